"""If these fail, a campaign times something else than training, or for less time than it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchreg import timing
from torchreg.config import TrainConfig
from torchreg.data import Standardizer, load_table
from torchreg.runtime import open_runtime
from torchreg.scaling.answer import make_rows
from torchreg.scaling.campaign import Setting
from torchreg.scaling.loop import StepLoop
from torchreg.train import train


class Alone:
    """One rank, as far as a clock needs it."""

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


@pytest.mark.parametrize("optimizer", ["hand", "sgd"])
def test_the_steps_that_are_timed_are_those_of_training(optimizer, tmp_path):
    # 551 rows are 8 batches of 64 and a short one: 30 steps end in the fourth epoch.
    with open_runtime(device="cpu") as runtime:
        rows = make_rows(551, 1, runtime, torch.float64)
        loop = StepLoop.of(Setting(optimizer, "none", 1, 64), rows.x, rows.y, rows.safe_rate, runtime)
        loop.take_steps(12)
        loop.take_steps(18)
        config = TrainConfig(
            optimizer=optimizer, global_batch_size=64, max_steps=30, lr_scaling="none", dtype="float64",
            base_learning_rate=(rows.safe_rate, rows.safe_rate), runs_dir=str(tmp_path),
        )  # fmt: skip
        result = train(config, runtime)
    table = load_table("builtin")
    weight, bias = loop.parameters() * table.target.std()  # the loop's prices are in standard deviations
    weight_out, bias_out = Standardizer.of(table.features, standardize=True).parameters_out([weight], bias)
    assert [*result.weight, result.bias] == pytest.approx([*weight_out, bias_out], rel=1e-10)
