"""A run to the target, as a user would train, and what theory says of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torchreg.distributed.communicator import Communicator
from torchreg.runs.config import TrainConfig
from torchreg.runs.record import read_metrics
from torchreg.runs.run import train
from torchreg.runs.setup import prepare
from torchreg.runs.step_errors import MOST_WAITING
from torchreg.scaling.campaign import Campaign, Launch, Setting

MOST_TARGET_FEATURES = 16
"""Beyond, theory predicts no noise and so no steps to a target."""

TARGET_FIELDS = (
    "target_excess",
    "predicted_steps",
    "measured_steps",
    "measured_time_s",
    "stability_limit",
    "noise_floor",
)
_REFERENCE_BATCH_SIZE = 64
_LINES = 4  # of metrics on the way, at least: more would cost a quick step a part of its time
_MOST_STEPS = 20_000
_LEAST_SHARE = 0.1  # of a window, that runs to the target last in all: a single short one says little
_MOST_RUNS = 5


def run_to_target(
    campaign: Campaign, launch: Launch, setting: Setting, communicator: Communicator, folder: Path
) -> dict[str, Any]:
    """Train, as a user would, until the loss is within the target; beside it what theory predicts of that.

    Rows are shuffled, as in the steps that are timed: drawing them afresh would cost a quick step half its time.
    """
    config = TrainConfig(
        num_rows=campaign.effective_num_rows,
        num_features=setting.num_features,
        optimizer=setting.optimizer,
        sync="auto" if setting.sync == "none" else setting.sync,
        global_batch_size=setting.global_batch_size,
        base_learning_rate=(campaign.base_learning_rate, campaign.base_learning_rate),
        reference_batch_size=_REFERENCE_BATCH_SIZE,
        target_excess=campaign.target_excess,
        max_steps=1,
        seed=launch.seed,
        dtype=campaign.dtype,
        device=campaign.device,
        name=setting.name,
        runs_dir=str(folder / "runs"),
        overwrite=True,
    )
    forecast = communicator.from_main(lambda: prepare(config, communicator.world_size)[0].forecast)
    predicted = forecast.steps_to_target
    answer: dict[str, Any] = {
        "target_excess": campaign.target_excess,
        "predicted_steps": predicted,
        "measured_steps": None,
        "measured_time_s": None,
        "stability_limit": forecast.stability_limit,
        "noise_floor": forecast.noise_floor,
    }
    if predicted is None or predicted > _MOST_STEPS:
        return answer
    log_every = max(1, predicted // _LINES)
    if log_every > MOST_WAITING:
        log_every -= log_every % MOST_WAITING  # losses are added up then anyway
    train(replace(config, max_steps=log_every, log_every=log_every), communicator)  # first uses cost more
    # Half as long again, so that a run that is late gets there too.
    config = replace(config, max_steps=math.ceil(1.5 * predicted) + 10, log_every=log_every)
    steps, total_s, num_runs = 0.0, 0.0, 0
    while total_s < _LEAST_SHARE * campaign.window_s and num_runs < _MOST_RUNS:
        result = train(config, communicator)
        crossing: Callable[[], tuple[float, float] | None] = partial(
            _crossing, Path(result.run_dir), result.closed_form_loss, campaign.target_excess
        )
        reached = communicator.from_main(crossing) if result.stopped_by == "target" else None
        if reached is None:
            return answer
        steps, time_s = reached
        total_s, num_runs = total_s + time_s, num_runs + 1
    return {**answer, "measured_steps": steps, "measured_time_s": total_s / num_runs}


def _crossing(run: Path, best_loss: float, target_excess: float) -> tuple[float, float] | None:
    """Steps and seconds at which a run's loss on all rows came within the target: between two lines, where the
    logarithm of the excess is interpolated."""
    lines = [line for line in read_metrics(run) if line.get("full_loss")]
    if len(lines) < 2:
        return None
    before, after = (math.log(line["full_loss"] / best_loss - 1) for line in lines[-2:])
    shard = (before - math.log(target_excess)) / (before - after)
    steps = [line["step"] + 1 for line in lines[-2:]]
    times = [line["time_s"] for line in lines[-2:]]
    return steps[0] + shard * (steps[1] - steps[0]), times[0] + shard * (times[1] - times[0])
