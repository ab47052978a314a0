"""A point: one setting at one world size, with its launches; and its times with intervals over launches."""

from __future__ import annotations

from collections.abc import Iterable
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
    def step_times(self) -> dict[int, float]:
        """Block → seconds."""
        return {int(block): float(value) for block, value in self.launches["step_time_s"].items()}  # type: ignore[call-overload]

    @property
    def has_local_times(self) -> bool:
        """Whether the steps without averaging were timed; one rank averages with nobody."""
        return self.world_size > 1 and bool(self.launches["local_step_time_s"].notna().all())


def points_of(group: str, table: pd.DataFrame) -> list[Point]:
    """The points of a group's launches, from rows of `points_table` whose check passed."""
    points = []
    for values, launches in table.groupby(_KEYS, sort=True):
        key = dict(zip(_KEYS, values, strict=True))
        setting = f"{key['optimizer']}-{key['sync']}-features-{key['num_features']}-batch-{key['global_batch_size']}"
        points.append(
            Point(
                id=f"{group}-nodes-{key['num_nodes']}-ranks-{key['world_size']}-{setting}",
                message_bytes=int(launches["message_bytes"].iloc[0]),
                local_batch_size=float(launches["local_batch_size"].iloc[0]),
                launches=launches.set_index("block").sort_index(),
                **{field: value if isinstance(value, str) else int(value) for field, value in key.items()},
            )
        )
    return points


def point_json(point: Point) -> dict[str, Any]:
    """What the report tells of a point.

    A step of the slowest rank is taking rows + computing + exposed communication; the imbalance, by which the slowest
    rank is slower than the median rank, is a part of these and not a fourth.
    """
    launches = point.launches
    step, rows, local = launches["step_time_s"], launches["rows_time_s"], launches["local_step_time_s"]
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
        "rows_time_s": over_launches(rows),
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


def features(number: int) -> str:
    """1 feature, 64 features."""
    return f"{number} feature{'s' * (number != 1)}"


def ranks(number: int) -> str:
    """1 rank, 4 ranks."""
    return f"{number} rank{'s' * (number != 1)}"
