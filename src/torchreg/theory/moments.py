"""The closed-form solution and its accuracy, from moments that chunks and ranks can merge; moments of row gradients."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

MAX_FEATURES = 16
"""The map of the second moment has num_features⁴ entries: beyond this many features it is applied without them."""
MAX_STEP_COST = 2e8
"""Where num_rows · num_features² is larger, such a step costs too much, and only the mean is predicted."""

_EPSILON = float(np.finfo(np.float64).eps)
_CHUNK_ROWS = 65_536
_GRADIENT_CHUNK_ROWS = 4_096
_WANTED_DIGITS = 12
_HARMLESS_CONDITION = 100.0  # below it, missing digits come from a weight near 0, not from dependent features
_MOST_DECOMPOSED = 256  # features up to which singular values are computed exactly
_POWER_STEPS = 50
_RESOLVED = 1e-14  # singular values, of the largest


@dataclass(frozen=True)
class ClosedForm:
    """The least-squares optimum and its accuracy.

    `weight` (num_features,), `bias`, and `loss`, the mean squared error there. `r_squared` is the fraction of the
    target's variance that is explained. `weight_error` (num_features,) and `bias_error` are standard errors under
    independent errors of equal variance (NaN where there are no more rows than parameters). `condition_number` is
    that of the centred features, each scaled to length 1 (Higham 2002, §20); beyond 256 features it is estimated by
    50 power iterations, a few percent too low at most. `digits` is the number of correct decimal digits of the weight.
    """

    weight: Matrix
    bias: float
    loss: float
    r_squared: float
    weight_error: Matrix
    bias_error: float
    condition_number: float
    digits: int

    @property
    def warning(self) -> str | None:
        """The warning for features so nearly dependent that `weight` has fewer than 12 correct digits."""
        if self.digits >= _WANTED_DIGITS or self.condition_number < _HARMLESS_CONDITION:
            return None
        return (
            f"the features are nearly dependent (condition number {self.condition_number:.2g}): about {self.digits} "
            "digits of the closed-form weights are correct, and the forecast has a relative error of up to about "
            f"{16 * _EPSILON * self.condition_number:.1g}; exclude one of the features"
        )


@dataclass(frozen=True)
class Moments:
    """First and second moments of rows (x, y), which determine the closed-form solution and the loss of any line.

    All vectors are (p,), over features and target. The mean is `origin` + `offset`, so that the difference of two
    means near 1e8 keeps its digits. `factor` is (p, p), upper triangular, with RᵀR the sum of centred outer products:
    the QR factor keeps the precision that squaring the rows would lose. Moments of chunks `merge` to those of the whole
    (Chan, Golub and LeVeque 1983; the QR form is TSQR, Demmel et al. 2012): one pass over chunks and ranks.
    """

    num_rows: int
    origin: Matrix
    offset: Matrix
    factor: Matrix

    @classmethod
    def of(cls, features: Matrix, target: Matrix) -> Moments:
        """Moments of features (rows, num_features) and target (rows, 1), in one pass over chunks of rows."""

        def of_chunk(start: int) -> Moments:
            rows = np.hstack([part[start : start + _CHUNK_ROWS] for part in (features, target)])
            origin = rows.mean(axis=0)
            rows -= origin
            offset = rows.mean(axis=0)
            return cls(len(rows), origin, offset, _triangle(rows - offset))

        return reduce(cls.merge, map(of_chunk, range(0, len(features), _CHUNK_ROWS)))

    def merge(self, other: Moments) -> Moments:
        """The moments of the union of both."""
        num_rows = self.num_rows + other.num_rows
        difference = (self.origin - other.origin) + (self.offset - other.offset)
        offset = self.offset - difference * (other.num_rows / num_rows)
        between = np.sqrt(self.num_rows * other.num_rows / num_rows) * difference
        return Moments(num_rows, self.origin, offset, _triangle(np.vstack([self.factor, other.factor, between])))

    @property
    def mean(self) -> Matrix:
        """Means of features and target, (p,)."""
        return self.origin + self.offset

    def closed_form(self) -> ClosedForm:
        """The least-squares optimum. Raises `ValueError` if the features do not determine it.

        Solves the triangular system R w = r of the centred rows (QR: Higham 2002, §20.2): the condition number is not
        squared, and an offset of the features costs no digits. With the condition number κ and
        τ = |residual| / (|features| |weight|), the relative error of the weight is of the order ε (κ + κ² τ).
        """
        return self._closed_form

    @cached_property
    def _closed_form(self) -> ClosedForm:
        r_features, r_target, r_residual = self.factor[:-1, :-1], self.factor[:-1, -1], self.factor[-1, -1]
        lengths = np.linalg.norm(r_features, axis=0)
        # Rounding to float64 leaves this much of a column that depends on those before it.
        rounding = 32 * _EPSILON * np.hypot(lengths, math.sqrt(self.num_rows) * np.abs(self.mean[:-1]))
        dependent = np.flatnonzero(np.abs(np.diag(r_features)) <= rounding)
        if len(dependent):
            raise ValueError(
                f"feature {dependent[0] + 1} of {len(lengths)} is a linear combination of those before it, so "
                "infinitely many solutions fit equally well: exclude it"
            )
        scaled = r_features / lengths
        weight = np.linalg.solve(scaled, r_target) / lengths
        bias = (self.origin[-1] - weight @ self.origin[:-1]) + (self.offset[-1] - weight @ self.offset[:-1])

        total = float(np.linalg.norm(self.factor[:, -1]))
        residual = abs(float(r_residual))
        if residual <= 16 * _EPSILON * total:  # a perfect fit, to rounding
            residual = 0.0
        inverse = np.linalg.inv(scaled)
        largest = _spectral_norm(scaled)
        condition = largest * _spectral_norm(inverse)
        fitted = float(largest * np.linalg.norm(weight * lengths)) or 1.0
        error = 16 * _EPSILON * condition * (1 + condition * residual / fitted)
        freedom = self.num_rows - len(weight) - 1
        deviation = residual / math.sqrt(freedom) if freedom > 0 else math.nan
        inverse /= lengths[:, None]  # R⁻¹: the squared norms of its rows give the variances
        return ClosedForm(
            weight=np.asarray(weight),
            bias=float(bias),
            loss=residual**2 / self.num_rows,
            r_squared=1 - (residual / total) ** 2 if total else math.nan,
            weight_error=deviation * np.linalg.norm(inverse, axis=1),
            bias_error=deviation * math.sqrt(1 / self.num_rows + float(np.sum((self.mean[:-1] @ inverse) ** 2))),
            condition_number=condition,
            digits=min(15, max(0, math.floor(-math.log10(error)))),
        )

    def excess(self, weight: Matrix, bias: float) -> float:
        """The excess loss L(θ) − L* of a line, computed without cancellation."""
        best = self.closed_form()
        off = weight - best.weight
        slope_part = self.factor[:-1, :-1] @ off
        return float(slope_part @ slope_part / self.num_rows + (bias - best.bias + off @ self.mean[:-1]) ** 2)

    def loss(self, weight: Matrix, bias: float) -> float:
        """The mean squared error of a line over all rows."""
        return self.closed_form().loss + self.excess(weight, bias)


@dataclass(frozen=True, eq=False)
class RowGradients:
    """Mean and covariance over rows of u_i b_iᵀ with b_i = (u_i, −e_i): Rᵀ times a mean of these is a batch's gradient.

    Features, in the model's units, are divided by `feature_unit` (num_features,) and residuals by `error_unit`. Then
    a_i = Rᵀu_i with the `factor` R (p, p), p being num_features + 1; G = RᵀR, and the mean of u_i u_iᵀ is I. R keeps
    directions of nearly dependent features that G loses. `rows` (num_rows, p + 1) are the b_i; `mean` (p,) is that of
    −e_i u_i, and `covariance` (p(p + 1), p(p + 1)), None beyond `MAX_FEATURES`; beyond `MAX_STEP_COST` `rows` are None.
    `known` caches the `Dynamics` of the same rows by their other arguments.
    """

    num_rows: int
    rows: Matrix | None
    feature_unit: Matrix
    error_unit: float
    factor: Matrix
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
        centre = features.mean(axis=0)
        centred, mean = np.hstack([np.ones((num_rows, 1)), features - centre]), np.zeros(num_features + 1)
        is_small = num_features <= MAX_FEATURES or num_rows * num_features**2 <= MAX_STEP_COST
        directions, triangle = np.linalg.qr(centred) if is_small else (centred, _triangle(centred))
        triangle[0, 1:] += triangle[0, 0] * centre
        factor = np.roll(triangle, -1, axis=1) / np.append(feature_unit, 1.0) / math.sqrt(num_rows)
        if not is_small:
            return cls(num_rows, None, feature_unit, error_unit, factor, mean, None, known)
        rows = np.hstack([directions * math.sqrt(num_rows), -residual / error_unit])
        product = rows[:, :-1].T @ rows / num_rows
        if num_features > MAX_FEATURES:
            return cls(num_rows, rows, feature_unit, error_unit, factor, product[:, -1], None, known)
        covariance = np.zeros((product.size, product.size))
        for i in range(0, num_rows, _GRADIENT_CHUNK_ROWS):
            b = rows[i : i + _GRADIENT_CHUNK_ROWS]
            flat = (b[:, :-1, None] * b[:, None, :] - product).reshape(len(b), -1)
            covariance += flat.T @ flat / num_rows
        return cls(num_rows, rows, feature_unit, error_unit, factor, product[:, -1], covariance, known)

    def curvature(self) -> Matrix:
        """The eigenvalues of 2G, the loss's second derivatives in the model's units, smallest first, (p,).

        0 where it is less than 1e-28 times the largest, which float64 does not resolve. Full-batch training with one
        learning rate for all parameters converges below 2 over the largest (Wilkinson 1965).
        """
        values = np.linalg.svd(self.factor * np.append(self.feature_unit, 1.0), compute_uv=False)[::-1]
        return np.where(values > _RESOLVED * values[-1], 2 * values**2, 0.0)


def _triangle(rows: Matrix) -> Matrix:
    missing = max(0, rows.shape[1] - len(rows))
    return np.asarray(np.linalg.qr(np.pad(rows, ((0, missing), (0, 0))), mode="r"))


def _spectral_norm(matrix: Matrix) -> float:
    if len(matrix) <= _MOST_DECOMPOSED:
        return float(np.linalg.norm(matrix, 2))
    vector = np.random.default_rng(0).standard_normal(len(matrix))
    for _ in range(_POWER_STEPS):
        vector = matrix.T @ (matrix @ (vector / np.linalg.norm(vector)))
    return math.sqrt(np.linalg.norm(vector))


@lru_cache(maxsize=2)
def _known(shape: tuple[int, ...], digest: bytes) -> dict[Any, Any]:
    """One dictionary for equal rows: each trial of a sweep reads the same table."""
    return {}
