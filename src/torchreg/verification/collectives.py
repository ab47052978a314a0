"""Do collectives deliver the right numbers on every rank, and how fast?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchreg.distributed.communicator import AnySync, Communicator
from torchreg.distributed.timing import time_all_reduce
from torchreg.verification.checks import Check, agree, skipped

_AREA = "collectives"
_DTYPES = (torch.float32, torch.float64, torch.int64)
_SIZES = (1, 1_000, 1 << 16, 1 << 22)
_QUICK_SIZES = (1, 1 << 16)
_TIMED_BYTES = (8, 1 << 16, 1 << 22)
_REPEATS = {8: 50, 1 << 16: 20, 1 << 22: 5}


def collective_checks(communicator: Communicator, *, quick: bool) -> Iterator[Check]:
    """Known integers through each collective, then latency and bandwidth of each way to average."""
    if communicator.world_size == 1:
        yield skipped(_AREA, "all", "one rank has nobody to talk to")
        return
    sizes = _QUICK_SIZES if quick else _SIZES
    dtypes = [dtype for dtype in _DTYPES if not (communicator.device.type == "mps" and dtype == torch.float64)]
    cases = [(dtype, size) for dtype in dtypes for size in sizes]
    for sync in _ways(communicator):
        name = "all-reduce" + (" by MPI" if sync == "mpi" else "")
        wrong = [told for dtype, size in cases if (told := _all_reduce(communicator, sync, dtype, size))]
        yield _row(communicator, name, wrong, len(cases))
    wrong = [told for dtype, size in cases if (told := _broadcast(communicator, dtype, size))]
    yield _row(communicator, "broadcast", wrong, len(cases))
    few = [(dtype, min(size, (1 << 22) // communicator.world_size)) for dtype, size in cases]
    wrong = [told for dtype, size in few if (told := _gather(communicator, dtype, size))]
    yield _row(communicator, "gather", wrong, len(cases))
    for sync in _ways(communicator):
        yield _timing(communicator, sync, quick=quick)


def _ways(communicator: Communicator) -> list[AnySync]:
    by_mpi = communicator.mpi_comm is not None and communicator.device.type == "cpu"
    return ["allreduce", "mpi"] if by_mpi else ["allreduce"]


def _row(communicator: Communicator, name: str, wrong: list[str], num_cases: int) -> Check:
    return agree(
        communicator,
        _AREA,
        name,
        wrong[0] if wrong else None,
        f"{num_cases} of {num_cases} cases exact",
        "exact integers",
    )


def _numbers(rank: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Small integers that differ by rank and place: every sum over ranks is exact in every type."""
    return (torch.arange(size, device=device) % 7 + 1).to(dtype) * (rank % 16 + 1)


def _differing(answer: Tensor, expected: Tensor, what: str) -> str | None:
    placements = (answer != expected).nonzero()
    if not len(placements):
        return None
    first = tuple(placements[0].tolist())
    return f"{what}: {answer[first].item():g} in place {first[-1]}, not {expected[first].item():g}"


def _what(dtype: torch.dtype, size: int) -> str:
    return f"{size} × {str(dtype).removeprefix('torch.')}"


def _all_reduce(communicator: Communicator, sync: AnySync, dtype: torch.dtype, size: int) -> str | None:
    buffer = _numbers(communicator.rank, size, dtype, communicator.device)
    communicator.using(sync).all_reduce(buffer)
    total = sum(rank % 16 + 1 for rank in range(communicator.world_size))
    return _differing(buffer, _numbers(0, size, dtype, communicator.device) * total, _what(dtype, size))


def _broadcast(communicator: Communicator, dtype: torch.dtype, size: int) -> str | None:
    buffer = _numbers(communicator.rank, size, dtype, communicator.device)
    communicator.broadcast(buffer)
    return _differing(buffer, _numbers(0, size, dtype, communicator.device), _what(dtype, size))


def _gather(communicator: Communicator, dtype: torch.dtype, size: int) -> str | None:
    gathered = communicator.gather_tensors(_numbers(communicator.rank, size, dtype, communicator.device))
    expected = torch.stack(
        [_numbers(rank, size, dtype, communicator.device) for rank in range(communicator.world_size)]
    )
    return _differing(gathered, expected, _what(dtype, size))


def _timing(communicator: Communicator, sync: AnySync, *, quick: bool) -> Check:
    """The median over repetitions of the slowest rank's time, for a few sizes."""
    told = []
    for num_bytes in _TIMED_BYTES[: 2 if quick else None]:
        median_s = time_all_reduce(communicator, sync, num_bytes, 3 if quick else _REPEATS[num_bytes])
        told.append(f"{_size(num_bytes)} {_time(median_s)}")
        if num_bytes == _TIMED_BYTES[-1]:
            told[-1] += f" ({num_bytes / median_s / 1e9:.2g} GB/s)"
    name = "all-reduce time" + (" by MPI" if sync == "mpi" else "")
    return agree(communicator, _AREA, name, None, ", ".join(told), "(median, slowest rank)")


def _size(num_bytes: int) -> str:
    return (
        f"{num_bytes} B"
        if num_bytes < 1 << 10
        else f"{num_bytes >> 10} KiB"
        if num_bytes < 1 << 20
        else f"{num_bytes >> 20} MiB"
    )


def _time(time_s: float) -> str:
    return f"{1e6 * time_s:.3g} µs" if time_s < 1e-3 else f"{1e3 * time_s:.3g} ms"
