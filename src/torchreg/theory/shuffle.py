"""SGD noise of sampling without replacement within an epoch: most of it cancels by the end of the epoch.

An epoch of `shuffle` sampling uses every row once, so the gradient noise of its batches sums to zero. Let g_i be a
row's gradient at the optimum (Σ_i g_i = 0), and w the sum of g_i over the rows used so far. With R rows left, the mean
of g over the next batch of B has, given the past, the expectation −w/R and the covariance c·Cov(g) with
c = n(R − B) / ((n − 1)BR) (sampling without replacement from the rest: Cochran 1977, §2.6, averaged over the rest). So
(δ, w, 1) moves by a linear map in each step, as (δ, 1) does for `random` sampling, and at the end of the epoch w is 0
again. The noise of the curvature, which multiplies δ, is taken as independent from batch to batch; that is the
approximation (Mishchenko, Khaled and Richtárik 2020 bound the effect).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import cycle

import numpy as np

from torchreg.theory.maps import kron, on_symmetric, symmetric_kron
from torchreg.theory.moments import Matrix


class ShuffledEpochs:
    """Epochs of `num_rows` rows in batches of `global_batch_size`, the last one short, at learning rates times x.

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
        factors = np.array([[(power == j) * factor for power, factor, _ in terms] for j in range(3)])
        # What each step of an epoch adds to a state: coefficients of x⁰, x¹ and x², (num_steps, 3, size, size).
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
        for changes, x in zip(cycle(self._changes), xs, strict=False):
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
