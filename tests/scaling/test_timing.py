"""If these fail, a campaign times something else than training, or for less time than it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchreg.data.table import Standardizer, load_table
from torchreg.distributed import timing
from torchreg.distributed.init import init_distributed
from torchreg.runs.config import TrainConfig
from torchreg.runs.logger import LossBuffer
from torchreg.runs.run import Seams, train
from torchreg.scaling import measure
from torchreg.scaling.campaign import Campaign, Launch, Setting
from torchreg.scaling.timed_training import TimedTraining, check, make_samples


class Alone:
    """One rank, with all that a clock needs."""

    def synchronize(self): ...
    def barrier(self): ...
    def largest(self, value):
        return value

    def gather(self, value):
        return [value]


class Clock:
    """Time that passes only in steps."""

    def __init__(self, step_time_s):
        self.now_s, self.step_time_s, self.num_steps = 0.0, step_time_s, 0

    def perf_counter(self):
        return self.now_s

    def take_steps(self, count):
        self.now_s += count * self.step_time_s
        self.num_steps += count


@given(step_time_s=st.floats(1e-6, 3.0), off_by=st.floats(0.1, 10))
def test_a_window_ends_when_it_is_full(step_time_s, off_by):
    clock = Clock(step_time_s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "time", clock)
        num_steps, (window_s,) = timing.time_window(Alone(), clock.take_steps, 1.0, step_time_s / off_by)
    assert num_steps == clock.num_steps
    assert window_s == pytest.approx(num_steps * step_time_s)
    # A step that the warm-up took for ten times as quick makes the first quarter ten times as long.
    most_s = max(1.02, 0.25 * off_by) + 2 * step_time_s
    assert 1.0 <= window_s <= most_s


def training_of(communicator, optimizer="manual"):
    """The training of batches of 64 of the synthetic houses, and their reference."""
    x, y, reference = make_samples(551, 1, communicator, torch.float64)
    return TimedTraining(Setting(optimizer, "none", 1, 64), x, y, reference.safe_learning_rate, communicator), reference


@pytest.mark.parametrize("optimizer", ["manual", "sgd"])
def test_the_steps_that_are_timed_are_those_of_training(optimizer, tmp_path):
    # 551 rows are 8 batches of 64 and a short one: 30 steps end in the fourth epoch.
    with init_distributed(device="cpu") as communicator:
        training, reference = training_of(communicator, optimizer)
        training.take_steps(12)
        training.take_steps(18)
        config = TrainConfig.of(
            optimizer=optimizer, global_batch_size=64, max_steps=30, lr_scaling="none", dtype="float64",
            base_learning_rate=(reference.safe_learning_rate,) * 2, last_batch_lr="full", runs_dir=str(tmp_path),
        )  # fmt: skip
        result = train(config, communicator)
    table = load_table("synthetic")
    weight, bias = training.parameters() * table.target.std()  # the samples' prices are in standard deviations
    weight_out, bias_out = Standardizer.of(table.features, standardize=True).parameters_out([weight], bias)
    assert [*result.weight, result.bias] == pytest.approx([*weight_out, bias_out], rel=1e-10)


def test_the_losses_of_timed_steps_are_reduced_as_often_as_in_training(monkeypatch):
    counts = []
    all_reduce = LossBuffer.all_reduce
    monkeypatch.setattr(LossBuffer, "all_reduce", lambda self: counts.append(len(self.errors)) or all_reduce(self))
    with init_distributed(device="cpu") as communicator:
        training, _ = training_of(communicator)
        for count in (30, 220):  # 250 steps: two sums of a hundred, and fifty that wait
            training.take_steps(count)
        before = training.parameters()
        training.take_samples(100)  # which have no losses, and update nothing
        assert (training.parameters() == before).all()
    assert counts == [100, 100]


@pytest.mark.parametrize(
    ("factor", "end"), [(1.0, "steps end at the closed form"), (1.001, "steps do not end at the closed form")]
)
def test_the_check_compares_the_timed_step_with_gradient_descent(factor, end):
    def enlarged(step):
        return lambda batch, learning_rates: step(batch, tuple(factor * one for one in learning_rates))

    with init_distributed(device="cpu") as communicator:
        x, y, reference = make_samples(551, 1, communicator, torch.float64)
        training = TimedTraining(Setting("sgd", "none", 1, 64), x, y, 0.01, communicator, seams=Seams(step=enlarged))
        training.take_steps(5)
        checked = check(training, reference, communicator)
    assert checked["check_passed"] == (factor == 1)
    assert checked["check_message"].endswith(end)


def test_the_run_to_the_target_is_between_two_halves_of_the_window(monkeypatch):
    # Where one came after the other, times that wander gave one setting in 16 a prediction 16 % off.
    order = []

    def half(communicator, take_steps, window_s, step_time_s):
        order.append(window_s)
        take_steps(3)
        return 3, [0.5]

    monkeypatch.setattr(measure, "time_window", half)
    with init_distributed(device="cpu") as communicator:
        samples = make_samples(551, 1, communicator, torch.float64)

        def run():
            order.append("run")
            return {"target_excess": 0.01, "stability_limit": 2.0, "measured_steps": 7.0, "measured_time_s": 0.1}

        point = measure.measure_point(Setting("manual", "none", 1, 64), 0, samples, communicator, 1.0, run)
    assert order == [0.5, "run", 0.5]
    assert (point.num_steps, point.window_s, point.measured_steps) == (6, 1.0, 7.0)
    assert point.check_passed


def test_a_short_run_to_the_target_is_repeated_and_its_time_is_the_mean(monkeypatch, tmp_path):
    # A tenth of a window of 1 s is asked for: 0.02 + 0.03 + 0.04 s are less, and 0.07 s more are enough.
    times_s = iter([0.02, 0.03, 0.04, 0.07])
    monkeypatch.setattr(measure, "crossing", lambda lines, best_loss, target_excess: (10.5, next(times_s)))
    campaign = Campaign(num_features=(1,), window_s=1.0, base_learning_rate=0.05)
    with init_distributed(device="cpu") as communicator:
        measured = measure.run_to_target(
            campaign,
            Launch("block-00-nodes-1-ranks-1", 0, 1, 1, 1, 3),
            Setting("manual", "none", 1, 64),
            communicator,
            tmp_path,
            Seams(),
        )
    assert measured["measured_steps"] == 10.5
    assert measured["measured_time_s"] == pytest.approx(0.16 / 4)


def test_a_crossing_is_interpolated_in_the_logarithm_of_the_excess():
    lines = [
        {"step": 3, "time_s": 0.2, "full_loss": 9.0},
        {"step": 4, "time_s": 0.25},
        {"step": 9, "time_s": 1.0, "full_loss": 1.1},
        {"step": 19, "time_s": 3.0, "full_loss": 1.001},
    ]
    # From an excess of 10⁻¹ to 10⁻³ of the loss 1, so 10⁻² is half-way from 10 steps to 20 and from 1 s to 3 s.
    assert measure.crossing(lines, 1.0, 0.01) == pytest.approx((15, 2.0))
    assert measure.crossing(lines[:2], 1.0, 0.01) is None
