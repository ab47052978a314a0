"""Times that are a sum of known shapes, fitted to launches; intervals from leaving out one block after the other.

A time is the sum of p columns with unknown coefficients; noise multiplies it. The fit is of logarithms, so that every
size counts alike and the truth is the typical time, not the mean; Huber's weights (Huber and Ronchetti, "Robust
statistics", 2009, chapter 7) keep a launch that was twice as slow from deciding it. Values of one block may depend on
each other in any way: the standard error is the jackknife's over blocks (Efron and Tibshirani, "An introduction to the
bootstrap", 1993, chapter 11), with Student's t. Its degrees of freedom are the number of blocks less one, or fewer
where blocks are incomplete and a coefficient rests on few of them (Satterthwaite's approximation as in Bell and
McCaffrey, "Bias reduction in standard errors for linear regression with multi-stage samples", Survey Methodology 28,
2002). Coefficients may come out negative: cutting the interval at a parameter's bound afterwards keeps its coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from torchreg.scaling.statistics import CONFIDENCE, Block, Vector

FEWEST_BLOCKS = 4  # with fewer, Student's t is so wide, and Huber's scale so uncertain, that nothing is determined

_LARGEST_CONDITION = 1e5  # of the columns, each scaled to length 1: beyond it they are the same column
_HUBER = 1.345  # standard deviations; 95 % efficient for normal noise
_MAD = 1.4826  # standard deviations of a normal distribution per median absolute deviation
_LEAST_SCALE = 1e-9  # of records without noise
_MOST_STEPS = 60
_STEP_TOLERANCE = 1e-5  # of the fitted times; the step after it is far smaller still
_LOST = 1e-2  # a fit whose last step was larger has found nothing

Array: TypeAlias = npt.NDArray[np.float64]
Coefficients: TypeAlias = npt.NDArray[np.complex128]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Observations:
    """Times (n,) with the block that each is of, as a number, and the size at which it was taken, as a number."""

    times: Vector
    blocks: npt.NDArray[np.int64]
    placements: npt.NDArray[np.int64]

    @property
    def num_blocks(self) -> int:
        """Of which there is at least one time."""
        return int(self.blocks.max()) + 1


@dataclass(frozen=True)
class Interval:
    """An estimate that knows no bounds, and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Regression:
    """Coefficients (p,), of all blocks and without each block (num_blocks, p); NaN where they are not determined."""

    coefficients: Vector
    without_block: Array
    held_out_error: float | None
    _blocks: npt.NDArray[np.int64]
    _columns: Array  # (n, p) of the relative times at the fit

    def interval(self, parameter: Callable[[Coefficients], Coefficients]) -> Interval:
        """Of a smooth function of the coefficients (..., p), one of arithmetic, so that it takes complex ones."""
        value = float(parameter(self.coefficients.astype(complex)).real)
        others = parameter(self.without_block.astype(complex)).real
        num_blocks = len(others)
        error = math.sqrt((num_blocks - 1) / num_blocks * float(np.sum((others - value) ** 2)))
        # The imaginary part of a small imaginary step is the derivative, to machine precision.
        steps = self.coefficients + 1e-30j * np.eye(len(self.coefficients))
        gradient = parameter(steps).imag / 1e-30
        arm = float(student.ppf((1 + CONFIDENCE) / 2, self._degrees_of_freedom(gradient))) * error
        return Interval(value, value - arm, value + arm)

    def _degrees_of_freedom(self, gradient: Vector) -> float:
        """Of the jackknife's variance of a linear function, if the noise were independent and of one size.

        Without block g the coefficients change by −(X'X)⁻¹ X_g' (I − H_gg)⁻¹ r_g, H the hat matrix and r the residuals
        (I − H) y. So the variance is a quadratic form in y, whose moments are those of a scaled χ².
        """
        weights = self._influence @ np.linalg.solve(self._triangle.T, gradient)
        gram = weights @ weights.T
        return float(np.clip(np.trace(gram) ** 2 / np.sum(gram**2), 1, len(gram) - 1))

    @cached_property
    def _triangle(self) -> Array:
        return np.linalg.qr(self._columns).R

    @cached_property
    def _influence(self) -> Array:
        """(num_blocks, n, p), times R'⁻¹ gradient: how values change what a left-out block does."""
        q = np.linalg.solve(self._triangle.T, self._columns.T).T  # X = QR, H = QQ'
        influence = np.zeros((len(self.without_block), *q.shape))
        for block, of_block in enumerate(influence):
            rows = self._blocks == block
            # The little more keeps it solvable where without this block almost nothing is determined.
            of_block[rows] = np.linalg.solve((1 + 1e-9) * np.eye(rows.sum()) - q[rows] @ q[rows].T, q[rows])
            of_block -= q @ (q[rows].T @ of_block[rows])
        return influence


def observe(
    times: Mapping[Block, Mapping[Key, float]], what: str, check: Callable[[Key], None]
) -> tuple[Observations, list[Key]]:
    """Lay out {block: {size: seconds}}; also returns the sizes, in the order of their numbers.

    Raises ValueError for no times, for a time that is not positive and finite, and whatever `check` says of a size.
    """
    sizes = sorted({size for of_block in times.values() for size in of_block})  # type: ignore[type-var]
    if not sizes:
        raise ValueError("times is empty: give the times of at least one launch")
    for size in sizes:
        check(size)
    number = {size: index for index, size in enumerate(sizes)}
    filled = [of_block for of_block in times.values() if of_block]
    rows = [(value, block, number[size]) for block, found in enumerate(filled) for size, value in found.items()]
    for value, _, place in rows:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"times has {value:g} s at {what} {sizes[place]}: leave out launches without a valid time")
    values, blocks, placements = zip(*rows, strict=True)
    return Observations(np.array(values, dtype=np.float64), np.array(blocks), np.array(placements)), sizes


def regress(observations: Observations, columns: Array, together: npt.NDArray[np.int64]) -> Regression:
    """Fit the columns (num_places, p), none negative; also without each block, and without each size in turn.

    Places with the same number in `together` (num_places,) are left out together, and predicted from the others.
    """
    blocks, placements = observations.blocks, observations.placements
    lengths = _lengths(columns)
    scaled = (columns / lengths)[placements]
    masks = np.vstack(
        [
            np.ones((1, len(blocks)), dtype=bool),
            blocks != np.arange(observations.num_blocks)[:, None],
            together[placements] != np.unique(together)[:, None],
        ]
    )
    coefficients = _fit(scaled, observations.times, masks)
    found, without_block, without_size = np.split(coefficients, [1, 1 + observations.num_blocks])
    fitted = scaled @ found[0]
    return Regression(
        found[0] / lengths,
        without_block / lengths,
        _held_out_error(observations, columns, together, without_size / lengths),
        blocks,
        columns[placements] / fitted[:, None],
    )


def fit_from_zero(observations: Observations, columns: Array) -> Vector:
    """The coefficients if none may be negative: a column that would need one is left out, one after the other."""
    kept = np.arange(columns.shape[1])
    every = np.ones((1, len(observations.times)), dtype=bool)
    while True:
        lengths = _lengths(columns[:, kept])
        found = _fit((columns[:, kept] / lengths)[observations.placements], observations.times, every)[0]
        if len(kept) == 1 or not found.min() < 0:  # also if it is NaN
            coefficients = np.zeros(columns.shape[1])
            coefficients[kept] = found / lengths
            return coefficients
        kept = np.delete(kept, found.argmin())


def _lengths(columns: Array) -> Vector:
    lengths = np.linalg.norm(columns, axis=0)
    return np.asarray(np.where(lengths > 0, lengths, 1))


def _held_out_error(
    observations: Observations, columns: Array, together: npt.NDArray[np.int64], without_size: Array
) -> float | None:
    """The largest relative error of a median time that the fit without its size predicts."""
    size_of = dict(zip(np.unique(together).tolist(), without_size, strict=True))
    errors = []
    for place, size in enumerate(together.tolist()):
        median = np.median(observations.times[observations.placements == place])
        errors.append(abs(float(columns[place] @ size_of[size] / median) - 1))
    return max(errors) if np.isfinite(errors).all() else None


def _fit(columns: Array, times: Vector, masks: npt.NDArray[np.bool_]) -> Array:
    """Coefficients (fits, p) of the columns (n, p), each fit to the rows in its mask; NaN if they are not determined.

    Gauss–Newton with Huber's weights, all fits at once. A step is cut where a fitted time would lose its sign.
    """
    num_columns = columns.shape[1]
    relative = columns / times[:, None]
    gram = np.einsum("fn,ni,nj->fij", masks.astype(float), relative, relative)
    lengths = np.sqrt(np.einsum("fii->fi", gram))
    some = (lengths > 0).all(axis=1)
    result = np.full((len(masks), num_columns), np.nan)
    lengths, gram = lengths[some], gram[some]
    spectrum = np.linalg.eigvalsh(gram / lengths[:, :, None] / lengths[:, None, :])
    good = spectrum[:, 0] * _LARGEST_CONDITION**2 > spectrum[:, -1]
    chosen = np.flatnonzero(some)[good]
    if len(chosen) == 0:
        return result
    inside = masks[chosen]
    counts = inside.sum(axis=1)
    freedom = np.sqrt(counts / np.maximum(counts - num_columns, 1))

    found = np.linalg.solve(gram[good], np.einsum("fn,ni->fi", inside.astype(float), relative)[:, :, None])[:, :, 0]
    lost = (np.where(inside, found @ relative.T, 1) < 0.1).any(axis=1)
    found[lost] = 1 / lengths[good][lost]  # no column is negative, so these times are positive
    diagonal = np.arange(num_columns)
    for _ in range(_MOST_STEPS):
        fitted = np.where(inside, found @ relative.T, 1)  # as a fraction of the measured times
        residuals = -np.log(fitted)
        scale = np.maximum(_MAD * freedom * _masked_median(np.abs(residuals), inside, counts), _LEAST_SCALE)
        weights = inside * np.minimum(1, _HUBER * scale[:, None] / np.maximum(np.abs(residuals), _LEAST_SCALE))
        jacobian = relative / fitted[:, :, None]
        weighted = np.swapaxes(jacobian * weights[:, :, None], 1, 2)
        normal = weighted @ jacobian
        # So little that only a singular matrix minds.
        normal[:, diagonal, diagonal] *= 1 + 1e-12
        change = np.linalg.solve(normal, weighted @ residuals[:, :, None])
        relative_change = np.where(inside, (jacobian @ change)[:, :, 0], 0)
        cut = 0.8 / np.maximum(-relative_change.min(axis=1), 0.8)
        found += cut[:, None] * change[:, :, 0]
        moved = np.abs(relative_change).max(axis=1)
        if moved.max() < _STEP_TOLERANCE:
            break
    result[chosen] = np.where(moved[:, None] < _LOST, found, np.nan)
    return result


def _masked_median(values: Array, inside: npt.NDArray[np.bool_], counts: npt.NDArray[np.int64]) -> Vector:
    ordered = np.sort(np.where(inside, values, np.inf), axis=1)
    fits = np.arange(len(values))
    return np.asarray((ordered[fits, (counts - 1) // 2] + ordered[fits, counts // 2]) / 2)
