"""What the steps of SGD add to the second moment of the error, as polynomials in the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal

import numpy as np

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

MOST_STEPS = 10**9
"""The largest number of steps to a target that is searched for."""
MOST_EPOCH_STEPS = 20_000
"""Longer epochs are predicted as independent steps of whole batches."""

_MOST_STEPS = 5_000  # without a matrix
_MOST_WORK = 2e10  # their floating-point operations
_LIMIT_EPOCHS = 20  # that matrix-free stability and noise floor take, about
_LIMIT_BISECTIONS = 6
_STILL = 1e-9  # of an entry of the second moment, what an epoch changes
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
    most_steps = MOST_STEPS

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
