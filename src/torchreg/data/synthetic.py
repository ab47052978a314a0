"""The synthetic table: houses whose sums are those of the real table.

Full-batch training on one feature depends on the data only through n, Σx, Σy, Σxy, Σx², Σy². Rows with the real
table's six sums have its closed form, loss and trajectory, and nothing is downloaded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

REAL_NUM_ROWS = 551
_MEAN_X, _MEAN_Y = 775_791.0 / REAL_NUM_ROWS, 87_177_171.0 / REAL_NUM_ROWS
_VARIANCE_X = 1_243_629_245.0 / REAL_NUM_ROWS - _MEAN_X**2
_VARIANCE_Y = 15_770_786_472_947.0 / REAL_NUM_ROWS - _MEAN_Y**2
_COVARIANCE = 136_013_443_019.0 / REAL_NUM_ROWS - _MEAN_X * _MEAN_Y
_FEATURE_EFFECT = 4_000.0  # dollars per standard deviation of each further feature


def make_houses(num_rows: int, num_features: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Synthetic features (num_rows, num_features), square feet first, and prices (num_rows,), in dollars.

    Areas are skewed, the spread of prices grows with the area, all prices are positive. At 551 rows and one
    feature the six sums are the real table's to rounding; at other sizes the means of the same quantities are.
    Further features are standardised, and correlated with the area as bathrooms or garage spaces would be.
    The random stream is NumPy's frozen `RandomState` (NEP 19), so a seed gives the same rows in every release.
    """
    if num_rows < num_features + 2:
        raise ValueError(f"num_rows is {num_rows}: give at least num_features + 2 = {num_features + 2} rows")
    stream = np.random.RandomState(seed)
    shape = _standardized(np.exp(0.38 * _clipped_normal(stream, num_rows)))
    area = _MEAN_X + np.sqrt(_VARIANCE_X) * shape
    noise = _clipped_normal(stream, num_rows) * area

    others = np.empty((num_rows, num_features - 1))
    for column in others.T:
        column[:] = _standardized(0.4 * shape + _clipped_normal(stream, num_rows))
    effect = _FEATURE_EFFECT * (others.sum(axis=1) - shape * (shape @ others).sum() / num_rows)

    # The noise is orthogonal to all columns, so that it changes no moment that the line determines.
    design = np.column_stack([np.ones(num_rows), shape, others])
    gram = design.T @ design
    for _ in range(2):  # the second time for the first one's rounding
        noise -= design @ np.linalg.solve(gram, design.T @ noise)
    slope = _COVARIANCE / _VARIANCE_X
    noise *= np.sqrt((_VARIANCE_Y - slope * _COVARIANCE) / np.mean(noise**2))
    return np.column_stack([area, others]), _MEAN_Y + slope * (area - _MEAN_X) + effect + noise


def _clipped_normal(stream: np.random.RandomState, num_rows: int) -> NDArray[np.float64]:
    return np.clip(stream.standard_normal(num_rows), -2.6, 2.6)


def _standardized(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return (values - values.mean()) / values.std()
