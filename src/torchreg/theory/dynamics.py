"""The mean and the mean square of the parameters' error under SGD: exact, not asymptotic.

One step with the rows of a batch B is affine in the error, δ ← δ − 2kP·mean_B(a(aᵀδ − e)), so z = (δ, 1) is multiplied
by a random matrix A(k), and Z = E[z zᵀ], which holds the mean and the second moment of δ, moves by the linear map
Z ← E[A Z Aᵀ]. With Q_i = 2P a_i b_iᵀ, b_i = (a_i, −e_i), and rows drawn without replacement, afresh for each step,

    A(k) = I − k mean_B(Q),   E[A Z Aᵀ] = Z − k(Q̄Z + ZQ̄ᵀ) + k²(Q̄ZQ̄ᵀ + φ Cov(Q)[Z]),   φ = (n − B) / (B(n − 1)),

so a few matrices, computed once, serve every multiple k of the learning rates. Written out, the k² terms are those of
Needell, Ward and Srebro (2014) and Jain et al. (2018) for SGD on least squares: 4φ P(F − G⊗G)P, the noise 4φ PSP, and
the third moment E[e a aᵀ ⊗ a], which couples the mean into the second moment in the transient. φ is the
finite-population correction (Cochran 1977, §2.6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from torchreg.theory.maps import band, first_reached, is_contraction, polynomial, spectral_radius, symmetric_basis
from torchreg.theory.moments import Matrix, RowGradients
from torchreg.theory.steps import MAX_SEQUENTIAL, NARROWEST, IndependentSteps, Order, ShuffledEpochs, square_maps, units

Steps = NDArray[np.int64]
Sampling = Literal["random", "shuffle", "full"]

MOST_STEPS = 10**9
"""The largest number of steps to a target that is searched for."""

_MOST_SHUFFLED_FEATURES = 4
_MOST_SHUFFLED_STEPS = 512


@dataclass(frozen=True)
class LearningCurve:
    """The expected excess loss L − L* after `steps` steps, and bounds of single runs.

    `excess` is exact where the dynamics are. `low` and `high` enclose 95 % of runs if δ is normal with its exact mean
    and covariance: good for small learning rates and large batches; near the stability limit the true tails are
    heavier. They are NaN where only the mean is predicted. All are (len(steps),); losses are in the loss's own units.
    """

    steps: Steps
    excess: Matrix
    low: Matrix
    high: Matrix


@dataclass(frozen=True, eq=False)
class Dynamics:
    """SGD with one batch size and the learning rates k·(weight, bias), as a function of k.

    Exact for `random` sampling and for full batches, approximate for `shuffle`. There, in the simultaneous order and up
    to four features and 512 steps an epoch, `ShuffledEpochs` follows how the batches of an epoch compensate each other.
    Otherwise batches have the sizes that an epoch has, the short last one too, but are taken as independent, which
    overestimates the noise floor. In the `sequential` order the bias moves with the new weight but the same rows, so
    higher moments of a batch enter at k³ and k⁴: means over sampled batches, adjusted to the exact first and second
    moments, with the error given by `sampling_error`.

    `criterion` is what is predicted and must shrink: the mean square of the error, or beyond `MAX_FEATURES` its mean
    alone, without the noise of mini-batches. Beyond `MAX_SEQUENTIAL` features `order` is always the simultaneous one.

    The error is held as ε = basis·δ, whose excess is error_unit²·|ε|² and which a full batch multiplies by
    1 − x·curvature, x = lr_unit·k: neither raw units nor extreme learning rates overflow. `basis` (p, p) and
    `curvature` (p,), the eigenvalues of 2G̃ where every learning rate is 1, are from the singular values of a factor of
    G̃, so the condition number is not squared. `steps` move a state: E[z zᵀ], z = (ε, 1), on the coordinates of
    symmetric matrices; or, for the mean, E[ε]. `groups` are the dynamics of each group of sampled batches alone.
    """

    criterion: Literal["mean square", "mean"]
    order: Order
    lr_unit: float
    basis: Matrix
    error_unit: float
    curvature: Matrix
    steps: IndependentSteps | ShuffledEpochs
    groups: tuple[Dynamics, ...] = ()

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
        """The dynamics with these learning rates (weight, bias) at k = 1. The `sequential` order samples with `seed`.

        Raises `ValueError` for learning rates that are too far apart or too extreme for float64.
        """
        num_features = len(rows.feature_unit)
        key = (learning_rates, order, *(() if rows.covariance is None else (global_batch_size, sampling, seed)))
        if key in rows.known:
            return rows.known[key]
        lr_unit, scale, factors = units(rows, learning_rates)
        left, values, right = np.linalg.svd(rows.factor * factors)
        values = np.maximum(values, NARROWEST * values[0])
        curvature = 2 * values**2
        common = (lr_unit, values[:, None] * right * scale, rows.error_unit, curvature)
        bias_only = np.outer(values * right[:, -1], right[:, -1] / values)  # takes the bias's part of a step
        if rows.rows is not None and rows.covariance is not None:
            rotation, mean_q = np.pad(left, (0, 1)), np.pad(np.diag(curvature), (0, 1))
            rotation[-1, -1], mean_q[:-1, -1] = 1.0, curvature * (left.T @ rows.mean)
            flat = np.kron(left, rotation) * np.repeat(curvature, len(rotation))
            covariance = flat.T @ rows.covariance @ flat
            b, bias = (rows.rows @ rotation, bias_only) if order == "sequential" else (rows.rows, None)
            of_batches = partial(square_maps, b, mean_q, covariance, bias, seed)
            maps, of_groups = of_batches(global_batch_size)
            groups = tuple(cls("mean square", order, *common, IndependentSteps(group)) for group in of_groups)
            steps: IndependentSteps | ShuffledEpochs = IndependentSteps(maps)
            num_steps, remainder = math.ceil(rows.num_rows / global_batch_size), rows.num_rows % global_batch_size
            is_small = num_features <= _MOST_SHUFFLED_FEATURES and 1 < num_steps <= _MOST_SHUFFLED_STEPS
            if sampling == "shuffle" and order == "simultaneous" and is_small:
                covariance = covariance.reshape(mean_q[:-1].shape * 2)
                steps = ShuffledEpochs(rows.num_rows, global_batch_size, mean_q, covariance)
            elif sampling == "shuffle" and remainder:
                steps = IndependentSteps(maps, of_batches(remainder)[0], num_steps)
            dynamics = cls("mean square", order, *common, steps, groups=groups)
        elif order == "sequential" and num_features <= MAX_SEQUENTIAL:
            # With B and W keeping the bias and the weight, E[A] = (I − kBC)(I − kWC) = I − kC + k² BCWC, C = 2G̃.
            mean = np.diag(curvature)
            twice = bias_only @ (mean - mean @ bias_only) @ mean
            dynamics = cls("mean", order, *common, IndependentSteps(np.array([-mean, twice])))
        else:
            dynamics = cls("mean", "simultaneous", *common, IndependentSteps(-curvature[None]))
        rows.known[key] = dynamics
        return dynamics

    def times(self, multiple: float) -> Dynamics:
        """The dynamics of the learning rates times `multiple`."""
        groups = tuple(group.times(multiple) for group in self.groups)
        return replace(self, lr_unit=self.lr_unit * multiple, groups=groups)

    def contraction(self, k: float = 1.0) -> float:
        """The asymptotic factor by which a step shrinks the mean of the error: the spectral radius of E[A]."""
        x, p = k * self.lr_unit, len(self.curvature)
        if isinstance(self.steps, ShuffledEpochs) or self.order == "simultaneous":
            return float(np.abs(1 - x * self.curvature).max())
        change = polynomial(self.steps.maps, x)
        if self.criterion == "mean square":  # its part that moves E[δ], the last column of Z
            of_mean = np.flatnonzero(np.triu_indices(p + 1)[1] == p)[:-1]
            change = change[np.ix_(of_mean, of_mean)]
        return spectral_radius(np.eye(p) + change)

    def radius(self, k: float = 1.0) -> float:
        """The spectral radius of what `criterion` names; training converges if and only if it is below 1.

        In `shuffle` sampling it is the geometric mean over the steps of an epoch.
        """
        if self.criterion == "mean":
            return self.contraction(k)
        change = self._inner_change(k)
        return spectral_radius(np.eye(len(change)) + change) ** (1 / self.steps.num_steps)

    def is_stable(self, k: float = 1.0) -> bool:
        """Whether training converges with the learning rates times k: whether `radius` is below 1, at lower cost."""
        is_mean = self.criterion == "mean"
        return self.contraction(k) < 1 if is_mean else is_contraction(self._inner_change(k), np.diag(self.curvature))

    def _inner_change(self, k: float) -> Matrix:
        with np.errstate(over="ignore", invalid="ignore"):
            return self.steps.change(k * self.lr_unit)[np.ix_(self._inner, self._inner)]

    def largest_multiplier(self) -> float:
        """The stability limit: the k from which training with the learning rates times k no longer converges.

        In the simultaneous order E[A⊗A] − I = −kL + k²N with L and N positive maps, so the limit is k = 1 / ρ(L⁻¹N):
        for a full batch, and in the mean, 1 / λmax(PG). In the sequential order and in `shuffle` sampling it is found
        by bisection, to one part in a million.
        """
        return self._largest_multiplier

    @cached_property
    def _largest_multiplier(self) -> float:
        low, high = 0.0, 2 / float(self.curvature[0]) / self.lr_unit
        if self.criterion == "mean" and self.order == "simultaneous":
            return high
        if self.order == "simultaneous" and isinstance(self.steps, IndependentSteps) and self.steps.short is None:
            linear, quadratic = self.steps.maps[:, self._inner[:, None], self._inner]
            return 1 / spectral_radius(np.linalg.solve(-linear, quadratic)) / self.lr_unit
        while self.is_stable(high):
            low, high = high, 2 * high
        while high - low > 1e-6 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.is_stable(middle) else (low, middle)
        return low

    def noise_floor(self, k: float = 1.0) -> float:
        """The excess loss at which training levels off, tr(GΣ): infinite where unstable, NaN for the mean alone.

        NaN too where some direction moves too slowly to be resolved in float64. In `shuffle` sampling it is that at the
        end of an epoch.
        """
        if self.criterion == "mean":
            return math.nan
        if not k < self.largest_multiplier():
            return math.inf
        change = self.steps.change(k * self.lr_unit)
        try:
            steady = np.linalg.solve(change[:-1, :-1], -change[:-1, -1])
        except np.linalg.LinAlgError:
            return math.nan
        noise_floor = float(self._excess(np.append(steady, 1.0)))
        return noise_floor if noise_floor > 1e-24 * self.error_unit**2 else 0.0  # a full batch has none, to rounding

    def learning_curve(
        self, start: Matrix, factors: Sequence[float], at: Sequence[int] | Steps | None = None
    ) -> LearningCurve:
        """The expected curve from δ = `start` (p,), in the model's units, with k = `factors[t]` in step t.

        `at` are increasing numbers of steps, from 0 to len(factors); by default all.
        """
        wanted = np.arange(len(factors) + 1) if at is None else np.asarray(at, dtype=np.int64)
        chosen = set(wanted.tolist())
        with np.errstate(over="ignore", invalid="ignore"):
            states = np.array([state for step, state in enumerate(self._states(start, factors)) if step in chosen])
            excess = np.nan_to_num(self._excess(states), nan=np.inf)
        bounds = np.full((2, len(wanted)), np.nan)
        if self.criterion == "mean square":
            q = len(self.curvature) + 1
            turned, triangle = np.linalg.qr(self.basis)  # back to the parameters' order, so that draws stay the same
            root = (turned * np.copysign(1.0, np.diag(triangle))).T
            bounds = self.error_unit**2 * band((states @ symmetric_basis(q)).reshape(-1, q, q), root)
        return LearningCurve(wanted, excess, *bounds)

    def steps_to(
        self, excess: float, start: Matrix, factors: Sequence[float], *, hold: bool = True, most_steps: int = MOST_STEPS
    ) -> int | None:
        """Steps after which the expected excess loss is first at most `excess`, from δ = `start`; None if never.

        The k of step t is `factors[t]`, and after the last one that one, unless `hold` is False. More than about
        `most_steps` count as never. (The expected curve reaches the target there; the mean over single runs differs.)
        With constant learning rates `first_reached` defines which steps are checked. In `shuffle` sampling the short
        last batch of epochs of more than 512 steps is then ignored.
        """
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            period = self.steps.period
            if hold:  # to the end of an epoch
                factors = [*factors, *[factors[-1]] * (-len(factors) % period)]
            for step, state in enumerate(self._states(start, factors)):
                if self._excess(state) <= excess:
                    return step
            if not hold:
                return None
            x, is_mean = factors[-1] * self.lr_unit, self.criterion == "mean"
            change, weights = (self.steps.change(x), None) if is_mean else self.steps.cycle(x, self._weights)

            def reached(states: Matrix) -> NDArray[np.bool_]:  # (len(states), period): in which steps of a cycle
                return np.asarray((self._excess(states)[:, None] if weights is None else states @ weights.T) <= excess)

            found = first_reached(change, state, reached, most_steps // period)
            if found is None:
                return None
            cycles, state = found
            return len(factors) + cycles * period + int(np.argmax(reached(state[None])))

    def sampling_error(self, prediction: Callable[[Dynamics], float]) -> float:
        """The standard error of a prediction that comes from sampling batches; 0 where nothing is sampled."""
        values = [prediction(group) for group in self.groups]
        return float(np.std(values, ddof=1) / math.sqrt(len(values))) if values else 0.0

    def _states(self, start: Matrix, factors: Sequence[float]) -> Iterator[Matrix]:
        state = self.basis @ start
        if self.criterion == "mean square":
            z = np.append(state, 1.0)
            state = symmetric_basis(len(z)) @ np.outer(z, z).ravel()
        return self.steps.states(state, [k * self.lr_unit for k in factors])

    @cached_property
    def _inner(self) -> NDArray[np.intp]:
        """Which coordinates of Z are the second moment of ε."""
        return np.flatnonzero(np.triu_indices(len(self.curvature) + 1)[1] < len(self.curvature))

    @cached_property
    def _weights(self) -> Matrix:
        """The excess as a weighted sum of the coordinates of E[z zᵀ]: the trace without the constant's part."""
        of_error = np.pad(np.eye(len(self.curvature)), (0, 1))
        return self.error_unit**2 * (symmetric_basis(len(of_error)) @ of_error.ravel())

    def _excess(self, states: Matrix) -> Matrix:
        """The excess loss |ε|² of states (..., size), in the loss's own units."""
        if self.criterion == "mean square":
            return np.asarray(states @ self._weights)
        return np.asarray(self.error_unit**2 * np.sum(states**2, axis=-1))
