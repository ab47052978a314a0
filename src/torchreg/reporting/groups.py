"""Which launches may be compared: those of the same machine, devices, backend, number format and versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd

from torchreg.scaling.records import FACTS

VERSIONS = ("torch", "numpy", "mpi_library", "nccl_version", *FACTS, "placement", "without")
"""What affects step times apart from the machine: versions, settings, visible devices."""

KEY = ("machine", "device_name", "backend", "dtype", "effective", *VERSIONS)

_OF_SEVERAL_RANKS = ("backend", "effective", "mpi_library", "nccl_version", "oneccl", "libfabric")
"""What a launch of one rank does not use, and so does not record."""

_IN_ALL_TITLES = ("machine", "device_name", "backend", "dtype")
_NAMES = {"device_name": "device", "mpi_library": "MPI", "nccl_version": "NCCL", "effective": "distributed"}

Values: TypeAlias = tuple[str | None, ...]


@dataclass(frozen=True)
class Group:
    """Launches that may be compared, by name, and what they have in common (`KEY`; None where it does not apply)."""

    id: str
    title: str
    key: Mapping[str, str | None]
    launches: tuple[str, ...]


def comparable_groups(launches: pd.DataFrame) -> list[Group]:
    """The groups of the launches that succeeded, the one with the most launches first.

    A launch of one rank belongs to each group that agrees in everything that one rank has. Where there is none, such
    launches form a group.
    """
    good = launches[launches["status"] == "ok"]
    keys = pd.Series([_key(row) for row in good.to_dict("records")], index=good.index, dtype=object)
    several = dict.fromkeys(keys[good["world_size"] > 1])
    members: dict[Values, list[str]] = {key: [] for key in several}
    for name, world_size, key in zip(good["launch"], good["world_size"], keys, strict=True):
        fitting = [key] if world_size > 1 else [other for other in several if _fits(key, other)] or [key]
        for other in fitting:
            members.setdefault(other, []).append(name)
    found = sorted(members, key=lambda key: (-len(members[key]), [str(part) for part in key]))
    return [
        Group(f"g{number}", _title(key, found), dict(zip(KEY, key, strict=True)), tuple(members[key]))
        for number, key in enumerate(found, 1)
    ]


def _key(row: Mapping[Any, Any]) -> Values:
    values = {field: None if pd.isna(row[field]) else str(row[field]) for field in KEY}
    if row["world_size"] == 1:
        unused = [field for field in _OF_SEVERAL_RANKS if values[field] in ("none", "single")]
        values |= dict.fromkeys(unused)
    return tuple(values.values())


def _fits(one_rank: Values, several: Values) -> bool:
    return all(
        one == other or (one is None and field in _OF_SEVERAL_RANKS)
        for field, one, other in zip(KEY, one_rank, several, strict=True)
    )


def _title(key: Values, keys: list[Values]) -> str:
    """Machine, device, backend and number format, and of the rest what differs between groups."""
    values = dict(zip(KEY, key, strict=True))
    parts = [values[field] for field in _IN_ALL_TITLES if values[field]]
    for index, field in enumerate(KEY):
        if field not in _IN_ALL_TITLES and len({other[index] for other in keys}) > 1:
            parts.append(f"{_NAMES.get(field, field)} {values[field] or 'none'}")
    return " · ".join(map(str, parts))
