"""Are the ranks where the launcher, MPI and torch expect them?"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import combinations

import torch

from torchreg.distributed.communicator import Communicator
from torchreg.verification.checks import Check, agree
from torchreg.verification.network import network_check


def topology_checks(communicator: Communicator) -> Iterator[Check]:
    """World sizes, hosts, devices, CPU masks."""
    row = partial(agree, communicator, "topology")
    sizes = communicator.world_sizes()
    measured = ", ".join(f"{name} {size}" for name, size in sizes.items())
    error = None if set(sizes.values()) == {communicator.world_size} else measured
    yield row("world size", error, measured, f"{communicator.world_size} everywhere")

    local_ranks = defaultdict(list)
    for placement in communicator.placements:
        local_ranks[placement.host].append(placement.local_rank)
    own = communicator.placements[communicator.rank]
    here, promised, error = sorted(local_ranks[own.host]), communicator.launcher.local_world_size, None
    if promised not in (None, len(here)) and communicator.world_size > 1:
        error = (
            f"{len(here)} ranks are on this host, and {communicator.launcher.name} started {promised}: a host is "
            "counted twice, or two hosts have one name"
        )
    elif here != list(range(len(here))):
        error = f"local ranks here are {here}"
    counts = " or ".join(map(str, sorted({len(ranks) for ranks in local_ranks.values()})))
    measured = f"{len(local_ranks)} host{'s' * (len(local_ranks) > 1)} with {counts} ranks"
    yield row("ranks on hosts", error, measured, "each rank once")

    if communicator.device.type == "cpu":
        yield Check("topology", "devices", "SKIP", "the ranks compute on CPUs")
    else:
        # A rank with one visible device has it at index 0, so the device's own identity counts.
        devices = [(placement.host, placement.device_id) for placement in communicator.placements]
        others = [rank for rank, device in enumerate(devices) if device == devices[own.rank] and rank != own.rank]
        error = f"shares its {communicator.device.type} device with rank {others[0]}" if others else None
        yield row("devices", error, f"{len(set(devices))} different ones", "a device of its own for each rank")
    yield _cpu_masks(communicator)
    yield network_check(communicator)


def arithmetic_checks(communicator: Communicator) -> Iterator[Check]:
    """Products that need all bits of the significand: TF32 keeps 11 of float32's 24."""
    for dtype, half in ((torch.float32, 12), (torch.float64, 26))[: 1 if communicator.device.type == "mps" else 2]:
        # (2^h + 1) (2^h - 1) = 2^2h - 1 is odd, with 2h bits. In each sum the other products are 0.
        left = torch.eye(256, dtype=dtype, device=communicator.device) * (2**half + 1)
        off = (left @ torch.full_like(left, 2**half - 1) - (4**half - 1)).abs().max().item()
        remedy = "unset NVIDIA_TF32_OVERRIDE and TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which may select TF32"
        error, bits = f"a product is off by {off:g}: {remedy}" if off else None, f"{2 * half} bits"
        yield agree(communicator, "arithmetic", f"{str(dtype).removeprefix('torch.')} products", error, bits, bits)


def _cpu_masks(communicator: Communicator) -> Check:
    if not hasattr(os, "sched_getaffinity"):
        return Check("topology", "CPU masks", "SKIP", "this system has none")
    mask = os.sched_getaffinity(0)
    try:
        is_bound = mask != os.sched_getaffinity(os.getppid())
    except OSError:  # the launcher is another user's, or has ended
        is_bound = True
    masks = communicator.gather((communicator.placements[communicator.rank].host, frozenset(mask), is_bound))
    if not any(bound for _, _, bound in masks):
        return Check("topology", "CPU masks", "SKIP", f"ranks are not bound; {len(mask)} CPUs for those of this host")
    overlapping = (
        f"ranks {a} and {b} on {masks[a][0]} share CPU {min(masks[a][1] & masks[b][1])}"
        for a, b in combinations(range(len(masks)), 2)
        if masks[a][0] == masks[b][0] and masks[a][1] & masks[b][1]
    )
    error = next(overlapping, None) if communicator.is_main else None
    measured = f"{len(mask)} CPUs for rank 0, none shared"
    return agree(communicator, "topology", "CPU masks", error, measured, "no CPU of two ranks")
