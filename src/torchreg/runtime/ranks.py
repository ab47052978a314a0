"""The `Runtime`: this process's place among the ranks, its device, and the ways to talk to the others."""

from __future__ import annotations

import gc
import itertools
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.nn.parallel import DistributedDataParallel

from torchreg.launcher import Launcher, detect_launcher
from torchreg.runtime import mpi, real_ezpz
from torchreg.runtime.devices import choose_device_type, device_name, device_of, own_cpus, threads_for
from torchreg.runtime.failure import Failure, one_line
from torchreg.runtime.ordered import DDP_BUCKET_BYTES, OrderedGradients, sum_in_order
from torchreg.runtime.rendezvous import agree_with_mpi, init_process_group
from torchreg.runtime.watchdog import Watchdog, exit_after

T = TypeVar("T")
AddOverRanks = Callable[[], None]
AnySync = Literal["ddp", "allreduce", "mpi"]

_deals = itertools.count()  # so that every `deal` of a process counts by itself


class AgreedError(ValueError):
    """An error that every rank raises together, so that each can leave in good order; the main rank tells it."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    rank: int
    host: str
    local_rank: int
    device: str


@dataclass(frozen=True)
class Runtime:
    """This process among the ranks. Made by `open_runtime()`, used as a context manager.

    `name` is `ezpz`, `torch`, or `single` (one process, no process group); `backend` is what carries gradients:
    gloo, nccl, xccl, MPI, or none. `places` is the map rank → host → device.
    """

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    name: Literal["single", "torch", "ezpz"]
    ezpz_version: str | None
    backend: str
    places: tuple[Place, ...]
    mpi_comm: Any
    failure: Failure | None = None
    watchdog: Watchdog | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reads, writes and speaks."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """Hosts that ranks run on."""
        return len({place.host for place in self.places})

    @property
    def quick_sync(self) -> AnySync:
        """The quickest way to add up a few numbers over ranks, whoever averages the gradients."""
        return "mpi" if self.mpi_comm is not None and self.device.type == "cpu" else "allreduce"

    def describe(self) -> str:
        """The bring-up in one line: launcher, runtime, backend, ranks × nodes, devices."""
        devices = sorted({place.device.split(":")[0] for place in self.places})
        nodes = f"{self.num_nodes} node{'s' * (self.num_nodes > 1)}"
        ezpz = f" {self.ezpz_version}" if self.ezpz_version else ""
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)} on {nodes}"
        return (
            f"{ranks} · launcher {self.launcher.name} · runtime {self.name}{ezpz} · backend {self.backend} · "
            f"device {', '.join(devices)}{f' × {self.world_size}' if self.world_size > 1 else ''}"
        )

    def evidence(self, requested: str) -> dict[str, Any]:
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
            "places": [asdict(place) for place in self.places],
        }

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the main rank, on every rank.

        What the user can mend (`ValueError`, `OSError`) becomes the same `AgreedError` on every rank.
        """
        answer: list[Any] = [None, None]
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

    def device_identity(self) -> str:
        """Which device this rank computes on, by an identity that no numbering of visible devices changes."""
        if self.device.type == "cuda":
            return str(torch.cuda.get_device_properties(self.device).uuid)
        return f"{self.places[self.rank].host} {self.device}"

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

    def alone(self) -> Runtime:
        """This rank as a world of its own, on its own device: it talks to nobody."""
        place = replace(self.places[self.rank], rank=0)
        return replace(
            self,
            rank=0,
            world_size=1,
            local_rank=0,
            name="single",
            backend="none",
            places=(place,),
            mpi_comm=None,
            failure=None,
            watchdog=None,
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

    def add_over_ranks(self, buffer: Tensor, sync: AnySync = "allreduce") -> AddOverRanks:
        """A function that replaces `buffer` by its sum over ranks, in place.

        `mpi` reduces the tensor's own memory through mpi4py (CPU only), others through torch.distributed.
        """
        if self.world_size == 1:
            return lambda: None
        if sync == "mpi":
            assert self.watchdog is not None
            return mpi.summation(self.mpi_comm, buffer, self.watchdog)
        return lambda: cast(None, dist.all_reduce(buffer))

    def wrap(self, model: nn.Module, sync: AnySync, ordered: OrderedGradients | None = None) -> nn.Module:
        """The model with its gradients averaged over ranks in every backward: DistributedDataParallel.

        ezpz makes it where ezpz is the runtime. With `mpi` a communication hook averages through mpi4py. With `ordered`
        a hook adds gradients up in the order of micro-batches instead.
        """
        if self.world_size == 1:
            return model
        if ordered and sum(p.numel() * p.element_size() for p in model.parameters()) > DDP_BUCKET_BYTES:
            raise AgreedError(
                f"reduction is ordered, and the model's gradients are more than {DDP_BUCKET_BYTES} bytes, which DDP "
                "reduces in several pieces: choose --optimizer hand"
            )
        if self.name == "ezpz":
            wrapped = cast(DistributedDataParallel, real_ezpz.wrap(model))
        else:
            wrapped = DistributedDataParallel(model, None if self.device.type == "cpu" else [self.device])
        if ordered:
            wrapped.register_comm_hook(ordered, sum_in_order)
        elif sync == "mpi":
            wrapped.register_comm_hook((self.mpi_comm, self.watchdog), mpi.average_gradients)
        return wrapped

    def averaging(self, model: nn.Module, *, now: bool) -> AbstractContextManager[Any]:
        """A context whose backward averages gradients over ranks now, or leaves them to a later micro-batch."""
        if now or not isinstance(model, DistributedDataParallel):
            return nullcontext()
        return model.no_sync()

    def __enter__(self) -> Runtime:
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


def open_runtime(
    *,
    runtime: Literal["auto", "ezpz", "torch"] = "auto",
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = "auto",
    sync: AnySync = "ddp",
    timeout_s: float = 300.0,
) -> Runtime:
    """Bring up this process among its ranks: find the launcher, make the process group, choose the device.

    Raises `ValueError` for what the user can mend: launchers that disagree, a missing package or device.
    """
    launcher = detect_launcher(os.environ)
    with exit_after(timeout_s, launcher.rank) if launcher.world_size > 1 else nullcontext():
        launcher, mpi_comm = agree_with_mpi(launcher, sync, os.environ)
    if mpi_comm is not None and launcher.world_size > 1:
        mpi.finalize_within(timeout_s)
    device_type = choose_device_type(device, sync, launcher.world_size)
    ezpz_version = None
    if launcher.world_size > 1 or runtime == "ezpz":
        ezpz_version = real_ezpz.find_ezpz(runtime)
    host = socket.gethostname()
    if launcher.world_size == 1:
        torch_device = torch.device(device_type) if device_type in ("cpu", "mps") else torch.device(device_type, 0)
        place = Place(0, host, 0, str(torch_device))
        return Runtime(launcher, 0, 1, 0, torch_device, "single", None, "none", (place,), mpi_comm)

    failure = Failure(launcher.rank, host, mpi_comm)
    watchdog = Watchdog(timeout_s, failure.end)
    with failure:
        with watchdog.over("to come together"):
            init_process_group(launcher, mpi_comm, timeout_s)
            cpus_of = _gather((host, own_cpus()), launcher.world_size)
            hosts = [where for where, _ in cpus_of]
        failure.store, failure.hosts = dist.distributed_c10d._get_default_store(), hosts
        local_ranks = [hosts[:rank].count(hosts[rank]) for rank in range(launcher.world_size)]
        local_rank = launcher.local_rank if launcher.local_rank is not None else local_ranks[launcher.rank]
        torch_device, problem = device_of(device_type, local_rank)
        problems = [text for text in _gather(problem, launcher.world_size) if text]
        if problems:
            dist.destroy_process_group()
            raise AgreedError(problems[0])
        if device_type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads_for(own_cpus(), [cpus for where, cpus in cpus_of if where == host]))
        if ezpz_version:
            real_ezpz.adopt(launcher.rank, launcher.world_size, torch_device, timeout_s)
        places = _gather(Place(launcher.rank, host, local_rank, str(torch_device)), launcher.world_size)
    return Runtime(
        launcher=launcher,
        rank=launcher.rank,
        world_size=launcher.world_size,
        local_rank=local_rank,
        device=torch_device,
        name="ezpz" if ezpz_version else "torch",
        ezpz_version=ezpz_version,
        backend="MPI" if sync == "mpi" else {"cuda": "nccl", "xpu": "xccl"}.get(device_type, "gloo"),
        places=tuple(places),
        mpi_comm=mpi_comm,
        failure=failure,
        watchdog=watchdog,
    )


def _gather(item: T, world_size: int) -> list[T]:
    items: list[Any] = [None] * world_size
    dist.all_gather_object(items, item)
    return items
