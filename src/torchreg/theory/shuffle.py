"""What sampling without replacement within an epoch does to SGD's noise: most of it cancels at the end of the epoch.

In an epoch of `shuffle` sampling every row is used once, so the noise of all its batches' gradients sums to zero: what
one batch has too much of, the later ones lack. Let g_i be a row's gradient at the optimum (Σ_i g_i = 0), and w the sum
of g_i over the rows used so far. With R rows left, the mean of g over the next batch of B has, given the past, the
expectation −w/R and the covariance c·Cov(g) with c = n(R − B) / ((n − 1)BR) (sampling without replacement from the
rest: Cochran 1977, §2.6, averaged over the rest). So (δ, w, 1) moves by a linear map in each step, as (δ, 1) does for
`random` sampling, and at the end of the epoch w is 0 again. The noise of the curvature, which multiplies δ, is taken as
independent from batch to batch; that is the approximation (Mishchenko, Khaled and Richtárik 2020 bound the effect).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np

from torchreg.theory.maps import symmetric_basis
from torchreg.theory.moments import Matrix


@dataclass(frozen=True)
class ShuffledEpochs:
    """Epochs of a table of `num_rows` rows in batches of `batch_size`, the last one short.

    `mean_q` (p + 1, p + 1) is the mean over rows of Q_i, which steps δ ← δ − k(Q z)_δ with z = (δ, 1), and `covariance`
    (p, p + 1, p, p + 1) that of its upper rows.
    """

    num_rows: int
    global_batch_size: int
    mean_q: Matrix
    covariance: Matrix

    @property
    def num_steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(self.num_rows / self.global_batch_size)

    def begin(self, second_moment: Matrix) -> Matrix:
        """E[(δ, w, 1)(δ, w, 1)ᵀ] at the start of an epoch, from E[z zᵀ] (..., p + 1, p + 1): w is 0."""
        inner = self._inner
        size = inner[-1] + 1
        state = np.zeros((*second_moment.shape[:-2], size, size))
        state[..., inner[:, None], inner] = second_moment
        return state

    def second_moment(self, state: Matrix) -> Matrix:
        """E[z zᵀ] (..., p + 1, p + 1) of a state."""
        inner = self._inner
        return state[..., inner[:, None], inner]

    def step(self, state: Matrix, position: int, k: float) -> Matrix:
        """The state (..., 2p + 1, 2p + 1) after the step at a position of the epoch, with the rates times k."""
        p = len(self.mean_q) - 1
        left = self.num_rows - position * self.global_batch_size
        size = min(self.global_batch_size, left)
        delta, w = slice(0, p), slice(p, 2 * p)
        mean_map = np.eye(2 * p + 1)
        mean_map[delta, delta] -= k * self.mean_q[:-1, :-1]
        mean_map[delta, w] -= k / left * np.eye(p)
        mean_map[w, w] -= size / left * np.eye(p)
        fresh = self.num_rows * (left - size) / ((self.num_rows - 1) * size * left)
        whole = (self.num_rows - size) / (size * (self.num_rows - 1))

        z = self.second_moment(state)
        curvature = np.einsum("ibjc,...bc->...ij", self.covariance[:, :-1, :, :-1], z[..., :-1, :-1])
        noise = np.einsum("ibjc,...bc->...ij", self.covariance, z)  # of Q_i z; its last column is −g_i
        crossed = np.einsum("ibj,...b->...ij", self.covariance[..., -1], z[..., -1])
        state = mean_map @ state @ mean_map.T
        state[..., delta, delta] += k**2 * (fresh * noise + (whole - fresh) * curvature)
        state[..., delta, w] += k * size * fresh * crossed
        state[..., w, delta] += k * size * fresh * crossed.swapaxes(-1, -2)
        state[..., w, w] += size**2 * fresh * self.covariance[:, -1, :, -1] * z[..., -1:, -1:]
        return state

    def epoch(self, second_moment: Matrix, k: float) -> Matrix:
        """E[z zᵀ] after an epoch, from that before it, (..., p + 1, p + 1)."""
        state = self.begin(second_moment)
        for position in range(self.num_steps):
            state = self.step(state, position, k)
        return self.second_moment(state)

    def moments(self, second_moment: Matrix, multiples: Iterable[float]) -> Iterator[Matrix]:
        """E[z zᵀ] before each step and after the last, the rates times `multiples[t]` in step t.

        On the coordinates of symmetric matrices, (size,).
        """
        inner = symmetric_basis(len(self.mean_q))
        of_states = self.second_moment(self._of_basis).reshape(-1, len(self.mean_q) ** 2)
        told = inner @ of_states.T
        return (told @ vector for vector in self._vectors(second_moment, multiples))

    def _vectors(self, second_moment: Matrix, multiples: Iterable[float]) -> Iterator[Matrix]:
        """The states on the coordinates of symmetric matrices, the rates times `multiples[t]` in step t.

        Where rates stay, the step at each position of an epoch is a matrix, found once.
        """
        basis, moves, before = self._basis, dict[int, Matrix](), math.nan
        state = basis @ self.begin(second_moment).ravel()
        yield state
        for step, k in enumerate(multiples):
            position = step % self.num_steps
            if k != before:
                moves, before = {}, k
                whole = (state @ basis).reshape(self._of_basis.shape[1:])
                state = basis @ self.step(whole, position, k).ravel()
            else:
                if position not in moves:
                    moves[position] = basis @ self.step(self._of_basis, position, k).reshape(len(basis), -1).T
                state = moves[position] @ state
            yield state

    def steps_to(
        self, weights: Matrix, limit: float, second_moment: Matrix, multiples: Sequence[float], most_steps: int
    ) -> int | None:
        """Steps after which Σ weights · E[z zᵀ] is first at most `limit`; None if never, or not in `most_steps`.

        The last of `multiples` stays for ever after.
        """
        given = len(multiples)
        weight = self._basis @ self.begin(weights).ravel()
        ever_after = repeat(multiples[-1], max(0, most_steps - given))
        before, worst = weight, math.inf
        for step, state in enumerate(self._vectors(second_moment, chain(multiples, ever_after))):
            value = float(weight @ state)
            if value <= limit:
                return step
            if step == given:
                before, worst = state, 1e6 * (value + limit)
            elif step > given and step % self.num_steps == 0:
                if not value <= worst or np.abs(state - before).max() <= 1e-13 * np.abs(state).max():
                    return None
                before = state
        return None

    @property
    def _basis(self) -> Matrix:
        """Of the symmetric matrices that states are, (size, (2p + 1)²)."""
        return symmetric_basis(2 * len(self.mean_q) - 1)

    @property
    def _of_basis(self) -> Matrix:
        """The basis as states, (size, 2p + 1, 2p + 1)."""
        size = 2 * len(self.mean_q) - 1
        return self._basis.reshape(-1, size, size)

    @property
    def _inner(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """Where δ and 1 are in (δ, w, 1)."""
        p = len(self.mean_q) - 1
        return np.append(np.arange(p), 2 * p)
