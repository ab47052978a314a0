"""Which launches may be compared: same machine, devices, backend, precision, runtime and provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from torchreg.scaling.records import FACTS

VERSIONS = ("torch", "numpy", "mpi_library", "nccl_version", *FACTS, "placement", "without")
"""What decides a number beside the place where it was measured: versions, settings, devices that are visible."""

KEY = ("machine", "device_name", "backend", "dtype", "effective", *VERSIONS)

_OF_SEVERAL_RANKS = ("backend", "effective", "mpi_library", "nccl_version", "oneccl", "libfabric")
"""What one process has no need of: its launch does not say which backend it would have had."""

_NAMES = {"device_name": "device", "mpi_library": "MPI", "nccl_version": "NCCL", "effective": "distributed"}


@dataclass(frozen=True)
class Group:
    """Launches that may be compared, by name, and what they have in common (`KEY`; None where it does not apply)."""

    id: str
    title: str
    key: Mapping[str, str | None]
    launches: tuple[str, ...]


def comparable_groups(launches: pd.DataFrame) -> list[Group]:
    """The groups of the launches that went well, the one with the most launches first.

    A launch of one rank belongs to each group that is equal in everything that one rank has; where there is none, such
    launches make their own.
    """
    good = launches[launches["status"] == "ok"]
    keys = pd.Series([_key(row) for row in good.to_dict("records")], index=good.index, dtype=object)
    several = dict.fromkeys(keys[good["world_size"] > 1])
    members: dict[tuple[str | None, ...], list[str]] = {key: [] for key in several}
    for name, world_size, key in zip(good["launch"], good["world_size"], keys, strict=True):
        fitting = [key] if world_size > 1 else [other for other in several if _fits(key, other)] or [key]
        for other in fitting:
            members.setdefault(other, []).append(name)
    ordered = sorted(members, key=lambda key: (-len(members[key]), [str(part) for part in key]))
    titles = _titles(ordered)
    return [
        Group(f"g{number}", title, dict(zip(KEY, key, strict=True)), tuple(members[key]))
        for number, (key, title) in enumerate(zip(ordered, titles, strict=True), 1)
    ]


def _key(row: Mapping[Any, Any]) -> tuple[str | None, ...]:
    alone = row["world_size"] == 1
    values = (None if pd.isna(row[field]) else str(row[field]) for field in KEY)
    return tuple(
        None if alone and field in _OF_SEVERAL_RANKS and value in (None, "none", "single") else value
        for field, value in zip(KEY, values, strict=True)
    )


def _fits(alone: tuple[str | None, ...], several: tuple[str | None, ...]) -> bool:
    return all(
        one == other or (one is None and field in _OF_SEVERAL_RANKS)
        for field, one, other in zip(KEY, alone, several, strict=True)
    )


def _titles(keys: list[tuple[str | None, ...]]) -> list[str]:
    """Machine, device, backend and precision, and of the rest what differs between groups."""
    titles = []
    always = ("machine", "device_name", "backend", "dtype")
    for key in keys:
        fields = dict(zip(KEY, key, strict=True))
        parts = [value for field in always if (value := fields[field])]
        for place, field in enumerate(KEY):
            if field not in always and len({other[place] for other in keys}) > 1:
                parts.append(f"{_NAMES.get(field, field)} {fields[field] or 'none'}")
        titles.append(" · ".join(parts))
    return titles
