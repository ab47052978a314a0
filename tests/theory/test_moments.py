"""If the closed-form solution is wrong, every run is judged by a wrong one."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchreg.data.synthetic import make_houses
from torchreg.theory import Moments

from ..conftest import BEST_BIAS, BEST_LOSS, BEST_WEIGHT


def moments_in_chunks(x, y, chunk_rows):
    parts = [Moments.of(x[i : i + chunk_rows], y[i : i + chunk_rows]) for i in range(0, len(x), chunk_rows)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    return whole


def exact_closed_form(x, y):
    """(weights, bias) and loss in rational arithmetic: the normal equations by elimination, no rounding anywhere."""
    rows = [[*map(Fraction, row), Fraction(1)] for row in x.tolist()]
    target = [Fraction(value) for value in y[:, 0].tolist()]
    p = len(rows[0])
    system = [
        [*(sum(a[i] * a[j] for a in rows) for j in range(p)), sum(a[i] * t for a, t in zip(rows, target, strict=True))]
        for i in range(p)
    ]
    for i in range(p):
        pivot = next(k for k in range(i, p) if system[k][i] != 0)
        system[i], system[pivot] = system[pivot], system[i]
        system[i] = [value / system[i][i] for value in system[i]]
        for k in range(p):
            if k != i:
                system[k] = [u - system[k][i] * v for u, v in zip(system[k], system[i], strict=True)]
    theta = [row[-1] for row in system]
    errors = (t - sum(c * v for c, v in zip(a, theta, strict=True)) for a, t in zip(rows, target, strict=True))
    return theta, sum(error**2 for error in errors) / len(rows)


def digits_right(computed, exact):
    error = max(abs(Fraction(c) - e) / abs(e) for c, e in zip(computed, exact, strict=True))
    return -math.log10(error) if error else 17


def test_closed_form_of_the_lessons_table():
    x, y = make_houses(551, 1, 0)
    best = Moments.of(x, y[:, None]).closed_form()
    assert best.weight[0] == pytest.approx(BEST_WEIGHT, abs=5e-7)
    assert best.bias == pytest.approx(BEST_BIAS, abs=5e-7)
    assert best.loss == pytest.approx(BEST_LOSS, rel=1e-12)


def test_three_rows_worked_out_by_arithmetic():
    # (0,1), (1,3), (2,2): means 1 and 2; Sxx = 2, Sxy = 1, Syy = 2, so w = 1/2, b = 3/2.
    # Residuals −1/2, 1, −1/2: squares 3/2, mean square 1/2; R² = 1 − (3/2)/2 = 1/4.
    # One degree of freedom: s² = 3/2; var w = s²/Sxx = 3/4; var b = s² (1/3 + 1²/Sxx) = 3/2 · 5/6 = 5/4.
    best = Moments.of(np.array([[0.0], [1], [2]]), np.array([[1.0], [3], [2]])).closed_form()
    assert (best.weight[0], best.bias, best.loss) == pytest.approx((0.5, 1.5, 0.5))
    assert best.r_squared == pytest.approx(0.25)
    assert (best.weight_error[0] ** 2, best.bias_error**2) == pytest.approx((0.75, 1.25))
    assert best.condition_number == pytest.approx(1)
    assert best.warning is None


def test_standard_errors_are_those_of_the_normal_equations():
    x, y = make_houses(80, 3, 1)
    best = Moments.of(x, y[:, None]).closed_form()
    a = np.hstack([x, np.ones((80, 1))])
    variance = best.loss * 80 / (80 - 4) * np.diag(np.linalg.inv(a.T @ a))
    np.testing.assert_allclose([*best.weight_error, best.bias_error], np.sqrt(variance), rtol=1e-8)


@pytest.mark.parametrize("num_features", [150, 350])
def test_the_closed_form_of_many_features(num_features):
    # W1: beyond 256 features the condition number is estimated.
    x, y = make_houses(1_000, num_features, 0)
    best = Moments.of(x, y[:, None]).closed_form()
    centred = x - x.mean(axis=0)
    condition = np.linalg.cond(centred / np.linalg.norm(centred, axis=0))
    assert 0.9 * condition < best.condition_number < (1 + 1e-9) * condition
    a = np.hstack([x, np.ones((1_000, 1))])
    variance = best.loss * 1_000 / (1_000 - num_features - 1) * np.diag(np.linalg.inv(a.T @ a))
    np.testing.assert_allclose([*best.weight_error, best.bias_error], np.sqrt(variance), rtol=1e-8)
    assert best.loss == pytest.approx(BEST_LOSS, rel=1e-9)  # which the synthetic data has at any size
    np.testing.assert_allclose(a @ [*best.weight, best.bias] - a @ np.linalg.lstsq(a, y)[0], 0, atol=1e-6)


@given(cut=st.integers(1, 199), seed=st.integers(0, 20), features=st.integers(1, 5))
@settings(max_examples=30)
def test_moments_of_parts_merge_to_those_of_the_whole(cut, seed, features):
    x, y = make_houses(200, features, seed)
    whole = Moments.of(x, y[:, None])
    parts = Moments.of(x[:cut], y[:cut, None]).merge(Moments.of(x[cut:], y[cut:, None]))
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-13, atol=1e-12)
    np.testing.assert_allclose(parts.closed_form().weight, whole.closed_form().weight, rtol=1e-11)
    assert parts.closed_form().loss == pytest.approx(whole.closed_form().loss, rel=1e-12)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("chunk_rows", [40, 7])
def test_a_nearly_constant_feature_with_a_large_offset_loses_no_digits(spread, chunk_rows):
    # In raw units the normal equations lose every digit here: the mean is 1e8 to 1e14 times the spread.
    generator = np.random.default_rng(0)
    x = 1e8 + spread * generator.normal(size=(40, 1))
    y = 3 * (x - 1e8) + spread * generator.normal(size=(40, 1)) + 1
    best = moments_in_chunks(x, y, chunk_rows).closed_form()
    exact, exact_loss = exact_closed_form(x, y)
    assert digits_right([*best.weight.tolist(), best.bias, best.loss], [*exact, exact_loss]) >= 14
    assert best.warning is None


@pytest.mark.parametrize("likeness", [1.0, 1e-2, 1e-4, 1e-6, 1e-8])
def test_nearly_collinear_features_have_the_digits_that_are_reported(likeness):
    # Ten features that differ from their common part by `likeness`: the condition number is about 5 / likeness.
    generator = np.random.default_rng(1)
    x = 100 + generator.normal(size=(60, 1)) + likeness * generator.normal(size=(60, 10))
    y = x @ generator.normal(size=(10, 1)) + generator.normal(size=(60, 1))
    best = moments_in_chunks(x, y, 13).closed_form()
    exact, _ = exact_closed_form(x, y)
    right = digits_right(best.weight.tolist(), exact[:-1])
    assert right >= best.digits
    assert right <= best.digits + 3, "a number far too low would warn of everything"
    assert (best.warning is None) == (best.digits >= 12)
    if best.warning:
        assert f"condition number {best.condition_number:.2g}" in best.warning


def test_many_rows_in_chunks_equal_one_pass():
    x, y = make_houses(200_000, 1, 0)
    x, y = 1e8 + x, y[:, None]
    centred = x[:, 0] - x.mean()
    weight = centred @ (y[:, 0] - y.mean()) / (centred @ centred)
    for best in (Moments.of(x, y).closed_form(), moments_in_chunks(x, y, 1_000).closed_form()):
        assert best.weight[0] == pytest.approx(weight, rel=1e-13)
        assert best.bias == pytest.approx(y.mean() - weight * x.mean(), rel=1e-13)
        assert best.loss == pytest.approx(np.mean((y[:, 0] - y.mean() - weight * centred) ** 2), rel=1e-12)


def test_a_perfect_line_has_no_loss_at_all():
    x = np.arange(50.0)[:, None]
    best = Moments.of(x, 3 * x + 0.1).closed_form()
    assert best.loss == 0
    assert best.r_squared == 1


def test_loss_is_the_mean_squared_error():
    x, y = make_houses(551, 1, 0)
    moments = Moments.of(x, y[:, None])

    @given(weight=st.floats(-200, 200), bias=st.floats(-1e5, 1e5))
    def check(weight, bias):
        loss = moments.loss(np.array([weight]), bias)
        assert loss == pytest.approx(np.mean((y - weight * x[:, 0] - bias) ** 2))

    check()


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_dependent_features_are_refused(offset):
    x = offset + np.random.default_rng(0).normal(size=(100, 1))
    with pytest.raises(ValueError, match="feature 2 of 2 is a linear combination"):
        Moments.of(np.hstack([x, 0.3 * x + 0.7]), x).closed_form()
