"""Are the ranks where the launcher, MPI and torch expect them?"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations

from torchreg.distributed.communicator import Communicator
from torchreg.verification.checks import Check, agree, skipped

_AREA = "topology"


def topology_checks(communicator: Communicator) -> Iterator[Check]:
    """World sizes, hosts, devices, CPU masks."""
    sizes = communicator.world_sizes()
    measured = ", ".join(f"{name} {size}" for name, size in sizes.items())
    error = None if set(sizes.values()) == {communicator.world_size} else measured
    yield agree(communicator, _AREA, "world size", error, measured, f"{communicator.world_size} everywhere")
    yield _ranks_on_hosts(communicator)
    yield _devices(communicator)
    yield _cpu_masks(communicator)


def _ranks_on_hosts(communicator: Communicator) -> Check:
    local_ranks = defaultdict(list)
    for placement in communicator.placements:
        local_ranks[placement.host].append(placement.local_rank)
    here = sorted(local_ranks[communicator.placements[communicator.rank].host])
    error, expected = None, communicator.launcher.local_world_size
    if expected is not None and expected != len(here) and communicator.world_size > 1:
        error = (
            f"{len(here)} ranks are on this host, and {communicator.launcher.name} started {expected}: a host is "
            "counted twice, or two hosts have one name"
        )
    elif here != list(range(len(here))):
        error = f"local ranks here are {here}"
    counts = " or ".join(map(str, sorted({len(ranks) for ranks in local_ranks.values()})))
    measured = f"{len(local_ranks)} host{'s' * (len(local_ranks) > 1)} with {counts} ranks"
    return agree(communicator, _AREA, "ranks on hosts", error, measured, "each local rank once on each host")


def _devices(communicator: Communicator) -> Check:
    if communicator.device.type == "cpu":
        return skipped(_AREA, "devices", "the ranks compute on CPUs")
    # A rank with one visible device has it at index 0, so the device's own identity counts.
    identities = [(placement.host, placement.device_id) for placement in communicator.placements]
    own = identities[communicator.rank]
    others = [rank for rank, identity in enumerate(identities) if identity == own and rank != communicator.rank]
    error = f"shares its {communicator.device.type} device with rank {others[0]}" if others else None
    measured = f"{len(set(identities))} different ones"
    return agree(communicator, _AREA, "devices", error, measured, "a device of its own for each rank")


def _cpu_masks(communicator: Communicator) -> Check:
    name = "CPU masks"
    if not hasattr(os, "sched_getaffinity"):
        return skipped(_AREA, name, "this system has none")
    mask = os.sched_getaffinity(0)
    try:
        is_bound = mask != os.sched_getaffinity(os.getppid())
    except OSError:  # the launcher is another user's, or has ended
        is_bound = True
    masks = communicator.gather((communicator.placements[communicator.rank].host, frozenset(mask), is_bound))
    if not any(bound for _, _, bound in masks):
        return skipped(_AREA, name, f"ranks are not bound; {len(mask)} CPUs for those of this host")
    overlapping = (
        f"ranks {a} and {b} on {masks[a][0]} share CPU {min(masks[a][1] & masks[b][1])}"
        for a, b in combinations(range(len(masks)), 2)
        if masks[a][0] == masks[b][0] and masks[a][1] & masks[b][1]
    )
    error = next(overlapping, None) if communicator.is_main else None
    return agree(communicator, _AREA, name, error, f"{len(mask)} CPUs for rank 0, none shared", "no CPU of two ranks")
