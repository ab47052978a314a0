"""Times that are a sum of known shapes, fitted to launches; intervals from a jackknife over blocks.

A time is the sum of p columns with unknown coefficients, times noise. The logarithms are fitted, so that all sizes have
the same weight and the result is the typical time, not the mean. Huber's weights (Huber and Ronchetti, "Robust
statistics", 2009, chapter 7) limit the influence of a slow launch. Values of one block may depend on each other: the
standard error is the jackknife's over blocks (Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapter
11), with Student's t and Satterthwaite's degrees of freedom, which are fewer than the blocks less one where blocks are
incomplete (Bell and McCaffrey, "Bias reduction in standard errors for linear regression with multi-stage samples",
Survey Methodology 28, 2002). Coefficients may be negative: clipping the interval afterwards keeps its coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import fdtrc, stdtrit

from torchreg.scaling.statistics import CONFIDENCE, MAD, Block, Vector

FEWEST_BLOCKS = 4  # with fewer, Student's t is so wide, and Huber's scale so uncertain, that nothing is determined

_LARGEST_CONDITION = 1e5  # of the columns, each scaled to length 1: beyond it they count as linearly dependent
_HUBER = 1.345  # standard deviations; 95 % efficient for normal noise
_SMALLEST_SCALE = 1e-9  # for times without noise
_SMALLEST_MISFIT = 1e-6  # of a time: a smaller one shows nothing
_OUTLYING = 3.0  # standard deviations, to which a residual is clipped, so that one slow launch does not hide a misfit
_MAX_ITERATIONS = 60
_TOLERANCE = 1e-5  # of the fitted times; the next iteration's change is far smaller
_NOT_CONVERGED = 1e-2  # a fit whose last change was larger has no result

Array: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.int64]
Key = TypeVar("Key", bound=Hashable)
Observations: TypeAlias = tuple[Vector, Indices, Indices]  # seconds, and the indices of block and size of each, (n,)


@dataclass(frozen=True)
class Regression:
    """Coefficients (p,), of all blocks and without each block (num_blocks, p); NaN where they are not determined.

    For `nonnegative` the column with the most negative coefficient is removed until none is negative. `lack_of_fit` is
    the probability of residuals as large as these or larger if the times are a sum of these columns.
    """

    coefficients: Vector
    nonnegative: Vector
    without_block: Array
    held_out_error: float | None
    lack_of_fit: float
    _blocks: Indices
    _columns: Array  # (n, p) of the relative times at the fit

    def intervals(
        self, functions: Iterable[Callable[[npt.NDArray[Any]], npt.NDArray[Any]]]
    ) -> list[tuple[float, float, float]]:
        """Values with 95 % intervals of smooth functions of the coefficients (..., p), which must accept complex ones.

        Without block g the coefficients change by −(X'X)⁻¹ X_g' (I − H_gg)⁻¹ r_g, with the hat matrix H = QQ' and the
        residuals r = (I − H) y. So the jackknife's variance is a quadratic form in y. Its degrees of freedom are those
        of the scaled χ² with the same moments, if the noise is independent and of equal size.
        """
        q, triangle = np.linalg.qr(self._columns)
        num_blocks, num_columns = self.without_block.shape
        inside = (self._blocks == np.arange(num_blocks)[:, None]).astype(float)
        gram = np.einsum("bn,ni,nj->bij", inside, q, q)
        # The 1e-9 keeps it solvable where without this block almost nothing is determined.
        inverse = np.linalg.inv((1 + 1e-9) * np.eye(num_columns) - gram)
        found = []
        for function in functions:
            value = float(function(self.coefficients))
            squares = float(np.sum((function(self.without_block) - value) ** 2))
            # The imaginary part of a small imaginary step is the derivative, to machine precision.
            gradient = function(self.coefficients + 1e-30j * np.eye(num_columns)).imag / 1e-30
            change = inverse @ np.linalg.solve(triangle.T, gradient)
            weights = inside * (change @ q.T) - np.einsum("bij,bj->bi", gram, change) @ q.T
            form = weights @ weights.T
            freedom = np.clip(np.trace(form) ** 2 / np.sum(form**2), 1, num_blocks - 1)
            arm = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt((num_blocks - 1) / num_blocks * squares)
            found.append((value, value - arm, value + arm))
        return found


def observe(times: Mapping[Block, Mapping[Key, float]], what: str) -> tuple[Observations, list[Key]]:
    """Lay out {block: {size: seconds}}; also returns the sizes, in the order of their indices.

    Raises ValueError for no times, and for a time that is not positive and finite.
    """
    filled = [of_block for of_block in times.values() if of_block]
    sizes = sorted(set().union(*filled))  # type: ignore[type-var]
    if not sizes:
        raise ValueError("times is empty: give the times of at least one launch")
    rows = [(value, block, sizes.index(size)) for block, found in enumerate(filled) for size, value in found.items()]
    for value, _, index in rows:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"times has {value:g} s at {what} {sizes[index]}: exclude launches without a valid time")
    seconds, blocks, indices = map(np.array, zip(*rows, strict=True))
    return (seconds, blocks, indices), sizes


def regress(observations: Observations, columns: Array, together: Indices) -> Regression:
    """Fit the columns (num_sizes, p), none negative; also without each block, and without each group of sizes in turn.

    Sizes with the same number 0, 1, … in `together` (num_sizes,) are held out together, and predicted from the others.
    """
    times, blocks, sizes = observations
    num_columns, rows, everything = columns.shape[1], columns[sizes], np.ones((1, len(times)), dtype=bool)
    without_each = blocks != np.unique(blocks)[:, None]
    without_together = together[sizes] != np.unique(together)[:, None]
    fits = _fit(rows, times, np.vstack([everything, without_each, without_together]))
    (found,), without_block, without_group = np.split(fits, [1, 1 + len(without_each)])
    kept, some = np.arange(num_columns), found
    while len(kept) > 1 and some.min() < 0:  # not if it is NaN
        kept = np.delete(kept, some.argmin())
        (some,) = _fit(rows[:, kept], times, everything)
    nonnegative = np.zeros(num_columns)
    nonnegative[kept] = some
    medians = np.array([np.median(times[sizes == size]) for size in range(len(columns))])
    error = float(np.abs(np.sum(columns * without_group[together], axis=1) / medians - 1).max())
    relative = rows / (rows @ found)[:, None]
    misfit, held_out_error = _lack_of_fit(observations, columns, found), error if math.isfinite(error) else None
    return Regression(found, nonnegative, without_block, held_out_error, misfit, blocks, relative)


def _lack_of_fit(observations: Observations, columns: Array, coefficients: Vector) -> float:
    """The p-value of the mean residuals of complete blocks, in the directions that no coefficients can follow.

    It is that of an analysis of variance of repeated measures, because the values of one block depend on each other
    (Box, Annals of Mathematical Statistics 25, 1954; Greenhouse and Geisser, Psychometrika 24, 1959). It is 1 where
    every direction can be followed, or too few blocks are complete. Outlying residuals are clipped.
    """
    times, blocks, sizes = observations
    residuals = np.full((blocks.max() + 1, len(columns)), np.nan)
    residuals[blocks, sizes] = np.log(times / (columns @ coefficients)[sizes])
    residuals = residuals[np.isfinite(residuals).all(axis=1)]
    if len(residuals) < FEWEST_BLOCKS or len(columns) <= columns.shape[1]:
        return 1.0
    centre = np.median(residuals, axis=0)
    most = _OUTLYING * MAD * np.median(np.abs(residuals - centre))
    residuals = np.clip(residuals, centre - most, centre + most)
    relative = columns / (columns @ coefficients)[:, None]
    misfits = residuals @ np.linalg.qr(relative, mode="complete")[0][:, columns.shape[1] :]
    mean, num_blocks = misfits.mean(axis=0), len(misfits)
    covariance = np.atleast_2d(np.cov(misfits.T)) / num_blocks + _SMALLEST_MISFIT**2 * np.eye(len(mean))
    freedom = np.trace(covariance) ** 2 / np.sum(covariance**2)
    return float(fdtrc(freedom, freedom * (num_blocks - 1), mean @ mean / np.trace(covariance)))


def _fit(columns: Array, times: Vector, masks: npt.NDArray[np.bool_]) -> Array:
    """Coefficients (fits, p) of the columns (n, p), each fit to the rows in its mask; NaN if they are not determined.

    Gauss–Newton with Huber's weights, all fits at once. A change is limited where a fitted time would become negative.
    """
    num_columns = columns.shape[1]
    result = np.full((len(masks), num_columns), np.nan)
    relative = columns / times[:, None]
    norms = np.linalg.norm(relative, axis=0)
    norms[norms == 0] = 1
    relative /= norms
    gram = np.einsum("fn,ni,nj->fij", masks.astype(float), relative, relative)
    lengths = np.sqrt(np.einsum("fii->fi", gram))
    divisors = np.where(lengths > 0, lengths, 1)
    spectrum = np.linalg.eigvalsh(gram / divisors[:, :, None] / divisors[:, None, :])
    chosen = np.flatnonzero(spectrum[:, 0] * _LARGEST_CONDITION**2 > spectrum[:, -1])
    if not len(chosen):
        return result
    inside, counts, fits = masks[chosen], masks[chosen].sum(axis=1), np.arange(len(chosen))
    freedom = np.sqrt(counts / np.maximum(counts - num_columns, 1))
    found = np.linalg.solve(gram[chosen], np.einsum("fn,ni->fi", inside.astype(float), relative)[:, :, None])[:, :, 0]
    negative = (np.where(inside, found @ relative.T, 1) < 0.1).any(axis=1)
    found[negative] = 1 / lengths[chosen][negative]  # no column is negative, so these times are positive
    for _ in range(_MAX_ITERATIONS):
        fitted = np.where(inside, found @ relative.T, 1)  # as a fraction of the measured times
        residuals = -np.log(fitted)
        ordered = np.sort(np.where(inside, np.abs(residuals), np.inf), axis=1)
        median = (ordered[fits, (counts - 1) // 2] + ordered[fits, counts // 2]) / 2
        scale = np.maximum(MAD * freedom * median, _SMALLEST_SCALE)[:, None]
        weights = inside * np.minimum(1, _HUBER * scale / np.maximum(np.abs(residuals), _SMALLEST_SCALE))
        jacobian = relative / fitted[:, :, None]
        weighted = np.swapaxes(jacobian * weights[:, :, None], 1, 2)
        normal = (weighted @ jacobian) * (1 + 1e-12 * np.eye(num_columns))  # matters only where it is singular
        change = np.linalg.solve(normal, weighted @ residuals[:, :, None])
        relative_change = np.where(inside, (jacobian @ change)[:, :, 0], 0)
        found += (0.8 / np.maximum(-relative_change.min(axis=1), 0.8))[:, None] * change[:, :, 0]
        moved = np.abs(relative_change).max(axis=1)
        if moved.max() < _TOLERANCE:
            break
    result[chosen] = np.where(moved[:, None] < _NOT_CONVERGED, found, np.nan)
    return result / norms
