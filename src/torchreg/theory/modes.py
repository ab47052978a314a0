"""The directions in which the mean of the error shrinks, each by itself: all there is where noise is left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from torchreg.theory.moments import Matrix

_MOST_DECOMPOSED = 512
_LANCZOS_STEPS = 128


@dataclass(frozen=True, eq=False)
class Modes:
    """Directions of the step δ ← δ − k·curvature·δ, whose `curvature` (p, p) is symmetric.

    Up to 512 parameters they are its eigenvectors. Beyond, 128 Lanczos steps from the error itself give the course of
    the loss by Gauss quadrature, and 128 from a random vector the extreme eigenvalues, from within (Golub and Meurant
    2010, §4 and §6).
    """

    curvature: Matrix
    _known: dict[bytes, tuple[Matrix, Matrix]] = field(default_factory=dict, repr=False)

    def of(self, error: Matrix) -> tuple[Matrix, Matrix]:
        """Eigenvalues (m,), and the components (m,) of an error (p,) along their directions."""
        if len(self.curvature) <= _MOST_DECOMPOSED:
            values, vectors = self._decomposed
            return values, error @ vectors
        key = error.tobytes()
        if key not in self._known:
            self._known[key] = _lanczos(self.curvature, error)
        return self._known[key]

    @cached_property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue."""
        values, _ = self.of(np.random.default_rng(0).standard_normal(len(self.curvature)))
        return float(values.min()), float(values.max())

    @cached_property
    def _decomposed(self) -> tuple[Matrix, Matrix]:
        values, vectors = np.linalg.eigh(self.curvature)
        return values, vectors


def _lanczos(matrix: Matrix, start: Matrix) -> tuple[Matrix, Matrix]:
    length = float(np.linalg.norm(start))
    basis = np.zeros((_LANCZOS_STEPS, len(start)))
    diagonal, beside = np.zeros((2, _LANCZOS_STEPS))
    basis[0] = start / (length or 1.0)
    for j in range(_LANCZOS_STEPS):
        image = matrix @ basis[j]
        diagonal[j] = image @ basis[j]
        for _ in range(2):  # once more, for what rounding left
            image -= (basis[: j + 1] @ image) @ basis[: j + 1]
        beside[j] = np.linalg.norm(image)
        if j + 1 == _LANCZOS_STEPS or beside[j] <= 1e-14 * np.abs(diagonal).max():  # nothing new in this direction
            break
        basis[j + 1] = image / beside[j]
    triangle = np.diag(diagonal[: j + 1]) + np.diag(beside[:j], 1) + np.diag(beside[:j], -1)
    values, vectors = np.linalg.eigh(triangle)
    return values, length * vectors[0]
