"""Models of the step time of a series and of the time of an all-reduce, fitted to launches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from torchreg.reporting.points import Json, over_launches
from torchreg.scaling import models
from torchreg.scaling.models import Fit

_FURTHER = 8  # curves end at this multiple of the largest measured world size
_CURVE_POINTS = 24
_SETTING = ("scope", "optimizer", "sync", "num_features")
_ALLREDUCE_KEY = ["backend", "sync", "num_nodes", "ranks_per_node", "world_size"]
Size = TypeVar("Size")


def models_of(series: Json, points: Mapping[str, Json], launches: Mapping[str, pd.DataFrame],
              others: Sequence[Json]) -> list[Json]:  # fmt: skip
    """Amdahl (strong scaling only), the universal scalability law, and compute + α–β.

    The last is fitted to the points of all `others` with the same scope, optimizer, sync and number of features, strong
    and weak together, because only then local batch and world size vary independently.
    """
    measured = [row["world_size"] for row in series["points"]]
    times = _times({row["point"]: row["world_size"] for row in series["points"]}, launches)
    global_batch, local_batch = series["global_batch_size"], series["local_batch_size"]
    last = measured[-1] * _FURTHER
    if series["kind"] == "strong":
        fits = [models.fit_amdahl(times), models.fit_usl(times, global_batch_size=global_batch)]
        last = max(min(last, global_batch), measured[-1])  # each rank has a sample
    else:
        fits = [models.fit_usl(times, local_batch_size=round(local_batch))]
    between = np.rint(np.geomspace(measured[0], last, _CURVE_POINTS))
    ranks = np.unique([*between, *measured]).astype(float)
    local_batches = global_batch / ranks if series["kind"] == "strong" else np.full_like(ranks, local_batch)

    alike = [other for other in others if all(other[field] == series[field] for field in _SETTING)]
    own = [points[name] for name in dict.fromkeys(row["point"] for other in alike for row in other["points"])]
    message = max(point["message_bytes"] for point in own)  # of one rank too, which sends none
    works = {
        point["id"]: models.Work(point["world_size"], point["global_batch_size"] / point["world_size"], message)
        for point in own
    }
    mechanistic = models.fit_mechanistic(_times(works, launches))
    predicted = [(fit, ranks) for fit in fits]
    predicted.append((mechanistic, np.stack([ranks, local_batches, np.full_like(ranks, series["message_bytes"])], 1)))
    return [
        {
            **_fit(fit),
            "curve": [
                {"world_size": int(p), "step_time_s": float(seconds), "extrapolated": bool(p > measured[-1])}
                for p, seconds in zip(ranks, fit.predict(at), strict=True)
                if fit.identifiable
            ],
        }
        for fit, at in predicted
    ]


def _times(sizes: Mapping[str, Size], launches: Mapping[str, pd.DataFrame]) -> dict[Hashable, dict[Size, float]]:
    """{block: {size: seconds of a step}}, as fits need them, of points with a size each."""
    times: dict[Hashable, dict[Size, float]] = {}
    for name, size in sizes.items():
        for block, seconds in launches[name]["step_time_s"].items():
            times.setdefault(block, {})[size] = seconds
    return times


def _fit(fit: Fit) -> Json:
    return {field: value for field, value in asdict(fit).items() if field != "predict"}


def allreduce_of(table: pd.DataFrame) -> list[Json]:
    """Time and bandwidth (B/s) by message size for each backend and world size, with a fit."""
    found = []
    for _, rows in table.groupby(_ALLREDUCE_KEY, sort=True):
        by_block: dict[Hashable, Any] = {
            block: own.set_index("message_bytes")["time_s"].to_dict() for block, own in rows.groupby("block")
        }
        sizes = [
            {"message_bytes": size, "time_s": over_launches(times), "bandwidth": size / median(times)}
            for size, times in rows.groupby("message_bytes")["time_s"]
        ]
        key = {name: rows[name].tolist()[0] for name in _ALLREDUCE_KEY}
        found.append({**key, "sizes": sizes, "fit": _fit(models.fit_allreduce(by_block))})
    return found
