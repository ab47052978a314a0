"""`init_distributed()`: from the launcher's environment to a `Communicator`."""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist

from torchreg.distributed import ezpz, mpi
from torchreg.distributed.communicator import AnySync, Communicator, Placement
from torchreg.distributed.devices import choose_device_type, device_name, own_cpus, take_device, threads_for
from torchreg.distributed.launcher import detect_launcher
from torchreg.distributed.rendezvous import agree_with_mpi, allow_connections, connect, exchange
from torchreg.distributed.watchdog import Watchdog, exit_after

_MAIN_RANK_FIRST_S = 5.0  # its time-out names the ranks that are missing
_JOB_IDS = "PBS_JOBID", "SLURM_JOB_ID", "FLUX_JOB_ID", "LSB_JOBID", "TORCHELASTIC_RUN_ID"
# torch builds with NCCL refuse it on machines without a GPU, so a group has its device's backend only.
_BACKENDS = {"cpu": "cpu:gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}


def init_distributed(
    *,
    distributed: Literal["auto", "ezpz", "torch"] = "auto",
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = "auto",
    sync: AnySync = "ddp",
    dtype: Literal["auto", "float32", "float64"] = "auto",
    timeout_s: float = 300.0,
    run: Mapping[str, object] | None = None,
) -> Communicator:
    """Initialise this rank: detect the launcher, choose the device, make the process group.

    `run` has the options that must be equal on all ranks, by name. Raises `ValueError` for what the user can fix, such
    as a missing package; once all ranks are connected it is an `AgreedError`, with the hosts of those that differ.
    """
    launcher = detect_launcher(os.environ)
    with exit_after(timeout_s, launcher.rank) if launcher.world_size > 1 else nullcontext():
        launcher, comm = agree_with_mpi(launcher, sync, os.environ)
    rank, world_size, host = launcher.rank, launcher.world_size, socket.gethostname()
    if comm is not None and world_size > 1:
        mpi.finalize_within(timeout_s)
    device_type, own_error = "cpu", None
    try:
        device_type = choose_device_type(device, sync, world_size, dtype)
        allow_connections(world_size)
    except ValueError as error:
        if world_size == 1:
            raise
        own_error = str(error)  # raised on all ranks, once they are connected
    ezpz_version = ezpz.find_ezpz(distributed) if world_size > 1 or distributed == "ezpz" else None
    if world_size == 1:
        torch_device, device_id = take_device(device_type, 0)
        placement = Placement(0, host, 0, str(torch_device), device_name(torch_device), device_id)
        return Communicator(launcher, 0, 1, torch_device, "single", None, "none", (placement,), comm)
    watchdog, timeout = Watchdog(rank, host, comm, timeout_s), timedelta(seconds=timeout_s)
    facts = {
        "host": host,
        "cpus": own_cpus(),
        "device": device_type,
        "error": own_error,
        "job": next((f"{name}={os.environ[name]}" for name in _JOB_IDS if name in os.environ), None),
        "options": {name: str(value) for name, value in (run or {}).items()},
    }
    address = f" at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}" if comm is None else ""
    try:
        with watchdog.limit(f"the other ranks to connect{address}", _MAIN_RANK_FIRST_S if rank else 0.0):
            watchdog.store = store = connect(launcher, comm, timeout)
            ask = partial(exchange, store, launcher, timeout_s)
            local_rank, num_threads = ask("torchreg/join", facts, _join)
            if launcher.local_rank is not None:
                local_rank = launcher.local_rank
            torch_device, device_id = take_device(device_type, local_rank)
            ask("torchreg/device", [host, device_type, device_id], _require_distinct_devices)
            backends = _BACKENDS[device_type]
            dist.init_process_group(backends, store=store, rank=rank, world_size=world_size, timeout=timeout)
            gathered: list[Any] = [None] * world_size
            own = Placement(rank, host, local_rank, str(torch_device), device_name(torch_device), device_id)
            dist.all_gather_object(gathered, own)
        placements: tuple[Placement, ...] = tuple(gathered)
        watchdog.hosts = [placement.host for placement in placements]
        if device_type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(num_threads)
        if ezpz_version:
            ezpz.adopt(rank, world_size, torch_device, timeout_s)
        name: Literal["ezpz", "torch"] = "ezpz" if ezpz_version else "torch"
        backend = "MPI" if sync == "mpi" else {"cuda": "nccl", "xpu": "xccl"}.get(device_type, "gloo")
        over_mpi = comm is not None and device_type == "cpu"
        return Communicator(
            launcher, rank, world_size, torch_device, name, ezpz_version, backend, placements, comm, watchdog, over_mpi
        )
    except ValueError:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever it is, it ends all ranks
        watchdog.end(error)


def _join(ranks: list[Any]) -> list[tuple[int, int]]:
    """The local rank and number of threads of each rank. Raises `ValueError` where ranks cannot work together."""

    def require_equal(name: str, values: list[object], remedy: str, of: Sequence[int] = range(len(ranks))) -> None:
        for rank in of:
            if values[rank] != values[of[0]]:
                first, other = (f"{values[each]} on rank {each} ({ranks[each]['host']})" for each in (of[0], rank))
                raise ValueError(f"{name} is {first} and {other}: {remedy}")

    in_job = [rank for rank, each in enumerate(ranks) if each["job"]]
    another_port = "two jobs have one MASTER_ADDR and MASTER_PORT; choose another MASTER_PORT"
    require_equal("job", [each["job"] for each in ranks], another_port, in_job)
    for name in sorted(set().union(*(each["options"] for each in ranks))):
        values = [each["options"].get(name, "unknown") for each in ranks]
        require_equal(name, values, "start all ranks with the same options")
    for rank, each in enumerate(ranks):
        if each["error"]:
            raise ValueError(f"rank {rank} ({each['host']}): {each['error']}")
    require_equal("device", [each["device"] for each in ranks], "name one with --device, or exclude the host")
    local_ranks, cpus_of = list[int](), defaultdict[str, list[int]](list)
    for each in ranks:
        local_ranks.append(len(cpus_of[each["host"]]))  # those before it on its host
        cpus_of[each["host"]].append(each["cpus"])
    num_threads = [threads_for(each["cpus"], cpus_of[each["host"]]) for each in ranks]
    return list(zip(local_ranks, num_threads, strict=True))


def _require_distinct_devices(devices: list[Any]) -> list[None]:
    """Raises `ValueError` where two ranks of a host compute on one accelerator."""
    first: dict[tuple[str, str], int] = {}
    for rank, (host, device_type, identity) in enumerate(devices):
        other = first.setdefault((host, identity), rank)
        if identity and other != rank:
            num_here = len({i for h, _, i in devices if h == host})
            reason = f"rank {other} and rank {rank} ({host}) have one {device_type} device ({identity})"
            remedy = f"start {num_here} rank{'s' * (num_here > 1)} on this host, or choose --device cpu"
            raise ValueError(f"{reason}: {remedy}")
    return [None] * len(devices)
