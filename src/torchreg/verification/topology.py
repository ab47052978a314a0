"""Are the ranks where the launcher, MPI and torch think they are?"""

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
    told = ", ".join(f"{name} {size}" for name, size in sizes.items())
    problem = None if set(sizes.values()) == {communicator.world_size} else told
    yield agree(communicator, _AREA, "world size", problem, told, f"{communicator.world_size} everywhere")

    yield _ranks_on_hosts(communicator)
    yield _devices(communicator)
    yield _cpu_masks(communicator)


def _ranks_on_hosts(communicator: Communicator) -> Check:
    hosts = defaultdict(list)
    for place in communicator.placements:
        hosts[place.host].append(place)
    here = hosts[communicator.placements[communicator.rank].host]
    problem = None
    promised = communicator.launcher.local_world_size
    if promised is not None and promised != len(here) and communicator.world_size > 1:
        problem = (
            f"{len(here)} ranks are on this host, and {communicator.launcher.name} says {promised}: a host is counted "
            "twice, or two hosts have one name"
        )
    elif sorted(place.local_rank for place in here) != list(range(len(here))):
        problem = f"local ranks here are {sorted(place.local_rank for place in here)}"
    counts = sorted({len(placements) for placements in hosts.values()})
    measured = f"{len(hosts)} host{'s' * (len(hosts) > 1)} with {' or '.join(map(str, counts))} ranks"
    return agree(communicator, _AREA, "ranks on hosts", problem, measured, "each local rank once on each host")


def _devices(communicator: Communicator) -> Check:
    name = "devices"
    if communicator.device.type == "cpu":
        return skipped(_AREA, name, "the ranks compute on CPUs")
    # A rank with one visible device calls it 0, so the device's own identity counts.
    identities = [(place.host, place.device_id) for place in communicator.placements]
    mine = identities[communicator.rank]
    others = [rank for rank, identity in enumerate(identities) if identity == mine and rank != communicator.rank]
    problem = f"shares its {communicator.device.type} device with rank {others[0]}" if others else None
    return agree(
        communicator, _AREA, name, problem, f"{len(set(identities))} of their own", "a device of its own for each rank"
    )


def _cpu_masks(communicator: Communicator) -> Check:
    name = "CPU masks"
    if not hasattr(os, "sched_getaffinity"):
        return skipped(_AREA, name, "this system has none")
    mask = os.sched_getaffinity(0)
    try:
        is_bound = mask != os.sched_getaffinity(os.getppid())
    except OSError:  # the launcher is another user's, or gone
        is_bound = True
    masks = communicator.gather((communicator.placements[communicator.rank].host, frozenset(mask), is_bound))
    if not any(bound for _, _, bound in masks):
        return skipped(_AREA, name, f"ranks are not bound; {len(mask)} CPUs for those of this host")
    overlapping = [
        f"ranks {a} and {b} on {masks[a][0]} share CPU {min(masks[a][1] & masks[b][1])}"
        for a, b in combinations(range(len(masks)), 2)
        if masks[a][0] == masks[b][0] and masks[a][1] & masks[b][1]
    ]
    problem = overlapping[0] if overlapping and communicator.is_main else None
    return agree(communicator, _AREA, name, problem, f"{len(mask)} CPUs for rank 0, none shared", "no CPU of two ranks")
