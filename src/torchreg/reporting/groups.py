"""Which launches may be compared: those of the same machine, devices, backend, number format and versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import pandas as pd

from torchreg.reporting.points import Json
from torchreg.scaling.records import FACTS

VERSIONS = ("torch", "numpy", "mpi_library", "nccl_version", *FACTS, "placement", "without")
"""What affects step times apart from the machine: versions, settings, visible devices."""

_WHERE = ("machine", "device_name", "backend", "dtype")  # in all titles
_KEY = (*_WHERE, "effective", *VERSIONS)
_OF_SEVERAL_RANKS = ("backend", "effective", "mpi_library", "nccl_version", "oneccl", "libfabric")
"""What a launch of one rank does not use, and so does not record."""
_NAMES = {"mpi_library": "MPI", "nccl_version": "NCCL", "effective": "distributed"}

Values: TypeAlias = tuple[str | None, ...]


def comparable_groups(launches: pd.DataFrame) -> list[tuple[Json, pd.DataFrame]]:
    """The groups of the launches that succeeded, the largest first: a heading, as in report.json, and the launches.

    The heading has what they have in common, None where it does not apply. A launch of one rank belongs to each group
    that agrees in everything that one rank has. Where there is none, such launches form a group.
    """
    good = launches[launches["status"] == "ok"]
    keys = [(_key(row), row["world_size"] == 1) for row in good.to_dict("records")]
    several = dict.fromkeys(key for key, is_single in keys if not is_single)
    members: dict[Values, list[int]] = {}
    for index, (key, is_single) in enumerate(keys):
        for other in [other for other in several if is_single and _fits(key, other)] or [key]:
            members.setdefault(other, []).append(index)
    ordered = sorted(members, key=lambda key: (-len(members[key]), [str(part) for part in key]))
    differing = {field for field, *values in zip(_KEY, *ordered, strict=True) if len(set(values)) > 1}
    found = []
    for number, key in enumerate(ordered, 1):
        own, values = good.iloc[members[key]], dict(zip(_KEY, key, strict=True))
        title = [value for value in key[: len(_WHERE)] if value]
        title += [f"{_NAMES.get(f, f)} {values[f] or 'none'}" for f in _KEY[len(_WHERE) :] if f in differing]
        num_cpus = pd.to_numeric(own["num_cpus"])
        too_many = own.loc[own["ranks_per_node"] > num_cpus, "ranks_per_node"]
        heading = {
            "id": f"g{number}",
            "title": " · ".join(title),
            **{field: values[field] for field in _WHERE},
            "distributed": values["effective"],
            "versions": {name: values[name] for name in VERSIONS},
            "num_launches": len(own),
            "num_cpus": int(num_cpus.min()) if num_cpus.notna().any() else None,
            "oversubscribed_ranks_per_node": sorted(too_many.unique().tolist()),
        }
        found.append((heading, own))
    return found


def _key(row: Mapping[Any, Any]) -> Values:
    values = {field: None if pd.isna(row[field]) else str(row[field]) for field in _KEY}
    if row["world_size"] == 1:
        values |= dict.fromkeys(field for field in _OF_SEVERAL_RANKS if values[field] in ("none", "single"))
    return tuple(values.values())


def _fits(one_rank: Values, several: Values) -> bool:
    pairs = zip(_KEY, one_rank, several, strict=True)
    return all(one == other or (one is None and field in _OF_SEVERAL_RANKS) for field, one, other in pairs)
