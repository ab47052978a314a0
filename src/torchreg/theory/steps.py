"""What the steps of SGD add to the second moment of the error, as polynomials in the learning rate."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from torchreg.theory.maps import kron, on_symmetric, polynomial, symmetric_kron
from torchreg.theory.moments import Matrix, RowGradients

Order = Literal["simultaneous", "sequential"]

MAX_SEQUENTIAL = 128
"""The sequential order has no symmetric matrix: beyond this many features it is predicted as the simultaneous one."""
NARROWEST = 1e-50  # of the widest direction: its fourth power is still a number

_MOST_EPOCH_STEPS = 512
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

    def states(self, state: Matrix, xs: Iterable[float]) -> Iterator[Matrix]:
        """The states before each step and after the last."""
        yield state
        exponents = np.arange(1, len(self.maps) + 1)
        for step, x in enumerate(xs, start=1):
            maps = self.maps if self.short is None or step % self.num_steps else self.short
            state = state + np.float64(x) ** exponents @ (maps @ state if maps.ndim == 3 else maps * state)
            yield state

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

    @property
    def period(self) -> int:
        """Steps of a cycle: an epoch, or a single step in long epochs, whose short step is ignored."""
        return self.num_steps if self.num_steps <= _MOST_EPOCH_STEPS else 1

    def cycle(self, x: float, weights: Matrix) -> tuple[Matrix, Matrix]:
        """What a cycle adds to a state, and `weights` before each step as weights at its start, (period, size)."""
        step, before = polynomial(self.maps, x), [weights]
        while len(before) < self.period:
            before.append(before[-1] + before[-1] @ step)
        return self.change(x) if self.period > 1 else step, np.array(before)


class ShuffledEpochs:
    """Epochs of `num_rows` rows in batches of `global_batch_size`, the last one short, at learning rates times x.

    An epoch uses every row once, so the gradient noise of its batches sums to zero. Let g_i be a row's gradient at the
    optimum (Σ_i g_i = 0), and w the sum of g_i over the rows used so far. With R rows left, the mean of g over the next
    batch of B has, given the past, the expectation −w/R and the covariance c·Cov(g) with c = n(R − B) / ((n − 1)BR)
    (sampling without replacement from the rest: Cochran 1977, §2.6, averaged over the rest). So (δ, w, 1) moves by a
    linear map in each step, as (δ, 1) does for `random` sampling, and at the end of the epoch w is 0 again. The noise
    of the curvature, which multiplies δ, is taken as independent from batch to batch; that is the approximation
    (Mishchenko, Khaled and Richtárik 2020 bound the effect).

    `mean_q` (p + 1, p + 1) is the mean over rows of Q_i, which steps δ ← δ − x(Q z)_δ with z = (δ, 1), and `covariance`
    (p, p + 1, p, p + 1) that of its upper rows. Internally states are E[(δ, w, 1)(δ, w, 1)ᵀ]; arguments and results are
    E[z zᵀ]; all on the coordinates of symmetric matrices.
    """

    def __init__(self, num_rows: int, global_batch_size: int, mean_q: Matrix, covariance: Matrix) -> None:
        # The mean map of a step is I − sW − x(Q + D/left), where W keeps w, D moves w to δ and s = size/left.
        p = len(mean_q) - 1
        identity, keep, move, q = np.eye(2 * p + 1), *np.zeros((3, 2 * p + 1, 2 * p + 1))
        keep[p:-1, p:-1] = move[:p, p:-1] = np.eye(p)
        q[:p, :p] = mean_q[:-1, :-1]
        curvature, noise, crossed, drift = np.zeros((4, *(2 * p + 1,) * 4))
        delta, const = np.arange(p), np.array([2 * p])
        inner = np.append(delta, const)
        noise[np.ix_(delta, delta, inner, inner)] = covariance.transpose(0, 2, 1, 3)
        curvature[:p, :p, :p, :p] = noise[:p, :p, :p, :p]
        crossed[np.ix_(delta, p + delta, inner, const)] = covariance[..., -1:].transpose(0, 2, 1, 3)
        drift[np.ix_(p + delta, p + delta, const, const)] = covariance[:, -1:, :, -1:].transpose(0, 2, 1, 3)

        left = np.arange(num_rows, 0, -global_batch_size)  # rows left before each step
        size = np.minimum(global_batch_size, left)
        fresh = num_rows * (left - size) / ((num_rows - 1) * size * left)
        whole = (num_rows - size) / (size * (num_rows - 1))
        s, one = size / left, np.ones(len(left))
        terms = [  # the power of x, its factor in each step, the map
            (0, -s, symmetric_kron(identity, keep)),
            (0, s**2, kron(keep, keep)),
            (0, size**2 * fresh, drift),
            (1, -one, symmetric_kron(identity, q)),
            (1, -1 / left, symmetric_kron(identity, move)),
            (1, s, symmetric_kron(keep, q)),
            (1, s / left, symmetric_kron(keep, move)),
            (1, size * fresh, crossed + crossed.transpose(1, 0, 2, 3)),
            (2, one, kron(q, q)),
            (2, 1 / left, symmetric_kron(q, move)),
            (2, 1 / left**2, kron(move, move)),
            (2, fresh, noise),
            (2, whole - fresh, curvature),
        ]
        # What each step of an epoch adds to a state: coefficients of x⁰, x¹ and x², (num_steps, 3, size, size).
        factors = np.array([[(power == j) * factor for power, factor, _ in terms] for j in range(3)])
        self._changes = np.tensordot(factors.T.swapaxes(1, 2), [on_symmetric(term) for *_, term in terms], axes=1)
        # The map from E[z zᵀ] to the state at the start of an epoch, where w is 0.
        row, column = np.triu_indices(2 * p + 1)
        of_z = np.append(delta, const)
        self._start = np.eye(len(row))[:, np.isin(row, of_z) & np.isin(column, of_z)]
        self.num_steps = self.period = len(left)

    def states(self, state: Matrix, xs: Iterable[float]) -> Iterator[Matrix]:
        """E[z zᵀ] before each step and after the last, with the learning rates xs[t] in step t."""
        yield state
        state = self._start @ state
        for changes, x in zip(itertools.cycle(self._changes), xs, strict=False):
            constant, linear, quadratic = changes @ state
            state = state + constant + x * (linear + x * quadratic)
            yield self._start.T @ state

    def change(self, x: float) -> Matrix:
        """What an epoch adds to E[z zᵀ]."""
        return self.cycle(x, np.zeros(self._start.shape[1]))[0]

    def cycle(self, x: float, weights: Matrix) -> tuple[Matrix, Matrix]:
        """What an epoch adds to E[z zᵀ], and `weights` before each step as weights at its start, (num_steps, size)."""
        total, before = np.zeros_like(self._start), []
        for constant, linear, quadratic in self._changes:
            before.append(weights + weights @ self._start.T @ total)
            total = total + (constant + x * (linear + x * quadratic)) @ (self._start + total)
        return self._start.T @ total, np.array(before)
