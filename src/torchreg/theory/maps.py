"""Second moments of an error: the linear maps that move them, and the band of the loss around its mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from torchreg.theory.moments import Matrix

_CHECKS = 64  # states that are checked at once
_STILL = 1e-12
_KRYLOV = 60  # dimensions, at most
_SETTLED = 1e-6
_BAND_DRAWS = 4_000


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
    return matrices(np.eye(q * (q + 1) // 2)).reshape(-1, q * q)


def coordinates(matrices: Matrix) -> Matrix:
    """Symmetric matrices (..., q, q) in the coordinates (..., q(q + 1)/2) of `symmetric_basis`."""
    row, column, weight = _triangle(matrices.shape[-1])
    return np.asarray(matrices[..., row, column] * weight)


def matrices(coordinates: Matrix) -> Matrix:
    """The symmetric matrices (..., q, q) with these coordinates."""
    q = math.isqrt(2 * coordinates.shape[-1])
    row, column, weight = _triangle(q)
    found = np.empty((*coordinates.shape[:-1], q, q))
    found[..., row, column] = coordinates / weight
    found[..., column, row] = found[..., row, column]
    return found


@lru_cache(maxsize=8)
def _triangle(q: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Matrix]:
    row, column = np.triu_indices(q)
    return row, column, np.where(row == column, 1.0, math.sqrt(2))


def polynomial(maps: Matrix, x: float) -> Matrix:
    """Σ_j x^(j + 1) maps[j]."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.tensordot(np.float64(x) ** np.arange(1, len(maps) + 1), maps, axes=1)


def spectral_radius(matrix: NDArray[np.floating]) -> float:
    """The largest absolute value of an eigenvalue; infinite where the matrix is not finite."""
    if not np.isfinite(matrix).all():
        return math.inf
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def krylov(apply: Callable[[Matrix], Matrix], start: Matrix) -> Iterator[tuple[Matrix, Matrix]]:
    """Orthonormal vectors that span start, apply(start), …, and what `apply` makes of them, one more each time.

    Arnoldi's method (Saad 2003, §6.3), orthogonalised twice. It ends where nothing new appears.
    """
    basis, images = np.empty((0, len(start))), np.empty((0, len(start)))
    vector, length = start, float(np.linalg.norm(start))
    while len(basis) < _KRYLOV and np.linalg.norm(vector) > 1e-10 * length:
        basis = np.vstack([basis, vector / np.linalg.norm(vector)])
        vector = apply(basis[-1])
        length, images = float(np.linalg.norm(vector)), np.vstack([images, vector])
        for _ in range(2):
            vector = vector - (basis @ vector) @ basis
        yield basis, images


def largest_eigenvalue(apply: Callable[[Matrix], Matrix], start: Matrix) -> float:
    """The spectral radius of a map that keeps positive matrices positive, to about 1e-6; `start` is one of them."""
    value = 0.0
    for basis, images in krylov(apply, start):
        before, value = value, spectral_radius(images @ basis.T)
        if not abs(value - before) > _SETTLED * value:
            break
    return value


def solve(apply: Callable[[Matrix], Matrix], right: Matrix) -> Matrix | None:
    """The v with apply(v) = right, to 1e-6 (GMRES: Saad 2003, §6.5); None if that is not reached."""
    for basis, images in krylov(apply, right):
        weights = np.linalg.lstsq(images.T, right)[0]
        if np.linalg.norm(weights @ images - right) <= _SETTLED * np.linalg.norm(right):
            return np.asarray(weights @ basis)
    return None


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


def band(second_moments: Matrix, root: Matrix, quantiles: tuple[float, float]) -> Matrix:
    """Quantiles of |y|² for y = `root` δ and normal δ, (2, steps), from E[z zᵀ] (steps, p + 1, p + 1), z = (δ, 1).

    From the same draws at every step; infinite where a moment is.
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
        bounds[:, index] = np.quantile(np.einsum("np,np->n", y, y), quantiles)
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
