"""How ranks find each other: the launcher confirmed by MPI, and a key-value store that all ranks reach."""

from __future__ import annotations

import ipaddress
import json
import math
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from torchreg.distributed.launcher import Launcher, sign_of_mpi
from torchreg.distributed.mpi import import_mpi, mpi_library

_ALCF_NODE = re.compile(r"x\d+c\d+s\d+b\d+n\d+")
_NOT_STARTED_BY_MPI = "torchrun", "RANK and WORLD_SIZE", "horovodrun"
_READ_WITHIN_S = 2.0
_MOST_CONNECTED = 64  # ranks
_OTHER_FILES = 256  # that a process may have open beside its connections


class AgreedError(ValueError):
    """An error that every rank raises together, so that all can exit in order; the main rank reports it."""


def agree_with_mpi(launcher: Launcher, sync: str, environ: Mapping[str, str]) -> tuple[Launcher, Any]:
    """The launcher, confirmed by MPI, and MPI's world communicator (None where MPI has no part in this run).

    Raises `ValueError` when the launcher and MPI have different ranks or world sizes: the launcher's MPI is then not
    the one that mpi4py was built for, and each rank would train alone.
    """
    sign = sign_of_mpi(environ) if launcher.is_none else None
    has_address = "MASTER_ADDR" in environ and "MASTER_PORT" in environ
    reason = ""
    if sync == "mpi":
        reason = "sync is mpi"
    elif sign:
        reason = f"{sign} is set, so an MPI launcher started this process"
    elif launcher.uses_mpi and launcher.world_size > 1 and not has_address:
        reason = f"{launcher.name} started {launcher.world_size} ranks"
    elif launcher.world_size == 1 or launcher.name in _NOT_STARTED_BY_MPI:
        return launcher, None
    try:
        comm = import_mpi(reason).COMM_WORLD
    except ValueError:
        if reason:
            raise
        return launcher, None  # MPI launchers with an address, srun and Flux: MPI confirms where it can be imported
    rank, size = comm.Get_rank(), comm.Get_size()
    reported = f"but MPI ({mpi_library()}) reports rank {rank} of {size}"
    if sign and environ[sign].isdecimal() and sign != "PMI_FD" and int(environ[sign]) != rank:
        raise ValueError(f"{sign} is {environ[sign]}, {reported}: use the launcher of mpi4py's MPI")
    if sign and size > 1:
        return Launcher("MPI", rank, size, None, None, uses_mpi=True), comm
    if (rank, size) != (launcher.rank, launcher.world_size):
        started = f"{launcher.name} started rank {launcher.rank} of {launcher.world_size}"
        if launcher.is_none:
            started = "no launcher is detected (rank 0 of 1)"
        remedy = "use the mpiexec of mpi4py's MPI"
        if launcher.name in _NOT_STARTED_BY_MPI:
            remedy = "start with mpiexec, or choose --sync ddp or allreduce"
        elif launcher.name == "srun":
            remedy = "set SLURM_MPI_TYPE (or srun --mpi) to the plug-in of mpi4py's MPI, pmi2 for MPICH or pmix for "
            remedy += "Open MPI, as `srun --mpi=list` names it"
        raise ValueError(f"{started}, {reported}: {remedy}")
    return launcher, comm


def connect(launcher: Launcher, comm: Any, timeout: timedelta) -> Store:
    """The key-value store that all ranks reach. On one node every socket of it, and of gloo, is on loopback.

    Raises `ValueError` where ranks cannot exchange an address.
    """
    one_node = _is_one_node(launcher, comm)
    if one_node:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    elif "GLOO_SOCKET_IFNAME" not in os.environ and any(name == "hsn0" for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "hsn0"
    if launcher.name == "torchrun":  # its agent has a store already
        store: Store = next(rendezvous("env://", launcher.rank, launcher.world_size, timeout=timeout))[0]
        return store
    is_main, address, port = launcher.rank == 0, "", 0
    if comm is None:
        address, port = _address_without_mpi(launcher, os.environ)
    elif is_main and not one_node:  # it alone looks up its names
        address = _reachable_name()
    if one_node:
        address = _loopback()
    server = _serve(launcher, address, port, timeout) if is_main else None
    if comm is not None:
        address, port = comm.bcast((address, server.port) if server else None)
    return server or TCPStore(address, port, launcher.world_size, is_master=False, timeout=timeout)


def allow_connections(world_size: int) -> None:
    """Prepare this process for gloo's connections to many ranks. Raises `ValueError` where too few files may be open.

    gloo connects every two of N ranks at once: 2N² + N requests of the store, and N + 5 sockets of each rank. Beyond 64
    ranks only those are connected that exchange messages, when they first do; the main rank does with all.
    """
    if world_size <= _MOST_CONNECTED:
        return
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = world_size + _OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ValueError(f"the limit of open files (ulimit -Hn) is {hard}: {world_size} ranks need {wanted}")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def exchange(
    store: Store, launcher: Launcher, timeout_s: float, topic: str, item: Any, answer: Callable[[list[Any]], list[Any]]
) -> Any:
    """Gather every rank's item on the main rank, and return this rank's part of `answer(items)`. All are JSON.

    Each rank makes a few requests to the store, however many ranks there are. A `ValueError` of `answer` becomes an
    `AgreedError` on every rank. Raises `TimeoutError` on the main rank, with the ranks that did not join.
    """
    rank, world_size = launcher.rank, launcher.world_size
    own = json.dumps([os.urandom(8).hex(), socket.gethostname(), item])
    first = store.compare_set(f"{topic}/{rank}", "", own).decode()
    if first != own:
        reason = f"this is a second rank {rank} of {world_size}, and the first is on {json.loads(first)[1]}"
        raise ValueError(f"{reason}: two runs have one MASTER_ADDR and MASTER_PORT; choose another MASTER_PORT")
    if rank == 0:
        keys = [f"{topic}/{other}" for other in range(world_size)]
        if not poll(lambda: store.check(keys), timeout_s):
            missing = ", ".join(str(other) for other, key in enumerate(keys) if not store.check([key]))
            raise TimeoutError(f"waited {timeout_s:g} s for rank {missing} of {world_size} to join")
        try:
            answers = [[None, each] for each in answer([json.loads(store.get(key))[2] for key in keys])]
        except ValueError as error:
            answers = [[str(error), None]] * world_size
        for key, each in zip(keys, answers, strict=True):
            store.set(f"{key}/answer", json.dumps(each))
    poll(lambda: store.check([f"{topic}/{rank}/answer"]))  # the watchdog ends this wait
    reason, answered = json.loads(store.get(f"{topic}/{rank}/answer"))
    if not reason:
        return answered
    store.add(f"{topic}/read", 1)
    if rank == 0:  # the store ends with this process
        poll(lambda: store.add(f"{topic}/read", 0) >= world_size, _READ_WITHIN_S)
    raise AgreedError(reason)


def poll(is_done: Callable[[], bool], within_s: float = math.inf) -> bool:
    """Whether a condition on the store becomes true in time, on the monotonic clock.

    A blocking wait would keep the store from the thread that reports a failure.
    """
    deadline_s, pause_s = time.monotonic() + within_s, 0.001
    while not is_done():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)
    return True


def _is_one_node(launcher: Launcher, comm: Any) -> bool:
    if comm is not None:
        return len(set(comm.allgather(socket.gethostname()))) == 1
    if launcher.local_world_size is not None:
        return launcher.local_world_size == launcher.world_size
    if launcher.name == "srun":
        return os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES")) == "1"
    return _is_loopback(os.environ.get("MASTER_ADDR", ""))


def _is_loopback(address: str) -> bool:
    with suppress(ValueError):  # a name
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"


def _loopback() -> str:
    """The loopback address of this host, which may have IPv6 alone."""
    return "127.0.0.1" if _is_own("127.0.0.1") else "::1"


def _is_own(address: str) -> bool:
    """Whether an address or a name is one of this host's own."""
    with suppress(OSError):
        family, kind, protocol, _, own = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(own)
        return True
    return False


def _serve(launcher: Launcher, address: str, port: int, timeout: timedelta) -> TCPStore:
    """The main rank's store, for ranks that connect to `address`.

    TCPStore itself would listen on every interface: on one node it gets a loopback socket. Otherwise it listens on all
    of this host's addresses, since the name that other ranks use may be unknown here.
    """
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    except OSError:
        family = socket.AF_INET
    interface = _loopback() if _is_loopback(address) else ""
    try:
        listener = socket.create_server((interface, port), family=family, backlog=launcher.world_size)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ValueError(f"MASTER_PORT is {port}, which is taken ({reason}): choose another") from error
    own, own_port = "127.0.0.1" if family == socket.AF_INET else "::1", listener.getsockname()[1]
    options: Any = {"is_master": True, "wait_for_workers": False, "use_libuv": True}
    return TCPStore(own, own_port, launcher.world_size, timeout=timeout, master_listen_fd=listener.detach(), **options)


def _address_without_mpi(launcher: Launcher, environ: Mapping[str, str]) -> tuple[str, int]:
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        port = environ["MASTER_PORT"]
        if not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ValueError(f"MASTER_PORT is {port!r}: it must be a number from 1 to 65535")
        return environ["MASTER_ADDR"], int(port)
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if launcher.name == "srun" and nodes and "SLURM_JOB_ID" in environ:
        step = int(environ.get("SLURM_STEP_ID", "0"))
        return first_slurm_node(nodes), 20_000 + (int(environ["SLURM_JOB_ID"]) * 37 + step) % 20_000
    ranks = f"{launcher.name} started {launcher.world_size} ranks, which need an address to connect to"
    raise ValueError(f"{ranks}: install mpi4py, or set MASTER_ADDR and MASTER_PORT")


def first_slurm_node(nodes: str) -> str:
    """The first host of a Slurm node list: nid001 of "nid[001-004,007],login1". Raises `ValueError` for other text."""
    first = re.sub(r"\[([^],-]*)[^]]*]", r"\1", nodes).split(",")[0]
    if not re.fullmatch(r"[\w.-]+", first):
        raise ValueError(f"SLURM_JOB_NODELIST is {nodes!r}: it must be a Slurm node list")
    return first


def _reachable_name() -> str:
    """This host's name on the fast network. MASTER_ADDR counts where it is this host: it may be left from elsewhere."""
    host = socket.gethostname()
    names = [os.environ.get("MASTER_ADDR", "")]
    if _ALCF_NODE.fullmatch(host):
        names += [f"{host}.hsn.cm.{machine}.alcf.anl.gov" for machine in ("polaris", "aurora")]
    names.append(re.sub(r"(\.|$)", r"i\1", host, count=1))  # JSC's machines
    return next((name for name in names if name and not _is_loopback(name) and _is_own(name)), host)
