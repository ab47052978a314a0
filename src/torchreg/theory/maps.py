"""Second moments of an error: the linear maps that move them, and the band of the loss around its mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from torchreg.theory.moments import Matrix

_CHECKS = 64  # states that are checked at once
_STILL = 1e-12
_BAND_DRAWS = 4_000
_BAND = (0.025, 0.975)


def kron(left: Matrix, right: Matrix) -> Matrix:
    """The map Z ↦ left Z rightᵀ as an array [i, j, b, c]: entry (i, j) from Z[b, c]."""
    return np.einsum("ib,jc->ijbc", left, right)


def symmetric_kron(left: Matrix, right: Matrix) -> Matrix:
    """The map Z ↦ left Z rightᵀ + right Z leftᵀ."""
    return kron(left, right) + kron(right, left)


def on_symmetric(array: Matrix) -> Matrix:
    """A map [i, j, b, c] as a matrix on the coordinates of symmetric matrices."""
    basis = symmetric_basis(len(array))
    return basis @ array.reshape(len(array) ** 2, -1) @ basis.T


@lru_cache(maxsize=4)
def symmetric_basis(q: int) -> Matrix:
    """An orthonormal basis of the symmetric (q, q) matrices, (q(q + 1)/2, q²), upper triangle row by row."""
    row, column = np.triu_indices(q)
    basis, index = np.zeros((len(row), q, q)), np.arange(len(row))
    basis[index, row, column] = basis[index, column, row] = np.where(row == column, 1.0, math.sqrt(0.5))
    return basis.reshape(len(row), -1)


def polynomial(maps: Matrix, x: float) -> Matrix:
    """Σ_j x^(j + 1) maps[j]."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.tensordot(np.float64(x) ** np.arange(1, len(maps) + 1), maps, axes=1)


def spectral_radius(matrix: NDArray[np.floating]) -> float:
    """The largest absolute value of an eigenvalue; infinite where the matrix is not finite."""
    if not np.isfinite(matrix).all():
        return math.inf
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def is_contraction(change: Matrix, interior: Matrix) -> bool:
    """Whether Z ↦ Z + change(Z), on the coordinates of symmetric matrices, has a spectral radius below 1.

    For a map that keeps positive matrices positive, that is so if and only if X = interior + map(X) has a positive
    definite solution, whatever the positive definite `interior` (Krasnosel'skii 1964, §2): a linear system instead of
    all eigenvalues. Growth of less than 1e-12 a step is ignored: rounding may cause it in a direction that does not
    move.
    """
    if not np.isfinite(change).all():
        return False
    basis = symmetric_basis(len(interior))
    interior = interior + _STILL * np.trace(interior) * np.eye(len(interior))
    try:
        solution = np.linalg.solve(_STILL * np.eye(len(change)) - (1 - _STILL) * change, basis @ interior.ravel())
    except np.linalg.LinAlgError:
        return False
    return bool(np.linalg.eigvalsh((solution @ basis).reshape(interior.shape))[0] > 0)


def band(second_moments: Matrix, root: Matrix) -> Matrix:
    """Bounds of 95 % of |y|² for y = `root` δ and normal δ, (2, steps), from E[z zᵀ] (steps, p + 1, p + 1), z = (δ, 1).

    Quantiles from the same draws at every step; infinite where a moment is.
    """
    bounds = np.full((2, len(second_moments)), np.inf)
    finite = np.isfinite(second_moments).all(axis=(1, 2))
    means = second_moments[finite, :-1, -1]
    covariances = second_moments[finite, :-1, :-1] - means[:, :, None] * means[:, None, :]
    values, vectors = np.linalg.eigh(root @ covariances @ root.T)
    spreads = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
    draws = np.random.default_rng(0).standard_normal((_BAND_DRAWS // 2, len(root)))
    draws = np.vstack([draws, -draws])
    for index, mean, spread in zip(np.flatnonzero(finite), means @ root.T, spreads, strict=True):
        y = mean + draws @ spread.T
        bounds[:, index] = np.quantile(np.einsum("np,np->n", y, y), _BAND)
    return bounds


def first_reached(
    change: Matrix, state: Matrix, reached: Callable[[Matrix], NDArray[np.bool_]], most: int
) -> tuple[int, Matrix] | None:
    """The number of moves state ← state + change(state) until `reached`, and the state then; None beyond `most`.

    `change` is a matrix, or its diagonal; `reached` takes states (n, size) and returns (n, criteria). Each of the first
    128 moves is checked, and after that 64 for each doubling of their number, so the work grows with the logarithm of
    the answer. Bisection between two checks finds the move: the first one, unless the state is reached and left again
    between them.
    """
    doubled = [change]  # doubled[j]: the change of 2^j moves

    def after(states: Matrix, j: int) -> Matrix:
        while len(doubled) <= j:
            last = doubled[-1]
            doubled.append(2 * last + (last * last if last.ndim == 1 else last @ last))
        return states + (states * doubled[j] if change.ndim == 1 else states @ doubled[j].T)

    if reached(state[None]).any():
        return 0, state
    done = 0
    while done <= most and np.isfinite(state).all():
        j = (done // (2 * _CHECKS)).bit_length()
        states = state[None]
        while len(states) < _CHECKS:
            states = np.concatenate([states, after(states, j + len(states).bit_length() - 1)])
        found = np.flatnonzero(reached(after(states, j)).any(axis=1))
        if len(found):
            state, done = states[found[0]], done + (int(found[0]) << j)
            for bit in reversed(range(j)):
                middle = after(state, bit)
                if not reached(middle[None]).any():
                    state, done = middle, done + (1 << bit)
            return done + 1, after(state, 0)
        state, done = after(states[-1], j), done + (_CHECKS << j)
    return None
