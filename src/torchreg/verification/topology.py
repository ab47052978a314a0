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

_REMEDY = "unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE and NVIDIA_TF32_OVERRIDE, which select TF32"


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
    """Products that need all bits of the significand: float32 as TF32 has 11 of 24, and float64 may be emulated."""
    device = communicator.device
    for dtype, half in ((torch.float32, 12), (torch.float64, 26)):
        name = str(dtype).removeprefix("torch.")
        if device.type == "mps" and dtype is torch.float64:
            yield Check("arithmetic", name, "SKIP", "this device has none")
            continue
        # (2^h + 1) (2^h - 1) = 2^2h - 1 is odd, with 2h bits. In each sum the other products are 0.
        left = torch.eye(256, dtype=dtype, device=device) * (2**half + 1)
        product = left @ torch.full_like(left, 2**half - 1)
        worst = (product.double() if device.type != "mps" else product) - (4**half - 1)
        remedy = f": {_REMEDY}" if dtype is torch.float32 else ""
        error = f"a product is off by {worst.abs().max().item():g}{remedy}" if worst.any() else None
        yield agree(communicator, "arithmetic", f"{name} products", error, f"{2 * half} bits", f"{2 * half} bits")


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
