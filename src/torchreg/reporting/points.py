"""A point is one setting at one world size; its numbers are medians over launches with 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from torchreg.scaling.statistics import Estimate, median_interval

Json = dict[str, Any]

_KEYS = ["num_nodes", "ranks_per_node", "world_size", "optimizer", "sync", "num_features", "global_batch_size"]


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
    were timed. The spread is the interquartile range over the median.
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
    return {"id": name, **setting, "num_launches": len(launches), "spread": spread, **estimates}


def over_launches(values: Iterable[float]) -> Json:
    """The median over launches and its interval, as JSON."""
    return asdict(median_interval(values))


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate times a positive number."""
    low, high = (None if end is None else end * factor for end in (estimate.low, estimate.high))
    return Estimate(estimate.value * factor, low, high, estimate.num_launches)
