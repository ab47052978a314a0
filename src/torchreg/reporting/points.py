"""A point: one setting at one world size, with its launches; and its times with intervals over launches."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from torchreg.scaling.statistics import Estimate, median_interval

_KEYS = ["num_nodes", "ranks_per_node", "world_size", "optimizer", "sync", "num_features", "global_batch_size"]


@dataclass(frozen=True)
class Point:
    """One setting (optimizer, sync, features, global batch) at a number of nodes and ranks a node.

    `launches` has a row for each launch, its index is the block; `sync` is `none` at one rank.
    """

    id: str
    world_size: int
    num_nodes: int
    ranks_per_node: int
    optimizer: str
    sync: str
    num_features: int
    message_bytes: int
    global_batch_size: int
    local_batch_size: float
    launches: pd.DataFrame

    @property
    def step_times(self) -> dict[Hashable, float]:
        """Block → seconds."""
        return dict(zip(self.launches.index.tolist(), self.launches["step_time_s"].tolist(), strict=True))

    @property
    def step_time(self) -> Estimate:
        """The median over launches."""
        return median_interval(self.launches["step_time_s"])

    @property
    def has_local_times(self) -> bool:
        """Whether the steps without averaging were timed; one rank averages with nobody."""
        return self.world_size > 1 and bool(self.launches["local_step_time_s"].notna().all())


def points_of(group: str, table: pd.DataFrame) -> list[Point]:
    """The points of a group's launches, from rows of `points_table` whose check passed."""
    return [_point(group, launches.set_index("block").sort_index()) for _, launches in table.groupby(_KEYS, sort=True)]


def _point(group: str, launches: pd.DataFrame) -> Point:
    key = launches[_KEYS].to_dict("records")[0]
    setting = f"{key['optimizer']}-{key['sync']}-features-{key['num_features']}-batch-{key['global_batch_size']}"
    return Point(
        id=f"{group}-nodes-{key['num_nodes']}-ranks-{key['world_size']}-{setting}",
        world_size=key["world_size"],
        num_nodes=key["num_nodes"],
        ranks_per_node=key["ranks_per_node"],
        optimizer=key["optimizer"],
        sync=key["sync"],
        num_features=key["num_features"],
        message_bytes=int(launches["message_bytes"].iloc[0]),
        global_batch_size=key["global_batch_size"],
        local_batch_size=float(launches["local_batch_size"].iloc[0]),
        launches=launches,
    )


def point_json(point: Point) -> dict[str, Any]:
    """What the report tells of a point.

    A step of the slowest rank is taking rows + computing + exposed communication; the imbalance, by which the slowest
    rank is slower than the median rank, is a part of these and not a fourth.
    """
    launches = point.launches
    step, rows, local = launches["step_time_s"], launches["data_time_s"], launches["local_step_time_s"]
    fields = (
        "id", "world_size", "num_nodes", "ranks_per_node", "optimizer", "sync", "num_features", "message_bytes",
        "global_batch_size", "local_batch_size",
    )  # fmt: skip
    alone, timed = point.world_size == 1, point.has_local_times
    return {
        **{field: getattr(point, field) for field in fields},
        "num_launches": len(launches),
        "step_time_s": over_launches(step),
        "spread": float(np.subtract(*np.percentile(step, [75, 25])) / np.median(step)),
        "slowest_over_median": over_launches(launches["rank_max_s"] / launches["rank_median_s"]),
        "data_time_s": over_launches(rows),
        "compute_time_s": over_launches(step - rows) if alone else over_launches(local - rows) if timed else None,
        "exposed_time_s": over_launches(step - local) if timed else None,
        "imbalance_time_s": over_launches(launches["rank_max_s"] - launches["rank_median_s"]),
        "throughput": over_launches(point.global_batch_size / step),
    }


def over_launches(values: Iterable[float]) -> dict[str, Any]:
    """The median and its interval, as JSON has it."""
    return asdict(median_interval(values))


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate times a positive number."""
    low, high = (None if end is None else end * factor for end in (estimate.low, estimate.high))
    return Estimate(estimate.value * factor, low, high, estimate.num_launches)
