"""The `Communicator`: this process among the ranks, its device, and collective operations."""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.nn.parallel import DistributedDataParallel

from torchreg.distributed import ezpz, mpi
from torchreg.distributed.devices import device_name, own_cpus
from torchreg.distributed.failure import one_line
from torchreg.distributed.launcher import Launcher
from torchreg.distributed.rendezvous import AgreedError, poll
from torchreg.distributed.watchdog import Watchdog

T = TypeVar("T")
AnySync = Literal["ddp", "allreduce", "mpi"]

_HEARTBEAT_S = 1.0
_uses = Counter[str]()  # of the store, by topic: each has its own keys


@dataclass(frozen=True)
class Placement:
    """Where a rank runs. `device_id` identifies an accelerator among all of its host; it is empty for a CPU."""

    rank: int
    host: str
    local_rank: int
    device: str
    device_name: str
    device_id: str


@dataclass(frozen=True)
class Communicator:
    """This process among the ranks. Made by `init_distributed()`, used as a context manager.

    `name` is `ezpz`, `torch`, or `single` (one process, no process group); `backend` carries the gradients: gloo, nccl,
    xccl, MPI, or none. `placements` maps ranks to hosts and devices.
    """

    launcher: Launcher
    rank: int
    world_size: int
    device: torch.device
    name: Literal["single", "torch", "ezpz"]
    ezpz_version: str | None
    backend: str
    placements: tuple[Placement, ...]
    mpi_comm: Any = None
    watchdog: Watchdog | None = None
    over_mpi: bool = False
    """Whether `all_reduce` and the gradients of `wrap` go through mpi4py instead of torch.distributed."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reads, writes and prints."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """The number of hosts that ranks run on."""
        return len({placement.host for placement in self.placements})

    def describe(self) -> str:
        """One line: ranks and nodes, launcher, distributed, backend, devices."""
        ranks, nodes = self.world_size, self.num_nodes
        devices = ", ".join(sorted({placement.device.split(":")[0] for placement in self.placements}))
        return (
            f"{ranks} rank{'s' * (ranks > 1)} on {nodes} node{'s' * (nodes > 1)} · launcher {self.launcher.name} · "
            f"distributed {' '.join(filter(None, [self.name, self.ezpz_version]))} · backend {self.backend} · "
            f"device {devices}{f' × {ranks}' if ranks > 1 else ''}"
        )

    def describe_environment(self, requested: str) -> dict[str, Any]:
        """A record's entries on the ranks; `requested` is the `distributed` of the configuration."""
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
            "placements": [asdict(placement) for placement in self.placements],
        }

    def from_main(self, work: Callable[[], T]) -> T:
        """The result of `work` on the main rank, on every rank; the others wait, however long, while that one is alive.

        Errors that the user can fix (`ValueError`, `OSError`) become the same `AgreedError` on every rank.
        """
        answer: list[Any] = [None, None]
        store = self._store("main") if self.world_size > 1 else None
        if self.is_main:
            with _heartbeat(store) if store else nullcontext():
                try:
                    answer[0] = work()
                except (ValueError, OSError) as error:
                    answer[1] = one_line(error)
        if store:
            self._await_main(store)
            dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        if answer[1] is not None:
            raise AgreedError(answer[1])
        return cast(T, answer[0])

    def _await_main(self, store: Store) -> None:
        """Wait until the main rank's `_heartbeat` is done. A collective would wait for `timeout_s` at most."""
        watchdog = cast(Watchdog, self.watchdog)

        def is_done() -> bool:
            with watchdog.limit("rank 0 to prepare the run"):  # until the next beat
                beat = store.add("beat", 0)
                poll(lambda: store.check(["done"]) or store.add("beat", 0) != beat)
                return store.check(["done"])

        poll(is_done)

    def deal(self, items: Sequence[T]) -> Iterator[T]:
        """Each item to one rank, whichever asks for it first. All ranks must pass the same items in the same order."""
        if self.watchdog is None:
            yield from items
            return
        store, number = self._store("deal"), 0
        while True:
            with self.watchdog.limit("rank 0 to deal work"):  # the store has no time-out for this
                number = store.add("num_dealt", 1) - 1
            if number >= len(items):
                return
            yield items[number]

    def _store(self, topic: str) -> Store:
        """The key-value store of all ranks, with keys of its own for each use of a topic."""
        assert self.watchdog is not None
        assert self.watchdog.store is not None
        _uses[topic] += 1
        return PrefixStore(f"torchreg/{topic}/{_uses[topic]}", self.watchdog.store)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by the main rank's, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def gather(self, item: T) -> list[T]:
        """Every rank's item, in the order of ranks, on every rank."""
        items: list[Any] = [item] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(items, item)
        return items

    def gather_tensors(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, all of one shape, as (world_size, *shape). For several ranks."""
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def world_sizes(self) -> dict[str, int]:
        """The world size according to the launcher, MPI and torch, by name."""
        by_mpi = {"MPI": self.mpi_comm.Get_size()} if self.mpi_comm is not None else {}
        by_torch = {"torch": dist.get_world_size()} if self.world_size > 1 else {}
        return {"launcher": self.launcher.world_size, **by_mpi, **by_torch}

    def largest(self, value: float) -> float:
        """The largest of the ranks' values."""
        values = torch.tensor([value], dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.item()

    def alone(self) -> Communicator:
        """This rank as a world of its own, on its own device, without communication."""
        placement = replace(self.placements[self.rank], rank=0, local_rank=0)
        return Communicator(self.launcher, 0, 1, self.device, "single", self.ezpz_version, "none", (placement,))

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def using(self, sync: AnySync) -> Communicator:
        """The same ranks, with `all_reduce` and `wrap` through mpi4py if `sync` is `mpi`, else torch.distributed.

        Raises `AgreedError` for `mpi` where it cannot reduce: mpi4py reduces CPU tensors only.
        """
        if sync == "mpi" and self.world_size > 1 and (self.mpi_comm is None or self.device.type != "cpu"):
            raise AgreedError(f"sync is mpi, and the communicator, on {self.device}, was not initialised for MPI")
        return replace(self, over_mpi=sync == "mpi")

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace the tensor on every rank by its sum over ranks."""
        if self.world_size == 1:
            return
        if self.over_mpi:
            assert self.watchdog is not None
            mpi.all_reduce(self.mpi_comm, mpi.memory(tensor), self.watchdog)
        else:
            dist.all_reduce(tensor)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as DistributedDataParallel, which averages gradients over ranks in backward.

        ezpz makes it where ezpz is used. With `over_mpi` a communication hook averages through mpi4py.
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

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.watchdog is None:
            return
        agreed = error is None or isinstance(error, AgreedError) or (isinstance(error, SystemExit) and not error.code)
        if error is not None and not agreed:
            self.watchdog.end(error)
        with self.watchdog.limit("the other ranks to end"):
            if self.mpi_comm is not None and error is None:
                self.mpi_comm.Barrier()  # MPI_Finalize would wait just as long, but report nothing
            gc.collect()  # a DDP model that outlives its process group ends the process by std::terminate
            dist.destroy_process_group()


@contextmanager
def _heartbeat(store: Store) -> Iterator[None]:
    """Add to `beat` about every second while the body runs, from a thread; then set `done`."""
    done = threading.Event()

    def beat() -> None:
        with suppress(RuntimeError):  # the store is gone: this process is about to end
            while not done.wait(_HEARTBEAT_S):
                store.add("beat", 1)

    thread = threading.Thread(target=beat, name="torchreg heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    store.set("done", "")
