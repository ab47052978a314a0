"""Mean and covariance of the gradients of single rows, which determine those of every batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from torchreg.theory.moments import Matrix

MAX_FEATURES = 16
"""The second moment costs num_features⁴: beyond this many features only the mean is predicted."""

_CHUNK_ROWS = 4_096


@dataclass(frozen=True, eq=False)
class RowGradients:
    """Mean and covariance over rows of a_i b_iᵀ with b_i = (a_i, −e_i): the gradient of a batch is a mean of these.

    Features, in the model's units, are divided by `feature_unit` (num_features,) and residuals by `error_unit`.
    `rows` (num_rows, p + 1) are the b_i so divided, p being num_features + 1; `mean` is (p, p + 1), and `covariance`
    (p(p + 1), p(p + 1)). Beyond `MAX_FEATURES` `rows` and `covariance` are None. `known` caches the `Dynamics` of the
    same rows by their other arguments.
    """

    num_rows: int
    rows: Matrix | None
    feature_unit: Matrix
    error_unit: float
    mean: Matrix
    covariance: Matrix | None
    known: dict[Any, Any]

    @classmethod
    def of(cls, features: Matrix, residual: Matrix) -> RowGradients:
        """From features (rows, num_features) as the model sees them and the optimum's residuals y − aᵀθ* (rows, 1)."""
        num_rows, num_features = features.shape
        known = _known(features.shape, hashlib.sha256(np.hstack([features, residual]).tobytes()).digest())
        largest = np.maximum(features.max(axis=0), -features.min(axis=0))
        feature_unit = largest * np.sqrt(np.mean(np.square(features / largest), axis=0))
        error_unit = float(np.sqrt(np.mean(residual**2))) or 1.0
        rows = np.hstack([features / feature_unit, np.ones((num_rows, 1)), -residual / error_unit])
        if num_features > MAX_FEATURES:
            return cls(num_rows, None, feature_unit, error_unit, (rows.T @ rows)[:-1] / num_rows, None, known)
        a = rows[:, :-1]
        mean = a.T @ rows / num_rows
        covariance = np.zeros((mean.size, mean.size))
        for i in range(0, num_rows, _CHUNK_ROWS):
            products = a[i : i + _CHUNK_ROWS, :, None] * rows[i : i + _CHUNK_ROWS, None, :] - mean
            flat = products.reshape(len(products), -1)
            covariance += flat.T @ flat / num_rows
        return cls(num_rows, rows, feature_unit, error_unit, mean, covariance, known)

    def curvature(self) -> Matrix:
        """The eigenvalues of 2G, the loss's second derivatives in the model's units, smallest first, (p,).

        Full-batch training with one learning rate for all parameters converges below 2 over the largest (Wilkinson
        1965).
        """
        unit = np.append(self.feature_unit, 1.0)
        return np.asarray(np.linalg.eigvalsh(2 * self.mean[:, :-1] * np.outer(unit, unit)))


@lru_cache(maxsize=2)
def _known(shape: tuple[int, ...], digest: bytes) -> dict[Any, Any]:
    """One dictionary for equal rows: each trial of a sweep reads the same table."""
    return {}
