"""The `Communicator`: this process's place among the ranks, its device, and the ways to talk to the others."""

from __future__ import annotations

import gc
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.nn.parallel import DistributedDataParallel

from torchreg.distributed import ezpz, mpi
from torchreg.distributed.devices import choose_device_type, device_name, own_cpus, take_device, threads_for
from torchreg.distributed.failure import Failure, one_line
from torchreg.distributed.launcher import Launcher, detect_launcher
from torchreg.distributed.rendezvous import (
    AgreedError,
    agree_with_mpi,
    ask_main_rank,
    init_process_group,
    meet,
    own_job,
)
from torchreg.distributed.watchdog import Watchdog, beating, exit_after

T = TypeVar("T")
AnySync = Literal["ddp", "allreduce", "mpi"]

_MAIN_RANK_FIRST_S = 5.0  # it knows which ranks are missing

_deals = itertools.count()  # so that every `deal` of a process counts by itself
_works = itertools.count()  # and every wait for the main rank


@dataclass(frozen=True)
class Placement:
    """Where a rank runs. `device_id` tells an accelerator from all others of its host; it is empty for a CPU."""

    rank: int
    host: str
    local_rank: int
    device: str
    device_name: str
    device_id: str


@dataclass(frozen=True)
class Communicator:
    """This process among the ranks. Made by `init_distributed()`, used as a context manager.

    `name` is `ezpz`, `torch`, or `single` (one process, no process group); `backend` is what carries gradients:
    gloo, nccl, xccl, MPI, or none. `placements` is the map rank → host → device.
    """

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    name: Literal["single", "torch", "ezpz"]
    ezpz_version: str | None
    backend: str
    placements: tuple[Placement, ...]
    mpi_comm: Any
    failure: Failure | None = None
    watchdog: Watchdog | None = None
    over_mpi: bool = False
    """Whether `all_reduce` and the gradients of `wrap` go through mpi4py; else through torch.distributed."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reads, writes and speaks."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """Hosts that ranks run on."""
        return len({place.host for place in self.placements})

    def describe(self) -> str:
        """The bring-up in one line: launcher, runtime, backend, ranks × nodes, devices."""
        devices = sorted({place.device.split(":")[0] for place in self.placements})
        nodes = f"{self.num_nodes} node{'s' * (self.num_nodes > 1)}"
        ezpz = f" {self.ezpz_version}" if self.ezpz_version else ""
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)} on {nodes}"
        return (
            f"{ranks} · launcher {self.launcher.name} · distributed {self.name}{ezpz} · backend {self.backend} · "
            f"device {', '.join(devices)}{f' × {self.world_size}' if self.world_size > 1 else ''}"
        )

    def describe_environment(self, requested: str) -> dict[str, Any]:
        """What a record says about the ranks, beside what was requested."""
        return {
            "launcher": self.launcher.name,
            "requested": requested,
            "effective": self.name,
            "ezpz_version": self.ezpz_version,
            "backend": self.backend,
            "world_size": self.world_size,
            "num_nodes": self.num_nodes,
            "mpi_library": self.mpi_comm and mpi.mpi_library(),
            "nccl_version": ".".join(map(str, torch.cuda.nccl.version())) if self.backend == "nccl" else None,
            "device_name": device_name(self.device),
            "num_cpus": os.cpu_count(),
            "cpus_per_rank": own_cpus().bit_count(),
            "placements": [asdict(place) for place in self.placements],
        }

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the main rank, on every rank.

        What the user can mend (`ValueError`, `OSError`) becomes the same `AgreedError` on every rank.
        """
        answer: list[Any] = [None, None]
        with self._while_main_works():
            if self.is_main:
                try:
                    answer[0] = work()
                except (ValueError, OSError) as error:
                    answer[1] = one_line(error)
        if self.world_size > 1:
            dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        if answer[1] is not None:
            raise AgreedError(answer[1])
        return cast(T, answer[0])

    @contextmanager
    def _while_main_works(self) -> Iterator[None]:
        """On the main rank, the body; others wait for its end, however long, as long as the main rank is alive.

        A collective operation would wait for `timeout_s` at most.
        """
        if self.failure is None or self.watchdog is None or self.failure.store is None:
            yield
            return
        store = PrefixStore(f"torchreg/main/{next(_works)}", self.failure.store)
        if self.is_main:
            with beating(lambda: store.add("beat", 1)):
                yield
            store.set("done", "")
            return
        yield
        beat, heard_s, pause_s = -1, time.monotonic(), 0.001
        while True:
            with self.watchdog.over("to prepare the run"):
                if store.check(["done"]):
                    return
                last, beat = beat, store.add("beat", 0)
            now_s = time.monotonic()
            heard_s = heard_s if beat == last else now_s
            if now_s - heard_s > self.watchdog.timeout_s:
                raise TimeoutError(f"waited {self.watchdog.timeout_s:g} s for rank 0 to prepare the run")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The main rank's values in every rank's tensor, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def gather(self, item: T) -> list[T]:
        """What every rank has, in the order of ranks, on every rank."""
        return _gather(item, self.world_size) if self.world_size > 1 else [item]

    def gather_tensors(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, all of one shape, as (world_size, *shape)."""
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        if self.world_size > 1:
            dist.all_gather(gathered, tensor)
        else:
            gathered[0].copy_(tensor)
        return torch.stack(gathered)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def world_sizes(self) -> dict[str, int]:
        """The world size as each part of the stack has it, by the part's name."""
        sizes = {"launcher": self.launcher.world_size}
        if self.mpi_comm is not None:
            sizes["MPI"] = self.mpi_comm.Get_size()
        if self.world_size > 1:
            sizes["torch"] = dist.get_world_size()
        return sizes

    def largest(self, value: float) -> float:
        """The largest of the ranks' values."""
        if self.world_size == 1:
            return value
        values = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.item()

    def alone(self) -> Communicator:
        """This rank as a world of its own, on its own device: it talks to nobody."""
        place = replace(self.placements[self.rank], rank=0)
        return replace(
            self,
            rank=0,
            world_size=1,
            local_rank=0,
            name="single",
            backend="none",
            placements=(place,),
            mpi_comm=None,
            failure=None,
            watchdog=None,
            over_mpi=False,
        )

    def deal(self, items: Sequence[T]) -> Iterator[T]:
        """Each item to one rank, whichever asks for it first. All ranks must deal the same items in the same order."""
        if self.world_size == 1:
            yield from items
            return
        store = PrefixStore(f"torchreg/deal/{next(_deals)}", dist.distributed_c10d._get_default_store())
        while (number := self._next(store)) < len(items):
            yield items[number]

    def _next(self, store: PrefixStore) -> int:
        assert self.watchdog is not None
        with self.watchdog.over("to deal work"):  # the store has no time-out for this
            return store.add("dealt", 1) - 1

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def using(self, sync: AnySync) -> Communicator:
        """The same ranks, whose `all_reduce` and `wrap` go through what `sync` names."""
        return replace(self, over_mpi=sync == "mpi")

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace the tensor on every rank by its sum over ranks. Through mpi4py the tensor is on the CPU."""
        if self.world_size == 1:
            return
        if self.over_mpi:
            assert self.watchdog is not None
            mpi.all_reduce(self.mpi_comm, tensor, self.watchdog)
        else:
            dist.all_reduce(tensor)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over ranks in every backward: DistributedDataParallel.

        ezpz makes it where ezpz sets up the ranks. Through MPI a communication hook averages with mpi4py.
        """
        if self.world_size == 1:
            return model
        if self.name == "ezpz":
            wrapped = cast(DistributedDataParallel, ezpz.wrap(model))
        else:
            wrapped = DistributedDataParallel(model, None if self.device.type == "cpu" else [self.device])
        if self.over_mpi:
            wrapped.register_comm_hook((self.mpi_comm, self.watchdog), mpi.average_gradients)
        return wrapped

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.failure is None or self.watchdog is None:
            return
        agreed = error is None or isinstance(error, AgreedError) or (isinstance(error, SystemExit) and not error.code)
        if error is not None and not agreed:
            self.failure.end(error)
        with self.watchdog.over("to end"):
            if self.mpi_comm is not None and error is None:
                self.mpi_comm.Barrier()  # MPI_Finalize would wait just as long, but nothing can be told there
            gc.collect()  # a DDP model that outlives its process group ends the process by std::terminate
            dist.destroy_process_group()


def init_distributed(
    *,
    distributed: Literal["auto", "ezpz", "torch"] = "auto",
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = "auto",
    sync: AnySync = "ddp",
    dtype: Literal["auto", "float32", "float64"] = "auto",
    timeout_s: float = 300.0,
    run: Mapping[str, object] | None = None,
) -> Communicator:
    """Bring up this process among its ranks: find the launcher, choose the device, make the process group.

    `run` has what must be equal on all ranks, by name. Raises `ValueError` for what the user can fix: launchers that
    disagree, a missing package or device; and as an `AgreedError` where all ranks have met, with the hosts of those
    that differ.
    """
    launcher = detect_launcher(os.environ)
    with exit_after(timeout_s, launcher.rank) if launcher.world_size > 1 else nullcontext():
        launcher, mpi_comm = agree_with_mpi(launcher, sync, os.environ)
    if mpi_comm is not None and launcher.world_size > 1:
        mpi.finalize_within(timeout_s)
    device_type, problem = "cpu", None
    try:
        device_type = choose_device_type(device, sync, launcher.world_size, dtype)
    except ValueError as error:
        if launcher.world_size == 1:
            raise
        problem = str(error)
    ezpz_version = None
    if launcher.world_size > 1 or distributed == "ezpz":
        ezpz_version = ezpz.find_ezpz(distributed)
    host = socket.gethostname()
    if launcher.world_size == 1:
        torch_device, device_id = take_device(device_type, 0)
        place = Placement(0, host, 0, str(torch_device), device_name(torch_device), device_id)
        return Communicator(launcher, 0, 1, 0, torch_device, "single", None, "none", (place,), mpi_comm)

    failure = Failure(launcher.rank, host, mpi_comm)
    watchdog = Watchdog(timeout_s, failure.end)
    address = f" at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}" if mpi_comm is None else ""
    with failure:
        with watchdog.over(f"to come together{address}", _MAIN_RANK_FIRST_S if launcher.rank else 0.0):
            failure.store = store = meet(launcher, mpi_comm, timeout_s)
            agree = partial(ask_main_rank, store, launcher=launcher, timeout_s=timeout_s)
            facts = {"host": host, "cpus": own_cpus(), "device": device_type, "problem": problem, "job": own_job()}
            options = {name: str(value) for name, value in (run or {}).items()}
            shared = agree("torchreg/join", item=facts | {"options": options}, answer=_join)
            local_rank = shared["local_rank"] if launcher.local_rank is None else launcher.local_rank
            torch_device, device_id = take_device(device_type, local_rank)
            agree("torchreg/device", item=[host, device_type, device_id], answer=_each_its_own)
            init_process_group(launcher, store, device_type, timeout_s)
            place = Placement(launcher.rank, host, local_rank, str(torch_device), device_name(torch_device), device_id)
            placements = _gather(place, launcher.world_size)
        failure.hosts = [each.host for each in placements]
        if device_type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(shared["num_threads"])
        if ezpz_version:
            ezpz.adopt(launcher.rank, launcher.world_size, torch_device, timeout_s)
    return Communicator(
        launcher=launcher,
        rank=launcher.rank,
        world_size=launcher.world_size,
        local_rank=local_rank,
        device=torch_device,
        name="ezpz" if ezpz_version else "torch",
        ezpz_version=ezpz_version,
        backend="MPI" if sync == "mpi" else {"cuda": "nccl", "xpu": "xccl"}.get(device_type, "gloo"),
        placements=tuple(placements),
        mpi_comm=mpi_comm,
        failure=failure,
        watchdog=watchdog,
        over_mpi=mpi_comm is not None and device_type == "cpu",
    )


def _join(ranks: list[Any]) -> list[dict[str, int]]:
    """The local rank and the number of threads of each rank. Raises `ValueError` where ranks cannot work together."""
    hosts = [each["host"] for each in ranks]
    another_port = "two jobs have one MASTER_ADDR and MASTER_PORT; choose another MASTER_PORT"
    _require_equal("job", {rank: each["job"] for rank, each in enumerate(ranks) if each["job"]}, hosts, another_port)
    for name in sorted(set().union(*(each["options"] for each in ranks))):
        values = {rank: each["options"].get(name, "unknown") for rank, each in enumerate(ranks)}
        _require_equal(name, values, hosts, "start all ranks with the same options")
    for rank, each in enumerate(ranks):
        if each["problem"]:
            raise ValueError(f"rank {rank} ({each['host']}): {each['problem']}")
    devices = {rank: each["device"] for rank, each in enumerate(ranks)}
    _require_equal("device", devices, hosts, "name one with --device, or leave out the host")
    cpus_of: dict[str, list[int]] = {}
    for each in ranks:
        cpus_of.setdefault(each["host"], []).append(each["cpus"])
    return [
        {
            "local_rank": hosts[:rank].count(each["host"]),
            "num_threads": threads_for(each["cpus"], cpus_of[each["host"]]),
        }
        for rank, each in enumerate(ranks)
    ]


def _require_equal(name: str, values: Mapping[int, object], hosts: Sequence[str], remedy: str) -> None:
    """Raises `ValueError`, naming two ranks that differ. `values` are those of some ranks, by rank."""
    first = next(iter(values), 0)
    for rank, value in values.items():
        if value != values[first]:
            here, there = f"rank {first} ({hosts[first]})", f"rank {rank} ({hosts[rank]})"
            raise ValueError(f"{name} is {values[first]} on {here} and {value} on {there}: {remedy}")


def _each_its_own(devices: list[Any]) -> list[None]:
    """Raises `ValueError` where two ranks of a host compute on one accelerator."""
    first: dict[tuple[str, ...], int] = {}
    for rank, (host, device_type, identity) in enumerate(devices):
        other = first.setdefault((host, identity), rank)
        if identity and other != rank:
            num_here = len({i for h, _, i in devices if h == host})
            raise ValueError(
                f"rank {other} and rank {rank} ({host}) have one {device_type} device ({identity}): start {num_here} "
                f"rank{'s' * (num_here > 1)} on this host, or choose --device cpu"
            )
    return [None] * len(devices)


def _gather(item: T, world_size: int) -> list[T]:
    items: list[Any] = [None] * world_size
    dist.all_gather_object(items, item)
    return items
