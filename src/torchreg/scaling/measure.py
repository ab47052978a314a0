"""What one launch does: measure every setting on its ranks, and check that each computes the right parameters.

All ranks call `measure_launch`; what it returns is the same on all of them.
"""

from __future__ import annotations

import gc
import itertools
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
from torchreg.runs.environment import machine_facts
from torchreg.runs.run import Seams, dtype_name, torch_dtype
from torchreg.scaling.campaign import Campaign, Launch, Setting, settings
from torchreg.scaling.known_samples import Reference, check, make_samples
from torchreg.scaling.launch_record import Point
from torchreg.scaling.target import run_to_target
from torchreg.scaling.timed_training import TimedTraining

ALL_REDUCE_BYTES = (8, 64, 512, 4_096, 32_768, 262_144, 2_097_152)
_ALL_REDUCE_S = 0.05  # of repetitions at each size, about
_MOST_REPEATS = 50


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
        setting = chosen[index]
        run = partial(run_to_target, campaign, launch, setting, communicator, folder, seams)
        given = samples[setting.num_features]
        points.append(measure_point(setting, order, given, communicator, campaign.window_s, run, seams))
    allreduce = _all_reduce(communicator, dtype, launch.seed, by_mpi=by_mpi)
    facts = communicator.gather(machine_facts())  # where they differ between hosts, all values are recorded
    values = {name: sorted({str(one[name]) for one in facts if one[name]}) for name in facts[0]}
    return {
        "dtype": dtype_name(dtype),
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
    train = partial(TimedTraining, setting, x, y, reference.safe_learning_rate, communicator, seams=seams)
    training = train()
    num_warmup_steps, step_time_s = warm_up(communicator, training.take_steps, window_s)
    local_times_s: list[list[float]] = []
    take_local_steps = None
    if communicator.world_size > 1:
        alone = train(all_reduce=False)
        _, local_step_time_s = warm_up(communicator, alone.take_steps, window_s / 4)
        num_local_steps = steps_for(window_s / 8, local_step_time_s)
        take_local_steps = partial(alone.take_steps, num_local_steps)
        local_times_s.append(elapsed_on_ranks(communicator, take_local_steps))
    gc.collect()
    halves = [time_window(communicator, training.take_steps, window_s / 2, step_time_s)]
    target = run()
    halves.append(time_window(communicator, training.take_steps, window_s / 2, step_time_s))
    num_steps = sum(count for count, _ in halves)
    times_s = [sum(both) for both in zip(*(times for _, times in halves), strict=True)]
    if take_local_steps:
        local_times_s.append(elapsed_on_ranks(communicator, take_local_steps))
    num_data_steps = min(num_steps, steps_for(window_s / 10, step_time_s))
    data_times_s = elapsed_on_ranks(communicator, partial(training.take_samples, num_data_steps))
    slowest = int(np.argmax(times_s))
    return Point(
        **asdict(setting),
        order=order,
        local_batch_size=training.plan.local_batch_size,
        message_bytes=(setting.num_features + 1) * x.dtype.itemsize,
        num_warmup_steps=num_warmup_steps,
        num_steps=num_steps,
        window_s=max(times_s),
        step_time_s=max(times_s) / num_steps,
        local_step_time_s=sum(map(max, local_times_s)) / (2 * num_local_steps) if take_local_steps else None,
        data_time_s=max(data_times_s) / num_data_steps,
        throughput=setting.global_batch_size * num_steps / max(times_s),
        rank_min_s=min(times_s) / num_steps,
        rank_median_s=float(np.median(times_s)) / num_steps,
        rank_max_s=max(times_s) / num_steps,
        slowest_rank=slowest,
        slowest_host=communicator.placements[slowest].host,
        **check(training, reference, communicator),
        **target,
    )


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
        backend = "MPI" if sync == "mpi" else communicator.backend
        one = {"backend": backend, "sync": sync, "message_bytes": num_bytes, "num_repeats": num_repeats}
        measured.append({**one, "time_s": time_s})
    return measured
