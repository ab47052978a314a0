"""A point is one setting at one world size; its numbers are medians over launches with 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from torchreg.reporting.groups import Group
from torchreg.scaling.statistics import Estimate, median_interval

Json = dict[str, Any]

_KEYS = ["num_nodes", "ranks_per_node", "world_size", "optimizer", "sync", "num_features", "global_batch_size"]


def launches_by_point(group: Group, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The launches of each point of a group by its id, indexed by block, from `points_table`.

    Launches whose check failed are excluded. `sync` is `none` at one rank.
    """
    own, found = table[table["launch"].isin(group.launches) & table["check_passed"]], {}
    for (num_nodes, _, world_size, optimizer, sync, num_features, batch), rows in own.groupby(_KEYS, sort=True):
        setting = f"{optimizer}-{sync}-features-{num_features}-batch-{batch}"
        found[f"{group.id}-nodes-{num_nodes}-ranks-{world_size}-{setting}"] = rows.set_index("block").sort_index()
    return found


def point_of(name: str, launches: pd.DataFrame) -> Json:
    """A point as report.json has it.

    The step time of the slowest rank is data + compute + exposed communication. The imbalance, by which the slowest
    rank exceeds the median rank, is a part of these. Compute and exposed are None where no steps without all-reduce
    were timed. The spread is the interquartile range over the median.
    """
    step, data, local = (launches[field] for field in ("step_time_s", "data_time_s", "local_step_time_s"))
    slowest, middle = launches["rank_max_s"], launches["rank_median_s"]
    setting = {field: launches[field].tolist()[0] for field in (*_KEYS, "message_bytes", "local_batch_size")}
    has_local = setting["world_size"] > 1 and bool(local.notna().all())
    compute = step - data if setting["world_size"] == 1 else local - data if has_local else None
    return {
        "id": name,
        **setting,
        "num_launches": len(launches),
        "step_time_s": over_launches(step),
        "spread": float(np.subtract(*np.percentile(step, [75, 25])) / np.median(step)),
        "slowest_over_median": over_launches(slowest / middle),
        "data_time_s": over_launches(data),
        "compute_time_s": None if compute is None else over_launches(compute),
        "exposed_time_s": over_launches(step - local) if has_local else None,
        "imbalance_time_s": over_launches(slowest - middle),
        "throughput": over_launches(setting["global_batch_size"] / step),
    }


def over_launches(values: Iterable[float]) -> Json:
    """The median over launches and its interval, as JSON."""
    return asdict(median_interval(values))


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate times a positive number."""
    low, high = (None if end is None else end * factor for end in (estimate.low, estimate.high))
    return Estimate(estimate.value * factor, low, high, estimate.num_launches)
