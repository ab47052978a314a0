"""What SGD does to the error of the parameters, in the mean and in the mean square: exact, not asymptotic.

One step with the rows of a batch B is affine in the error, δ ← δ − 2kP·mean_B(a(aᵀδ − e)), so z = (δ, 1) is multiplied
by a random matrix A(k), and Z = E[z zᵀ], which holds the mean and the second moment of δ, moves by the linear map
Z ← E[A Z Aᵀ]. With Q_i = 2P a_i b_iᵀ, b_i = (a_i, −e_i), and rows drawn without replacement, afresh for each step,

    A(k) = I − k mean_B(Q),   E[A Z Aᵀ] = Z − k(Q̄Z + ZQ̄ᵀ) + k²(Q̄ZQ̄ᵀ + φ Cov(Q)[Z]),   φ = (n − B) / (B(n − 1)),

so a few matrices, found once, answer for every multiple k of the rates. Written out, the k² terms are those of Needell,
Ward and Srebro (2014) and Jain et al. (2018) for SGD on least squares: 4φ P(F − G⊗G)P, the noise 4φ PSP, and the third
moment E[e a aᵀ ⊗ a], which couples the mean into the second moment on the way. φ is the finite-population correction
(Cochran 1977, §2.6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from torchreg.theory.curve import LearningCurve, Steps, band
from torchreg.theory.maps import first_reached, is_contraction, spectral_radius, symmetric_basis
from torchreg.theory.modes import Modes
from torchreg.theory.moments import Matrix
from torchreg.theory.row_gradients import RowGradients
from torchreg.theory.shuffle import ShuffledEpochs
from torchreg.theory.steps import Order, step_maps

Sampling = Literal["random", "shuffle", "full"]

_MOST_SHUFFLED_FEATURES = 4
_MOST_EPOCH_STEPS = 512

MOST_STEPS = 10**9
"""How far steps to a target are looked for."""


@dataclass(frozen=True)
class Dynamics:
    """SGD with one batch size and the rates k·(weight rate, bias rate), as a question about k.

    Exact for `random` sampling and for full batches. For `shuffle` it is an approximation. In the simultaneous order
    (up to four features, 512 steps an epoch) `ShuffledEpochs` follows how the batches of an epoch make up for each
    other; otherwise they have the sizes that an epoch has, the short last one too, but are taken for independent, which
    makes the noise floor too high. In the `sequential` order
    the bias moves with the new weight but the same rows, so higher moments of a batch enter at k³ and k⁴: those are
    means over sampled batches, adjusted to the exact first and second moments, and `sampling_error` says what that
    costs.

    `criterion` is what is predicted and must shrink: the mean square of the error, or beyond `MAX_FEATURES` its mean
    alone, which leaves out the noise of mini-batches. The mean has `modes`, directions that move each by itself, in the
    simultaneous order. Beyond `MAX_SEQUENTIAL` features `order` is that one whatever was asked for.

    The error is held as δ̃ = scale·δ, in which every rate is 1, with k̃ = rate_unit·k, and losses as multiples of
    error_unit², so that neither raw units nor extreme rates overflow. The maps are polynomials in k̃: E[A] is
    I + Σ_j k̃^j mean_maps[j − 1], each (p + 1, p + 1), and E[A⊗A] is I + Σ_j k̃^j square_maps[j − 1], each on the
    (p + 1)(p + 2)/2 coordinates of a symmetric matrix.
    """

    criterion: Literal["mean square", "mean"]
    rate_unit: float
    scale: Matrix
    error_unit: float
    gram: Matrix
    order: Order
    mean_maps: tuple[Matrix, ...]
    square_maps: tuple[Matrix, ...]
    modes: Modes | None = None
    groups: tuple[tuple[Matrix, ...], ...] = ()
    """`square_maps` of each group of sampled batches; empty where nothing is sampled."""
    steps_per_epoch: int = 1
    short: Dynamics | None = None
    """The dynamics of the last step of each epoch, where its batch is short."""
    shuffled: ShuffledEpochs | None = None
    """How the steps of an epoch depend on each other, where that is followed."""

    @classmethod
    def of(
        cls,
        rows: RowGradients,
        learning_rates: tuple[float, float],
        global_batch_size: int,
        order: Order = "simultaneous",
        sampling: Sampling = "random",
        seed: int = 0,
    ) -> Dynamics:
        """The dynamics of batches of `global_batch_size` rows, with these rates of the weight and of the bias at k = 1.

        `seed` is that of the batches that the `sequential` order samples. Raises `ValueError` for rates that cannot be
        computed with: so far apart that one of them vanishes beside the other, or without a limit in float64.
        """
        # The mean does not depend on the batches.
        key = (
            (learning_rates, order)
            if rows.covariance is None
            else (learning_rates, order, global_batch_size, sampling, seed)
        )
        if key in rows.known:
            return rows.known[key]
        num_rows, num_features = rows.num_rows, len(rows.feature_unit)
        maps = step_maps(rows, learning_rates, global_batch_size, order, seed)
        steps_per_epoch, remainder, shuffled = math.ceil(num_rows / global_batch_size), 0, None
        if sampling == "shuffle" and maps.covariance is not None:
            remainder = num_rows % global_batch_size
            is_small = num_features <= _MOST_SHUFFLED_FEATURES and 1 < steps_per_epoch <= _MOST_EPOCH_STEPS
            if order == "simultaneous" and is_small:
                shuffled = ShuffledEpochs(num_rows, global_batch_size, maps.mean_q, maps.covariance)
                remainder = 0
        rows.known[key] = cls(
            criterion="mean" if maps.covariance is None else "mean square",
            rate_unit=maps.rate_unit,
            scale=maps.scale,
            error_unit=rows.error_unit,
            gram=maps.mean_q[:-1, :-1] / 2,
            order=order if maps.mean_maps else "simultaneous",
            mean_maps=maps.mean_maps,
            square_maps=maps.square_maps,
            modes=None if maps.mean_maps else Modes(maps.mean_q[:-1, :-1]),
            groups=maps.groups if len(maps.groups) > 1 else (),
            steps_per_epoch=steps_per_epoch,
            shuffled=shuffled,
            short=cls.of(rows, learning_rates, remainder, order, seed=seed) if remainder else None,
        )
        return rows.known[key]

    def times(self, multiple: float) -> Dynamics:
        """The dynamics of the rates times `multiple`."""
        short = self.short.times(multiple) if self.short else None
        return replace(self, rate_unit=self.rate_unit * multiple, short=short)

    def contraction(self, k: float = 1.0) -> float:
        """The factor by which a step shrinks the mean of the error, in the long run: the spectral radius of E[A]."""
        if self.modes:
            return max(abs(1 - k * self.rate_unit * value) for value in self.modes.extremes)
        return spectral_radius(np.eye(len(self.gram)) + self._polynomial(self.mean_maps, k)[:-1, :-1])

    def radius(self, k: float = 1.0) -> float:
        """The spectral radius of what `criterion` names; training converges if and only if it is below 1.

        In `shuffle` sampling it is the mean over the steps of an epoch.
        """
        if self.criterion == "mean":
            return self.contraction(k)
        radius = spectral_radius(np.eye(self._inner.sum()) + self._inner_change(k))
        return radius ** (1 / self.steps_per_epoch) if self.short or self.shuffled else radius

    def is_stable(self, k: float = 1.0) -> bool:
        """Whether training converges with the rates times k: whether `radius` is below 1, at less cost."""
        if self.criterion == "mean":
            return self.contraction(k) < 1
        return is_contraction(self._inner_change(k), self.gram)

    def largest_multiplier(self) -> float:
        """The k at which the rates times k cease to converge.

        In the simultaneous order E[A⊗A] − I = −kL + k²N with L and N positive maps, so stability ends at
        k = 1 / ρ(L⁻¹N): for a full batch, and in the mean, at 1 / λmax(PG). In the sequential order and in `shuffle`
        sampling it is found by bisection, to one part in a million.
        """
        return self._largest_multiplier

    @cached_property
    def _largest_multiplier(self) -> float:
        if self.modes:
            return 2 / self.modes.extremes[1] / self.rate_unit
        if self.order == "sequential" or self.short or self.shuffled:
            return self._bisected_multiplier()
        linear, quadratic = (matrix[np.ix_(self._inner, self._inner)] for matrix in self.square_maps)
        return 1 / spectral_radius(np.linalg.solve(-linear, quadratic)) / self.rate_unit

    def noise_floor(self, k: float = 1.0) -> float:
        """The excess loss at which training levels off, tr(GΣ): infinite where unstable, NaN for the mean alone.

        NaN too where some direction moves so slowly that float64 cannot tell it from standing still.
        In `shuffle` sampling it is that at the end of an epoch.
        """
        if self.criterion == "mean":
            return math.nan
        if not k < self.largest_multiplier():
            return math.inf
        change = self._epoch_change(k)
        try:
            steady = np.linalg.solve(change[:-1, :-1], -change[:-1, -1])
        except np.linalg.LinAlgError:
            return math.nan
        floor = float(self._excess(np.append(steady, 1.0)))
        return floor if floor > 1e-24 * self.error_unit**2 else 0.0  # a full batch has none, to rounding

    def learning_curve(
        self, start: Matrix, factors: Sequence[float], at: Sequence[int] | Steps | None = None
    ) -> LearningCurve:
        """The expected curve from δ = `start` (p,), in the model's units, with k = `factors[t]` in step t.

        `at` are numbers of steps done, from 0 to len(factors) and growing; by default all of them.
        """
        wanted = np.arange(len(factors) + 1) if at is None else np.asarray(at, dtype=np.int64)
        is_wanted = np.isin(np.arange(len(factors) + 1), wanted).tolist()
        with np.errstate(over="ignore", invalid="ignore"):
            states = np.array([s for s, keep in zip(self._states(start, factors), is_wanted, strict=True) if keep])
            excess = np.nan_to_num(self._excess(states), nan=np.inf)
        if self.criterion == "mean":
            return LearningCurve(wanted, excess, *np.full((2, len(wanted)), np.nan))
        q = len(self.gram) + 1
        low, high = band((states @ symmetric_basis(q)).reshape(-1, q, q), self.gram)
        return LearningCurve(wanted, excess, self.error_unit**2 * low, self.error_unit**2 * high)

    def steps_to(
        self,
        excess: float,
        start: Matrix,
        factors: Sequence[float],
        *,
        hold: bool = True,
        most_steps: int = MOST_STEPS,
    ) -> int | None:
        """Steps after which the expected excess loss is first at most `excess`, from δ = `start`; None if never.

        The k of step t is `factors[t]`, and the last of them for ever after unless `hold` is False. More than about
        `most_steps` count as never. (This is where the expected curve gets there, not the mean over single runs.)
        With constant rates see `first_reached` for how closely it is looked. In `shuffle` sampling the short last batch
        of epochs of more than 512 steps is left out there.
        """
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if hold:  # to the end of an epoch
                factors = [*factors, *[factors[-1]] * (-len(factors) % self._cycle_steps)]
            state = self._start(start)
            for step, state in enumerate(self._states(start, factors)):
                if self._excess(state) <= excess:
                    return step
            if not hold:
                return None
            change, weights = self._cycle(factors[-1], start)

            def reached(states: Matrix) -> NDArray[np.bool_]:
                """At which steps of a cycle that begins in these states, (len(states), steps)."""
                values = self._excess(states)[:, None] if weights is None else states @ weights.T
                return np.asarray(values <= excess)

            found = first_reached(change, state, reached, most_steps // self._cycle_steps)
            if found is None:
                return None
            cycles, state = found
            return len(factors) + cycles * self._cycle_steps + int(np.argmax(reached(state[None])))

    def sampling_error(self, prediction: Callable[[Dynamics], float]) -> float:
        """The standard error of a prediction that comes from sampling batches; 0 where nothing is sampled."""
        if not self.groups:
            return 0.0
        values = [prediction(replace(self, square_maps=maps, groups=(), short=None)) for maps in self.groups]
        return float(np.std(values, ddof=1) / math.sqrt(len(values)))

    @property
    def _inner(self) -> NDArray[np.bool_]:
        """Which coordinates of Z are the second moment of δ."""
        return np.triu_indices(len(self.gram) + 1)[1] < len(self.gram)

    def _polynomial(self, maps: Iterable[Matrix], k: float) -> Matrix:
        """Σ_j k̃^j maps[j − 1]."""
        x = np.float64(k) * self.rate_unit
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(sum(x**j * matrix for j, matrix in enumerate(maps, start=1)))

    def _bisected_multiplier(self) -> float:
        low, high = 0.0, 1 / float(np.linalg.eigvalsh(self.gram)[-1]) / self.rate_unit
        while self.is_stable(high):
            low, high = high, 2 * high
        while high - low > 1e-6 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.is_stable(middle) else (low, middle)
        return low

    def _start(self, start: Matrix) -> Matrix:
        """The state of a known error δ with δ̃ = scale·δ: √(curvature/2)·δ̃ along the modes, z = (δ̃, 1), or z zᵀ."""
        if self.modes:
            curvature, components = self.modes.of(self.scale * start)
            return np.asarray(np.sqrt(np.maximum(curvature, 0) / 2) * components)
        z = np.append(self.scale * start, 1.0)
        return z if self.criterion == "mean" else symmetric_basis(len(z)) @ np.outer(z, z).ravel()

    def _states(self, start: Matrix, factors: Sequence[float]) -> Iterator[Matrix]:
        """The states before each step and after the last."""
        state = self._start(start)
        if self.shuffled:
            yield from self.shuffled.moments(state, [k * self.rate_unit for k in factors])
            return
        yield state
        if self.modes:
            learning_rates, _ = self.modes.of(self.scale * start)
            for k in factors:
                state = state - k * self.rate_unit * learning_rates * state
                yield state
            return
        change, maps, before = (
            lru_cache(maxsize=2)(self._change),
            [self._maps(short) for short in (False, True)],
            math.nan,
        )
        for step, k in enumerate(factors):
            is_short = self.short is not None and (step + 1) % self.steps_per_epoch == 0
            if k == before:
                state = state + change(k, is_short) @ state
            else:  # not worth a matrix
                powers = np.float64(k * self.rate_unit) ** np.arange(1, len(maps[is_short]) + 1)
                state = state + powers @ (maps[is_short] @ state)
            before = k
            yield state

    def _change(self, k: float, is_short: bool = False) -> Matrix:
        """What one step, or the short one that ends an epoch, adds to a state, as a matrix."""
        return self._polynomial(self._maps(is_short), k)

    def _maps(self, is_short: bool) -> Matrix:
        source = self.short if is_short and self.short else self
        return np.array(source.mean_maps if self.criterion == "mean" else source.square_maps)

    def _epoch_change(self, k: float) -> Matrix:
        """What one step, or an epoch whose last batch is short, adds to a state: E[A⊗A] − I.

        An epoch's is composed of changes, I + C = (I + A)(I + B), so that those of tiny rates do not vanish beside I.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            if self.shuffled:
                *_, epoch = self.shuffled.epoch(k * self.rate_unit)
                return epoch
            step = self._change(k)
            if self.short is None:
                return step
            epoch = self._change(k, True)
            for bit in range((self.steps_per_epoch - 1).bit_length()):
                if (self.steps_per_epoch - 1) >> bit & 1:
                    epoch = epoch + step + epoch @ step
                step = 2 * step + step @ step
            return epoch

    def _inner_change(self, k: float) -> Matrix:
        """The part of `_epoch_change` that moves the second moment of δ, without what feeds it."""
        return self._epoch_change(k)[np.ix_(self._inner, self._inner)]

    @property
    def _cycle_steps(self) -> int:
        """After how many steps all is as before: an epoch, where its steps differ."""
        differ = self.shuffled or (self.short and self.steps_per_epoch <= _MOST_EPOCH_STEPS)
        return self.steps_per_epoch if differ else 1

    def _cycle(self, k: float, start: Matrix) -> tuple[Matrix, Matrix | None]:
        """What a cycle of steps adds to a state; and the weights of the excess at each of its steps, (steps, size).

        The excess of the mean is no weighted sum: None.
        """
        if self.modes:
            return -k * self.rate_unit * self.modes.of(self.scale * start)[0], None
        if self.criterion == "mean":
            return self._change(k), None
        weights = [self._weights]
        if self.shuffled:
            *before_last, epoch = self.shuffled.epoch(k * self.rate_unit)
            return epoch, np.array(weights + [weights[0] + weights[0] @ change for change in before_last])
        step = self._change(k)
        while len(weights) < self._cycle_steps:
            weights.append(weights[-1] + weights[-1] @ step)
        return (step if len(weights) == 1 else self._epoch_change(k)), np.array(weights)

    @cached_property
    def _weights(self) -> Matrix:
        """What the excess is made of, of the coordinates of E[z zᵀ]."""
        return self.error_unit**2 * (symmetric_basis(len(self.gram) + 1) @ np.pad(self.gram, (0, 1)).ravel())

    def _excess(self, states: Matrix) -> Matrix:
        """δ̃ᵀG̃δ̃ = tr(G̃C̃) of states (..., size), in the loss's own units."""
        if self.criterion == "mean square":
            return np.asarray(states @ self._weights)
        if self.modes:
            return np.asarray(self.error_unit**2 * np.sum(states**2, axis=-1))
        error = states[..., :-1]
        return np.asarray(self.error_unit**2 * np.einsum("...i,ij,...j->...", error, self.gram, error))
