"""What one launch does: measure every setting on its ranks, and check that each computes the right parameters.

All ranks call `measure_launch`; what it returns is the same on all of them.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from torchreg.distributed.communicator import AnySync, Communicator
from torchreg.distributed.timing import elapsed_on_ranks, steps_for, time_all_reduce, time_window, warm_up
from torchreg.runs.config import TrainConfig
from torchreg.runs.environment import machine_facts
from torchreg.runs.logger import MOST_WAITING
from torchreg.runs.record import read_metrics
from torchreg.runs.run import Seams, torch_dtype, train
from torchreg.runs.setup import prepare
from torchreg.scaling.campaign import Campaign, Launch, Setting, settings
from torchreg.scaling.launch_record import Point
from torchreg.scaling.timed_training import Reference, TimedTraining, check, make_samples

ALL_REDUCE_BYTES = (8, 64, 512, 4_096, 32_768, 262_144, 2_097_152)
_ALL_REDUCE_S = 0.05  # of repetitions at each size, about
_MOST_REPEATS = 50

# Of runs to the target.
_MOST_FEATURES = 16  # beyond, a forecast takes seconds in each launch
_REFERENCE_BATCH_SIZE = 64
_NUM_LINES = 4  # of metrics until the target, at least: more would cost a fast step a part of its time
_MOST_STEPS = 20_000
_LEAST_FRACTION = 0.1  # of a window, that they last in all: a single short one is too uncertain
_MOST_RUNS = 5


def measure_launch(
    campaign: Campaign, launch: Launch, communicator: Communicator, folder: Path, seams: Seams = Seams()
) -> dict[str, Any]:
    """Measure every setting of a launch, in an order drawn from its seed; `folder` takes the runs to the target.

    Returns what an `OkLaunch` has of it, as plain data. Raises `AgreedError`, on every rank, for what cannot be
    measured here.
    """
    dtype = torch_dtype(campaign.dtype, communicator.device)
    by_mpi = communicator.mpi_comm is not None and communicator.device.type == "cpu"
    chosen = settings(campaign, communicator.world_size, by_mpi=by_mpi)
    communicator.from_main(lambda: _refuse(campaign, launch, communicator, by_mpi=by_mpi))
    samples = {
        count: make_samples(campaign.effective_num_rows, count, communicator, dtype) for count in campaign.num_features
    }
    points = []
    for order, index in enumerate(np.random.default_rng(launch.seed).permutation(len(chosen)).tolist()):
        setting, given = chosen[index], samples[chosen[index].num_features]
        run = partial(run_to_target, campaign, launch, setting, communicator, folder, seams)
        points.append(measure_point(setting, order, given, communicator, campaign.window_s, run, seams))
    allreduce = _all_reduce(communicator, dtype, launch.seed, by_mpi=by_mpi)
    facts = communicator.gather(machine_facts())  # where they differ between hosts, all values are recorded
    values = {name: sorted({str(one[name]) for one in facts if one[name]}) for name in facts[0]}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "points": msgspec.to_builtins(points),
        "allreduce": allreduce,
        "distributed": communicator.describe_environment(campaign.distributed),
        "machine_facts": {name: ", ".join(found) or None for name, found in values.items()},
    }


def _refuse(campaign: Campaign, launch: Launch, communicator: Communicator, *, by_mpi: bool) -> None:
    found = (communicator.num_nodes, communicator.world_size)
    if found != (launch.num_nodes, launch.world_size):
        raise ValueError(
            f"launch is {launch.id}, and what the launcher started are {found[1]} ranks on {found[0]} nodes: see "
            "launcher and launcher_args"
        )
    devices = sorted({placement.device.split(":")[0] for placement in communicator.placements})
    if campaign.device not in ("auto", *devices) or len(devices) > 1:
        raise ValueError(f"device is {campaign.device}, and the ranks have {', '.join(devices)}: nothing is measured")
    wanted = [combination for combination in campaign.combinations if combination.endswith("/mpi")]
    if wanted and not by_mpi and communicator.world_size > 1:
        raise ValueError(
            f"combinations has {wanted[0]}, and these ranks have no MPI for CPU tensors: start them with mpiexec on "
            "the CPU, or omit it"
        )


def measure_point(
    setting: Setting,
    order: int,
    samples: tuple[Tensor, Tensor, Reference],
    communicator: Communicator,
    window_s: float,
    run: Callable[[], dict[str, Any]],
    seams: Seams = Seams(),
) -> Point:
    """Time a setting's steps, with reduction over ranks and without, and its `run` to the target; check the step.

    After the warm-up: steps without reduction, half a window with it, the run, the other half, steps without
    reduction. A drift of the machine's speed is then the same for all three.
    """
    x, y, reference = samples
    make = partial(TimedTraining, setting, x, y, reference.safe_learning_rate, communicator, seams=seams)
    training = make()
    num_warmup_steps, warm_step_s = warm_up(communicator, training.take_steps, window_s)
    take_local_steps, local_time_s = None, 0.0
    if communicator.world_size > 1:
        alone = make(all_reduce=False)
        num_local_steps = steps_for(window_s / 8, warm_up(communicator, alone.take_steps, window_s / 4)[1])
        take_local_steps = partial(alone.take_steps, num_local_steps)
        local_time_s = max(elapsed_on_ranks(communicator, take_local_steps))
    gc.collect()
    first, first_s = time_window(communicator, training.take_steps, window_s / 2, warm_step_s)
    target = run()
    second, second_s = time_window(communicator, training.take_steps, window_s / 2, warm_step_s)
    if take_local_steps:
        local_time_s += max(elapsed_on_ranks(communicator, take_local_steps))
    num_steps = first + second
    times_s = [sum(both) / num_steps for both in zip(first_s, second_s, strict=True)]
    step_time_s = max(times_s)
    num_data_steps = min(num_steps, steps_for(window_s / 10, warm_step_s))
    data_time_s = max(elapsed_on_ranks(communicator, partial(training.take_samples, num_data_steps)))
    slowest = times_s.index(step_time_s)
    return Point(
        **asdict(setting),
        order=order,
        local_batch_size=training.plan.local_batch_size,
        message_bytes=(setting.num_features + 1) * x.dtype.itemsize,
        num_warmup_steps=num_warmup_steps,
        num_steps=num_steps,
        window_s=step_time_s * num_steps,
        step_time_s=step_time_s,
        local_step_time_s=local_time_s / (2 * num_local_steps) if take_local_steps else None,
        data_time_s=data_time_s / num_data_steps,
        throughput=setting.global_batch_size / step_time_s,
        rank_min_s=min(times_s),
        rank_median_s=float(np.median(times_s)),
        rank_max_s=step_time_s,
        slowest_rank=slowest,
        slowest_host=communicator.placements[slowest].host,
        **check(training, reference, communicator),
        **target,
    )


def run_to_target(
    campaign: Campaign, launch: Launch, setting: Setting, communicator: Communicator, folder: Path, seams: Seams
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
    answer = {name: getattr(forecast, name) for name in ("stability_limit", "noise_floor")}
    answer |= {"target_excess": campaign.target_excess, "predicted_steps": predicted}
    if predicted is None or predicted > _MOST_STEPS:
        return answer
    log_every = max(1, predicted // _NUM_LINES)
    if log_every > MOST_WAITING:
        log_every -= log_every % MOST_WAITING  # losses are summed over ranks then anyway
    train(config.replace(max_steps=log_every, log_every=log_every), communicator, seams=seams)  # first uses cost more
    # Half as many steps again, so that a run that is late reaches the target too.
    config = config.replace(max_steps=math.ceil(1.5 * predicted) + 10, log_every=log_every)
    num_steps, times_s = 0.0, list[float]()
    while sum(times_s) < _LEAST_FRACTION * campaign.window_s and len(times_s) < _MOST_RUNS:
        result = train(config, communicator, seams=seams)
        if result.stopped_by != "target":
            return answer
        lines = communicator.from_main(partial(read_metrics, Path(result.run_dir)))
        reached = crossing(lines, result.closed_form_loss, campaign.target_excess)
        if reached is None:
            return answer
        num_steps, time_s = reached
        times_s.append(time_s)
    return {**answer, "measured_steps": num_steps, "measured_time_s": sum(times_s) / len(times_s)}


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


def _all_reduce(communicator: Communicator, dtype: torch.dtype, seed: int, *, by_mpi: bool) -> list[dict[str, Any]]:
    """The fields of an `AllReduce` by message size, with each backend that there is, in an order drawn by `seed`."""
    syncs: list[AnySync] = ["allreduce", "mpi"] if by_mpi else ["allreduce"]
    cases = list(itertools.product(syncs, ALL_REDUCE_BYTES)) if communicator.world_size > 1 else []
    measured = []
    for index in np.random.default_rng(seed).permutation(len(cases)).tolist():
        sync, num_bytes = cases[index]
        once_s = time_all_reduce(communicator, sync, num_bytes, 3, dtype)
        num_repeats = max(10, min(_MOST_REPEATS, int(_ALL_REDUCE_S / once_s)))
        time_s = time_all_reduce(communicator, sync, num_bytes, num_repeats, dtype)
        one = {"sync": sync, "message_bytes": num_bytes, "num_repeats": num_repeats, "time_s": time_s}
        measured.append({"backend": "MPI" if sync == "mpi" else communicator.backend, **one})
    return measured
