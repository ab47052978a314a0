"""Linear maps of symmetric matrices: how the second moment of an error moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from torchreg.theory.moments import Matrix

_LOOKS = 64
_STILL = 1e-12


def pairs(left: Matrix, right: Matrix) -> Matrix:
    """The map Z ↦ left Z rightᵀ as an array [i, j, b, c]: entry (i, j) from Z[b, c]."""
    return np.einsum("ib,jc->ijbc", left, right)


def both_ways(left: Matrix, right: Matrix) -> Matrix:
    """The map Z ↦ left Z rightᵀ + right Z leftᵀ."""
    return pairs(left, right) + pairs(right, left)


def on_symmetric(pairs: Matrix) -> Matrix:
    """A map [i, j, b, c] on the coordinates of symmetric matrices."""
    basis = symmetric_basis(len(pairs))
    return basis @ pairs.reshape(len(pairs) ** 2, -1) @ basis.T


@lru_cache(maxsize=4)
def symmetric_basis(q: int) -> Matrix:
    """An orthonormal basis of the symmetric (q, q) matrices, (q(q + 1)/2, q²), upper triangle row by row."""
    basis = []
    for i, j in zip(*np.triu_indices(q), strict=True):
        element = np.zeros((q, q))
        element[i, j] = element[j, i] = 1.0 if i == j else math.sqrt(0.5)
        basis.append(element.ravel())
    return np.array(basis)


def spectral_radius(matrix: NDArray[np.floating]) -> float:
    """The largest size of an eigenvalue; infinite where the matrix is not finite."""
    if not np.isfinite(matrix).all():
        return math.inf
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def is_contraction(change: Matrix, interior: Matrix) -> bool:
    """Whether Z ↦ Z + change(Z), on the coordinates of symmetric matrices, shrinks every Z in the end.

    For a map that keeps positive matrices positive, the spectral radius is below 1 if and only if
    X = interior + map(X) has a positive definite solution, whatever the positive definite `interior` (Krasnosel'skii
    1964, §2): a linear system in place of all eigenvalues. Growth of less than 1e-12 a move does not count: rounding
    may feign it in a direction that stands still.
    """
    if not np.isfinite(change).all():
        return False
    size, basis = len(change), symmetric_basis(len(interior))
    interior = interior + _STILL * np.trace(interior) * np.eye(len(interior))
    try:
        solution = np.linalg.solve(_STILL * np.eye(size) - (1 - _STILL) * change, basis @ interior.ravel())
    except np.linalg.LinAlgError:
        return False
    return bool(np.linalg.eigvalsh((solution @ basis).reshape(interior.shape))[0] > 0)


Reached = Callable[[Matrix], NDArray[np.bool_]]


def first_reached(change: Matrix, state: Matrix, reached: Reached, most: int) -> tuple[int, Matrix] | None:
    """How many moves state ← state + change(state) it takes until `reached`, and the state then; None beyond `most`.

    `change` is a matrix, or its diagonal; `reached` answers for each of some states (n, size), in one or more respects
    (n, respects). Each of the first 128 moves is looked at, and from there on 64 for each doubling of their number, so
    the work grows with its logarithm. Between two looks halving finds the move: the first one, unless the state comes
    and goes between them.
    """
    doubled = [change]  # what 2^j moves add

    def after(states: Matrix, j: int) -> Matrix:
        while len(doubled) <= j:
            last = doubled[-1]
            doubled.append(2 * last + (last * last if last.ndim == 1 else last @ last))
        return states + (states * doubled[j] if change.ndim == 1 else states @ doubled[j].T)

    done = 0
    while done <= most and np.isfinite(state).all():
        j = (done // (2 * _LOOKS)).bit_length()
        states = state[None]
        while len(states) < _LOOKS:
            states = np.concatenate([states, after(states, j + len(states).bit_length() - 1)])
        found = np.flatnonzero(reached(states).any(axis=1))
        if len(found):
            state, done = states[found[0]], done + (int(found[0]) << j)
            if found[0]:
                last, gap = states[found[0] - 1], j
            if not done:
                return done, state
            begin = done - (1 << gap)
            for bit in reversed(range(gap)):
                middle = after(last, bit)
                if not reached(middle[None]).any():
                    last, begin = middle, begin + (1 << bit)
            return begin + 1, after(last, 0)
        last, gap = states[-1], j
        state, done = after(last, j), done + (_LOOKS << j)
    return None
