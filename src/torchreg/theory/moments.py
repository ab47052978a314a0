"""The best line and how well it is known, from moments that chunks and ranks can merge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

_EPSILON = float(np.finfo(np.float64).eps)
_CHUNK_ROWS = 65_536
_WANTED_DIGITS = 12
_HARMLESS_CONDITION = 100.0  # fewer digits than wanted then come from a weight near 0, and no feature is to blame
_MOST_DECOMPOSED = 256  # features whose singular values are all computed
_POWER_STEPS = 50


@dataclass(frozen=True)
class ClosedForm:
    """The least-squares optimum and how well the rows determine it.

    `weight` (num_features,), `bias`, and `loss`, the mean squared error there. `r_squared` is the part of the target's
    variance that the line explains. `weight_error` (num_features,) and `bias_error` are standard errors under
    independent errors of equal variance (NaN where there are no more rows than parameters). `condition_number` is
    that of the centred features, each scaled to length 1 (Higham 2002, §20); beyond 256 features it is estimated by
    50 power iterations, a few percent too low at most.
    """

    weight: Matrix
    bias: float
    loss: float
    r_squared: float
    weight_error: Matrix
    bias_error: float
    condition_number: float
    digits: int
    """Decimal digits of the weight that float64 can be trusted for."""

    @property
    def warning(self) -> str | None:
        """What to tell a user whose features are too alike for `weight` to be known to 12 digits."""
        if self.digits >= _WANTED_DIGITS or self.condition_number < _HARMLESS_CONDITION:
            return None
        return (
            f"the features are nearly dependent (condition number {self.condition_number:.2g}): about {self.digits} "
            "digits of the closed form's weights are right; leave one of the features out"
        )


@dataclass(frozen=True)
class Moments:
    """First and second moments of rows (x, y), from which closed form and loss follow without the rows.

    All vectors are (p,), over features and target. The mean is held in two parts, `origin` + `offset`, so that the
    difference of two means near 1e8 keeps its digits. `factor` is (p, p), upper triangular, RᵀR being the sum of
    centred outer products: the QR factor keeps the precision that squaring the rows would lose. Moments of parts
    `merge` to those of the whole (Chan, Golub and LeVeque 1983; the QR form is TSQR, Demmel et al. 2012), so a table
    can be reduced over chunks and ranks in one pass.
    """

    num_rows: int
    origin: Matrix
    offset: Matrix
    factor: Matrix

    @classmethod
    def of(cls, features: Matrix, target: Matrix) -> Moments:
        """Moments of features (rows, num_features) and target (rows, 1), in one pass over chunks of rows."""
        chunks = (
            cls._of_chunk(np.hstack([features[i : i + _CHUNK_ROWS], target[i : i + _CHUNK_ROWS]]))
            for i in range(0, len(features), _CHUNK_ROWS)
        )
        return reduce(cls.merge, chunks)

    @classmethod
    def _of_chunk(cls, rows: Matrix) -> Moments:
        """Of rows (rows, p), which are changed."""
        origin = rows.mean(axis=0)
        rows -= origin
        offset = rows.mean(axis=0)
        rows -= offset
        return cls(len(rows), origin, offset, _triangle(rows))

    def merge(self, other: Moments) -> Moments:
        """The moments of the rows of both."""
        num_rows = self.num_rows + other.num_rows
        difference = (self.origin - other.origin) + (self.offset - other.offset)
        between = np.sqrt(self.num_rows * other.num_rows / num_rows) * difference
        return Moments(
            num_rows,
            self.origin,
            self.offset - difference * (other.num_rows / num_rows),
            _triangle(np.vstack([self.factor, other.factor, between])),
        )

    @property
    def mean(self) -> Matrix:
        """Means of features and target, (p,)."""
        return self.origin + self.offset

    def closed_form(self) -> ClosedForm:
        """The least-squares optimum. Raises `ValueError` if the features do not determine it.

        The triangular system R w = r of the centred rows is solved (QR: Higham 2002, §20.2), which squares no
        condition number, and no offset of the features costs digits. With the condition number κ and
        τ = |residual| / (|features| |weight|), the weight's relative error is of the order ε (κ + κ² τ).
        """
        return self._closed_form

    @cached_property
    def _closed_form(self) -> ClosedForm:
        r_features, r_target, r_residual = self.factor[:-1, :-1], self.factor[:-1, -1], self.factor[-1, -1]
        lengths = np.linalg.norm(r_features, axis=0)
        # What rounding the numbers to float64 leaves of a column that depends on those before it.
        rounding = 32 * _EPSILON * np.hypot(lengths, math.sqrt(self.num_rows) * np.abs(self.mean[:-1]))
        dependent = np.flatnonzero(np.abs(np.diag(r_features)) <= rounding)
        if len(dependent):
            raise ValueError(
                f"feature {dependent[0] + 1} of {len(lengths)} is a linear combination of those before it, so "
                "infinitely many lines fit equally well: leave it out"
            )
        scaled = r_features / lengths
        weight = np.linalg.solve(scaled, r_target) / lengths
        bias = (self.origin[-1] - weight @ self.origin[:-1]) + (self.offset[-1] - weight @ self.offset[:-1])

        total = float(np.linalg.norm(self.factor[:, -1]))
        residual = abs(float(r_residual))
        if residual <= 16 * _EPSILON * total:  # a perfect fit, to rounding
            residual = 0.0
        inverse = _inverse_triangle(scaled)
        largest, smallest = _extreme_singular_values(scaled, inverse)
        condition = largest / smallest
        fitted = float(largest * np.linalg.norm(weight * lengths)) or 1.0
        error = 16 * _EPSILON * condition * (1 + condition * residual / fitted)
        freedom = self.num_rows - len(weight) - 1
        deviation = residual / math.sqrt(freedom) if freedom > 0 else math.nan
        inverse /= lengths[:, None]  # R⁻¹, whose rows give the weights' variances
        return ClosedForm(
            weight=np.asarray(weight, dtype=np.float64),
            bias=float(bias),
            loss=residual**2 / self.num_rows,
            r_squared=1 - (residual / total) ** 2 if total else math.nan,
            weight_error=deviation * np.linalg.norm(inverse, axis=1),
            bias_error=deviation * math.sqrt(1 / self.num_rows + float(np.sum((self.mean[:-1] @ inverse) ** 2))),
            condition_number=condition,
            digits=min(15, max(0, math.floor(-math.log10(error)))),
        )

    def excess(self, weight: Matrix, bias: float) -> float:
        """L(θ) − L*: how far a line is above the best possible mean squared error, without cancellation."""
        best = self.closed_form()
        off = weight - best.weight
        slope_part = self.factor[:-1, :-1] @ off
        return float(slope_part @ slope_part / self.num_rows + (bias - best.bias + off @ self.mean[:-1]) ** 2)

    def loss(self, weight: Matrix, bias: float) -> float:
        """Mean squared error of a line over all rows."""
        return self.closed_form().loss + self.excess(weight, bias)


def _triangle(rows: Matrix) -> Matrix:
    num_columns = rows.shape[1]
    if len(rows) < num_columns:
        rows = np.vstack([rows, np.zeros((num_columns - len(rows), num_columns))])
    return np.asarray(np.linalg.qr(rows, mode="r"))


def _inverse_triangle(upper: Matrix) -> Matrix:
    """The inverse of an upper triangular matrix, in blocks: a sixth of the work of `numpy.linalg.inv`."""
    half = len(upper) // 2
    if half < 64:
        return np.asarray(np.linalg.inv(upper))
    inverse = np.zeros_like(upper)
    inverse[:half, :half] = _inverse_triangle(upper[:half, :half])
    inverse[half:, half:] = _inverse_triangle(upper[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ upper[:half, half:] @ inverse[half:, half:]
    return inverse


def _extreme_singular_values(matrix: Matrix, inverse: Matrix) -> tuple[float, float]:
    if len(matrix) <= _MOST_DECOMPOSED:
        values = np.linalg.svd(matrix, compute_uv=False)
        return float(values[0]), float(values[-1])
    return _largest_singular_value(matrix), 1 / _largest_singular_value(inverse)


def _largest_singular_value(matrix: Matrix) -> float:
    vector = np.random.default_rng(0).standard_normal(len(matrix))
    for _ in range(_POWER_STEPS):
        vector = matrix.T @ (matrix @ (vector / np.linalg.norm(vector)))
    return math.sqrt(np.linalg.norm(vector))
