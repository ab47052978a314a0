"""95 % intervals over launches, the unit of repetition: of a median and of a ratio.

Each value is of one launch: its steps share its disturbances (Hoefler and Belli, "Scientific benchmarking of parallel
computing systems", SC 2015). `scripts/measure_statistics.py` measures the coverage, also where some launches are slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, t

Vector: TypeAlias = npt.NDArray[np.float64]
Block = TypeVar("Block", bound=Hashable)

CONFIDENCE = 0.95
FEWEST_LAUNCHES = 6  # the range of 5 values contains the median with probability 93.75 %, that of 6 with 96.875 %
MAD = 1.4826  # standard deviations of a normal distribution per median absolute deviation

_CUTOFF = 4.685  # standard deviations, beyond which a ratio has no weight: 95 % efficient for normal noise
_NUM_ITERATIONS = 50  # after far fewer the biweight no longer changes


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; `low` and `high` are None where there are too few launches for one."""

    value: float
    low: float | None
    high: float | None
    num_launches: int


def median_interval(values: Iterable[float]) -> Estimate:
    """The median over launches; distribution-free interval from order statistics.

    The interval from the k-th smallest to the k-th largest value contains the median with a probability given by the
    binomial distribution (Hahn and Meeker, "Statistical intervals", 1991, chapter 5): at 8 values 99.2 % or 93.0 %. It
    is interpolated to 95 % (Hettmansperger and Sheather, "Confidence intervals based on interpolated order statistics",
    Statistics & Probability Letters 4, 1986), which depends on the distribution only slightly. Assumes independent
    launches. Raises ValueError for no values or one that is not finite.
    """
    ordered = np.sort(_checked("values", values))
    value, count = float(np.median(ordered)), len(ordered)
    if count < FEWEST_LAUNCHES:
        return Estimate(value, None, None, count)
    rank, fraction = _median_rank(count)
    low, high = ((1 - fraction) * end[rank - 1] + fraction * end[rank] for end in (ordered, ordered[::-1]))
    return Estimate(value, float(low), float(high), count)


def ratio_interval(numerator: Mapping[Block, float], denominator: Mapping[Block, float]) -> Estimate:
    """The typical ratio of the numerator to the denominator; both are {block: positive value}.

    If at least 6 blocks are shared, or all of one side, each gives one ratio, free of the disturbances of the block.
    The value is Tukey's biweight of their logarithms, in which a launch several times as slow as the others has no
    weight; the interval is Student's t with 0.7 (n − 1) degrees of freedom (Mosteller and Tukey, "Data analysis and
    regression", 1977, chapter 10; Kafadar, "A biweight approach to the one-sample problem", Journal of the American
    Statistical Association 77, 1982). Fewer than 6 launches: the median, and no interval.

    Otherwise the sides count as independent: the value is the ratio of their medians, and the squared arms of the two
    intervals are summed, as logarithms (Price and Bonett, "Distribution-free confidence intervals for difference and
    ratio of medians", Journal of Statistical Computation and Simulation 72, 2002; Zou and Donner, Statistics in
    Medicine 27, 2008). That covers 95 to 98 %.
    """
    for name, side in (("numerator", numerator), ("denominator", denominator)):
        if (least := _checked(name, side.values()).min()) <= 0:
            raise ValueError(f"{name} has {least:g}: a ratio needs positive values")
    shared = [block for block in numerator if block in denominator]
    if len(shared) >= FEWEST_LAUNCHES or len(shared) == min(len(numerator), len(denominator)):
        logs, count = np.array([math.log(numerator[block] / denominator[block]) for block in shared]), len(shared)
        if count < FEWEST_LAUNCHES:
            return Estimate(math.exp(np.median(logs)), None, None, count)
        value, error = _biweight(logs)
        arm = float(t.ppf((1 + CONFIDENCE) / 2, 0.7 * (count - 1))) * error
        return _transformed(Estimate(value, value - arm, value + arm, count), math.exp)
    one, other = (_transformed(median_interval(side.values()), math.log) for side in (numerator, denominator))
    value, low, high = one.value - other.value, None, None
    if one.low is not None and one.high is not None and other.low is not None and other.high is not None:
        low = value - math.hypot(one.value - one.low, other.high - other.value)
        high = value + math.hypot(one.high - one.value, other.value - other.low)
    return _transformed(Estimate(value, low, high, min(one.num_launches, other.num_launches)), math.exp)


def karp_flatt(speedup: Estimate, ratio_of_ranks: float) -> Estimate:
    """The serial fraction that corresponds to a speedup S with p times as many ranks: e = (1/S − 1/p) / (1 − 1/p).

    Karp and Flatt, "Measuring parallel processor performance", Communications of the ACM 33, 1990. It decreases with S;
    below 0 the speedup is superlinear. Raises ValueError unless p > 1 and S > 0.
    """
    if not (math.isfinite(ratio_of_ranks) and ratio_of_ranks > 1):
        raise ValueError(f"ratio_of_ranks is {ratio_of_ranks}: Karp–Flatt compares with fewer ranks, give more than 1")
    for value in (speedup.value, speedup.low, speedup.high):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"speedup is {value}: it must be positive")
    return _transformed(speedup, lambda value: (1 / value - 1 / ratio_of_ranks) / (1 - 1 / ratio_of_ranks))


def _checked(name: str, values: Iterable[float]) -> Vector:
    found = np.array(list(values), dtype=np.float64)
    if not len(found):
        raise ValueError(f"{name} is empty: give the value of at least one launch")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} has {found[~np.isfinite(found)][0]}: exclude launches without a finite value")
    return found


def _transformed(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    """The estimate of a monotonic function of the value."""
    value, count = function(estimate.value), estimate.num_launches
    if estimate.low is None or estimate.high is None:
        return Estimate(value, None, None, count)
    low, high = sorted((function(estimate.low), function(estimate.high)))
    return Estimate(value, low, high, count)


@lru_cache
def _median_rank(count: int) -> tuple[int, float]:
    """The order statistic that bounds the median of `count` values, and how far to move to the next inner one."""
    rank = int(binom.ppf((1 - CONFIDENCE) / 2, count, 0.5))
    outer, inner = (1 - 2 * float(binom.cdf(k - 1, count, 0.5)) for k in (rank, rank + 1))
    excess = (outer - CONFIDENCE) / (outer - inner)
    return rank, (count - rank) * excess / (rank + (count - 2 * rank) * excess)


def _biweight(values: Vector) -> tuple[float, float]:
    """Tukey's biweight of six or more values, and its standard error."""
    centre, count = float(np.median(values)), len(values)
    scale = _CUTOFF * MAD * float(np.median(np.abs(values - centre))) * math.sqrt(count / (count - 1))
    if scale == 0:  # most values are equal
        return centre, 0.0
    for _ in range(_NUM_ITERATIONS):
        squares = np.minimum(1, ((values - centre) / scale) ** 2)
        centre = float(np.average(values, weights=(1 - squares) ** 2))
    slope = max(1.0, float(np.sum((1 - squares) * (1 - 5 * squares))))
    variance = np.sum((values - centre) ** 2 * (1 - squares) ** 4) / (slope * max(1.0, slope - 1))
    return centre, math.sqrt(variance)
