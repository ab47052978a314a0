"""The built-in data: made houses whose sums are those of the real table.

Full-batch training on one feature depends on the data only through n, Σx, Σy, Σxy, Σx², Σy². Rows made to
have the real table's six sums therefore give the real table's closed form, loss and trajectory, with
nothing downloaded and nothing copied.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

REAL_NUM_ROWS = 551
REAL_SUM_X = 775_791.0
REAL_SUM_Y = 87_177_171.0
REAL_SUM_XY = 136_013_443_019.0
REAL_SUM_XX = 1_243_629_245.0
REAL_SUM_YY = 15_770_786_472_947.0

_FEATURE_EFFECT = 4_000.0  # dollars a standard deviation of each further feature
_MOST_DECOMPOSED = 300  # features; beyond, normal equations do, at a tenth of the time


def make_houses(num_rows: int, num_features: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Made features (num_rows, num_features), square feet first, and prices (num_rows,), in dollars.

    Areas are skewed, the spread of prices grows with the area, all prices are positive. At 551 rows and one
    feature the six sums are the real table's to rounding; at other sizes the means of the same quantities are.
    Further features are standardised, and correlated with the area as bathrooms or garage places would be.

    The random stream is NumPy's frozen `RandomState` (NEP 19), so a seed gives the same rows in every release.
    """
    if num_rows < num_features + 2:
        raise ValueError(
            f"num_rows is {num_rows} and num_features is {num_features}: the built-in data needs at least "
            f"num_features + 2 = {num_features + 2} rows"
        )
    stream = np.random.RandomState(seed)
    mean_x, mean_y = REAL_SUM_X / REAL_NUM_ROWS, REAL_SUM_Y / REAL_NUM_ROWS
    variance_x = REAL_SUM_XX / REAL_NUM_ROWS - mean_x**2
    covariance = REAL_SUM_XY / REAL_NUM_ROWS - mean_x * mean_y
    slope = covariance / variance_x
    residual_variance = REAL_SUM_YY / REAL_NUM_ROWS - mean_y**2 - slope * covariance

    shape = _standardized(np.exp(0.38 * _clipped_normal(stream, num_rows)))
    area = mean_x + np.sqrt(variance_x) * shape
    noise = _clipped_normal(stream, num_rows) * area

    others = np.empty((num_rows, num_features - 1))
    for column in others.T:
        column[:] = _standardized(0.4 * shape + _clipped_normal(stream, num_rows))
    own = shape[:, None] * (shape @ others / num_rows)
    effect = _FEATURE_EFFECT * np.subtract(others, own, out=own).sum(axis=1)
    del own

    # What is left of the noise after a fit has no share in any moment that the line fixes.
    residual = _after_fit(np.column_stack([np.ones(num_rows), shape, others]), noise)
    residual *= np.sqrt(residual_variance / np.mean(residual**2))
    price = mean_y + slope * (area - mean_x) + effect + residual
    return np.column_stack([area, others]), price


def _after_fit(design: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    if design.shape[1] <= _MOST_DECOMPOSED + 1:
        return np.asarray(noise - design @ np.linalg.lstsq(design, noise, rcond=None)[0])
    gram = design.T @ design
    for _ in range(2):  # the second time for what rounding left
        noise = noise - design @ np.linalg.solve(gram, design.T @ noise)
    return noise


def _clipped_normal(stream: np.random.RandomState, num_rows: int) -> NDArray[np.float64]:
    return np.clip(stream.standard_normal(num_rows), -2.6, 2.6)


def _standardized(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return (values - values.mean()) / values.std()
