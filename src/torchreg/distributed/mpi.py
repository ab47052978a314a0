"""Everything that torchreg needs of mpi4py, which is imported when it is first used."""

# No `from __future__ import annotations`: DistributedDataParallel reads the hook's annotations as types.
import atexit
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from torchreg.distributed.watchdog import Watchdog, exit_after


def import_mpi(reason: str = "") -> Any:
    """`mpi4py.MPI`. Raises `ValueError`, with the reason that it is needed for, where it cannot be imported."""
    # A Cray MPICH with GPU support ends the process in MPI_Init if torch was imported first. MPI gets CPU tensors only.
    os.environ["MPICH_GPU_SUPPORT_ENABLED"] = "0"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py's wheel raises RuntimeError when it finds no libmpi
        reason += f", and mpi4py cannot be imported ({str(error).splitlines()[0]})"
        raise ValueError(f"{reason}: pip install mpi4py mpich, or on an HPC system use the site's mpi4py") from error
    return MPI


def mpi_library() -> str:
    """The MPI library behind mpi4py, and its version."""
    return str(import_mpi().Get_library_version().splitlines()[0].strip(" \0").replace("\t", " "))


def finalize_within(timeout_s: float) -> None:
    """Limit MPI_Finalize, which waits for all ranks when Python ends, to `timeout_s`."""
    mpi = import_mpi()

    @atexit.register
    def finalize() -> None:
        if not mpi.Is_finalized():
            with exit_after(timeout_s, mpi.COMM_WORLD.Get_rank()):
                mpi.Finalize()


def all_reduce(comm: Any, memory: Any, watchdog: Watchdog) -> None:
    """Replace the memory of a CPU tensor by its sum over ranks."""
    watchdog.call = object()
    comm.Allreduce(None, memory)  # None is MPI.IN_PLACE
    watchdog.call = None


@lru_cache(maxsize=2)
def memory(tensor: Tensor) -> Any:
    """The memory of a CPU tensor that a run reduces again and again: its gradient, its losses. A view costs 2 µs."""
    return tensor.numpy()


def average_gradients(state: tuple[Any, Watchdog], bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook of DistributedDataParallel that averages a bucket through mpi4py."""
    comm, watchdog = state
    gradient = bucket.buffer()
    all_reduce(comm, gradient.numpy(), watchdog)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradient.div_(comm.Get_size()))
    return done
