"""Groups of launches that may be compared, and the points that they measured.

Those on the same machine, devices and backend, with the same number format and versions. A point is one setting at one
world size; its numbers are medians over launches with 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from torchreg.scaling.records import FACTS
from torchreg.scaling.statistics import Estimate, median_interval

Json = dict[str, Any]

VERSIONS = ("torch", "numpy", "mpi_library", "nccl_version", *FACTS, "placement", "without")
"""What affects step times apart from the machine: versions, settings, visible devices."""

_WHERE = ("machine", "device_name", "backend", "dtype")  # in all titles
_KEY = (*_WHERE, "effective", *VERSIONS)
_OF_SEVERAL_RANKS = ("backend", "effective", "mpi_library", "nccl_version", "oneccl", "libfabric")
"""What a launch of one rank does not use, and so does not record."""
_NAMES = {"mpi_library": "MPI", "nccl_version": "NCCL", "effective": "distributed"}
_KEYS = ["num_nodes", "ranks_per_node", "world_size", "optimizer", "sync", "num_features", "global_batch_size"]

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


def launches_by_point(group: str, launches: pd.Series[str], table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The launches of each point of a group by its id, indexed by block, from `points_table`.

    Launches whose check failed are excluded. `sync` is `none` at one rank.
    """
    own, found = table[table["launch"].isin(launches) & table["check_passed"]], {}
    for (num_nodes, _, world_size, optimizer, sync, num_features, batch), rows in own.groupby(_KEYS, sort=True):
        setting = f"{optimizer}-{sync}-features-{num_features}-batch-{batch}"
        found[f"{group}-nodes-{num_nodes}-ranks-{world_size}-{setting}"] = rows.set_index("block").sort_index()
    return found


def point_of(name: str, launches: pd.DataFrame) -> Json:
    """A point as report.json has it.

    The step time of the slowest rank is data + compute + exposed communication. The imbalance, by which the slowest
    rank exceeds the median rank, is a part of these. Compute and exposed are None where no steps without all-reduce
    were timed. The spread is the interquartile range over the median. `step_times_s` are those of the launches.
    """
    step, data, local = (launches[field] for field in ("step_time_s", "data_time_s", "local_step_time_s"))
    slowest, middle = launches["rank_max_s"], launches["rank_median_s"]
    setting = {field: launches[field].tolist()[0] for field in (*_KEYS, "message_bytes", "local_batch_size")}
    is_single = setting["world_size"] == 1
    times = {
        "step_time_s": step,
        "slowest_over_median": slowest / middle,
        "data_time_s": data,
        "compute_time_s": (step if is_single else local) - data,
        "exposed_time_s": step - (np.nan if is_single else local),
        "imbalance_time_s": slowest - middle,
        "throughput": setting["global_batch_size"] / step,
    }
    estimates = {field: over_launches(values) if values.notna().all() else None for field, values in times.items()}
    spread = float(np.subtract(*np.percentile(step, [75, 25])) / np.median(step))
    numbers = {"num_launches": len(launches), "step_times_s": step.tolist(), "spread": spread}
    return {"id": name, **setting, **numbers, **estimates}


def over_launches(values: Iterable[float]) -> Json:
    """The median over launches and its interval, as JSON."""
    return asdict(median_interval(values))


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate times a positive number."""
    low, high = (None if end is None else end * factor for end in (estimate.low, estimate.high))
    return Estimate(estimate.value * factor, low, high, estimate.num_launches)
