"""A run to the target, as a user would train, and what theory predicts of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torchreg.distributed.communicator import Communicator
from torchreg.runs.config import TrainConfig
from torchreg.runs.logger import MOST_WAITING
from torchreg.runs.record import read_metrics
from torchreg.runs.run import Seams, train
from torchreg.runs.setup import prepare
from torchreg.scaling.campaign import Campaign, Launch, Setting

_MOST_FEATURES = 16  # beyond, theory predicts no noise and so no steps to a target
_REFERENCE_BATCH_SIZE = 64
_NUM_LINES = 4  # of metrics until the target, at least: more would cost a fast step a part of its time
_MOST_STEPS = 20_000
_LEAST_FRACTION = 0.1  # of a window, that runs to the target last in all: a single short one is too uncertain
_MOST_RUNS = 5


def run_to_target(
    campaign: Campaign,
    launch: Launch,
    setting: Setting,
    communicator: Communicator,
    folder: Path,
    seams: Seams = Seams(),
) -> dict[str, Any]:
    """Train, as a user would, until the loss is within the target: the last fields of a `Point`, or none of them.

    Samples are shuffled, as in the steps that are timed: random sampling would cost a fast step half its time.
    """
    if setting.num_features > _MOST_FEATURES:
        return {}
    config = TrainConfig.of(
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
        name=f"{setting.optimizer}-{setting.sync}-features-{setting.num_features}-batch-{setting.global_batch_size}",
        runs_dir=str(folder / "runs"),
        overwrite=True,
    )
    forecast = communicator.from_main(lambda: prepare(config, communicator.world_size)[0].forecast)
    predicted = forecast.steps_to_target
    answer = {
        "target_excess": campaign.target_excess,
        "predicted_steps": predicted,
        "stability_limit": forecast.stability_limit,
        "noise_floor": forecast.noise_floor,
    }
    if predicted is None or predicted > _MOST_STEPS:
        return answer
    log_every = max(1, predicted // _NUM_LINES)
    if log_every > MOST_WAITING:
        log_every -= log_every % MOST_WAITING  # losses are summed over ranks then anyway
    train(config.replace(max_steps=log_every, log_every=log_every), communicator, seams=seams)  # first uses cost more
    # Half as many steps again, so that a run that is late reaches the target too.
    config = config.replace(max_steps=math.ceil(1.5 * predicted) + 10, log_every=log_every)
    reached: list[tuple[float, float]] = []
    while sum(time_s for _, time_s in reached) < _LEAST_FRACTION * campaign.window_s and len(reached) < _MOST_RUNS:
        result = train(config, communicator, seams=seams)
        if result.stopped_by != "target":
            return answer
        lines = communicator.from_main(lambda: read_metrics(Path(result.run_dir)))  # noqa: B023
        one = crossing(lines, result.closed_form_loss, campaign.target_excess)
        if one is None:
            return answer
        reached.append(one)
    mean_s = sum(time_s for _, time_s in reached) / len(reached)
    return {**answer, "measured_steps": reached[-1][0], "measured_time_s": mean_s}


def crossing(lines: list[dict[str, Any]], best_loss: float, target_excess: float) -> tuple[float, float] | None:
    """Steps and seconds at which a run's loss on all samples came within the target, by its lines of metrics.

    The logarithm of the excess is interpolated between the last two lines; None where there are fewer.
    """
    lines = [line for line in lines if line.get("full_loss")][-2:]
    if len(lines) < 2:
        return None
    before, after = (math.log(line["full_loss"] / best_loss - 1) for line in lines)
    fraction = (before - math.log(target_excess)) / (before - after)
    (step, time_s), (end_step, end_s) = ((line["step"] + 1, line["time_s"]) for line in lines)
    return step + fraction * (end_step - step), time_s + fraction * (end_s - time_s)
