"""Do collectives deliver the right numbers on every rank, and how fast?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from torchreg.distributed.communicator import AnySync, Communicator
from torchreg.distributed.timing import time_all_reduce
from torchreg.verification.checks import Check, agree

_DTYPES = (torch.float32, torch.float64, torch.int64)
_SIZES = (1, 1_000, 1 << 16, 1 << 22)
_QUICK_SIZES = (1, 1 << 16)
_MESSAGES = (("8 B", 8, 50), ("64 KiB", 1 << 16, 20), ("4 MiB", 1 << 22, 5))  # size, bytes, repetitions


def collective_checks(communicator: Communicator, *, quick: bool) -> Iterator[Check]:
    """Known integers through each collective, exact in every type, then the time of each all-reduce."""
    if communicator.world_size == 1:
        yield Check("collectives", "all", "SKIP", "there is one rank only")
        return
    row = partial(agree, communicator, "collectives")
    syncs: dict[str, AnySync] = {"": "allreduce"}
    if communicator.over_mpi:
        syncs[" by MPI"] = "mpi"
    deviations: dict[str, Callable[[Communicator, Tensor, list[int]], Tensor]] = {
        **{f"all-reduce{by}": partial(_all_reduce, sync) for by, sync in syncs.items()},
        "broadcast": _broadcast,
        "gather": _gather,
    }
    factors = [rank % 16 + 1 for rank in range(communicator.world_size)]
    cases = list(product(_DTYPES, _QUICK_SIZES if quick else _SIZES))
    for name, deviation in deviations.items():
        errors = []
        for dtype, size in cases:
            pattern = (torch.arange(size, device=communicator.device) % 7 + 1).to(dtype)
            off = deviation(communicator, pattern, factors).flatten()
            if len(wrong := off.nonzero()):
                index = int(wrong[0])
                errors.append(f"{size} × {str(dtype).removeprefix('torch.')}: off by {off[index].item():g} at {index}")
        yield row(name, next(iter(errors), None), f"{len(cases)} of {len(cases)} cases exact", "exact integers")
    for by, sync in syncs.items():
        times = []
        for size_name, num_bytes, repeats in _MESSAGES[: 2 if quick else None]:
            median_s = time_all_reduce(communicator, sync, num_bytes, 3 if quick else repeats)
            time = f"{1e6 * median_s:.3g} µs" if median_s < 1e-3 else f"{1e3 * median_s:.3g} ms"
            bandwidth = f" ({num_bytes / median_s / 1e9:.2g} GB/s)" if num_bytes >= 1 << 20 else ""
            times.append(f"{size_name} {time}{bandwidth}")
        yield row(f"all-reduce time{by}", None, ", ".join(times), "(median, slowest rank)")


# Each rank has `pattern` times its own of the `factors`, small integers. What a collective makes of them, minus what it
# should:


def _all_reduce(sync: AnySync, communicator: Communicator, pattern: Tensor, factors: list[int]) -> Tensor:
    numbers = pattern * factors[communicator.rank]
    communicator.using(sync).all_reduce(numbers)
    return numbers - pattern * sum(factors)


def _broadcast(communicator: Communicator, pattern: Tensor, factors: list[int]) -> Tensor:
    return communicator.broadcast(pattern * factors[communicator.rank]) - pattern * factors[0]


def _gather(communicator: Communicator, pattern: Tensor, factors: list[int]) -> Tensor:
    pattern = pattern[: (1 << 22) // communicator.world_size]
    gathered = communicator.gather_tensors(pattern * factors[communicator.rank])
    return gathered - torch.stack([pattern * factor for factor in factors])
