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

from torchreg.theory.epochs import ShuffledSteps, SimulatedRuns
from torchreg.theory.maps import coordinates, is_contraction, matrices, polynomial, spectral_radius
from torchreg.theory.moments import Matrix, RowGradients
from torchreg.theory.steps import (
    MAX_SEQUENTIAL,
    MOST_EPOCH_STEPS,
    NARROWEST,
    IndependentSteps,
    MatrixFreeSteps,
    Order,
    square_maps,
    units,
)  # fmt: skip

Sampling = Literal["random", "shuffle", "full"]

_SCANNED = 24  # learning rates tried for the first at which training is unstable


@dataclass(frozen=True, eq=False)
class Dynamics:
    """SGD with one batch size and the learning rates k·(weight, bias), as a function of k.

    Exact for `random` sampling and for full batches. In `shuffle` sampling `ShuffledSteps` follows how the batches of
    an epoch compensate each other, with the sizes that they have, but takes the noise of the curvature as independent,
    and stability as that of an epoch of independent batches. In the `sequential` order the bias moves with the new
    weight but the same rows, so higher moments of a batch enter at k³ and k⁴: means over sampled batches, adjusted to
    the exact first and second moments, with the error given by `sampling_error`.

    `criterion` is what is predicted and must shrink: the mean square of the error; or, in the sequential order beyond
    `MAX_FEATURES` and beyond `MAX_STEP_COST`, its mean alone, without the noise of mini-batches: a bound that stable
    training needs to be below, but that does not make it stable. Beyond `MAX_FEATURES` no matrix of the map is made,
    and about `most_steps` steps are predicted at most. Beyond `MAX_SEQUENTIAL` `order` is always the simultaneous one.

    The error is held as ε = basis·δ, whose excess is error_unit²·|ε|² and which a full batch multiplies by
    1 − x·curvature, x = lr_unit·k: neither raw units nor extreme learning rates overflow. `basis` (p, p) and
    `curvature` (p,), the eigenvalues of 2G̃ where every learning rate is 1, are from the singular values of a factor of
    G̃, so the condition number is not squared. `steps` move a state: E[z zᵀ], z = (ε, 1), on the coordinates of
    symmetric matrices; or E[ε] where only the mean is predicted, and beyond `MAX_FEATURES` for full batches, where the
    mean is all. `runs` simulate; they are None in both cases. `groups` have the dynamics of each group of sampled
    batches alone.
    """

    criterion: Literal["mean square", "mean"]
    order: Order
    lr_unit: float
    basis: Matrix
    error_unit: float
    curvature: Matrix
    runs: SimulatedRuns | None
    steps: IndependentSteps | MatrixFreeSteps | ShuffledSteps
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
        scale_last_batch: bool = True,
    ) -> Dynamics:
        """The dynamics with these learning rates (weight, bias) at k = 1. The `sequential` order samples with `seed`.

        With `scale_last_batch` the short last batch of a shuffled epoch has learning rates in proportion to its size.
        Raises `ValueError` for learning rates that are too far apart or too extreme for float64.
        """
        key = (learning_rates, global_batch_size, order, sampling, seed, scale_last_batch)
        if key in rows.known:
            return rows.known[key]
        num_rows, p = rows.num_rows, len(rows.feature_unit) + 1
        lr_unit, scale, factors = units(rows, learning_rates)
        left, values, right = np.linalg.svd(rows.factor * factors)
        values = np.maximum(values, NARROWEST * values[0])
        curvature = 2 * values**2
        order = "simultaneous" if p > MAX_SEQUENTIAL + 1 else order
        # Takes the bias's part of a step in the sequential order.
        bias_only = np.outer(values * right[:, -1], right[:, -1] / values) if order == "sequential" else None
        common = (order, lr_unit, values[:, None] * right * scale, rows.error_unit, curvature)

        num_steps = math.ceil(num_rows / global_batch_size) if sampling == "shuffle" else 1
        last_size = num_rows - (num_steps - 1) * global_batch_size if num_steps > 1 else global_batch_size
        last_factor = last_size / global_batch_size if scale_last_batch else 1.0

        def epoch(maps: Matrix, of_last: Matrix) -> IndependentSteps:
            of_last = (of_last.T * last_factor ** np.arange(1, len(of_last) + 1)).T
            return IndependentSteps(maps, of_last if num_steps > 1 else None, num_steps)

        is_full = global_batch_size == num_rows  # the mean is all there is
        if rows.rows is None or (rows.covariance is None and (bias_only is not None or is_full)):
            maps = -curvature[None]
            if bias_only is not None:
                # With B and W keeping the bias and the weight, E[A] = (I − kBC)(I − kWC) = I − kC + k² BCWC, C = 2G̃.
                mean = np.diag(curvature)
                maps = np.array([-mean, bias_only @ (mean - mean @ bias_only) @ mean])
            rows.known[key] = cls("mean square" if is_full else "mean", *common, None, epoch(maps, maps))
            return rows.known[key]

        rotation = np.pad(left, (0, 1))
        rotation[-1, -1] = 1.0
        b, gradient = rows.rows @ rotation, curvature * (left.T @ rows.mean)
        runs = SimulatedRuns(b, curvature, bias_only, global_batch_size, sampling == "shuffle", last_factor)
        independent: tuple[IndependentSteps | MatrixFreeSteps, ...]
        if rows.covariance is None:
            whole_phi, last_phi = ((num_rows - n) / (n * (num_rows - 1)) for n in (global_batch_size, last_size))
            batches = (1.0, whole_phi), (last_factor, last_phi)
            matrix_free = MatrixFreeSteps(b, curvature, gradient, *batches, num_steps)
            independent, noise = (matrix_free,), matrix_free.noise
        else:
            mean_q = np.pad(np.diag(curvature), (0, 1))
            mean_q[:-1, -1] = gradient
            flat = np.kron(left, rotation) * np.repeat(curvature, len(rotation))
            covariance = flat.T @ rows.covariance @ flat
            of_batches = partial(
                square_maps, rows.rows if bias_only is None else b, mean_q, covariance, bias_only, seed
            )
            whole = of_batches(global_batch_size)
            last = whole if last_size == global_batch_size else of_batches(last_size)
            independent = (epoch(whole[0], last[0]), *map(epoch, whole[1], last[1]))
            of_gradient = covariance.reshape(p, p + 1, p, p + 1)[..., -1].swapaxes(0, 1).reshape(p + 1, -1)

            def noise(mean: Matrix) -> Matrix:
                return np.asarray(mean @ of_gradient).reshape(*mean.shape[:-1], p, p)

        steps = [
            ShuffledSteps(each, noise, curvature, bias_only, num_rows, global_batch_size, last_factor)
            if 1 < num_steps <= MOST_EPOCH_STEPS else each
            for each in independent
        ]  # fmt: skip
        of_all, *of_groups = (cls("mean square", *common, runs, each) for each in steps)
        rows.known[key] = replace(of_all, groups=tuple(of_groups))
        return rows.known[key]

    def times(self, multiple: float) -> Dynamics:
        """The dynamics of the learning rates times `multiple`."""
        groups = tuple(group.times(multiple) for group in self.groups)
        return replace(self, lr_unit=self.lr_unit * multiple, groups=groups)

    def contraction(self, k: float = 1.0) -> float:
        """The asymptotic factor by which a step shrinks the mean of the error: the spectral radius of E[A]."""
        x, p, independent = k * self.lr_unit, len(self.curvature), self.independent
        if isinstance(independent, MatrixFreeSteps) or self.order == "simultaneous":
            return float(np.abs(1 - x * self.curvature).max())
        change = polynomial(independent.maps, x)
        if self.runs:  # its part that moves E[δ], the last column of Z
            of_mean = np.flatnonzero(np.triu_indices(p + 1)[1] == p)[:-1]
            change = change[np.ix_(of_mean, of_mean)]
        return spectral_radius(np.eye(p) + change)

    def radius(self, k: float = 1.0) -> float:
        """The spectral radius of what `criterion` names; training converges if and only if it is below 1.

        In `shuffle` sampling it is the geometric mean over the steps of an epoch.
        """
        if not self.runs:
            return self.contraction(k) ** (2 if self.criterion == "mean square" else 1)
        if isinstance(self.independent, MatrixFreeSteps):
            return self.independent.radius(k * self.lr_unit) ** (1 / self.steps.num_steps)
        change = self._inner_change(self.independent, k)
        return spectral_radius(np.eye(len(change)) + change) ** (1 / self.steps.num_steps)

    def is_stable(self, k: float = 1.0) -> bool:
        """Whether training converges with the learning rates times k: whether `radius` is below 1, at lower cost."""
        if not self.runs or isinstance(self.independent, MatrixFreeSteps):
            return self.radius(k) < 1
        return is_contraction(self._inner_change(self.independent, k), np.diag(self.curvature))

    @property
    def independent(self) -> IndependentSteps | MatrixFreeSteps:
        """The steps as if the batches of an epoch were independent."""
        return self.steps.independent if isinstance(self.steps, ShuffledSteps) else self.steps

    def _inner_change(self, independent: IndependentSteps, k: float) -> Matrix:
        with np.errstate(over="ignore", invalid="ignore"):
            return independent.change(k * self.lr_unit)[np.ix_(self._inner, self._inner)]

    def largest_multiplier(self) -> float:
        """The stability limit: the k from which training with the learning rates times k no longer converges.

        In the simultaneous order E[A⊗A] − I = −kL + k²N with L and N positive maps, so the limit of one step is
        k = 1 / ρ(L⁻¹N): for a full batch, and in the mean, 1 / λmax(PG). That of an epoch with a short last batch is
        between those of its steps, and need not be the only k with a radius of 1: the first is searched for on a grid
        and by bisection, to one part in a million. So is that of the sequential order.
        """
        return self._largest_multiplier

    @cached_property
    def _largest_multiplier(self) -> float:
        low, high = 0.0, 2 / float(self.curvature[0]) / self.lr_unit
        independent = self.independent
        if isinstance(independent, MatrixFreeSteps):
            return independent.limit() / self.lr_unit
        if self.order == "simultaneous":
            if not self.runs:
                return high

            def of_step(maps: Matrix) -> float:
                linear, quadratic = maps[:, self._inner[:, None], self._inner]
                return 1 / spectral_radius(np.linalg.solve(-linear, quadratic)) / self.lr_unit

            low = high = of_step(independent.maps)
            if independent.short is not None:
                low, high = sorted([low, of_step(independent.short)])
            if high <= low * (1 + 1e-9):
                return low
        for k in np.geomspace(low or high / 1000, high, _SCANNED):
            if not self.is_stable(k):
                high = float(k)
                break
            low = float(k)
        while low == high and self.is_stable(2 * high):
            low = high = 2 * high
        high = 2 * high if low == high else high
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
        if not self.runs:  # full batches
            return 0.0
        x, steps = k * self.lr_unit, self.steps
        if isinstance(self.independent, MatrixFreeSteps):
            const = np.diag([0.0] * len(self.curvature) + [1.0])
            *_, end = steps.states(coordinates(const), [x] * steps.num_steps)
            return self.error_unit**2 * self.independent.noise_floor(x, matrices(end)[:-1, :-1])
        assert not isinstance(steps, MatrixFreeSteps)
        added = steps.change(x)[self._inner, -1]  # by an epoch from the optimum
        try:
            steady = np.linalg.solve(self._inner_change(self.independent, k), -added)
        except np.linalg.LinAlgError:
            return math.nan
        noise_floor = float(steady @ self.weights[self._inner])
        return noise_floor if noise_floor > 1e-24 * self.error_unit**2 else 0.0  # a full batch has none, to rounding

    def sampling_error(self, prediction: Callable[[Dynamics], float]) -> float:
        """The standard error of a prediction that comes from sampling batches; 0 where nothing is sampled."""
        values = [prediction(group) for group in self.groups]
        return float(np.std(values, ddof=1) / math.sqrt(len(values))) if values else 0.0

    def states(self, start: Matrix, factors: Sequence[float]) -> Iterator[Matrix]:
        """The states before each step and after the last, from δ = `start` (p,), with k = factors[t] in step t."""
        state = self.basis @ start
        if self.runs:
            z = np.append(state, 1.0)
            state = coordinates(np.outer(z, z))
        return self.steps.states(state, [k * self.lr_unit for k in factors])

    @cached_property
    def _inner(self) -> NDArray[np.intp]:
        """Which coordinates of Z are the second moment of ε."""
        return np.flatnonzero(np.triu_indices(len(self.curvature) + 1)[1] < len(self.curvature))

    @cached_property
    def weights(self) -> Matrix:
        """The excess as a weighted sum of the coordinates of E[z zᵀ]: the trace without the constant's part."""
        of_error = np.pad(np.eye(len(self.curvature)), (0, 1))
        return self.error_unit**2 * coordinates(of_error)

    def excess(self, states: Matrix) -> Matrix:
        """The excess loss |ε|² of states (..., size), in the loss's own units."""
        if self.runs:
            return np.asarray(states @ self.weights)
        return np.asarray(self.error_unit**2 * np.sum(states**2, axis=-1))
