"""If these fail, the forecast before the first step misleads the user."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from torchreg.cli import main
from torchreg.runs.config import TrainConfig
from torchreg.runs.recipes import RECIPES
from torchreg.runs.setup import LeastSquares, prepare
from torchreg.theory import Dynamics, learning_curve

# Standardised features: G is the identity, so with all rows in every step and both learning rates r the error shrinks
# by 1 − 2r a step and the excess loss by its square: by 1/4 with r = 1/4.
QUARTER = TrainConfig.of(sampling="full", base_learning_rate=(0.25, 0.25), lr_scaling="none", max_steps=12)


def forecast_of(config, world_size=1):
    return prepare(config, world_size)[0].forecast


def test_the_curve_of_full_batches_worked_out_by_arithmetic():
    forecast = forecast_of(QUARTER.replace(target_excess=0.01))
    start = forecast.curve.excess[0]
    assert forecast.curve.steps == tuple(range(13))
    assert start > 1
    np.testing.assert_allclose(forecast.curve.excess, [start / 4**t for t in range(13)], rtol=1e-9)
    np.testing.assert_allclose(forecast.curve.low, forecast.curve.excess, rtol=1e-5)
    np.testing.assert_allclose(forecast.curve.high, forecast.curve.excess, rtol=1e-5)
    assert forecast.stability_limit == pytest.approx(4, rel=1e-9)  # 1 − 2·4·¼ = −1
    assert forecast.noise_floor == 0
    assert forecast.steps_to_target == math.ceil(math.log(start / 0.01, 4))


def test_warm_up_and_decay_are_part_of_the_forecast():
    start = forecast_of(QUARTER).curve.excess[0]
    # lr_scaling linear with a reference of 1102 rows halves the learning rates, and the warm-up goes down from the base
    # to them: factors 1 and ¾ of 0.25, then ½: the excess shrinks by (½)², (1 − ⅜)², and then (¾)² a step.
    warmed = QUARTER.replace(lr_scaling="linear", reference_batch_size=1102, warmup_steps=2, max_steps=4)
    curve = forecast_of(warmed).curve
    np.testing.assert_allclose(
        curve.excess, start * np.cumprod([1, 1 / 4, 25 / 64, 9 / 16, 9 / 16]), rtol=1e-9
    )  # fmt: skip
    # Linear decay to 0 over 5 steps: factors 1, ¾, ½, ¼, 0 of 0.25.
    curve = forecast_of(QUARTER.replace(decay="linear", max_steps=5)).curve
    np.testing.assert_allclose(
        curve.excess, start * np.cumprod([1, (1 / 2) ** 2, (5 / 8) ** 2, (3 / 4) ** 2, (7 / 8) ** 2, 1]), rtol=1e-9
    )


def test_a_constant_learning_rate_may_reach_the_target_after_the_run_but_a_decayed_one_may_not():
    soon = QUARTER.replace(max_steps=2, target_excess=0.01)
    assert forecast_of(soon).steps_to_target == forecast_of(soon.replace(max_steps=50)).steps_to_target > 2
    assert forecast_of(soon.replace(decay="linear")).steps_to_target is None


def test_the_band_and_the_noise_floor_are_those_of_the_dynamics():
    config = RECIPES["homework"].replace(max_steps=50)
    forecast, least_squares = forecast_of(config), LeastSquares.of(config)
    dynamics = Dynamics.of(least_squares.rows, config.optimizer.base_learning_rate, 64, "sequential")
    best = least_squares.closed_form.loss
    assert forecast.noise_floor == pytest.approx(dynamics.noise_floor() / best, rel=1e-12)
    curve = learning_curve(dynamics, least_squares.start_error, [1.0] * 50, simulate=True)
    for name in ("excess", "low", "high"):
        expected = getattr(curve, name)[list(forecast.curve.steps)] / best
        np.testing.assert_allclose(getattr(forecast.curve, name), expected, rtol=1e-9, err_msg=name)
    assert forecast.simulated_ratio[0] == pytest.approx(curve.simulated[-1] / curve.excess[-1], rel=1e-9)


def test_long_runs_are_predicted_to_their_first_20_000_steps():
    forecast = forecast_of(TrainConfig.of(sampling="full", max_steps=1_000_000))
    assert forecast.curve.steps[-1] == 20_000
    assert len(forecast.curve.steps) <= 240


@pytest.mark.parametrize(
    ("config", "part"),
    [
        # Expected excess after 12 steps: 18.3683 / 4¹² of the closed form's loss.
        (QUARTER, "stable: learning rate at 25 % of the limit; expected end 0.000109 % above the optimum (exact)"),
        (
            QUARTER.replace(base_learning_rate=(2.0, 2.0)),
            "unstable: learning rate at 2 times the limit; expected to diverge (exact)",
        ),
        (TrainConfig.of(base_learning_rate=(1e-9, 1e-9)), "stable: learning rate at 1.0e-07 % of the limit; "),
        (TrainConfig(), " above the optimum (simulated runs: 0.99 ± 0.05 times that). 95 % of runs: "),
        (
            TrainConfig.of(update_order="sequential", optimizer="manual", sampling="random"),
            "(estimated from sampled batches)",
        ),
        (TrainConfig.of(num_features=17, num_rows=300), "% of the limit; expected end about "),
        (TrainConfig.of(sampling="random", base_learning_rate=(0.98, 0.98)), "diverges in the mean square: learning "),
        # Only the first 20,000 of the steps are predicted, and too many to be simulated.
        (TrainConfig.of(sampling="random", max_steps=300_000, decay="cosine"), "expected after 20,000 steps "),
        (TrainConfig.of(sampling="random", max_steps=300_000), "expected end 0.206 % above"),  # the noise floor
        (TrainConfig.of(sampling="random", max_steps=20_000), "(exact). About 95 % of runs: "),
        (
            RECIPES["homework"].replace(num_features=17, num_rows=300),
            "mean converges: learning rate at 14 % of the limit of the mean, which makes no run stable; expected end ",
        ),
        (RECIPES["homework"].replace(num_features=17, num_rows=300), "(without the noise of mini-batches)"),
    ],
)
def test_the_forecast_in_one_line(config, part):
    message = forecast_of(config).message()
    assert part in message
    for word in ("nan", "inf", "\n"):
        assert word not in message


def test_a_limit_of_the_mean_is_never_called_stable():
    config = RECIPES["homework"].replace(num_features=17, num_rows=300, max_steps=3)
    sequential, simultaneous = (forecast_of(config.replace(update_order=o)) for o in ("sequential", "simultaneous"))
    assert simultaneous.criterion == "mean square"
    assert simultaneous.is_stable is True
    assert 0 < simultaneous.curve.low[-1] < simultaneous.curve.excess[-1] < simultaneous.curve.high[-1]
    assert sequential.criterion == "mean"
    assert sequential.is_stable is None
    assert sequential.curve.excess[-1] > 0
    assert "stable:" not in sequential.message()
    assert np.isnan([sequential.noise_floor, *sequential.curve.low, *sequential.curve.high]).all()


def test_the_first_learning_rates_of_a_warm_up_that_goes_down_count():
    # Full batches of standardised features: the limit is a learning rate of 1, and the warm-up begins with 1.5.
    config = QUARTER.replace(base_learning_rate=(1.5, 1.5), lr_scaling="linear", reference_batch_size=5510)
    assert forecast_of(config).is_stable  # a tenth of it
    warmed = forecast_of(config.replace(warmup_steps=5))
    assert warmed.is_stable is False
    assert warmed.stability_limit == pytest.approx(1 / 1.5)


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_a_short_last_batch_of_outliers_is_stable_with_its_share_of_the_learning_rate_alone(num_samples):
    # Four ranks have batches of 256 and then of so few, with four times the default learning rates. Drawn into these,
    # the one outlier multiplies the error by 100 and more.
    generator = np.random.default_rng(num_samples)
    x = generator.normal(size=512 + num_samples)
    x[7] = 60.0
    lines = [f"{a},{b}" for a, b in zip(x, 2 * x + generator.normal(size=len(x)), strict=True)]
    Path("heavy.csv").write_text("\n".join(["GrLivArea,SalePrice", *lines]))
    config = TrainConfig.of(data="heavy.csv", base_learning_rate=(0.05, 0.05))
    scaled, full = (forecast_of(config.replace(last_batch_lr=rule), 4) for rule in ("scaled", "full"))
    assert scaled.is_stable is True
    assert scaled.curve.excess[-1] < scaled.curve.excess[0]
    assert full.is_stable is False
    assert full.mean_converges


def test_a_perfect_line_has_no_excess_to_predict():
    Path("perfect.csv").write_text("GrLivArea,SalePrice\n1,2\n2,4\n3,6\n4,8\n")
    forecast = forecast_of(TrainConfig.of(data="perfect.csv", local_batch_size=2))
    assert forecast.is_stable
    assert (forecast.curve, forecast.steps_to_target) == (None, None)
    assert math.isnan(forecast.noise_floor)
    assert re.fullmatch(
        r"stable: learning rate at [\d.]+ % of the limit \(approximate for shuffle sampling\)", forecast.message()
    )


def test_train_prints_its_forecast_before_the_first_step_and_records_it(capsys):
    assert main(["train", "--recipe", "homework", "--max-steps", "30", "--name", "predicted"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (index,) = [number for number, line in enumerate(lines) if line.startswith("forecast ")]
    assert index < min(number for number, line in enumerate(lines) if line.startswith("step "))
    record = json.loads(Path("runs/predicted/record.json").read_text())["forecast"]
    expected = forecast_of(RECIPES["homework"].replace(max_steps=30))
    assert record["curve"]["steps"][-1] == 30
    assert record["noise_floor"] == expected.noise_floor
    assert expected.message() in lines[index]


@pytest.mark.timeout(60)  # W2: it took 101 s
def test_sixteen_features_in_the_sequential_order_are_predicted_soon():
    forecast = forecast_of(RECIPES["homework"].replace(num_rows=1_000, num_features=16))
    assert forecast.steps_to_target > 1_000_000
    assert 0 < forecast.stability_limit_error < 0.01 * forecast.stability_limit


def test_the_sequential_order_of_too_many_features_is_warned_of(capsys):
    options = ["--recipe", "homework", "--num-features", "130", "--num-rows", "200", "--max-steps", "2"]
    assert main(["train", *options]) == 0
    warning = "warning: update_order is sequential, which is predicted up to 128 features"
    assert warning in "".join(capsys.readouterr())


def test_full_batches_override_the_batch_size_of_the_recipe(capsys):
    assert main(["train", "--recipe=homework", "--sampling=full", "--max-steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["global_batch_size"] == 551


@pytest.mark.timeout(60)  # W1: 100 features took 47 s and 3 GB, 300 could not be trained at all
def test_many_features_are_trained(capsys):
    options = ["--num-features", "300", "--num-rows", "400", "--global-batch-size", "400"]
    assert main(["train", *options, "--max-steps", "3", "--json", "--name", "many"]) == 0
    result = json.loads(capsys.readouterr().out)
    forecast = json.loads(Path("runs/many/record.json").read_text())["forecast"]
    assert result["excess"] == pytest.approx(forecast["curve"]["excess"][-1], rel=1e-9)


@pytest.mark.parametrize(
    ("learning_rate", "code"), [("5e-324", 2), ("1e-320", 2), ("1e-300", 0), ("1e30", 3), ("1e300", 3), ("1e308", 2)]
)
@pytest.mark.parametrize("options", [[], ["--num-features", "20"], ["--recipe", "homework"]])
def test_extreme_learning_rates_are_trained_with_or_refused_in_one_line(learning_rate, code, options, capsys):  # W5
    assert main(["train", *options, "--base-learning-rate", learning_rate, learning_rate, "--max-steps", "3"]) in {
        code,
        2,
    }
    err = capsys.readouterr().err.splitlines()
    if code == 2:
        (line,) = err
        assert line.startswith("torchreg: error: base_learning_rate is ")
        assert "computed with" in line
