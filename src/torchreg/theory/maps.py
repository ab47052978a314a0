"""Linear maps of symmetric matrices: how the second moment of an error moves."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from torchreg.theory.moments import Matrix


def pairs(left: Matrix, right: Matrix) -> Matrix:
    """The map Z ↦ left Z rightᵀ as an array [i, j, b, c]: entry (i, j) from Z[b, c]."""
    return np.einsum("ib,jc->ijbc", left, right)


def both_sides(matrix: Matrix) -> Matrix:
    """The map Z ↦ matrix Z + Z matrixᵀ."""
    identity = np.eye(len(matrix))
    return pairs(matrix, identity) + pairs(identity, matrix)


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
