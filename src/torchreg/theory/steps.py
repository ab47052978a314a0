"""What the steps of SGD add to the second moment of the error, as polynomials in the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from torchreg.theory.maps import (
    coordinates,
    kron,
    largest_eigenvalue,
    matrices,
    on_symmetric,
    polynomial,
    solve,
    symmetric_kron,
)  # fmt: skip
from torchreg.theory.moments import Matrix, RowGradients

Order = Literal["simultaneous", "sequential"]

MAX_SEQUENTIAL = 128
"""The sequential order has no symmetric matrix: beyond this many features it is predicted as the simultaneous one."""
NARROWEST = 1e-50  # of the widest direction: its fourth power is still a number

MOST_EPOCH_STEPS = 20_000
"""Longer epochs are predicted as independent steps of whole batches."""

_MOST_STEPS = 5_000  # without a matrix
_MOST_WORK = 2e10  # their floating-point operations
_LIMIT_EPOCHS = 20  # that matrix-free stability and noise floor take, about
_LIMIT_BISECTIONS = 6
_STILL = 1e-9  # of an entry of the second moment, what an epoch changes
_RUNS = 400
_MOST_SIMULATED = 3e8  # numbers read
_EXTREME = 1e305  # learning rates beyond which the stability limit would not be a number
_SAMPLED = 1e-4  # of the widest direction: what narrower ones add to a sampled covariance would be lost
_SAMPLE_GROUPS = 8
_GROUP_BATCHES = 256
_MOST_DRAWN_ROWS = 512


def units(rows: RowGradients, learning_rates: tuple[float, float]) -> tuple[float, Matrix, Matrix]:
    """`lr_unit` of `Dynamics`, δ̃ = scale·δ where every learning rate is 1, and the factors (p,) from a_i to ã_i there.

    Raises `ValueError` for learning rates so far apart that one of them vanishes beside the other, and for those too
    extreme to have a stability limit in float64.
    """
    weight, bias = learning_rates
    sqrt_learning_rates = np.sqrt([weight] * len(rows.feature_unit) + [bias])
    lengths = np.append(rows.feature_unit, 1.0) * sqrt_learning_rates
    unit, error, remedy = float(lengths.max()), "", ""
    if lengths.min() < NARROWEST * unit:
        error, remedy = "far apart", "bring them closer"
    elif not 1 / _EXTREME < unit * unit < _EXTREME:
        error, remedy = ("small", "give larger ones") if unit < 1 else ("large", "give smaller ones")
    if error:
        raise ValueError(
            f"base_learning_rate is {weight:.4g} (weight) and {bias:.4g} (bias), too {error} to be computed with, for "
            f"features of size {rows.feature_unit.max():.3g}: {remedy}"
        )
    return unit * unit, unit / (sqrt_learning_rates * rows.error_unit), lengths / unit


def square_maps(
    rows: Matrix, mean_q: Matrix, covariance: Matrix, bias_only: Matrix | None, seed: int, global_batch_size: int
) -> tuple[Matrix, list[Matrix]]:
    """E[A⊗A] − I, and the same of each group of sampled batches, (powers of k, size, size).

    `rows` are the b_i along the directions of ε; `mean_q` (p + 1, p + 1) is the mean over rows of Q_i, which steps ε,
    and `covariance` (p(p + 1), p(p + 1)) that of its upper rows. In the sequential order `bias_only` (p, p) takes the
    bias's part of a step. The groups are empty where nothing is sampled.
    """
    num_rows, q, identity = len(rows), len(mean_q), np.eye(len(mean_q))
    of_batch = covariance * max(0.0, (num_rows - global_batch_size) / (global_batch_size * (num_rows - 1)))
    squares = kron(mean_q, mean_q)
    squares[:-1, :-1] += of_batch.reshape(q - 1, q, q - 1, q).transpose(0, 2, 1, 3)
    linear, quadratic = -on_symmetric(symmetric_kron(mean_q, identity)), on_symmetric(squares)
    if bias_only is None:
        return np.array([linear, quadratic]), []
    second = np.pad(bias_only, (0, 1))
    twice = second @ np.einsum("ijbc,bj->ic", squares, identity - second)
    quadratic += on_symmetric(symmetric_kron(twice, identity))
    # Sampled are 2 b_i b_iᵀ with a_i instead of u_i, as the learning rates weigh them.
    curvature = np.diag(mean_q)[:-1]
    unit = np.append(np.sqrt(np.maximum(curvature, _SAMPLED**2 * curvature[0]) / 2), 1.0)
    scaling = np.outer(curvature / unit[:-1] / 2, 1 / unit).ravel()
    root = _covariance_root(of_batch / np.outer(scaling, scaling), 0.5)
    groups = [
        np.array([linear, quadratic, *_higher_maps(deviations, mean_q[:-1], root * scaling, second)])
        for deviations in _sampled_deviations(rows * unit, root, global_batch_size, seed)
    ]
    return np.mean(groups, axis=0), groups if len(groups) > 1 else []


def _sampled_deviations(rows: Matrix, root: Matrix, global_batch_size: int, seed: int) -> Iterator[Matrix]:
    """Groups of mean_B(Q) − Q̄ of batches B drawn without replacement, (batches, p(p + 1)), from rows b_i.

    Beyond 512 rows they are drawn from the normal distribution that they approach, whose covariance has this `root`.
    """
    if global_batch_size >= len(rows):
        yield np.zeros((1, len(root)))
        return
    generator = np.random.default_rng(seed)
    for _ in range(_SAMPLE_GROUPS):
        if global_batch_size > _MOST_DRAWN_ROWS:
            sampled = generator.standard_normal((_GROUP_BATCHES, len(root))) @ root
        else:
            choice = partial(generator.choice, len(rows), global_batch_size, replace=False, shuffle=False)
            b = rows[np.array([choice() for _ in range(_GROUP_BATCHES)])]
            sampled = (2 * b[:, :, :-1].swapaxes(1, 2) @ b / b.shape[1]).reshape(len(b), -1)
        yield sampled - sampled.mean(axis=0)


def _higher_maps(deviations: Matrix, mean: Matrix, root: Matrix, second: Matrix) -> tuple[Matrix, Matrix]:
    """The k³ and k⁴ terms of E[A⊗A] in the sequential order, from sampled deviations.

    Adjusted to the exact `mean` (p, p + 1) and covariance, whose root is `root` (p(p + 1), p(p + 1)): with the exact
    terms in k and k² the map is that of one distribution, so it stays positive; and the sampling error is small.
    `second` (p + 1, p + 1) takes the bias's part of a step.
    """
    num, (p, q) = len(deviations), mean.shape
    adjusted = deviations @ _covariance_root(deviations.T @ deviations / num, -0.5) @ root
    gradients = np.zeros((num, q, q))
    gradients[:, :-1] = (mean.ravel() + adjusted).reshape(num, p, q)
    twice = second @ gradients @ (gradients - second @ gradients)
    crossed, squared = (np.einsum("nib,njc->ijbc", left, twice, optimize=True) / num for left in (gradients, twice))
    return -on_symmetric(crossed + crossed.transpose(1, 0, 3, 2)), on_symmetric(squared)


def _covariance_root(covariance: Matrix, power: float) -> Matrix:
    """A power of a positive semidefinite matrix on its range."""
    values, vectors = np.linalg.eigh(covariance)
    in_range = values > 1e-10 * max(values[-1], 0.0)
    return np.asarray((vectors[:, in_range] * values[in_range] ** power) @ vectors[:, in_range].T)


@dataclass(frozen=True, eq=False)
class IndependentSteps:
    """Steps whose batches are independent of each other, at learning rates times x.

    A step adds Σ_j x^(j + 1) maps[j] times the state to it, where `maps` are (powers, size, size), or their diagonals
    (powers, size). With `short`, they are those of the last of `num_steps` steps of an epoch, whose batch is short.
    """

    maps: Matrix
    short: Matrix | None = None
    num_steps: int = 1

    def after(self, state: Matrix, x: float, step: int) -> Matrix:
        """The states (..., size) after a step."""
        is_short = self.short is not None and (step + 1) % self.num_steps == 0
        maps = self.short if is_short and self.short is not None else self.maps
        moved = state @ maps.swapaxes(1, 2) if maps.ndim == 3 else state * maps
        return state + (np.float64(x) ** np.arange(1, len(maps) + 1) @ moved.reshape(len(maps), -1)).reshape(
            state.shape
        )

    def states(self, state: Matrix, xs: Iterable[float]) -> Iterator[Matrix]:
        """The states before each step and after the last, with the learning rates xs[t] in step t."""
        return accumulate(enumerate(xs), lambda before, step: self.after(before, step[1], step[0]), initial=state)

    def change(self, x: float) -> Matrix:
        """What an epoch adds to a state, composed of changes, I + C = (I + A)(I + B): tiny ones do not vanish."""
        step = polynomial(self.maps, x)
        if self.short is None:
            return step
        epoch = polynomial(self.short, x)
        for bit in reversed(f"{self.num_steps - 1:b}"):
            if bit == "1":
                epoch = epoch + step + epoch @ step
            step = 2 * step + step @ step
        return epoch

    def cycle(self, x: float, weights: Matrix) -> tuple[Matrix, Matrix]:
        """What an epoch adds to a state, and `weights` before each step as weights at its start, (num_steps, size).

        In epochs of more than 20,000 steps it is that of one step, and the short one is ignored.
        """
        step = polynomial(self.maps, x)
        if self.num_steps > MOST_EPOCH_STEPS:
            return step, weights[None]
        before = accumulate(range(self.num_steps - 1), lambda found, _: found + found @ step, initial=weights)
        return self.change(x), np.array(list(before))


@dataclass(frozen=True, eq=False)
class MatrixFreeSteps:
    """`IndependentSteps` of the simultaneous order without their matrix: a step costs num_rows · num_features².

    `rows` are the b_i = (r_i, −e_i) (num_rows, p + 1) with mean r_i r_iᵀ = I, along the directions of ε, whose
    `curvature` is (p,), and `gradient` (p,) is the mean of −e_i r_i times it. A batch is given by the factor of its
    learning rates and by φ, and an epoch of `num_steps` by its `batch` and the last one.
    """

    rows: Matrix
    curvature: Matrix
    gradient: Matrix
    batch: tuple[float, float]
    last_batch: tuple[float, float]
    num_steps: int = 1

    @property
    def most_steps(self) -> int:
        """How many steps are taken at most."""
        return min(_MOST_STEPS, int(_MOST_WORK / (4 * self.rows.size * self.rows.shape[1])))

    def second_moment(self, weights: Matrix) -> Matrix:
        """The mean over rows of weights_i r_i r_iᵀ, (p, p)."""
        r = self.rows[:, :-1]
        return np.asarray(r.T @ (weights[:, None] * r) / len(r))

    def noise(self, mean: Matrix) -> Matrix:
        """The covariance of Qz and g over rows, (p, p), for a z of this mean (p + 1,)."""
        squares = self.second_moment((self.rows @ mean) * self.rows[:, -1])
        fixed = self.curvature * mean[:-1] + self.gradient * mean[-1]
        return np.asarray(np.outer(self.curvature, self.curvature) * squares - np.outer(fixed, self.gradient))

    def after(self, state: Matrix, x: float, step: int) -> Matrix:
        """The state after a step."""
        factor, phi = self.batch if (step + 1) % self.num_steps else self.last_batch
        z, x = matrices(state), x * factor
        moved = self.curvature[:, None] * z[:-1] + np.outer(self.gradient, z[-1])  # Q̄Z
        fixed = moved[:, :-1] * self.curvature + np.outer(moved[:, -1], self.gradient)  # Q̄ZQ̄ᵀ
        squares = self.second_moment(np.einsum("ij,ij->i", self.rows @ z, self.rows))
        squares *= np.outer(self.curvature, self.curvature)
        z[:-1] -= x * moved
        z[:, :-1] -= x * moved.T
        z[:-1, :-1] += x * x * (phi * squares + (1 - phi) * fixed)
        return coordinates(z)

    def states(self, state: Matrix, xs: Iterable[float]) -> Iterator[Matrix]:
        """The states before each step and after the last, with the learning rates xs[t] in step t."""
        return accumulate(enumerate(xs), lambda before, step: self.after(before, step[1], step[0]), initial=state)

    def limit(self) -> float:
        """The x below which an epoch shrinks the second moment; where that costs too much, each of its steps.

        With E[A⊗A] − I = −xL + x²N it is 1 / ρ(L⁻¹N) for one step, and for an epoch between those of its steps.
        """
        root = np.sqrt(np.outer(self.curvature, self.curvature) / (self.curvature[:, None] + self.curvature))

        def of_batch(factor: float, phi: float) -> float:
            def apply(state: Matrix) -> Matrix:  # L^-½ N L^-½, which no curvature makes overflow
                z = root * matrices(state)
                return coordinates(root * (phi * self._curved(z) + (1 - phi) * z))

            return 1 / largest_eigenvalue(apply, coordinates(np.eye(len(root)))) / factor

        low, high = sorted([of_batch(*self.batch), of_batch(*self.last_batch)])
        if self.num_steps * _LIMIT_EPOCHS <= self.most_steps:
            for _ in range(_LIMIT_BISECTIONS if high > low else 0):
                middle = math.sqrt(low * high)
                low, high = (middle, high) if self.radius(middle) < 1 else (low, middle)
        return low

    def radius(self, x: float) -> float:
        """The spectral radius of an epoch's map of the second moment, to about 1e-6."""
        p = len(self.curvature)
        scale = np.sqrt(np.outer(self.curvature, self.curvature))[np.triu_indices(p)]  # makes a step symmetric
        return largest_eigenvalue(lambda state: self._epoch(x, scale * state) / scale, coordinates(np.eye(p)))

    def noise_floor(self, x: float, source: Matrix) -> float:
        """The trace of the second moment that an epoch leaves as it is if it adds `source` (p, p); NaN if too costly.

        But for the noise of the curvature an epoch multiplies each entry by 1 − decay; GMRES solves for all of it.
        """
        if self.num_steps * _LIMIT_EPOCHS > self.most_steps:
            return math.nan
        shrinks = np.prod(
            [1 - x * f * self.curvature for f, _ in [self.batch] * (self.num_steps - 1) + [self.last_batch]], axis=0
        )
        decay = 1 - np.outer(shrinks, shrinks)[np.triu_indices(len(shrinks))]
        decay[decay < _STILL] = math.inf  # directions that hardly move add as little to the noise floor
        found = solve(lambda state: (state - self._epoch(x, state)) / decay, coordinates(source) / decay)
        return math.nan if found is None else float(np.trace(matrices(found)))

    def _curved(self, z: Matrix) -> Matrix:
        return self.second_moment(np.einsum("ij,ij->i", self.rows[:, :-1] @ z, self.rows[:, :-1]))

    def _epoch(self, x: float, state: Matrix) -> Matrix:
        """The second moment (p, p) after an epoch, without the noise at the optimum, in coordinates."""
        *_, end = self.states(coordinates(np.pad(matrices(state), (0, 1))), [x] * self.num_steps)
        return coordinates(matrices(end)[:-1, :-1])


class ShuffledSteps:
    """Epochs of `num_rows` rows in batches of `global_batch_size`, the last one short: each row counts once an epoch.

    So the noise of an epoch's batches sums to zero. Let g_i be a row's gradient at the optimum (Σ_i g_i = 0), and w the
    sum of g_i over the U rows used so far. With R rows left, the mean of g over the next batch of s has, given the
    past, the expectation −w/R and the covariance c·Cov(g) with c = n(R − s) / ((n − 1)sR), and E[w wᵀ] is
    U(n − U)/(n − 1)·Cov(g) (sampling without replacement: Cochran 1977, §2.6). `states` adds what that changes to the
    `independent` steps, and carries along E[δ wᵀ]. The noise of the curvature, which multiplies δ, is taken as
    independent from batch to batch; that is the approximation (Mishchenko, Khaled and Richtárik 2020 bound the effect).

    `noise` gives Cov(Qz, g) (..., p, p) for z = (δ, 1) of mean (..., p + 1), and `bias_only` (p, p) takes the bias's
    part of a step in the sequential order. `last_factor` is that of the learning rates in the last step.
    """

    def __init__(
        self,
        independent: IndependentSteps | MatrixFreeSteps,
        noise: Callable[[Matrix], Matrix],
        curvature: Matrix,
        bias_only: Matrix | None,
        num_rows: int,
        global_batch_size: int,
        last_factor: float,
    ) -> None:
        self.independent, self._noise, self._curvature = independent, noise, curvature
        self.num_steps = math.ceil(num_rows / global_batch_size)
        p = len(curvature)
        row, column = np.triu_indices(p + 1)
        self._of_error, self._of_mean = np.flatnonzero(column < p), np.flatnonzero(column == p)
        self._to_mean = np.where(row[self._of_mean] == p, 1.0, math.sqrt(0.5))
        self._covariance, self._identity = noise(np.eye(p + 1)[-1]), np.eye(p)
        self._twice = np.zeros((p, p)) if bias_only is None else bias_only * curvature @ (np.eye(p) - bias_only)
        left = np.arange(num_rows, 0, -global_batch_size)  # rows left before each step
        size, used = np.minimum(global_batch_size, left), num_rows - left
        fresh = num_rows * (left - size) / ((num_rows - 1) * size * left)
        more = fresh - (num_rows - size) / (size * (num_rows - 1))  # than the variance of independent batches
        factor = np.append(np.ones(len(left) - 1), last_factor)
        self._batches = list(zip(size, left, fresh, more, used * left / (num_rows - 1), factor, strict=True))

    def states(self, state: Matrix, xs: Iterable[float]) -> Iterator[Matrix]:
        """E[z zᵀ] (..., size) before each step and after the last, with the learning rates xs[t] in step t."""
        yield state
        crossed = np.zeros(0)  # E[δ wᵀ]
        for step, x in enumerate(xs):
            size, left, fresh, more, spread, factor = self._batches[step % self.num_steps]
            mean = state[..., self._of_mean] * self._to_mean
            noise, covariance = self._noise(mean), mean[..., -1:, None] * self._covariance
            if step % self.num_steps == 0:
                crossed = np.zeros_like(noise)
            state, x = self.independent.after(state, x, step), x * factor
            inject = self._identity - x * self._twice
            kept = crossed - x * inject * self._curvature @ crossed
            pulled = (x / left) ** 2 / 2 * spread * covariance + x * x * more * (noise - covariance / 2)
            added = (x / left * kept + inject @ pulled) @ inject.T
            state[..., self._of_error] += coordinates(added + added.swapaxes(-1, -2))
            crossed = (1 - size / left) * (kept + x / left * spread * inject @ covariance)
            crossed = crossed - x * size * fresh * inject @ noise
            yield state

    def change(self, x: float) -> Matrix:
        """What an epoch adds to E[z zᵀ]."""
        return self.cycle(x, np.zeros(len(self._of_error) + len(self._of_mean)))[0]

    def cycle(self, x: float, weights: Matrix) -> tuple[Matrix, Matrix]:
        """What an epoch adds to E[z zᵀ], and `weights` before each step as weights at its start, (num_steps, size)."""
        assert isinstance(self.independent, IndependentSteps)
        change, before = self.independent.cycle(x, weights)
        of_mean = np.eye(len(weights))[self._of_mean]  # all that the batches' dependence acts on
        states = list(self.states(of_mean, [x] * self.num_steps))
        change[:, self._of_mean] = (states[-1] - of_mean).T
        before[:, self._of_mean] = np.array(states[:-1]) @ weights
        return change, before


@dataclass(frozen=True, eq=False)
class SimulatedRuns:
    """Many runs of SGD at once, each with samples of its own.

    `rows` (num_rows, p + 1) are the b_i along the directions of ε, and `bias_only` (p, p) takes the bias's part of a
    step in the sequential order. `last_factor` is that of the learning rates in the last step of a shuffled epoch.
    """

    rows: Matrix
    curvature: Matrix
    bias_only: Matrix | None
    global_batch_size: int
    is_shuffled: bool
    last_factor: float

    def excess(self, start: Matrix, xs: Sequence[float], at: Iterable[int]) -> Matrix | None:
        """|ε|² from ε = `start` (p,) after `at` numbers of steps, (len(at), runs), at the learning rates times xs[t].

        None where fewer than 200 runs can be simulated at moderate cost.
        """
        num_rows, width = self.rows.shape
        work = max(len(xs) * self.global_batch_size * width, 20 * num_rows)  # to draw the rows costs more than to read
        num_runs = min(_RUNS, int(_MOST_SIMULATED / work))
        if num_runs < _RUNS / 2 or self.global_batch_size == num_rows:
            return None
        z = np.tile(np.append(start, 1.0), (num_runs, 1))
        wanted, found = set(at), []
        for step, (x, rows) in enumerate(zip([*xs, 0.0], self._batches(num_runs), strict=False)):
            if step in wanted:
                found.append(np.sum(z[:, :-1] ** 2, axis=1))
            b = self.rows.take(rows, axis=0)
            x *= self.last_factor if rows.shape[1] < self.global_batch_size else 1.0

            def change(b: Matrix = b, x: float = x) -> Matrix:
                residual = (b @ z[:, :, None])[:, :, 0]
                return np.asarray(x / b.shape[1] * self.curvature * (residual[:, None] @ b)[:, 0, :-1])

            if self.bias_only is None:
                z[:, :-1] -= change()
            else:
                z[:, :-1] -= change() @ (np.eye(len(start)) - self.bias_only).T
                z[:, :-1] -= change() @ self.bias_only.T
        return np.array(found)

    def _batches(self, num_runs: int) -> Iterator[NDArray[np.uint64]]:
        """The samples of each step, (num_runs, samples)."""
        generator, num_rows, size = np.random.default_rng(0), len(self.rows), self.global_batch_size
        parts = num_rows // size  # of a permutation: batches of different runs in random sampling
        shape, bits = (num_runs if self.is_shuffled else math.ceil(num_runs / parts), num_rows), num_rows.bit_length()
        while True:  # to sort keys that end with the row's number is the fastest way to many permutations
            keys = generator.integers(1 << (64 - bits), size=shape, dtype=np.uint64) << np.uint64(bits)
            keys |= np.arange(num_rows, dtype=np.uint64)
            keys.sort(axis=1)
            order = keys & np.uint64((1 << bits) - 1)
            if self.is_shuffled:
                yield from (order[:, start : start + size] for start in range(0, num_rows, size))
            else:
                yield order[:, : parts * size].reshape(-1, size)[:num_runs]
