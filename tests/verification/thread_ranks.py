"""Ranks that are threads of this process, by torch's own test backend: a collective takes microseconds."""

import threading
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg

from torchreg.distributed.communicator import Communicator, Placement
from torchreg.distributed.launcher import Launcher


def on_threads(world_size, work, communicator_type=Communicator):
    """What `work(communicator)` returns on each rank."""
    results, failures = [None] * world_size, []
    placements = tuple(Placement(rank, "n1", rank, "cpu", "CPU", "") for rank in range(world_size))
    watchdog = SimpleNamespace(store=dist.HashStore())
    meeting = dist.HashStore()

    def run_rank(rank):
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=meeting)
            launcher = Launcher("MPICH mpiexec", rank, world_size, rank, world_size, uses_mpi=True)
            communicator = communicator_type(
                launcher, rank, world_size, torch.device("cpu"), "torch", None, "threaded", placements, None, watchdog
            )
            results[rank] = work(communicator)
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()
    multi_threaded_pg.ProcessLocalGroup.reset()
    try:
        threads = [threading.Thread(target=run_rank, args=(rank,), daemon=True) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        multi_threaded_pg._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if failures:
        raise failures[0]
    return results
