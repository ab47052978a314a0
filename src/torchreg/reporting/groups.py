"""Which launches may be compared: those of the same machine, devices, backend, number format and versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

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


class Group(NamedTuple):
    """Launches that may be compared, by name, and what they have in common (`KEY`; None where it does not apply)."""

    id: str
    title: str
    key: Mapping[str, str | None]
    launches: list[str]


def comparable_groups(launches: pd.DataFrame) -> list[Group]:
    """The groups of the launches that succeeded, the one with the most launches first.

    A launch of one rank belongs to each group that agrees in everything that one rank has. Where there is none, such
    launches form a group.
    """
    good = [(_key(row), row) for row in launches[launches["status"] == "ok"].to_dict("records")]
    members: dict[Values, list[str]] = {key: [] for key, row in good if row["world_size"] > 1}
    several = list(members)
    for key, row in good:
        fitting = [other for other in several if _fits(key, other)] if row["world_size"] == 1 else []
        for other in fitting or [key]:
            members.setdefault(other, []).append(row["launch"])
    keys = sorted(members, key=lambda key: (-len(members[key]), [str(part) for part in key]))
    differing = {field for field, *values in zip(KEY, *keys, strict=True) if len(set(values)) > 1}
    found = []
    for number, key in enumerate(keys, 1):
        values = dict(zip(KEY, key, strict=True))
        parts = [values[field] for field in _IN_ALL_TITLES if values[field]]
        rest = [field for field in KEY if field in differing and field not in _IN_ALL_TITLES]
        parts += [f"{_NAMES.get(field, field)} {values[field] or 'none'}" for field in rest]
        found.append(Group(f"g{number}", " · ".join(map(str, parts)), values, members[key]))
    return found


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
