"""How ranks find each other and become a process group."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from torchreg.launcher import Launcher
from torchreg.runtime.mpi import import_mpi, mpi_library

_LOOPBACK = "127.0.0.1"
_ALCF_NODE = re.compile(r"x\d+c\d+s\d+b\d+n\d+")
_PMI_HINTS = ("PMI_RANK", "PMI_FD", "PMIX_RANK")


def agree_with_mpi(launcher: Launcher, sync: str, environ: Mapping[str, str]) -> tuple[Launcher, Any]:
    """The launcher, confirmed by MPI, and MPI's world communicator (None where MPI has no part in this run).

    Raises `ValueError` when the launcher and MPI name different ranks or world sizes: the launcher's MPI is
    then not the one that mpi4py was built for, and each rank would train alone.
    """
    hinted = launcher.is_none and any(name in environ for name in _PMI_HINTS)
    has_address = "MASTER_ADDR" in environ and "MASTER_PORT" in environ
    if sync == "mpi":
        mpi = import_mpi("sync is mpi")
    elif hinted or (launcher.uses_mpi and launcher.world_size > 1 and not has_address):
        mpi = import_mpi(f"an MPI launcher started {launcher.world_size if not hinted else 'this'} rank(s)")
    elif launcher.name == "torchrun" or launcher.world_size == 1 or (has_address and not launcher.uses_mpi):
        return launcher, None
    else:  # MPI launchers with an address and srun: MPI is asked where it is there
        try:
            mpi = import_mpi("")
        except ValueError:
            return launcher, None
    comm = mpi.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    if launcher.is_none and hinted and size > 1:
        return Launcher("MPI", rank, size, None, None, uses_mpi=True), comm
    if (rank, size) != (launcher.rank, launcher.world_size):
        who = "no launcher is seen, so this is rank 0 of 1" if launcher.is_none else (
            f"{launcher.name} says rank {launcher.rank} of {launcher.world_size}"
        )  # fmt: skip
        remedy = {
            "torchrun": "start with mpiexec, or choose --sync ddp or allreduce",
            "srun": "use `srun --mpi=...` with the plug-in of mpi4py's MPI, or set MASTER_ADDR and MASTER_PORT",
        }.get(launcher.name, "use the mpiexec of the MPI that mpi4py was built for")
        raise ValueError(f"{who}, but MPI ({mpi_library()}) says rank {rank} of {size}: {remedy}")
    return launcher, comm


def init_process_group(launcher: Launcher, comm: Any, timeout_s: float) -> None:
    """Make the default process group: gloo for CPU tensors, NCCL or XCCL for those of an accelerator.

    On one node every socket is on the loopback interface. Raises `ValueError` where ranks have no way to
    exchange an address.
    """
    timeout = timedelta(seconds=timeout_s)
    one_node = _is_one_node(launcher, comm)
    if one_node:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    elif "GLOO_SOCKET_IFNAME" not in os.environ and any(name == "hsn0" for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "hsn0"
    backend = "cpu:gloo" + "".join(
        f",{device}:{name}" for device, name in (("cuda", "nccl"), ("xpu", "xccl")) if dist.is_backend_available(name)
    )
    store: Store | None = None
    if launcher.name != "torchrun" or "TORCHELASTIC_RUN_ID" not in os.environ:
        store = _make_store(launcher, comm, timeout, one_node)
    dist.init_process_group(backend, store=store, rank=launcher.rank, world_size=launcher.world_size, timeout=timeout)


def _is_one_node(launcher: Launcher, comm: Any) -> bool:
    if comm is not None:
        return len(set(comm.allgather(socket.gethostname()))) == 1
    if launcher.local_world_size is not None:
        return launcher.local_world_size == launcher.world_size
    return os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES")) == "1"


def _make_store(launcher: Launcher, comm: Any, timeout: timedelta, one_node: bool) -> Store:
    is_main = launcher.rank == 0
    if comm is not None:
        store = _serve(launcher, 0, timeout, one_node) if is_main else None
        address = _LOOPBACK if one_node else os.environ.get("MASTER_ADDR") or _reachable_name()
        address, port = comm.bcast((address, store.port) if store else None)
        return store or TCPStore(address, port, launcher.world_size, is_master=False, timeout=timeout)
    address, port = _address_without_mpi(launcher, os.environ)
    if is_main:
        return _serve(launcher, port, timeout, one_node)
    return TCPStore(_LOOPBACK if one_node else address, port, launcher.world_size, is_master=False, timeout=timeout)


def _serve(launcher: Launcher, port: int, timeout: timedelta, one_node: bool) -> TCPStore:
    """The main rank's store. TCPStore itself would listen on every interface; on one node it gets a loopback socket."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_LOOPBACK if one_node else "", port))
    except OSError as error:
        raise ValueError(f"MASTER_PORT is {port}, which is taken ({error.strerror}): choose another") from error
    listener.listen(launcher.world_size)
    return TCPStore(
        _LOOPBACK if one_node else socket.gethostname(),
        listener.getsockname()[1],
        launcher.world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        use_libuv=True,
        master_listen_fd=listener.detach(),
    )


def _address_without_mpi(launcher: Launcher, environ: Mapping[str, str]) -> tuple[str, int]:
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        if not environ["MASTER_PORT"].isdigit():
            raise ValueError(f"MASTER_PORT is {environ['MASTER_PORT']!r}: it must be a number")
        return environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if launcher.name == "srun" and nodes and "SLURM_JOB_ID" in environ:
        step = int(environ.get("SLURM_STEP_ID", "0"))
        return first_slurm_node(nodes), 20_000 + (int(environ["SLURM_JOB_ID"]) * 37 + step) % 20_000
    raise ValueError(
        f"{launcher.name} started {launcher.world_size} ranks, which need an address to meet at: install mpi4py, or "
        "set MASTER_ADDR and MASTER_PORT"
    )


def first_slurm_node(nodes: str) -> str:
    """The first host of a Slurm node list: nid001 of "nid[001-004,007],login1"."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if not match:
        raise ValueError(f"SLURM_JOB_NODELIST is {nodes!r}: it must be a Slurm node list")
    return match[1] + (match[2] or "")


def _reachable_name() -> str:
    """This host's name on the fast network: ALCF's nodes have their own names there."""
    host = socket.gethostname()
    if _ALCF_NODE.fullmatch(host):
        for machine in ("polaris", "aurora"):
            name = f"{host}.hsn.cm.{machine}.alcf.anl.gov"
            try:
                socket.getaddrinfo(name, None)
            except OSError:
                continue
            return name
    return host
