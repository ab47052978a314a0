"""What one launch does: measure every setting on its ranks, check that each one computes the right thing, and tell.

All ranks call `measure_launch`; what it returns is the same on all of them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchreg.distributed.communicator import AnySync, Communicator
from torchreg.distributed.timing import elapsed_on_ranks, steps_for, time_all_reduce, time_window, warm_up
from torchreg.runs.environment import machine_facts
from torchreg.runs.rows import torch_dtype
from torchreg.scaling.campaign import Campaign, Launch, Setting, settings
from torchreg.scaling.known_rows import Rows, check, make_rows
from torchreg.scaling.loop import StepLoop
from torchreg.scaling.target import MOST_TARGET_FEATURES, TARGET_FIELDS, run_to_target

ALL_REDUCE_BYTES = (8, 64, 512, 4_096, 32_768, 262_144, 2_097_152)
_ALL_REDUCE_S = 0.05  # of repetitions at each size, about
_MOST_REPEATS = 50


def measure_launch(campaign: Campaign, launch: Launch, communicator: Communicator, folder: Path) -> dict[str, Any]:
    """Measure every setting of a launch, in an order drawn from its seed; `folder` takes the runs to the target.

    Raises `AgreedError`, on every rank, for what cannot be measured here.
    """
    dtype = torch_dtype(campaign.dtype, communicator.device)
    by_mpi = communicator.mpi_comm is not None and communicator.device.type == "cpu"
    chosen = settings(campaign, communicator.world_size, by_mpi=by_mpi)
    communicator.from_main(lambda: _refuse(campaign, launch, communicator, by_mpi=by_mpi))
    rows = {
        count: make_rows(campaign.effective_num_rows, count, communicator, dtype) for count in campaign.num_features
    }
    order = np.random.default_rng(launch.seed).permutation(len(chosen)).tolist()
    points: list[dict[str, Any]] = []
    for place, number in enumerate(order):
        setting = chosen[number]
        run = None
        if setting.num_features <= MOST_TARGET_FEATURES:
            run = partial(run_to_target, campaign, launch, setting, communicator, folder)
        measured = _measure_point(setting, rows[setting.num_features], communicator, campaign.window_s, run)
        points.append({**asdict(setting), "order": place, **measured})
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "points": points,
        "allreduce": _all_reduce(communicator, dtype, launch.seed, by_mpi=by_mpi),
        "distributed": communicator.describe_environment(campaign.distributed),
        "machine_facts": _facts(communicator),
    }


def _facts(communicator: Communicator) -> dict[str, str | None]:
    """What the hosts of all ranks have; where they differ, all that there is."""
    of_ranks = communicator.gather(machine_facts())
    found = {name: sorted({value for facts in of_ranks if (value := facts[name])}) for name in of_ranks[0]}
    return {name: ", ".join(values) or None for name, values in found.items()}


def _refuse(campaign: Campaign, launch: Launch, communicator: Communicator, *, by_mpi: bool) -> None:
    found = (communicator.num_nodes, communicator.world_size)
    if found != (launch.num_nodes, launch.world_size):
        raise ValueError(
            f"launch is {launch.id}, and what the launcher started are {found[1]} ranks on {found[0]} nodes: see "
            "launcher and launcher_args"
        )
    devices = sorted({place.device.split(":")[0] for place in communicator.placements})
    if campaign.device not in ("auto", *devices) or len(devices) > 1:
        raise ValueError(f"device is {campaign.device}, and the ranks have {', '.join(devices)}: nothing is measured")
    wanted = [combination for combination in campaign.combinations if combination.endswith("/mpi")]
    if wanted and not by_mpi and communicator.world_size > 1:
        raise ValueError(
            f"combinations has {wanted[0]}, and these ranks have no MPI for CPU tensors: start them with mpiexec on "
            "the CPU, or leave it out"
        )


def _measure_point(
    setting: Setting, rows: Rows, communicator: Communicator, window_s: float, run: Callable[[], dict[str, Any]] | None
) -> dict[str, Any]:
    """Time a setting's steps, with averaging and without, and its `run` to the target; then check the step itself.

    After the warm-up: steps without averaging, half a window with it, the run, the other half, steps without averaging.
    What drifts meanwhile is then the same for all three.
    """
    loop = StepLoop.of(setting, rows.x, rows.y, rows.safe_learning_rate, communicator)
    num_warmup_steps, step_time_s = warm_up(communicator, loop.take_steps, window_s)
    alone = None
    if communicator.world_size > 1:
        alone = StepLoop.of(setting, rows.x, rows.y, rows.safe_learning_rate, communicator, averaged=False)
    local_times_s: list[list[float]] = []
    half = 0
    if alone:
        _, local_step_time_s = warm_up(communicator, alone.take_steps, window_s / 4)
        half = steps_for(window_s / 8, local_step_time_s)
        local_times_s.append(elapsed_on_ranks(communicator, partial(alone.take_steps, half)))
    gc.collect()
    halves = [time_window(communicator, loop.take_steps, window_s / 2, step_time_s)]
    target = run() if run else None
    halves.append(time_window(communicator, loop.take_steps, window_s / 2, step_time_s))
    num_steps = sum(count for count, _ in halves)
    times_s = [sum(both) for both in zip(*(times for _, times in halves), strict=True)]
    if alone:
        local_times_s.append(elapsed_on_ranks(communicator, partial(alone.take_steps, half)))
    rows_steps = min(num_steps, steps_for(window_s / 10, step_time_s))
    data_time_s = max(elapsed_on_ranks(communicator, partial(loop.take_rows, rows_steps))) / rows_steps
    slowest = int(np.argmax(times_s))
    return {
        "local_batch_size": loop.plan.local_batch_size,
        "message_bytes": (setting.num_features + 1) * rows.x.dtype.itemsize,
        "num_warmup_steps": num_warmup_steps,
        "num_steps": num_steps,
        "window_s": max(times_s),
        "step_time_s": max(times_s) / num_steps,
        "rank_min_s": min(times_s) / num_steps,
        "rank_median_s": float(np.median(times_s)) / num_steps,
        "rank_max_s": max(times_s) / num_steps,
        "slowest_rank": slowest,
        "slowest_host": communicator.placements[slowest].host,
        "local_step_time_s": sum(map(max, local_times_s)) / (2 * half) if alone else None,
        "data_time_s": data_time_s,
        "throughput": setting.global_batch_size * num_steps / max(times_s),
        **check(loop, rows, communicator),
        **(target or dict.fromkeys(TARGET_FIELDS)),
    }


def _all_reduce(communicator: Communicator, dtype: torch.dtype, seed: int, *, by_mpi: bool) -> list[dict[str, Any]]:
    """The time to add up messages of many sizes over ranks, by each way that there is, in an order drawn by `seed`."""
    if communicator.world_size == 1:
        return []
    ways: list[AnySync] = ["allreduce", "mpi"] if by_mpi else ["allreduce"]
    cases = [(sync, num_bytes) for sync in ways for num_bytes in ALL_REDUCE_BYTES]
    measured = []
    for place in np.random.default_rng(seed).permutation(len(cases)).tolist():
        sync, num_bytes = cases[place]
        once_s = time_all_reduce(communicator, sync, num_bytes, 3, dtype)
        num_repeats = max(10, min(_MOST_REPEATS, int(_ALL_REDUCE_S / once_s)))
        measured.append(
            {
                "backend": "MPI" if sync == "mpi" else communicator.backend,
                "sync": sync,
                "message_bytes": num_bytes,
                "time_s": time_all_reduce(communicator, sync, num_bytes, num_repeats, dtype),
                "num_repeats": num_repeats,
            }
        )
    return measured
