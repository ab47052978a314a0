"""Models of the step time of a series and of the time of an all-reduce, fitted to launches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from statistics import median

import numpy as np
import pandas as pd

from torchreg.reporting.points import Json, over_launches
from torchreg.reporting.series import step_times
from torchreg.scaling import models
from torchreg.scaling.identify import Fit
from torchreg.scaling.statistics import Vector

_FURTHER = 8  # curves end at this multiple of the largest measured world size
_CURVE_POINTS = 24
_SETTING = ("scope", "optimizer", "sync", "num_features")
_ALLREDUCE_KEY = ["backend", "sync", "num_nodes", "ranks_per_node", "world_size"]


def models_of(series: Json, points: Mapping[str, Json], launches: Mapping[str, pd.DataFrame],
              others: Sequence[Json]) -> list[Json]:  # fmt: skip
    """Amdahl (strong scaling only), the universal scalability law, and compute + α–β.

    The last is fitted to the points of all `others` with the same scope, optimizer, sync and number of features, strong
    and weak together, because only then local batch and world size vary independently.
    """
    times: dict[Hashable, dict[int, float]] = {}
    for row in series["points"]:
        for block, seconds in step_times(launches[row["point"]]).items():
            times.setdefault(block, {})[row["world_size"]] = seconds
    ranks = _world_sizes(series)
    global_batch, local_batch = series["global_batch_size"], series["local_batch_size"]
    if series["kind"] == "strong":
        fits = [models.fit_amdahl(times), models.fit_usl(times, global_batch_size=global_batch)]
        local_batches = global_batch / ranks
    else:
        fits = [models.fit_usl(times, local_batch_size=round(local_batch))]
        local_batches = np.full_like(ranks, local_batch)
    works = np.stack([ranks, local_batches, np.full_like(ranks, series["message_bytes"])], axis=1)
    alike = [other for other in others if all(other[field] == series[field] for field in _SETTING)]
    names = dict.fromkeys(row["point"] for other in alike for row in other["points"])
    mechanistic = models.fit_mechanistic(_works([points[name] for name in names], launches))
    return [*(_model(fit, series, ranks, ranks) for fit in fits), _model(mechanistic, series, ranks, works)]


def _works(points: Sequence[Json], launches: Mapping[str, pd.DataFrame]) -> dict[Hashable, dict[models.Work, float]]:
    times: dict[Hashable, dict[models.Work, float]] = {}
    message = max(point["message_bytes"] for point in points)  # of one rank too, which sends none
    for point in points:
        work = models.Work(point["world_size"], point["global_batch_size"] / point["world_size"], message)
        for block, seconds in step_times(launches[point["id"]]).items():
            times.setdefault(block, {})[work] = seconds
    return times


def _world_sizes(series: Json) -> Vector:
    """The world sizes of a curve: measured ones, others between, and larger ones as far as each rank has a sample."""
    measured = [row["world_size"] for row in series["points"]]
    last = measured[-1] * _FURTHER
    if series["kind"] == "strong":
        last = max(min(last, series["global_batch_size"]), measured[-1])
    between = np.rint(np.geomspace(measured[0], last, _CURVE_POINTS))
    return np.unique([*between, *measured]).astype(float)


def _model(fit: Fit, series: Json, ranks: Vector, predict_at: Vector) -> Json:
    largest = series["points"][-1]["world_size"]
    times = fit.predict(predict_at) if fit.identifiable else ()
    curve = [
        {"world_size": int(p), "step_time_s": float(seconds), "extrapolated": bool(p > largest)}
        for p, seconds in zip(ranks, times, strict=fit.identifiable)
    ]
    return {**_fit(fit), "curve": curve}


def _fit(fit: Fit) -> Json:
    fields = ("model", "formula", "source", "identifiable", "why", "held_out_error")
    return {
        **{field: getattr(fit, field) for field in fields},
        "parameters": [asdict(parameter) for parameter in fit.parameters],
    }


def allreduce_of(table: pd.DataFrame) -> list[Json]:
    """Time and bandwidth (B/s) by message size for each backend and world size, with a fit."""
    found = []
    for _, rows in table.groupby(_ALLREDUCE_KEY, sort=True):
        by_block = {
            block: dict(zip(own["message_bytes"].tolist(), own["time_s"].tolist(), strict=True))
            for block, own in rows.groupby("block")
        }
        by_size = {size: own.tolist() for size, own in rows.groupby("message_bytes")["time_s"]}
        sizes = [
            {"message_bytes": size, "time_s": over_launches(times), "bandwidth": size / median(times)}
            for size, times in by_size.items()
        ]
        key = {name: rows[name].tolist()[0] for name in _ALLREDUCE_KEY}
        found.append({**key, "sizes": sizes, "fit": _fit(models.fit_allreduce(by_block))})
    return found
