"""The expected learning curve, and the band of single runs around it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchreg.theory.moments import Matrix

Steps = NDArray[np.int64]

_BAND_DRAWS = 4_000
_BAND = (0.025, 0.975)


@dataclass(frozen=True)
class LearningCurve:
    """The expected excess loss L − L* after `steps` steps, and bounds of single runs.

    `excess` is exact where the dynamics are. `low` and `high` enclose 95 % of runs if δ is normal with its exact mean
    and covariance: good for small learning rates and large batches; near the stability limit the true tails are
    heavier. They are NaN where only the mean is predicted. All are (len(steps),); losses are in the loss's own units.
    """

    steps: Steps
    excess: Matrix
    low: Matrix
    high: Matrix


def band(second_moments: Matrix, gram: Matrix) -> Matrix:
    """Bounds of 95 % of δᵀGδ for normal δ, (2, steps), from E[z zᵀ] (steps, p + 1, p + 1), z = (δ, 1), and G (p, p).

    Quantiles of |y|² for y = G^½ δ, from the same draws at every step; infinite where a moment is.
    """
    try:
        root = np.linalg.cholesky(gram).T
    except np.linalg.LinAlgError:  # a direction lost in float64 rounding
        curvature, directions = np.linalg.eigh(gram)
        root = np.sqrt(np.maximum(curvature, 0))[:, None] * directions.T
    bounds = np.full((2, len(second_moments)), np.inf)
    finite = np.isfinite(second_moments).all(axis=(1, 2))
    means = second_moments[finite, :-1, -1]
    covariances = second_moments[finite, :-1, :-1] - means[:, :, None] * means[:, None, :]
    values, vectors = np.linalg.eigh(root @ covariances @ root.T)
    spreads = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
    draws = np.random.default_rng(0).standard_normal((_BAND_DRAWS // 2, len(gram)))
    draws = np.vstack([draws, -draws])
    for index, mean, spread in zip(np.flatnonzero(finite), means @ root.T, spreads, strict=True):
        y = mean + draws @ spread.T
        bounds[:, index] = np.quantile(np.einsum("np,np->n", y, y), _BAND)
    return bounds
