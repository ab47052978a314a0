"""Do collectives deliver the right numbers on every rank, and how fast?

Messages have integers of all bits of their type, times a power of two: sums over ranks are exact in any order.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchreg.distributed.communicator import AnySync, Communicator
from torchreg.distributed.devices import free_bytes
from torchreg.distributed.timing import time_repeats
from torchreg.verification.checks import Check, agree, size_text
from torchreg.verification.verify_record import times_text, timing

_BITS = {  # of a sum of magnitudes, at most: those of the significand, or without the sign
    torch.float32: 24, torch.float64: 53, torch.float16: 11, torch.bfloat16: 8, torch.int32: 31, torch.int64: 62,
}  # fmt: skip
_HALF_TYPES = torch.float16, torch.bfloat16  # MPI has none
_PERIOD = 1_021  # elements after which a message repeats: a prime, so that parts in a wrong order differ
_SIZES = 8, 1 << 16, 1 << 20, 1 << 24, 1 << 26, 1 << 28, 1 << 30  # bytes
_SHORT_BYTES = 1 << 16  # the most that --quick times, and sends in types other than float32
_MEDIUM_BYTES = 1 << 24  # the most of a collective that is not timed
_LONG_BYTES = 1 << 26  # beyond one bucket of DDP; longer ones are sent only where memory and time allow
_MEMORY = 9  # of a message's size: own, result, expected, those of the backend, and a half more
_LONG_WITHIN_S = 3.0  # all repetitions
_NUM_CALLS, _CALLS_BETWEEN_LOOKS = 1_000, 50
_CALLS_WITHIN_S, _QUICK_CALLS_WITHIN_S = 60.0, 1.0
_LATE_S = 0.1
_NOT_SUPPORTED = re.compile(r"not (yet )?(support|implement)|unsupported|no support", re.IGNORECASE)

# What runs, with this rank's message and the result, which has the same content before; the rows that are expected, of
# the values of all ranks; the part of each row, None for all of them; the bus's bytes by the message's, 0: not timed.
Operation = tuple[Callable[[Tensor, Tensor], object], Callable[[Tensor], Tensor], int | None, float]


def collective_checks(communicator: Communicator, *, quick: bool) -> Iterator[Check]:
    """Each collective with known answers in all types and sizes, and the times of those that trainers use."""
    if communicator.world_size == 1:
        yield Check("collectives", "all", "SKIP", "there is one rank only")
        return
    for name, operation in _operations(communicator).items():
        yield from _exact(communicator, name, operation, quick=quick)
    row = partial(agree, communicator, "collectives")
    for by, sync in _syncs(communicator).items():
        summing = communicator.using(sync)
        yield row(f"NaN and infinity{by}", _not_finite_error(summing), "on every rank", "on every rank")
        yield row(f"equal bits{by}", _bits_error(summing), f"equal on {communicator.world_size}", "equal on all")
        num_calls, error = _repeat(summing, _QUICK_CALLS_WITHIN_S if quick else _CALLS_WITHIN_S)
        yield row(f"repeated all-reduce{by}", error, f"{num_calls:,} exact", "each exact")
    yield row("barrier", _barrier_error(communicator), "waits for the last rank", "waits for the last rank")


@cache
def summands(world_size: int, dtype: torch.dtype) -> Tensor:
    """Integers of (rank, element), the same on each rank. Their magnitudes' sum over ranks has at most `_BITS` bits.

    With many ranks only every so many add to an element, so that about half of the bits are left for each.
    """
    bits = _BITS[dtype]
    every = math.ceil(world_size / 2 ** (bits // 2))
    largest = 2**bits // math.ceil(world_size / every) - 1
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-largest, largest + 1, (world_size, _PERIOD), generator=generator)
    rank, element = torch.arange(world_size)[:, None], torch.arange(_PERIOD)
    return torch.where(values == 0, 1, values) * ((rank - element) % every == 0)


def _message(rows: Tensor, dtype: torch.dtype, length: int, first: int, device: torch.device) -> Tensor:
    """Of each row, periodically continued, so many elements from the first on; one row after the other."""
    pattern = rows.roll(-first, 1).to(dtype)
    if dtype.is_floating_point:
        pattern *= 2.0 ** -_BITS[dtype]
    return pattern.to(device).repeat(1, math.ceil(length / _PERIOD))[:, :length].reshape(-1)


def _syncs(communicator: Communicator) -> dict[str, AnySync]:
    return {"": "allreduce", " by MPI": "mpi"} if communicator.over_mpi else {"": "allreduce"}


def _operations(communicator: Communicator) -> dict[str, Operation]:
    """By name. Messages consist of a part for each rank. The factors are those of nccl-tests (doc/PERFORMANCE.md)."""
    size, rank = communicator.world_size, communicator.rank
    # Renamed in torch 2.13.
    scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def reduced(op: Any) -> Callable[[Tensor, Tensor], object]:
        return lambda own, out: dist.all_reduce(out, op)

    def summed(sync: AnySync) -> Callable[[Tensor, Tensor], object]:
        return lambda own, out: communicator.using(sync).all_reduce(out)

    def first_part(message: Tensor) -> Tensor:
        return message[: len(message) // size]

    def gathered(own: Tensor, out: Tensor) -> None:
        out.copy_(communicator.gather_tensors(first_part(own)).flatten())

    def passed_on(own: Tensor, out: Tensor) -> None:
        sent = dist.P2POp(dist.isend, own, (rank + 1) % size)
        for work in dist.batch_isend_irecv([sent, dist.P2POp(dist.irecv, out, (rank - 1) % size)]):
            work.wait()

    def total(values: Tensor) -> Tensor:
        return values.sum(0, keepdim=True)

    moved = (size - 1) / size
    return {
        **{f"all-reduce{by}": (summed(sync), total, None, 2 * moved) for by, sync in _syncs(communicator).items()},
        "all-reduce MAX": (reduced(dist.ReduceOp.MAX), lambda values: values.amax(0, keepdim=True), None, 0),
        "all-reduce MIN": (reduced(dist.ReduceOp.MIN), lambda values: values.amin(0, keepdim=True), None, 0),
        "broadcast": (lambda own, out: communicator.broadcast(out), lambda values: values[:1], None, 1),
        "gather": (gathered, lambda values: values, 0, 0),
        "all-gather": (lambda own, out: gather(out, first_part(own)), lambda values: values, 0, moved),
        "reduce-scatter": (lambda own, out: scatter(first_part(out), own), total, rank, moved),
        "all-to-all": (lambda own, out: dist.all_to_all_single(out, own), lambda values: values, rank, moved),
        "send and receive": (passed_on, lambda values: values[[rank - 1]], None, 1),
    }


def _exact(communicator: Communicator, name: str, operation: Operation, *, quick: bool) -> Iterator[Check]:
    """One collective in all types and sizes, and its times in float32."""
    *_, bus_factor = operation
    error, num_cases, longest, refused, timings = None, 0, 0, dict[str, str](), list[dict[str, Any]]()
    for dtype, num_bytes in _cases(quick=quick):
        if name.endswith("MPI") and dtype in _HALF_TYPES:
            continue
        is_short, has_time = num_bytes <= _SHORT_BYTES, _has_time(timings, num_bytes)
        always = _LONG_BYTES if bus_factor else _MEDIUM_BYTES
        if num_bytes > always and not (has_time and _has_memory(communicator, num_bytes)):
            continue
        type_name = str(dtype).removeprefix("torch.")
        try:
            again, difference = _run_once(communicator, operation, dtype, num_bytes)
        except RuntimeError as refusal:  # what a backend lacks: torch has no type of its own for that
            if not _NOT_SUPPORTED.search(str(refusal)):
                raise
            refused[type_name] = str(refusal).splitlines()[0]
            continue
        num_cases, longest = num_cases + 1, max(longest, num_bytes)
        if difference and error is None:
            error = f"{size_text(num_bytes)} of {type_name}: {difference}"
        is_timed = is_short and name.startswith("all-reduce") if quick else is_short or has_time
        if bus_factor and dtype is torch.float32 and is_timed:
            times_s = time_repeats(communicator, again, 20 if is_short and not quick else 5)
            timings.append(timing(name, num_bytes, bus_factor, times_s))
        del again  # its memory
    if not num_cases:
        yield Check("collectives", name, "SKIP", f"{communicator.backend} refuses: {next(iter(refused.values()))}")
        return
    measured = " and ".join([f"{num_cases} cases exact", *(f"{type_name} refused" for type_name in refused)])
    row = agree(communicator, "collectives", name, error, measured, f"exact to {size_text(longest)}")
    yield replace(row, message_bytes=longest)
    if timings:
        yield Check("collectives", f"{name} time", "PASS", times_text(timings), "median, slowest", tuple(timings))


def _cases(*, quick: bool) -> list[tuple[torch.dtype, int]]:
    """Types, and bytes of a message. float32 comes first, in growing sizes: the time of one predicts the next."""
    sizes, others = (_SIZES[:3], [_SHORT_BYTES]) if quick else (_SIZES, _SIZES[:3])
    return [(torch.float32, size) for size in sizes] + [(dtype, size) for dtype in list(_BITS)[1:] for size in others]


def _run_once(
    communicator: Communicator, operation: Operation, dtype: torch.dtype, num_bytes: int
) -> tuple[Callable[[], object], str | None]:
    """What runs it once more, and the first difference from what is expected."""
    run, rows_of, one_part, _ = operation
    part = max(1, num_bytes // dtype.itemsize // communicator.world_size)
    length = part * communicator.world_size + (one_part is None)  # a whole message is no multiple of the ranks
    message = partial(_message, dtype=dtype, device=communicator.device)
    values = summands(communicator.world_size, dtype)
    own = message(values[communicator.rank, None], length=length, first=0)
    out = own.clone()
    run(own, out)
    first, length = (0, length) if one_part is None else (one_part * part, part)
    right = message(rows_of(values), length=length, first=first)
    wrong = out[: len(right)] != right
    index, difference = int(wrong.to(torch.uint8).argmax()), None
    if wrong[index]:
        difference = f"{out[index].item():.9g} instead of {right[index].item():.9g} at {index}"
    return partial(run, own, out), difference


def _has_memory(communicator: Communicator, num_bytes: int) -> bool:
    hosts = [placement.host for placement in communicator.placements]
    sharing = hosts.count(hosts[communicator.rank]) if communicator.device.type == "cpu" else 1
    return min(communicator.gather(free_bytes(communicator.device) / sharing)) > _MEMORY * num_bytes


def _has_time(timings: list[dict[str, Any]], num_bytes: int) -> bool:
    """Whether all repetitions end soon, by the time of the longest message so far; False without one."""
    times_s = [10 * last["median_s"] * num_bytes / last["message_bytes"] for last in timings[-1:]]
    return max(times_s, default=math.inf) <= _LONG_WITHIN_S


def _not_finite_error(communicator: Communicator) -> str | None:
    """A NaN of each rank, and infinities of the first and the last one, in each floating type."""
    size, rank = communicator.world_size, communicator.rank
    right = torch.tensor([math.nan] * size + [math.inf, -math.inf])
    for dtype in _BITS:
        if dtype.is_floating_point and not (communicator.over_mpi and dtype in _HALF_TYPES):
            # Each rank has its NaN, the last one infinity, the first one the negative.
            of_rank = torch.tensor([*range(size), size - 1, 0]) == rank
            values = torch.where(of_rank, right, 0.0).to(communicator.device, dtype)
            communicator.all_reduce(values)
            if not torch.equal(values.cpu().float().nan_to_num(1, 2, 3), right.nan_to_num(1, 2, 3)):
                return f"{dtype}: {values[:8].tolist()} … {values[-2:].tolist()}"
    return None


def _bits_error(communicator: Communicator) -> str | None:
    """Sums that must be rounded have the same bits on all ranks, or replicas of a model drift apart."""
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(communicator.rank)
        values = torch.randn(_SHORT_BYTES // 4, dtype=dtype, generator=generator).to(communicator.device)
        communicator.all_reduce(values)
        digest.update(values.cpu().numpy().tobytes())
    of_main = communicator.gather(digest.hexdigest())[0]
    return None if digest.hexdigest() == of_main else "the sum has other bits than on rank 0"


def _repeat(communicator: Communicator, most_s: float) -> tuple[int, str | None]:
    """Many short all-reduces: how many ended in time, and the first that was wrong."""
    # Ten bits, which bfloat16 has not, and another power of two in each call; the sum is exact in float32.
    units = 513 / 512 * 2.0 ** (torch.arange(_NUM_CALLS, device=communicator.device) % 16)[:, None].expand(-1, 8)
    sums, right = units * (1 + communicator.rank % 2), units * (communicator.world_size + communicator.world_size // 2)
    num_calls, start_s = 0, time.perf_counter()
    while num_calls < _NUM_CALLS:
        for one in sums[num_calls : num_calls + _CALLS_BETWEEN_LOOKS]:
            communicator.all_reduce(one)
        communicator.synchronize()
        num_calls += _CALLS_BETWEEN_LOOKS
        if max(communicator.gather(time.perf_counter() - start_s)) > most_s:
            break
    wrong = (sums != right)[:num_calls].any(1).nonzero().flatten().tolist()
    error = f"{len(wrong)} of {num_calls:,} are wrong, first number {wrong[0] + 1}" if wrong else None
    return num_calls, error


def _barrier_error(communicator: Communicator) -> str | None:
    """No rank may leave before the first, and then the last one, which are late, have entered.

    Each rank that enters is counted in the store, which is no part of a collective.
    """
    store: Any = communicator.watchdog and communicator.watchdog.store
    error = None
    for late in (0, communicator.world_size - 1):
        key = communicator.gather(f"torchreg/verify/{uuid.uuid4().hex}")[0]
        time.sleep(_LATE_S * (communicator.rank == late))
        store.add(key, 1)
        communicator.barrier()
        num_entered = store.add(key, 0)
        if num_entered < communicator.world_size:
            error = f"left when {num_entered} of {communicator.world_size} ranks had entered"
    return error
