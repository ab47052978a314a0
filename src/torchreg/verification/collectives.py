"""Do collectives deliver the right numbers on every rank, and how fast?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from torchreg.distributed.communicator import AnySync, Communicator
from torchreg.distributed.timing import time_all_reduce
from torchreg.verification.checks import Check, agree, skipped

_AREA = "collectives"
_DTYPES = (torch.float32, torch.float64, torch.int64)
_SIZES = (1, 1_000, 1 << 16, 1 << 22)
_QUICK_SIZES = (1, 1 << 16)
_REPEATS = {8: 50, 1 << 16: 20, 1 << 22: 5}  # of a message of so many bytes


def collective_checks(communicator: Communicator, *, quick: bool) -> Iterator[Check]:
    """Known integers through each collective, then latency and bandwidth of each all-reduce."""
    if communicator.world_size == 1:
        yield skipped(_AREA, "all", "there is one rank only")
        return
    syncs: list[AnySync] = ["allreduce", "mpi"] if communicator.over_mpi else ["allreduce"]
    for sync in syncs:
        yield _exact(communicator, "all-reduce" + " by MPI" * (sync == "mpi"), partial(_all_reduce, sync), quick=quick)
    yield _exact(communicator, "broadcast", _broadcast, quick=quick)
    yield _exact(communicator, "gather", _gather, quick=quick)
    for sync in syncs:
        yield _timing(communicator, sync, quick=quick)


def _exact(
    communicator: Communicator, name: str, collective: Callable[[Communicator, Tensor], Tensor], *, quick: bool
) -> Check:
    """The row of a collective, whose result on integers is exact in every type.

    `collective` takes this rank's numbers, and returns what the collective makes of them minus what it should.
    """
    errors = []
    cases = [(dtype, size) for dtype in _DTYPES for size in (_QUICK_SIZES if quick else _SIZES)]
    for dtype, size in cases:
        off = collective(communicator, _numbers(communicator, communicator.rank, size, dtype)).flatten()
        if len(wrong := off.nonzero()):
            index = int(wrong[0])
            errors.append(f"{size} × {str(dtype).removeprefix('torch.')}: off by {off[index].item():g} at {index}")
    measured = f"{len(cases)} of {len(cases)} cases exact"
    return agree(communicator, _AREA, name, errors[0] if errors else None, measured, "exact integers")


def _numbers(communicator: Communicator, rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """Small integers that differ by rank and index: every sum over ranks is exact in every type."""
    return (torch.arange(size, device=communicator.device) % 7 + 1).to(dtype) * (rank % 16 + 1)


def _all_reduce(sync: AnySync, communicator: Communicator, numbers: Tensor) -> Tensor:
    communicator.using(sync).all_reduce(numbers)
    total = sum(rank % 16 + 1 for rank in range(communicator.world_size))
    return numbers - _numbers(communicator, 0, len(numbers), numbers.dtype) * total


def _broadcast(communicator: Communicator, numbers: Tensor) -> Tensor:
    return communicator.broadcast(numbers) - _numbers(communicator, 0, len(numbers), numbers.dtype)


def _gather(communicator: Communicator, numbers: Tensor) -> Tensor:
    numbers = numbers[: (1 << 22) // communicator.world_size]
    ranks = range(communicator.world_size)
    expected = [_numbers(communicator, rank, len(numbers), numbers.dtype) for rank in ranks]
    return communicator.gather_tensors(numbers) - torch.stack(expected)


def _timing(communicator: Communicator, sync: AnySync, *, quick: bool) -> Check:
    """The median over repetitions of the slowest rank's time, for a few message sizes."""
    times = []
    for num_bytes in list(_REPEATS)[: 2 if quick else None]:
        median_s = time_all_reduce(communicator, sync, num_bytes, 3 if quick else _REPEATS[num_bytes])
        time = f"{1e6 * median_s:.3g} µs" if median_s < 1e-3 else f"{1e3 * median_s:.3g} ms"
        times.append(f"{_size(num_bytes)} {time}")
        if num_bytes >= 1 << 20:
            times[-1] += f" ({num_bytes / median_s / 1e9:.2g} GB/s)"
    name = "all-reduce time" + " by MPI" * (sync == "mpi")
    return agree(communicator, _AREA, name, None, ", ".join(times), "(median, slowest rank)")


def _size(num_bytes: int) -> str:
    power = (num_bytes.bit_length() - 1) // 10
    return f"{num_bytes >> 10 * power} {('B', 'KiB', 'MiB')[power]}"
