"""If these fail, a report's intervals do not have their nominal coverage, and chance is taken for a regression."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchreg.scaling.statistics import Estimate, karp_flatt, median_interval, ratio_interval

from .statistics_script import measure_statistics as measured

TIMES = st.lists(st.floats(1e-6, 1e3), min_size=6, max_size=30)


def test_the_median_of_six_worked_out():
    # From the smallest to the largest: 1 - 2/2^6 = 96.875 %; from the second to the fifth: 1 - 2 * 7/2^6 = 78.125 %.
    # So I = (96.875 - 95) / (96.875 - 78.125) = 0.1, and the way inwards is (6 - 1) I / (1 + (6 - 2) I) = 0.5 / 1.4.
    found = median_interval([4, 1, 6, 2, 5, 3])
    assert found == Estimate(3.5, pytest.approx(1 + 0.5 / 1.4), pytest.approx(6 - 0.5 / 1.4), 6)


def test_five_values_have_a_median_and_no_interval():
    # Even their whole range holds the median with 1 - 2/2^5 = 93.75 % only.
    assert median_interval([3, 1, 2, 5, 4]) == Estimate(3, None, None, 5)
    assert ratio_interval(dict.fromkeys(range(5), 2.0), dict.fromkeys(range(9), 1.0)).low is None
    assert ratio_interval({"a": 2.0}, {"b": 1.0}) == Estimate(2, None, None, 1)


def test_one_launch_twice_as_slow_moves_nothing():
    quiet = [1 + 0.01 * k for k in range(12)]
    slow = [*quiet[:-1], 2.2]
    assert median_interval(slow) == median_interval(quiet)
    ones = dict.fromkeys(range(12), 1.0)
    assert ratio_interval(dict(enumerate(slow)), ones).high < 1.12
    # Of 8 ratios near 3.4 one is 1.1, because the denominator's launch was slow.
    ratios = dict(enumerate([3.4, 3.42, 3.38, 3.41, 3.39, 3.43, 3.37, 3.4 / 3]))
    found = ratio_interval(ratios, dict.fromkeys(range(8), 1.0))
    assert 3.37 < found.low < found.value < found.high < 3.43
    assert found == ratio_interval({**ratios, 7: 3.4 / 300}, dict.fromkeys(range(8), 1.0)), "of no weight, however slow"


def test_the_biweight_of_eight_worked_out():
    # Logarithms -1, -1, -1, 0, 1, 1, 1 and one far away: the median is 0.5, the median distance from it 1, so that the
    # weight ends at c = 4.685 * 1.4826 * sqrt(8/7) = 7.4255. The far one has none, and the centre of the others is 0,
    # where (1/c)^2 = 0.018136. The slope is 1 + 6 (1 - 0.018136) (1 - 5 * 0.018136) = 6.35697, the sum of squares
    # 6 * (1 - 0.018136)^4 = 5.57644, the standard error sqrt(5.57644 / (6.35697 * 5.35697)) = 0.404663, and Student's t
    # of 0.7 * 7 = 4.9 degrees of freedom is 2.58644.
    logs = [-1, -1, -1, 0, 1, 1, 1, 50]
    found = ratio_interval(dict(enumerate(np.exp(logs))), dict.fromkeys(range(8), 1.0))
    arm = 0.404663 * 2.58644
    assert [math.log(end) for end in (found.low, found.value, found.high)] == pytest.approx([-arm, 0, arm], abs=1e-4)


@given(TIMES, st.floats(0.01, 100))
def test_an_interval_holds_its_value_and_scales_with_the_unit(values, unit):
    for interval in (
        median_interval,
        lambda v: ratio_interval(dict(enumerate(v)), dict.fromkeys(range(len(v)), 1.0)),
        lambda v: ratio_interval(dict(enumerate(v)), {-1 - k: 1.0 for k in range(len(v))}),
    ):
        found, scaled = interval(values), interval([unit * value for value in values])
        assert found.low <= found.value * (1 + 1e-12)
        assert found.value * (1 - 1e-12) <= found.high
        assert min(values) * (1 - 1e-12) <= found.value <= max(values) * (1 + 1e-12)
        if interval is median_interval:  # others are no order statistics: with few values they may reach further
            assert min(values) * (1 - 1e-12) <= found.low
            assert found.high <= max(values) * (1 + 1e-12)
        assert [scaled.low, scaled.value, scaled.high] == pytest.approx(
            [unit * found.low, unit * found.value, unit * found.high], rel=1e-9
        )


@given(TIMES)
def test_a_ratio_turned_over_is_its_inverse(values):
    first, second = dict(enumerate(values)), dict(enumerate(np.roll(values, 1)))
    for other in (second, {str(key): value for key, value in second.items()}):
        there, back = ratio_interval(first, other), ratio_interval(other, first)
        assert [1 / back.high, 1 / back.value, 1 / back.low] == pytest.approx([there.low, there.value, there.high])


def test_the_disturbance_of_a_block_cancels():
    blocks = [1.0, 1.3, 0.9, 5.0, 1.1, 2.0, 1.2]
    slow, fast = ({k: time * block for k, block in enumerate(blocks)} for time in (3.0, 2.0))
    assert ratio_interval(slow, fast) == Estimate(*[pytest.approx(1.5)] * 3, 7)
    del slow[3]  # a failed launch takes its block's other launch out of this ratio
    assert ratio_interval(slow, fast) == Estimate(*[pytest.approx(1.5)] * 3, 6)
    assert ratio_interval(fast, fast) == Estimate(1, 1, 1, 7)


def test_independent_sides_are_compared_by_their_medians():
    # Medians 3.5 and 35; arms of 2.5 - 0.5/1.4 and ten times that, as logarithms, summed as squares: both are the same.
    low, high = 1 + 0.5 / 1.4, 6 - 0.5 / 1.4
    first, second = {("new", k): float(k) for k in range(1, 7)}, {("old", k): 10.0 * k for k in range(1, 7)}
    found = ratio_interval(second, first)
    arm = math.hypot(math.log(3.5 / low), math.log(high / 3.5))
    assert found == Estimate(
        pytest.approx(10), pytest.approx(10 * math.exp(-arm)), pytest.approx(10 * math.exp(arm)), 6
    )


def test_few_shared_blocks_do_not_hide_the_others():
    first, second = {k: 2.0 + k / 100 for k in range(8)}, dict.fromkeys(range(4, 12), 1.0)
    assert ratio_interval(first, second).num_launches == 8  # as independent; the four pairs would have no interval
    assert ratio_interval(first, second).low is not None


def test_karp_and_flatt_find_amdahls_serial_fraction():
    def speedup(serial, ranks):
        return 1 / (serial + (1 - serial) / ranks)

    found = karp_flatt(Estimate(speedup(0.1, 4), speedup(0.2, 4), speedup(0.05, 4), 9), 4)
    assert found == Estimate(pytest.approx(0.1), pytest.approx(0.05), pytest.approx(0.2), 9)
    assert karp_flatt(Estimate(4.0, None, None, 3), 4) == Estimate(0, None, None, 3)
    assert karp_flatt(Estimate(5.0, None, None, 3), 4).value < 0  # faster than linear


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: median_interval([]), "values is empty: give the value of at least one launch"),
        (lambda: median_interval([1, math.nan]), "values has nan: exclude launches without a finite value"),
        (lambda: ratio_interval({1: 1.0}, {}), "denominator is empty"),
        (lambda: ratio_interval({1: -1.0}, {1: 1.0}), "numerator has -1: a ratio needs positive values"),
        (lambda: ratio_interval({1: 1.0}, {1: 0.0}), "denominator has 0: a ratio needs positive values"),
        (lambda: ratio_interval({1: math.inf}, {1: 1.0}), "numerator has inf"),
        (lambda: karp_flatt(Estimate(1.0, None, None, 1), 1.0), "ratio_of_ranks is 1.0"),
        (lambda: karp_flatt(Estimate(-1.0, None, None, 1), 2), "speedup is -1.0: it must be positive"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "case",
    [
        *(measured.median_case(count, "lognormal", measured.lognormal) for count in (6, 8, 20)),
        measured.median_case(12, "with spikes", measured.spiky),
        *(measured.ratio_case(blocks, measured.Noise(0.1, 0.1)) for blocks in (6, 8, 20)),
        measured.ratio_case(12, measured.Noise(0.1, 0.05, slow=0.1, failed=0.15)),
        *(
            measured.ratio_case(count, measured.Noise(0, 0.1, slow=0.1, factor=3.0, one_side=True), independent=apart)
            for count in (8, 20)
            for apart in (False, True)
        ),
        measured.ratio_case(20, measured.Noise(0, 0.1, tails=True)),
        measured.independent_case((20, 0.03), (6, 0.1)),
    ],
    ids=lambda case: f"{case.title}, {case.num_blocks}",
)
def test_intervals_cover_the_truth(case):
    # Seeds are fixed. With others, an interval that covers exactly 95 % misses this band in one of 25 tries.
    low, high = case.required
    for covered in measured.measure(case, 500, seed=1).values():
        assert low <= covered.fraction() <= high
