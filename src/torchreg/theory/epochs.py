"""Epochs in which each row counts once, and simulated runs of SGD."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchreg.theory.maps import coordinates
from torchreg.theory.moments import Matrix
from torchreg.theory.steps import IndependentSteps, MatrixFreeSteps

_RUNS = 400
_MOST_SIMULATED = 3e7  # numbers read


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
