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
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle

import numpy as np

from torchreg.theory.maps import kron, on_symmetric, symmetric_basis, symmetric_kron
from torchreg.theory.moments import Matrix


@dataclass(frozen=True, eq=False)
class ShuffledEpochs:
    """Epochs of `num_rows` rows in batches of `global_batch_size`, the last one short.

    `mean_q` (p + 1, p + 1) is the mean over rows of Q_i, which steps δ ← δ − k(Q z)_δ with z = (δ, 1), and `covariance`
    (p, p + 1, p, p + 1) that of its upper rows. States are E[(δ, w, 1)(δ, w, 1)ᵀ] on the coordinates of symmetric
    matrices; what goes in and comes out is E[z zᵀ], also on coordinates.
    """

    num_rows: int
    global_batch_size: int
    mean_q: Matrix
    covariance: Matrix

    def epoch(self, k: float) -> Iterator[Matrix]:
        """What the steps of an epoch, up to and including each one, add to E[z zᵀ], as a matrix.

        Changes are composed, so that those of tiny learning rates do not vanish beside the identity.
        """
        start = self._start
        total = np.zeros_like(start)
        for constant, linear, quadratic in self._changes:
            total = total + (constant + k * (linear + k * quadratic)) @ (start + total)
            yield start.T @ total

    def moments(self, second_moment: Matrix, multiples: Iterable[float]) -> Iterator[Matrix]:
        """E[z zᵀ] before each step and after the last; the learning rates of step t are times `multiples[t]`."""
        state = self._start @ second_moment
        yield second_moment
        for changes, k in zip(cycle(self._changes), multiples, strict=False):
            constant, linear, quadratic = changes @ state
            state = state + constant + k * (linear + k * quadratic)
            yield self._start.T @ state

    @cached_property
    def _start(self) -> Matrix:
        """The map from E[z zᵀ] to the state at the start of an epoch, where w is 0."""
        p = len(self.mean_q) - 1
        of_z = np.append(np.arange(p), 2 * p)
        basis = symmetric_basis(p + 1).reshape(-1, p + 1, p + 1)
        states = np.zeros((len(basis), 2 * p + 1, 2 * p + 1))
        states[:, of_z[:, None], of_z] = basis
        return np.asarray(symmetric_basis(2 * p + 1) @ states.reshape(len(basis), -1).T)

    @cached_property
    def _changes(self) -> Matrix:
        """What each step of an epoch adds to a state: coefficients of k⁰, k¹ and k², (num_steps, 3, size, size).

        The mean map is I − sW − k(Q + D/left), where W keeps w, D moves w to δ and s = size/left.
        """
        p, covariance = len(self.mean_q) - 1, self.covariance
        identity, keep, move, q = np.eye(2 * p + 1), *np.zeros((3, 2 * p + 1, 2 * p + 1))
        keep[p:-1, p:-1] = move[:p, p:-1] = np.eye(p)
        q[:p, :p] = self.mean_q[:-1, :-1]
        curvature, noise, crossed, drift = np.zeros((4, *(2 * p + 1,) * 4))
        delta, const = np.arange(p), np.array([2 * p])
        inner = np.append(delta, const)
        noise[np.ix_(delta, delta, inner, inner)] = covariance.transpose(0, 2, 1, 3)
        curvature[:p, :p, :p, :p] = noise[:p, :p, :p, :p]
        crossed[np.ix_(delta, p + delta, inner, const)] = covariance[..., -1:].transpose(0, 2, 1, 3)
        drift[np.ix_(p + delta, p + delta, const, const)] = covariance[:, -1:, :, -1:].transpose(0, 2, 1, 3)

        left = np.arange(self.num_rows, 0, -self.global_batch_size)  # rows left before each step
        size = np.minimum(self.global_batch_size, left)
        fresh = self.num_rows * (left - size) / ((self.num_rows - 1) * size * left)
        whole = (self.num_rows - size) / (size * (self.num_rows - 1))
        s, one = size / left, np.ones(len(left))
        terms = [  # the power of k, its factor in each step, the map
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
        factors = np.zeros((len(left), 3, len(terms)))
        for index, (power, factor, _) in enumerate(terms):
            factors[:, power, index] = factor
        return np.tensordot(factors, np.array([on_symmetric(term) for *_, term in terms]), axes=1)
