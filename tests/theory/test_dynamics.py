"""If the dynamics are wrong, torchreg predicts convergence where there is none, or a wrong noise floor."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchreg.theory import MAX_FEATURES, Dynamics, RowGradients, learning_curve, steps_to

from ..conftest import data_sources
from .simulation import Houses, simulate

LESSON_RATES = (1e-7, 1e-1)
LESSON_START = (5.0, 1000.0)


def small_table(num_features, seed, num_rows=6):
    """A few rows in units far apart: features (rows, num_features), and any residuals."""
    generator = np.random.default_rng(seed)
    x = generator.exponential(1.0, (num_rows, num_features)) * [1000, 3, 0.1][:num_features]
    return x, 50 * generator.normal(size=(num_rows, 1))


def maps_of_all_batches(x, residual, learning_rates, batch_size, order, k):
    """A(k) of every batch, each as likely as any other, for z = (δ, 1): the algorithm itself as matrices."""
    a = np.hstack([x, np.ones_like(residual)])
    p = a.shape[1]
    weight_only, bias_only = np.diag([1.0] * (p - 1) + [0, 0]), np.diag([0.0] * (p - 1) + [1, 0])
    maps = []
    for batch in itertools.combinations(range(len(a)), batch_size):
        rows, errors = a[list(batch)], residual[list(batch)]
        q = np.zeros((p + 1, p + 1))
        learning_rate = 2 * np.array([[learning_rates[0]]] * (p - 1) + [[learning_rates[1]]]) / batch_size
        q[:-1] = learning_rate * np.hstack([rows.T @ rows, -rows.T @ errors])
        if order == "sequential":
            maps.append((np.eye(p + 1) - k * bias_only @ q) @ (np.eye(p + 1) - k * weight_only @ q))
        else:
            maps.append(np.eye(p + 1) - k * q)
    return np.array(maps), a.T @ a / len(a)


def exact_curve(maps, gram, start, num_steps):
    z = np.append(start, 1.0)
    second = np.outer(z, z)
    excess = []
    for _ in range(num_steps + 1):
        excess.append(np.sum(gram * second[:-1, :-1]))
        second = np.mean([m @ second @ m.T for m in maps], axis=0)
    return excess


@given(num_features=st.integers(1, 3), seed=st.integers(0, 50), batch_size=st.integers(1, 6), k=st.floats(0.1, 3))
@settings(max_examples=40)
def test_random_batches_are_exact_against_all_batches_one_by_one(num_features, seed, batch_size, k):
    x, residual = small_table(num_features, seed)
    learning_rates, start = (2e-7, 0.05), np.array([3.0] * num_features + [100.0])
    dynamics = Dynamics.of(RowGradients.of(x, residual), learning_rates, batch_size)
    maps, gram = maps_of_all_batches(x, residual, learning_rates, batch_size, "simultaneous", k)
    second = np.mean([np.kron(m[:-1, :-1], m[:-1, :-1]) for m in maps], axis=0)
    assert dynamics.radius(k) == pytest.approx(np.abs(np.linalg.eigvals(second)).max(), rel=1e-9)
    mean = np.mean(maps, axis=0)[:-1, :-1]
    assert dynamics.contraction(k) == pytest.approx(np.abs(np.linalg.eigvals(mean)).max(), rel=1e-9)
    curve = learning_curve(dynamics, start, [k] * 8)
    # The residuals are not those of an optimum, so the mean of the noise is not 0: the recursion holds all the same.
    np.testing.assert_allclose(curve.excess, exact_curve(maps, gram, start, 8), rtol=1e-9)


@pytest.mark.parametrize("batch_size", [2, 3, 5, 6])
def test_the_sequential_order_agrees_with_all_batches_within_its_sampling_error(batch_size):
    x, residual = small_table(2, 4)
    learning_rates, start, k = (2e-7, 0.05), np.array([3.0, 3.0, 100.0]), 0.2
    dynamics = Dynamics.of(RowGradients.of(x, residual), learning_rates, batch_size, "sequential")
    maps, gram = maps_of_all_batches(x, residual, learning_rates, batch_size, "sequential", k)
    exact = exact_curve(maps, gram, start, 8)[-1]

    def end(d):
        return learning_curve(d, start, [k] * 8).excess[-1]

    error = dynamics.sampling_error(end)
    assert end(dynamics) == pytest.approx(exact, rel=1e-9, abs=4 * error)
    assert error < 0.03 * exact
    assert (error == 0) == (batch_size == 6), "a full batch needs no sampling"


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
def test_stability_limit_of_the_lessons_learning_rates(order, batch_size, limit):
    dynamics = Dynamics.of(Houses().rows, LESSON_RATES, batch_size, order)
    assert dynamics.largest_multiplier() == pytest.approx(limit, rel=0.01)
    assert dynamics.sampling_error(Dynamics.largest_multiplier) < 0.01 * limit


def test_curvature_worked_out_by_arithmetic():
    # Standardised, G is the identity and the curvature 2 in every direction. Raw: G = [[Σx²/n, Σx/n], [Σx/n, 1]] with
    # Σx²/n = 2257040.4 and Σx/n = 1407.97: twice its eigenvalues have the product 4 (2257040.4 − 1407.97²) = 1098653.
    assert Houses(standardize=True).rows.curvature() == pytest.approx([2, 2])
    small, large = Houses().rows.curvature()
    assert small + large == pytest.approx(2 * (1243629245 / 551 + 1))
    assert small * large == pytest.approx(4 * (1243629245 / 551 - (775791 / 551) ** 2))


def test_full_batch_limit_of_standardised_features_worked_out_by_arithmetic():
    # G is the identity: I − 2kP has the factor 1 − 2·k·0.5, which is below 1 in size for k below 2.
    dynamics = Dynamics.of(Houses(standardize=True).rows, (0.5, 0.5), 551)
    assert dynamics.largest_multiplier() == pytest.approx(2, rel=1e-9)
    assert dynamics.contraction(1.5) == pytest.approx(0.5)
    assert dynamics.radius(1.5) == pytest.approx(0.25)
    assert dynamics.noise_floor(1.5) == 0


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_the_limit_is_where_the_radius_is_one(order, batch_size):
    x, residual = small_table(2, 8, num_rows=40)
    dynamics = Dynamics.of(RowGradients.of(x, residual), (3e-7, 0.02), batch_size, order)
    limit = dynamics.largest_multiplier()
    assert dynamics.radius(0.999 * limit) < 1 < dynamics.radius(1.001 * limit)
    assert dynamics.noise_floor(1.001 * limit) == math.inf


@pytest.mark.parametrize("source", data_sources())
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("batch_size", [64, 551])
def test_simulated_runs_diverge_beyond_the_limit_and_not_below(source, order, batch_size):
    houses = Houses(source)
    limit = Dynamics.of(houses.rows, LESSON_RATES, batch_size, order).largest_multiplier()
    for side in (0.97, 1.03):
        num_runs = 1 if batch_size == 551 else 30  # full batches: all runs are the same
        *_, end = simulate(houses, LESSON_START, LESSON_RATES, batch_size, [side * limit] * 400, num_runs, order=order)
        excess = houses.excess(end).mean()
        assert (excess > 100 * houses.excess(np.array(LESSON_START))) == (side > 1)


@pytest.mark.parametrize(("batch_size", "k"), [(16, 2.0), (64, 3.0)])
def test_the_noise_floor_is_that_of_simulated_runs(batch_size, k):
    houses = Houses()
    floor = Dynamics.of(houses.rows, LESSON_RATES, batch_size).noise_floor(k)
    ends = simulate(houses, houses.optimum, LESSON_RATES, batch_size, [k] * 500, 200, seed=3)
    runs = np.mean([houses.excess(theta) for theta in itertools.islice(ends, 100, None)], axis=0)
    error = runs.std(ddof=1) / math.sqrt(len(runs))
    assert error < 0.02 * floor
    assert runs.mean() == pytest.approx(floor, abs=3 * error)


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_the_learning_curve_and_its_band_hold_simulated_runs(order):
    # With a warm-up, a plateau and a decay, so that a schedule's every part is predicted.
    houses = Houses(standardize=True)
    learning_rates, num_runs = (0.1, 0.1), 400
    factors = [0.2 + 0.8 * t / 20 for t in range(20)] + [1.0] * 60 + [1 - t / 40 for t in range(40)]
    start = np.zeros(2)
    dynamics = Dynamics.of(houses.rows, learning_rates, 32, order)
    curve = learning_curve(dynamics, start - houses.optimum, factors)
    runs = np.array(
        [houses.excess(t) for t in simulate(houses, start, learning_rates, 32, factors, num_runs, order=order)]
    )
    error = runs.std(axis=1, ddof=1) / math.sqrt(num_runs)
    assert curve.excess[0] == pytest.approx(houses.excess(start))
    within = np.abs(runs.mean(axis=1) - curve.excess[1:]) <= 2 * error
    assert within.mean() > 0.85, "95 % of the points are expected, and neighbours depend on each other"
    inside = (runs >= curve.low[1:, None]) & (runs <= curve.high[1:, None])
    assert 0.92 < inside.mean() < 0.98


def test_steps_to_a_target_are_where_the_curve_gets_there():
    houses = Houses()
    dynamics = Dynamics.of(houses.rows, LESSON_RATES, 64)
    start = np.array(LESSON_START) - houses.optimum
    target = 0.05 * houses.best_loss
    steps = steps_to(dynamics, target, start, [1.0])
    curve = learning_curve(dynamics, start, [1.0] * steps)
    assert curve.excess[-1] <= target < curve.excess[-2]
    warmed = steps_to(dynamics, target, start, [0.1 * t for t in range(1, 10)] + [1.0])
    assert warmed > steps
    assert steps_to(dynamics, target, 0 * start, [1.0]) == 0
    assert steps_to(dynamics, target, start, [1.0] * (steps - 1), hold=False) is None


@pytest.mark.parametrize(
    ("learning_rate", "batch_size", "order", "sampling"),
    [
        (1e-4, 64, "simultaneous", "random"),
        (1e-3, 64, "sequential", "random"),
        (1e-4, 64, "simultaneous", "shuffle"),  # followed through its epochs of 9 steps
        (1e-3, 256, "sequential", "shuffle"),  # a short batch in every third step
        (1e-4, 551, "simultaneous", "full"),
    ],
)
def test_steps_to_a_far_target_are_found_without_taking_them_all(learning_rate, batch_size, order, sampling):
    # W2: what is found by doubling is where the curve, step by step, gets there first.
    houses = Houses(standardize=True)
    dynamics = Dynamics.of(houses.rows, (learning_rate, learning_rate), batch_size, order, sampling)
    steps = steps_to(dynamics, 0.01 * houses.best_loss, -houses.optimum, [1.0])
    at = np.unique([*np.linspace(0, steps, 100, dtype=int), steps - 1, steps])
    excess = learning_curve(dynamics, -houses.optimum, [1.0] * steps, at).excess / houses.best_loss
    assert steps > 1_500
    assert excess[-1] <= 0.01 < excess[:-1].min()


@pytest.mark.parametrize("num_features", [1, 20])
@pytest.mark.parametrize("learning_rate", [1e-4, 1e-6, 1e-8])
def test_hundreds_of_millions_of_steps_worked_out_by_arithmetic(learning_rate, num_features):
    # W2. Standardised, one feature or many at its optimum but for the bias: the excess shrinks by (1 − 2 lr)² a step.
    houses = Houses(standardize=True, num_rows=200, num_features=num_features)
    start = np.zeros(num_features + 1)
    start[-1] = math.sqrt(1000 * houses.best_loss)
    steps = steps_to(Dynamics.of(houses.rows, (learning_rate, learning_rate), 200), houses.best_loss, start, [1.0])
    assert steps == pytest.approx(math.log(1000) / (-2 * math.log1p(-2 * learning_rate)), rel=1e-6, abs=1)


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize(("batch_size", "sampling"), [(64, "random"), (100, "shuffle"), (551, "full")])
@pytest.mark.parametrize("standardize", [True, False])
def test_stable_is_where_the_spectral_radius_is_below_one(order, batch_size, sampling, standardize):
    # The radius is found from all eigenvalues, stability from a linear system.
    learning_rates = (0.1, 0.1) if standardize else (1e-7, 1e-3)
    dynamics = Dynamics.of(Houses(standardize=standardize).rows, learning_rates, batch_size, order, sampling)
    limit = dynamics.largest_multiplier()
    for side in (1e-5, 0.1, 0.7, 0.999, 1.001, 1.3, 5):
        assert dynamics.is_stable(side * limit) == (dynamics.radius(side * limit) < 1) == (side < 1), side


def test_large_batches_of_the_sequential_order_end_where_simulated_ones_do():
    # Beyond 512 rows the moments of a batch are those of a normal distribution; here k³ and k⁴ matter most.
    houses = Houses(num_rows=1_000)
    dynamics = Dynamics.of(houses.rows, LESSON_RATES, 600, "sequential")
    ends = simulate(houses, houses.optimum, LESSON_RATES, 600, [5.0] * 300, 100, order="sequential")
    runs = np.mean([houses.excess(theta) for theta in itertools.islice(ends, 100, None)], axis=0)
    error = runs.std(ddof=1) / math.sqrt(len(runs))
    assert dynamics.sampling_error(lambda d: d.noise_floor(5.0)) < error < 0.03 * runs.mean()
    assert dynamics.noise_floor(5.0) == pytest.approx(runs.mean(), abs=3 * error)


def test_a_target_below_the_noise_floor_is_never_reached_and_the_answer_is_fast():
    houses = Houses()
    start = np.array(LESSON_START) - houses.optimum
    for k in (1.0, 5.0):  # stable with a noise floor above the target, and unstable
        dynamics = Dynamics.of(houses.rows, LESSON_RATES, 64)
        assert steps_to(dynamics, 0.001 * houses.best_loss, start, [k]) is None


@pytest.mark.parametrize(
    ("batch_size", "learning_rate", "scaled"),
    [
        (64, 0.05, True),  # the default recipe on one rank: independent batches would have 14 times the noise floor
        (64, 0.05, False),
        (29, 0.05, True),  # 551 = 19·29: no short batch
        (256, 0.2, True),  # three batches an epoch, the last of 39 rows
        (256, 0.2, False),
    ],
)
def test_shuffled_epochs_end_where_simulated_ones_do(batch_size, learning_rate, scaled):
    houses = Houses(standardize=True)
    num_epochs, num_runs = 8, 1_500
    rates = (learning_rate, learning_rate)
    dynamics = Dynamics.of(houses.rows, rates, batch_size, sampling="shuffle", scale_last_batch=scaled)
    steps_per_epoch = math.ceil(551 / batch_size)
    start = np.zeros(2)
    curve = learning_curve(dynamics, start - houses.optimum, [1.0] * num_epochs * steps_per_epoch)
    factors = [1.0] * (len(curve.steps) - 1)
    options = {"shuffle": True, "scale_last_batch": scaled}
    thetas = list(simulate(houses, start, rates, batch_size, factors, num_runs, **options))
    for steps in (2, steps_per_epoch + 1, num_epochs * steps_per_epoch - 1, num_epochs * steps_per_epoch):
        runs = houses.excess(thetas[steps - 1])
        error = runs.std(ddof=1) / math.sqrt(num_runs)
        # The noise of the curvature is approximated: a few percent beside what is measured.
        assert curve.excess[steps] == pytest.approx(runs.mean(), rel=0.06, abs=3 * error), steps
    random = Dynamics.of(houses.rows, rates, batch_size)
    assert (dynamics.noise_floor(1.0) < 0.5 * random.noise_floor(1.0)) == (scaled or batch_size < 256)


def test_the_batches_of_a_shuffled_epoch_compensate_each_other():
    # Two rows, one a step, the model a constant: targets ±1 around the optimum 0, a = 1, learning rate 1/4, so
    # δ ← δ − ½(δ − y) = (δ + y)/2. Whichever comes first, from δ = 0: y/2, then (y/2 − y)/2 = −y/4: δ² = 1/16 for sure,
    # where independent batches would have E[δ²] = (1/4 + 1)/4 = 5/16.
    # The next epoch's y′ is independent: (δ + y′)/2 with (1/16 + 1)/4 = 17/64, then (δ − y′)/4 with 17/256. At 1/2 each
    # step goes to its own target, δ² = 1; back at 1/4, (δ + y″)/2 has (1 + 1)/4.
    rows = RowGradients.of(np.empty((2, 0)), np.array([[1.0], [-1.0]]))
    dynamics = Dynamics.of(rows, (1.0, 0.25), 1, sampling="shuffle")
    curve = learning_curve(dynamics, np.zeros(1), [1.0] * 4 + [2.0] * 4 + [1.0])
    assert curve.excess == pytest.approx([0, 1 / 4, 1 / 16, 17 / 64, 17 / 256, 1, 1, 1, 1, 1 / 2])
    # At the end of each epoch δ ← (δ − y)/4, so the steady state E[δ²] = s has s = (s + 1)/16.
    assert dynamics.noise_floor() == pytest.approx(1 / 15)


def test_a_short_last_batch_at_full_learning_rates_raises_the_noise_floor_and_lowers_the_limit():
    # 551 = 2·256 + 39: at learning rates meant for 256 rows, every third step has the noise of 39.
    houses = Houses()
    random, scaled = (Dynamics.of(houses.rows, LESSON_RATES, 256, sampling=s) for s in ("random", "shuffle"))
    shuffled = Dynamics.of(houses.rows, LESSON_RATES, 256, sampling="shuffle", scale_last_batch=False)
    assert shuffled.noise_floor(2.0) > 3 * random.noise_floor(2.0)
    assert shuffled.largest_multiplier() < random.largest_multiplier() < scaled.largest_multiplier()
    assert scaled.noise_floor(2.0) < 0.3 * shuffled.noise_floor(2.0)
    assert shuffled.radius(shuffled.largest_multiplier()) == pytest.approx(1, abs=1e-5)
    start = np.array(LESSON_START) - houses.optimum
    steps = steps_to(shuffled, 0.01 * houses.best_loss, start, [1.0])
    curve = learning_curve(shuffled, start, [1.0] * steps)
    assert curve.excess[-1] <= 0.01 * houses.best_loss < curve.excess[-2]


def test_the_noise_floor_of_tiny_learning_rates_is_proportional_to_them():
    # To first order the noise floor is proportional to the learning rates: a billionth of them has a billionth of it.
    houses = Houses(standardize=True)
    # (`shuffle` too, because of the short last batch; there an epoch's change is a small difference, of fewer digits.)
    for sampling, digits in (("random", 2e-3), ("shuffle", 1e-2)):
        dynamics = Dynamics.of(houses.rows, (1e-4, 1e-4), 64, sampling=sampling, scale_last_batch=False)
        assert dynamics.noise_floor(1e-9) == pytest.approx(1e-9 * dynamics.noise_floor(1.0), rel=digits)
        assert 0 < Dynamics.of(houses.rows, (1e-300, 1e-300), 64, sampling=sampling).largest_multiplier() < math.inf
    # Where the last batch counts its samples as the others do, an epoch's noise cancels but for what its decay leaves.
    scaled = Dynamics.of(houses.rows, (1e-4, 1e-4), 64, sampling="shuffle")
    assert scaled.noise_floor(0.1) < 0.02 * scaled.noise_floor(1.0)


def test_learning_rates_that_cannot_be_computed_with_are_refused_by_name():
    for learning_rate, size in ((5e-324, "small"), (1e308, "large")):
        with pytest.raises(ValueError, match=rf"base_learning_rate is .*, too {size} to be computed with"):
            Dynamics.of(Houses().rows, (learning_rate, learning_rate), 64)
    with pytest.raises(ValueError, match=r"base_learning_rate is 1e-07 \(weight\) and 1e\+300 \(bias\), too far apart"):
        Dynamics.of(Houses().rows, (1e-7, 1e300), 64)


def test_a_direction_lost_in_float64_rounding_has_no_noise_floor_but_no_crash():
    x = 1e9 + np.arange(40.0)[:, None]
    dynamics = Dynamics.of(RowGradients.of(x, (-1.0) ** np.arange(40)[:, None]), (1e-20, 0.05), 8)
    assert not dynamics.noise_floor() > 1e9


@pytest.mark.parametrize(("num_features", "order"), [(20, "simultaneous"), (64, "simultaneous"), (6, "sequential")])
@pytest.mark.parametrize("heavy", [False, True])
def test_shuffled_epochs_of_many_features_and_of_the_sequential_order_end_where_simulated_ones_do(
    num_features, order, heavy
):
    # Taken as independent, the batches would give up to twice the noise.
    options = {"num_rows": 300, "num_features": num_features}
    houses = Houses.with_outliers(**options) if heavy else Houses(standardize=True, **options)
    rates, batch_size, num_epochs, num_runs = (0.2 / num_features, 0.2), 64, 12, 300
    dynamics = Dynamics.of(houses.rows, rates, batch_size, order, "shuffle")
    factors = [1.0] * 5 * num_epochs
    curve = learning_curve(dynamics, -houses.optimum, factors, [5 * num_epochs], simulate=True)
    ends = simulate(houses, 0 * houses.optimum, rates, batch_size, factors, num_runs, order=order, shuffle=True)
    runs = houses.excess(list(ends)[-1])
    error = runs.std(ddof=1) / math.sqrt(num_runs)
    assert error < 0.06 * runs.mean()
    assert curve.excess[0] == pytest.approx(runs.mean(), rel=0.08, abs=3 * error)
    assert (curve.simulated is None) == (num_features == 64), "which costs too much to simulate"
    if curve.simulated is not None:
        assert curve.simulated[0] == pytest.approx(runs.mean(), abs=4 * math.hypot(error, curve.simulated_error[0]))


def test_beyond_sixteen_features_random_batches_are_exact_against_the_map_written_out():
    # All terms of theory.md, as matrices of p⁴ entries, in the model's own units.
    num_features, k, steps = MAX_FEATURES + 1, 2.0, 40
    houses = Houses.with_outliers(60, num_features)
    p, n, batch_size, rates = num_features + 1, 60, 7, (0.004, 0.05)
    a, e = houses.a, houses.y[:, 0] - houses.a @ houses.optimum
    phi, lr = (n - batch_size) / (batch_size * (n - 1)), np.diag([rates[0]] * num_features + [rates[1]])
    gram, squares = a.T @ a / n, np.einsum("ni,nj->nij", a, a).reshape(n, -1)
    fourth = squares.T @ squares / n  # (1/n) Σ (a aᵀ) ⊗ (a aᵀ): symmetric in all four indices

    def second_moment_map(k):
        shrink, pp = np.eye(p) - 2 * k * lr @ gram, np.kron(lr, lr)
        noise = fourth.reshape(p, p, p, p).transpose(0, 2, 1, 3).reshape(p * p, p * p) - np.kron(gram, gram)
        return np.kron(shrink, shrink) + 4 * k * k * phi * pp @ noise

    dynamics = Dynamics.of(houses.rows, rates, batch_size)
    limit = dynamics.largest_multiplier()
    assert dynamics.criterion == "mean square"
    radii = [np.abs(np.linalg.eigvals(second_moment_map(side * limit))).max() for side in (0.9999, 1, 1.0001)]
    assert radii[0] < 1 < radii[2]
    assert [dynamics.radius(side * limit) for side in (0.9999, 1, 1.0001)] == pytest.approx(radii, rel=1e-5)
    source = 4 * k * k * phi * lr @ (a.T @ (e[:, None] ** 2 * a) / n) @ lr
    steady = np.linalg.solve(np.eye(p * p) - second_moment_map(k), source.ravel()).reshape(p, p)
    assert dynamics.noise_floor(k) == pytest.approx(np.sum(gram * steady), rel=1e-5)
    mean, second, full = -houses.optimum, np.outer(houses.optimum, houses.optimum), second_moment_map(k)
    curve = learning_curve(dynamics, mean, [k] * steps)
    for excess in curve.excess:
        assert excess == pytest.approx(np.sum(gram * second), rel=1e-9)
        third = lr @ (a.T @ ((e * (a @ mean))[:, None] * a) / n) @ lr
        second = (full @ second.ravel()).reshape(p, p) + source - 8 * k * k * phi * third
        mean = mean - 2 * k * lr @ gram @ mean
    assert steps_to(dynamics, curve.excess[-1] * (1 + 1e-9), -houses.optimum, [k]) == steps


def test_where_a_step_costs_too_much_or_the_order_is_sequential_only_the_mean_is_predicted():
    houses = Houses(standardize=True, num_rows=400, num_features=MAX_FEATURES + 1)
    dynamics = Dynamics.of(houses.rows, (0.01, 0.01), 32, "sequential")
    assert dynamics.criterion == "mean"
    assert math.isnan(dynamics.noise_floor(1.0))
    curve = learning_curve(dynamics, -houses.optimum, [1.0] * 50, simulate=True)
    full = simulate(houses, 0 * houses.optimum, (0.01, 0.01), 400, [1.0] * 50, 1, order="sequential")
    np.testing.assert_allclose(curve.excess[1:], [houses.excess(t)[0] for t in full], rtol=1e-9)
    assert np.isnan(curve.low).all()


@pytest.mark.parametrize("scaled", [False, True])
def test_a_last_batch_of_one_row_that_may_be_an_outlier_makes_training_unstable_first_of_all(scaled):
    # Eleven rows in batches of 5, 5 and 1: the map of an epoch is the product of those of its steps, each the mean over
    # all batches of its size. It is unstable far below the limit of the batches of 5 alone, and just above the limit.
    x = np.linspace(-1, 1, 11)[:, None]
    x[0] = 8.0
    x, residual, rates = x - x.mean(), np.ones((11, 1)), (1.0, 0.5)
    dynamics = Dynamics.of(RowGradients.of(x, residual), rates, 5, sampling="shuffle", scale_last_batch=scaled)
    limit = dynamics.largest_multiplier()

    def radius(k):
        sizes = [(5, k), (5, k), (1, k / 5 if scaled else k)]
        steps = [maps_of_all_batches(x, residual, rates, size, "simultaneous", k)[0] for size, k in sizes]
        squares = [np.mean([np.kron(m[:-1, :-1], m[:-1, :-1]) for m in maps], axis=0) for maps in steps]
        return np.abs(np.linalg.eigvals(np.linalg.multi_dot(squares))).max()

    assert all(radius(side * limit) < 1 for side in (0.03, 0.1, 0.3, 0.6, 0.9, 0.9999))
    assert radius(1.0001 * limit) > 1
    assert dynamics.radius(0.9) ** 3 == pytest.approx(radius(0.9), rel=1e-9)
    alone = Dynamics.of(RowGradients.of(x, residual), rates, 5).largest_multiplier()
    assert limit > 0.9 * alone if scaled else limit < 0.7 * alone


def test_the_limit_of_many_features_with_a_short_last_batch_is_where_the_radius_is_one():
    houses = Houses.with_outliers(101, MAX_FEATURES + 2)
    for scaled in (False, True):
        dynamics = Dynamics.of(houses.rows, (0.001, 0.02), 20, sampling="shuffle", scale_last_batch=scaled)
        limit = dynamics.largest_multiplier()
        assert dynamics.radius(0.999 * limit) < 1 < dynamics.radius(1.05 * limit)
        assert dynamics.noise_floor(1.01 * limit) == math.inf


def test_hundreds_of_features_are_predicted_as_well():
    # W1: the sequential order as the simultaneous one.
    houses = Houses(standardize=True, num_rows=900, num_features=600)
    dynamics = Dynamics.of(houses.rows, (0.002, 0.01), 32, "sequential")
    assert dynamics.order == "simultaneous"
    curve = learning_curve(dynamics, -houses.optimum, [1.0] * 300)
    full = simulate(houses, 0 * houses.optimum, (0.002, 0.01), 900, [1.0] * 300, 1)
    np.testing.assert_allclose(curve.excess[1:], [houses.excess(t)[0] for t in full], rtol=1e-6)
    sqrt_learning_rates = np.sqrt([0.002] * 600 + [0.01])
    largest = np.linalg.eigvalsh(houses.a.T @ houses.a / 900 * np.outer(sqrt_learning_rates, sqrt_learning_rates))[-1]
    assert dynamics.largest_multiplier() == pytest.approx(1 / largest, rel=1e-6)
    steps = steps_to(dynamics, curve.excess[250] * (1 + 1e-9), -houses.optimum, [1.0])
    assert steps == 250


def test_the_sequential_order_of_many_features_is_its_own_where_features_have_a_mean():
    # Up to 128 features the mean map of the sequential order is used: with raw features it goes further.
    houses = Houses(num_rows=300, num_features=20)
    limits = [
        Dynamics.of(houses.rows, LESSON_RATES, 300, order).largest_multiplier()
        for order in ("simultaneous", "sequential")
    ]
    assert limits[1] > 1.5 * limits[0]


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_extreme_learning_rates_overflow_nothing(scale):
    houses = Houses()
    limit = Dynamics.of(houses.rows, LESSON_RATES, 64).largest_multiplier()
    learning_rates = (LESSON_RATES[0] * scale, LESSON_RATES[1] * scale)
    extreme = Dynamics.of(houses.rows, learning_rates, 64)
    assert extreme.largest_multiplier() * scale == pytest.approx(limit, rel=1e-9)
    assert (extreme.radius(1.0) < 1) == (scale < 1) or extreme.radius(1.0) == pytest.approx(1)
