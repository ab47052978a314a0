"""Intervals over launches, the unit of repetition: of a median, of a ratio and of a difference.

Each value is of one launch; steps within a launch share what befell it, and say nothing about the next launch (Hoefler
and Belli, "Scientific benchmarking of parallel computing systems", SC 2015). Intervals are of 95 % and come from ranks,
so one slow launch among several moves them little. They are not bootstrapped (Efron and Tibshirani, "An introduction to
the bootstrap", 1993): percentiles of a ratio of medians cover 94 % with 6 launches, but 99 % with 20 where blocks
differ, as `scripts/measure_statistics.py` shows: they take no profit of what a block's launches share.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

Vector: TypeAlias = npt.NDArray[np.float64]
Block = TypeVar("Block", bound=Hashable)

CONFIDENCE = 0.95
FEWEST_LAUNCHES = 6  # the whole range of 5 values holds the median with 93.75 %, that of 6 with 96.875 %


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; `low` and `high` are None where there are too few launches for one."""

    value: float
    low: float | None
    high: float | None
    num_launches: int


def median_interval(values: Iterable[float]) -> Estimate:
    """The median over launches; distribution-free interval from order statistics.

    The interval from the k-th smallest to the k-th largest value holds the median with a probability that the binomial
    distribution gives (Hahn and Meeker, "Statistical intervals", 1991, chapter 5), which at 8 values is 99.2 % or
    93.0 %, nothing between. It is interpolated to 95 % as Hettmansperger and Sheather do ("Confidence intervals based
    on interpolated order statistics", Statistics & Probability Letters 4, 1986), which depends on the distribution only
    slightly. Assumes independent launches. Raises ValueError for no values or one that is not finite.
    """
    found = np.sort(_checked("values", list(values)))
    value, count = float(np.median(found)), len(found)
    if count < FEWEST_LAUNCHES:
        return Estimate(value, None, None, count)
    rank, part = _median_rank(count)
    low = (1 - part) * found[rank - 1] + part * found[rank]
    high = (1 - part) * found[count - rank] + part * found[count - rank - 1]
    return Estimate(value, float(low), float(high), count)


def ratio_interval(numerator: Mapping[Block, float], denominator: Mapping[Block, float]) -> Estimate:
    """How many times as large the numerator typically is; both are {block: positive value}.

    Launches of one block ran one after the other, so where blocks are shared each gives one ratio, free of what the
    whole block met. The value is the Hodges–Lehmann estimate of their logarithms (the median of the means of all
    pairs), the interval that of Wilcoxon's signed ranks (Hollander and Wolfe, "Nonparametric statistical methods",
    chapter 3): exact if the logarithms of ratios are symmetric about the truth, which they are when both launches are
    disturbed in the same manner, however that is. So the value is near the ratio of the medians, but not equal to it.

    Pairs are made where at least 6 blocks are shared, or all blocks of one side; a block of the other side alone is
    left out. Without pairs the sides count as independent: the value is the ratio of their medians, and the two
    intervals' arms are added as squares, as logarithms (Price and Bonett, "Distribution-free confidence intervals for
    difference and ratio of medians", Journal of Statistical Computation and Simulation 72, 2002; Zou and Donner,
    Statistics in Medicine 27, 2008). That needs no equal spread on both sides, and covers 95 to 98 %. Fewer than 6
    launches on a side: no interval. Keys that are shared by accident do no harm: random pairs are as exact.
    """
    for name, values in (("numerator", numerator), ("denominator", denominator)):
        if (least := _checked(name, list(values.values())).min()) <= 0:
            raise ValueError(f"{name} has {least:g}: a ratio needs positive values")
    shared = _shared(numerator, denominator)
    if shared:
        found = _signed_ranks(np.array([math.log(numerator[block] / denominator[block]) for block in shared]))
    else:
        found = _independent(*(_logarithm(median_interval(side.values())) for side in (numerator, denominator)))
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Estimate(math.exp(found.value), low, high, found.num_launches)


def difference_interval(first: Mapping[Block, float], second: Mapping[Block, float]) -> Estimate:
    """How much larger the first typically is than the second; both are {block: value}.

    Pairs are made as for a ratio, and the median of their differences is told with its distribution-free interval: a
    difference of times is as skewed as the times are, so no symmetry is assumed. Without pairs it is the difference of
    the medians, with an interval as for a ratio.
    """
    for name, values in (("first", first), ("second", second)):
        _checked(name, list(values.values()))
    if shared := _shared(first, second):
        return median_interval(first[block] - second[block] for block in shared)
    return _independent(median_interval(first.values()), median_interval(second.values()))


def karp_flatt(speedup: Estimate, ratio_of_ranks: float) -> Estimate:
    """The serial fraction that a speed-up S over p times as many ranks shows: e = (1/S − 1/p) / (1 − 1/p).

    Karp and Flatt, "Measuring parallel processor performance", Communications of the ACM 33, 1990. It falls with S, so
    the interval's ends change places; below 0 the speed-up is more than linear. Raises ValueError unless p > 1, S > 0.
    """
    if not (math.isfinite(ratio_of_ranks) and ratio_of_ranks > 1):
        raise ValueError(
            f"ratio_of_ranks is {ratio_of_ranks}: Karp and Flatt compare with fewer ranks, give more than 1"
        )

    def fraction(value: float) -> float:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"speedup is {value}: it must be positive")
        return (1 / value - 1 / ratio_of_ranks) / (1 - 1 / ratio_of_ranks)

    low = None if speedup.high is None else fraction(speedup.high)
    high = None if speedup.low is None else fraction(speedup.low)
    return Estimate(fraction(speedup.value), low, high, speedup.num_launches)


def _checked(name: str, values: list[float]) -> Vector:
    if not values:
        raise ValueError(f"{name} is empty: give the value of at least one launch")
    found = np.array(values, dtype=np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"{name} has {found[~np.isfinite(found)][0]}: leave out launches without a finite value")
    return found


def _shared(first: Mapping[Block, float], second: Mapping[Block, float]) -> list[Block]:
    """The blocks by which to make pairs; none if the sides are to be taken as independent."""
    shared = [block for block in first if block in second]
    enough = len(shared) >= FEWEST_LAUNCHES or len(shared) == min(len(first), len(second))
    return shared if enough else []


def _signed_ranks(values: Vector) -> Estimate:
    count = len(values)
    means = np.sort((values[:, None] + values)[np.triu_indices(count)] / 2)
    value = float(np.median(means))
    if count < FEWEST_LAUNCHES:
        return Estimate(value, None, None, count)
    rank = _signed_rank(count)
    return Estimate(value, float(means[rank - 1]), float(means[-rank]), count)


def _logarithm(estimate: Estimate) -> Estimate:
    low, high = (None if end is None else math.log(end) for end in (estimate.low, estimate.high))
    return Estimate(math.log(estimate.value), low, high, estimate.num_launches)


def _independent(first: Estimate, second: Estimate) -> Estimate:
    """The difference of two independent estimates, each with its own, perhaps lopsided, interval."""
    value, fewer = first.value - second.value, min(first.num_launches, second.num_launches)
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return Estimate(value, None, None, fewer)
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, value - below, value + above, fewer)


@lru_cache
def _median_rank(count: int) -> tuple[int, float]:
    """Which order statistic bounds the median of `count` values, and how far to go to the next one inside."""
    rank = _rank_below(binom.pmf(np.arange(count + 1), count, 0.5))
    outer, inner = (1 - 2 * float(binom.cdf(k - 1, count, 0.5)) for k in (rank, rank + 1))
    part = (outer - CONFIDENCE) / (outer - inner)
    return rank, (count - rank) * part / (rank + (count - 2 * rank) * part)


@lru_cache
def _signed_rank(count: int) -> int:
    """From the sum of those of the ranks 1 … count that a fair coin takes."""
    chance = np.ones(1)
    for rank in range(1, count + 1):
        chance = (np.pad(chance, (0, rank)) + np.pad(chance, (rank, 0))) / 2
    return _rank_below(chance)


def _rank_below(chance: Vector) -> int:
    """How many of the smallest outcomes together have at most the chance of one side."""
    return int(np.searchsorted(np.cumsum(chance), (1 - CONFIDENCE) / 2, side="right"))
