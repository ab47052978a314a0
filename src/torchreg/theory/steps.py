"""What one step of SGD adds to the second moment of the error, as a polynomial in the learning rate."""

from __future__ import annotations

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

_MOST_EPOCH_STEPS = 512
_NARROWEST = 1e-50  # of the widest direction: its fourth power is still a number
_EXTREME = 1e305  # learning rates beyond which the stability limit would not be a number
_SAMPLE_GROUPS = 8
_GROUP_BATCHES = 256
_MOST_DRAWN_ROWS = 512


def units(rows: RowGradients, learning_rates: tuple[float, float]) -> tuple[float, Matrix, Matrix]:
    """`lr_unit` and `scale` of `Dynamics`, and the factors (p + 1,) from the units of `rows` to those of δ̃.

    Raises `ValueError` for learning rates so far apart that one of them vanishes beside the other, and for those too
    extreme to have a stability limit in float64.
    """
    weight, bias = learning_rates
    sqrt_learning_rates = np.sqrt([weight] * len(rows.feature_unit) + [bias])
    lengths = np.append(rows.feature_unit, 1.0) * sqrt_learning_rates
    unit, error, remedy = float(lengths.max()), "", ""
    if lengths.min() < _NARROWEST * unit:
        error, remedy = "far apart", "bring them closer"
    elif not 1 / _EXTREME < unit * unit < _EXTREME:
        error, remedy = ("small", "give larger ones") if unit < 1 else ("large", "give smaller ones")
    if error:
        raise ValueError(
            f"base_learning_rate is {weight:.4g} (weight) and {bias:.4g} (bias), too {error} to be computed with, for "
            f"features of size {rows.feature_unit.max():.3g}: {remedy}"
        )
    return unit * unit, unit / (sqrt_learning_rates * rows.error_unit), np.append(lengths / unit, 1.0)


def square_maps(
    rows: Matrix, mean_q: Matrix, covariance: Matrix, global_batch_size: int, order: Order, seed: int
) -> tuple[Matrix, list[Matrix]]:
    """E[A⊗A] − I, and the same of each group of sampled batches, (powers of k, size, size).

    `rows` are the b_i in units of δ̃; `mean_q` (p + 1, p + 1) is the mean over rows of Q_i, and `covariance`
    (p(p + 1), p(p + 1)) that of its upper rows. The groups are empty where nothing is sampled.
    """
    num_rows, q, identity = len(rows), len(mean_q), np.eye(len(mean_q))
    of_batch = covariance * max(0.0, (num_rows - global_batch_size) / (global_batch_size * (num_rows - 1)))
    squares = kron(mean_q, mean_q)
    squares[:-1, :-1] += of_batch.reshape(q - 1, q, q - 1, q).transpose(0, 2, 1, 3)
    linear, quadratic = -on_symmetric(symmetric_kron(mean_q, identity)), on_symmetric(squares)
    if order == "simultaneous":
        return np.array([linear, quadratic]), []
    twice = np.zeros((q, q))
    twice[-2] = np.einsum("jjc->c", squares[-2, :-2, :-2])
    quadratic += on_symmetric(symmetric_kron(twice, identity))
    root = _covariance_root(of_batch, 0.5)
    groups = [
        np.array([linear, quadratic, *_higher_maps(deviations, mean_q[:-1], root)])
        for deviations in _sampled_deviations(rows, root, global_batch_size, seed)
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


def _higher_maps(deviations: Matrix, mean: Matrix, root: Matrix) -> tuple[Matrix, Matrix]:
    """The k³ and k⁴ terms of E[A⊗A] in the sequential order, from sampled deviations.

    They are adjusted to the exact `mean` (p, p + 1) and covariance, whose root is `root` (p(p + 1), p(p + 1)). With the
    exact terms in k and k² the map is then that of one distribution, so it stays positive; and the sampling error
    becomes small.
    """
    num, (p, q) = len(deviations), mean.shape
    adjusted = deviations @ _covariance_root(deviations.T @ deviations / num, -0.5) @ root
    gradients = np.zeros((num, q, q))
    gradients[:, :-1] = (mean.ravel() + adjusted).reshape(num, p, q)
    twice = np.zeros_like(gradients)
    twice[:, -2] = np.einsum("nj,njc->nc", gradients[:, -2, :-2], gradients[:, :-2])
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
