"""If the closed form or the stability limit is wrong, torchreg does not know the right answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchreg.builtin import make_houses
from torchreg.theory import Moments, Stability, largest_stable_world_size

from .conftest import BEST_BIAS, BEST_LOSS, BEST_WEIGHT

LESSON_RATES = (1e-7, 1e-1)


def houses():
    x, y = make_houses(551, 1, 0)
    return x, y[:, None]


def test_closed_form_of_the_lessons_table():
    best = Moments.of(*houses()).closed_form()
    assert best.weight[0] == pytest.approx(BEST_WEIGHT, abs=5e-7)
    assert best.bias == pytest.approx(BEST_BIAS, abs=5e-7)
    assert best.loss == pytest.approx(BEST_LOSS, rel=1e-12)


def test_closed_form_of_three_rows_by_hand():
    # (0,1), (1,3), (2,2): means 1 and 2; Sxx = 2, Sxy = 1, so w = 1/2, b = 3/2.
    # Residuals −1/2, 1, −1/2: mean square (1/4 + 1 + 1/4) / 3 = 1/2.
    best = Moments.of(np.array([[0.0], [1], [2]]), np.array([[1.0], [3], [2]])).closed_form()
    assert (best.weight[0], best.bias, best.loss) == pytest.approx((0.5, 1.5, 0.5))


@given(cut=st.integers(1, 199), seed=st.integers(0, 20), features=st.integers(1, 5))
@settings(max_examples=30)
def test_moments_of_parts_merge_to_those_of_the_whole(cut, seed, features):
    x, y = make_houses(200, features, seed)
    whole = Moments.of(x, y[:, None]).closed_form()
    parts = Moments.of(x[:cut], y[:cut, None]).merge(Moments.of(x[cut:], y[cut:, None])).closed_form()
    np.testing.assert_allclose(parts.weight, whole.weight, rtol=1e-9)
    assert parts.bias == pytest.approx(whole.bias, rel=1e-9)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-9)


def test_closed_form_survives_a_large_offset():
    # In raw units the normal equations lose every digit here: the mean is 1e8 times the spread.
    x = 1e8 + np.arange(100.0)[:, None]
    best = Moments.of(x, 3 * (x - 1e8) + 1).closed_form()
    assert best.weight[0] == pytest.approx(3, rel=1e-9)


@given(weight=st.floats(-200, 200), bias=st.floats(-1e5, 1e5))
def test_loss_is_the_mean_squared_error(weight, bias):
    x, y = houses()
    assert Moments.of(x, y).loss(np.array([weight]), bias) == pytest.approx(np.mean((y - weight * x - bias) ** 2))


def test_dependent_features_are_refused():
    x = np.arange(10.0)[:, None]
    with pytest.raises(ValueError, match="feature 2 of 2 is a linear combination"):
        Moments.of(np.hstack([x, 2 * x + 1]), x).closed_form()


@pytest.mark.parametrize(
    ("order", "batch_size", "limit"),
    [
        # theory.md: SGD is unstable from k a little above 3, the sequential order hides it until about 7.
        ("simultaneous", 551, 3.154),
        ("simultaneous", 64, 3.140),
        ("sequential", 551, 7.215),
        ("sequential", 64, 7.07),
    ],
)
def test_stability_limit_of_the_lessons_rates(order, batch_size, limit):
    x, _ = houses()
    stability = Stability.of(x, LESSON_RATES, batch_size, order)
    assert stability.largest_multiplier() == pytest.approx(limit, rel=0.01)


def test_full_batch_limit_of_standardised_features_is_one():
    # G is the identity: I − 2kP has the factor 1 − 2·k·0.5, which is below 1 in size for k below 2.
    x, _ = houses()
    standard = (x - x.mean()) / x.std()
    assert Stability.of(standard, (0.5, 0.5), 551).largest_multiplier() == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("side", [0.98, 1.02])
def test_full_batch_trajectories_obey_the_limit(order, side):
    x, _ = houses()
    k = side * Stability.of(x, LESSON_RATES, 551, order).largest_multiplier()
    a = np.hstack([x, np.ones_like(x)])
    gram = a.T @ a / len(a)
    error = np.array([1.0, 1.0])
    sizes = []
    for _ in range(2000):
        slope = 2 * k * np.array(LESSON_RATES) * (gram @ error)
        if order == "sequential":
            error[0] -= slope[0]
            error[1] -= 2 * k * LESSON_RATES[1] * (gram[1] @ error)
        else:
            error = error - slope
        sizes.append(np.abs(error).max())
    assert (sizes[-1] < sizes[200]) == (side < 1)


def test_mean_square_limit_agrees_with_simulated_second_moments():
    # A batch of one row of heavy-tailed data: the mean converges far beyond where the mean square does.
    generator = np.random.default_rng(0)
    x = generator.standard_t(4, size=(40, 1))
    stability = Stability.of(x, (1.0, 1.0), 1)
    limit = stability.largest_multiplier()
    a = np.hstack([x, np.ones_like(x)])
    for k, shrinks in ((0.9 * limit, True), (1.1 * limit, False)):
        # E[M⊗M] over the 40 equally likely rows, which is exact for a batch of one.
        steps = np.eye(2) - 2 * k * np.einsum("ni,nj->nij", a, a)
        exact = np.mean([np.kron(step, step) for step in steps], axis=0)
        assert (np.abs(np.linalg.eigvals(exact)).max() < 1) == shrinks
    assert Stability.of(x, (1.0, 1.0), 40).largest_multiplier() > 1.5 * limit


def test_largest_stable_world_size_of_the_lessons_rates():
    x, _ = houses()
    sizes = [
        largest_stable_world_size(x, LESSON_RATES, 64, lambda b: b / 64, o) for o in ("simultaneous", "sequential")
    ]
    assert sizes == [3, 7]
    assert largest_stable_world_size(x, (1e-6, 1.0), 64, lambda b: b / 64) == 0


def test_beyond_sixteen_parameters_the_mean_is_judged_and_said_so():
    x, _ = make_houses(400, 20, 0)
    assert Stability.of((x - x.mean(0)) / x.std(0), (0.01, 0.01), 32).criterion == "mean"
