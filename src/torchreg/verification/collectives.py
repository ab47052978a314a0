"""Do collectives deliver the right numbers on every rank, and how fast?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    cases = list(product(_DTYPES, _QUICK_SIZES if quick else _SIZES))
    errors: dict[str, str | None] = {}
    for dtype, size in cases:
        pattern = (torch.arange(size, device=communicator.device) % 7 + 1).to(dtype)
        for name, off in _deviations(communicator, syncs, pattern):
            if errors.setdefault(name, None) is None and len(wrong := off.nonzero()):
                index = int(wrong[0])
                errors[name] = f"{size} × {str(dtype).removeprefix('torch.')}: off by {off[index].item():g} at {index}"
    for name, error in errors.items():
        yield row(name, error, f"{len(cases)} of {len(cases)} exact", "exact integers")
    for by, sync in syncs.items():
        times = []
        for size_name, num_bytes, repeats in _MESSAGES[: 2 if quick else None]:
            median_s = time_all_reduce(communicator, sync, num_bytes, 3 if quick else repeats)
            time = f"{1e6 * median_s:.3g} µs" if median_s < 1e-3 else f"{1e3 * median_s:.3g} ms"
            bandwidth = f" ({num_bytes / median_s / 1e9:.2g} GB/s)" if num_bytes >= 1 << 20 else ""
            times.append(f"{size_name} {time}{bandwidth}")
        yield row(f"all-reduce time{by}", None, ", ".join(times), "median, slowest")


def _deviations(
    communicator: Communicator, syncs: Mapping[str, AnySync], pattern: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """What each collective makes of the pattern, times a small integer of each rank, minus what it should."""
    factors = [rank % 16 + 1 for rank in range(communicator.world_size)]
    own = pattern * factors[communicator.rank]
    for by, sync in syncs.items():
        total = own.clone()
        communicator.using(sync).all_reduce(total)
        yield f"all-reduce{by}", total - pattern * sum(factors)
    yield "broadcast", communicator.broadcast(own.clone()) - pattern * factors[0]
    part = slice((1 << 22) // communicator.world_size)
    expected = torch.stack([pattern[part] * factor for factor in factors])
    yield "gather", (communicator.gather_tensors(own[part]) - expected).flatten()
