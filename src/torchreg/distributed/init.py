"""`init_distributed()`: from the launcher's environment to a `Communicator`."""

from __future__ import annotations

import os
import socket
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
from torchreg.distributed.launcher import Launcher, detect_launcher
from torchreg.distributed.rendezvous import agree_with_mpi, connect, exchange
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

    `run` has the options that must be equal on all ranks, by name. Raises `ValueError` for what the user can fix:
    launchers that disagree, a missing package or device; as an `AgreedError` once all ranks are connected, with the
    hosts of those that differ.
    """
    launcher = detect_launcher(os.environ)
    with exit_after(timeout_s, launcher.rank) if launcher.world_size > 1 else nullcontext():
        launcher, comm = agree_with_mpi(launcher, sync, os.environ)
    if comm is not None and launcher.world_size > 1:
        mpi.finalize_within(timeout_s)
    device_type, device_error = "cpu", None
    try:
        device_type = choose_device_type(device, sync, launcher.world_size, dtype)
    except ValueError as error:
        if launcher.world_size == 1:
            raise
        device_error = str(error)  # raised on all ranks, once they are connected
    ezpz_version = ezpz.find_ezpz(distributed) if launcher.world_size > 1 or distributed == "ezpz" else None
    if launcher.world_size == 1:
        torch_device, device_id = take_device(device_type, 0)
        placement = Placement(0, socket.gethostname(), 0, str(torch_device), device_name(torch_device), device_id)
        return Communicator(launcher, 0, 1, torch_device, "single", None, "none", (placement,), comm)
    host = socket.gethostname()
    watchdog = Watchdog(launcher.rank, host, comm, timeout_s)
    facts = {
        "host": host,
        "cpus": own_cpus(),
        "device": device_type,
        "device_error": device_error,
        "job": next((f"{name}={os.environ[name]}" for name in _JOB_IDS if name in os.environ), None),
        "options": {name: str(value) for name, value in (run or {}).items()},
    }
    try:
        return _connect(launcher, comm, watchdog, facts, sync, ezpz_version)
    except ValueError:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever it is, it ends all ranks
        watchdog.end(error)


def _connect(
    launcher: Launcher, comm: Any, watchdog: Watchdog, facts: dict[str, Any], sync: AnySync, ezpz_version: str | None
) -> Communicator:
    """Connect several ranks: exchange their facts, take the device, make the process group."""
    rank, world_size, host, device_type = launcher.rank, launcher.world_size, facts["host"], facts["device"]
    address = f" at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}" if comm is None else ""
    with watchdog.limit(f"to connect{address}", _MAIN_RANK_FIRST_S if rank else 0.0):
        watchdog.store = store = connect(launcher, comm, watchdog.timeout_s)
        ask = partial(exchange, store, launcher, watchdog.timeout_s)
        shared = ask("torchreg/join", facts, _join)
        local_rank = shared["local_rank"] if launcher.local_rank is None else launcher.local_rank
        device, device_id = take_device(device_type, local_rank)
        ask("torchreg/device", [host, device_type, device_id], _require_distinct_devices)
        timeout = timedelta(seconds=watchdog.timeout_s)
        dist.init_process_group(_BACKENDS[device_type], store=store, rank=rank, world_size=world_size, timeout=timeout)
        placements: list[Any] = [None] * world_size
        own = Placement(rank, host, local_rank, str(device), device_name(device), device_id)
        dist.all_gather_object(placements, own)
    watchdog.hosts = [placement.host for placement in placements]
    if device_type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(shared["num_threads"])
    if ezpz_version:
        ezpz.adopt(rank, world_size, device, watchdog.timeout_s)
    return Communicator(
        launcher,
        rank,
        world_size,
        device,
        name="ezpz" if ezpz_version else "torch",
        ezpz_version=ezpz_version,
        backend="MPI" if sync == "mpi" else {"cuda": "nccl", "xpu": "xccl"}.get(device_type, "gloo"),
        placements=tuple(placements),
        mpi_comm=comm,
        watchdog=watchdog,
        over_mpi=comm is not None and device_type == "cpu",
    )


def _join(ranks: list[Any]) -> list[dict[str, int]]:
    """The local rank and number of threads of each rank. Raises `ValueError` where ranks cannot work together."""
    hosts = [each["host"] for each in ranks]
    another_port = "two jobs have one MASTER_ADDR and MASTER_PORT; choose another MASTER_PORT"
    _require_equal("job", {rank: each["job"] for rank, each in enumerate(ranks) if each["job"]}, hosts, another_port)
    for name in sorted(set().union(*(each["options"] for each in ranks))):
        values = {rank: each["options"].get(name, "unknown") for rank, each in enumerate(ranks)}
        _require_equal(name, values, hosts, "start all ranks with the same options")
    for rank, each in enumerate(ranks):
        if each["device_error"]:
            raise ValueError(f"rank {rank} ({each['host']}): {each['device_error']}")
    devices = {rank: each["device"] for rank, each in enumerate(ranks)}
    _require_equal("device", devices, hosts, "name one with --device, or exclude the host")
    cpus_of: dict[str, list[int]] = {}
    joined = []
    for each in ranks:  # a rank's local rank is the number of ranks before it on its host
        cpus_of.setdefault(each["host"], []).append(each["cpus"])
        joined.append({"local_rank": len(cpus_of[each["host"]]) - 1})
    for each, own in zip(ranks, joined, strict=True):
        own["num_threads"] = threads_for(each["cpus"], cpus_of[each["host"]])
    return joined


def _require_equal(name: str, values: Mapping[int, object], hosts: Sequence[str], remedy: str) -> None:
    """Raises `ValueError`, naming two ranks that differ. `values` are those of some ranks, by rank."""
    first = next(iter(values), 0)
    for rank, value in values.items():
        if value != values[first]:
            here, there = f"rank {first} ({hosts[first]})", f"rank {rank} ({hosts[rank]})"
            raise ValueError(f"{name} is {values[first]} on {here} and {value} on {there}: {remedy}")


def _require_distinct_devices(devices: list[Any]) -> list[None]:
    """Raises `ValueError` where two ranks of a host compute on one accelerator."""
    first: dict[tuple[str, str], int] = {}
    for rank, (host, device_type, identity) in enumerate(devices):
        other = first.setdefault((host, identity), rank)
        if identity and other != rank:
            num_here = len({i for h, _, i in devices if h == host})
            raise ValueError(
                f"rank {other} and rank {rank} ({host}) have one {device_type} device ({identity}): start {num_here} "
                f"rank{'s' * (num_here > 1)} on this host, or choose --device cpu"
            )
    return [None] * len(devices)
