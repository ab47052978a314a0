"""The models of a series and of an all-reduce, as the report tells them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from torchreg.reporting.points import Point, over_launches
from torchreg.reporting.series import Series
from torchreg.scaling import models
from torchreg.scaling.identify import Fit
from torchreg.scaling.statistics import Vector

_FURTHER = 8  # times the largest measured world size is where curves end
_CURVE_POINTS = 24


def models_of(series: Series, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Amdahl (strong scaling alone), the universal scalability law, and compute + α–β.

    The last is fitted to all of `points` that share scope, features and way to train with the series, strong and weak
    together: only so do rows and ranks vary apart.
    """
    times: dict[Hashable, dict[int, float]] = {}
    for point in series.points:
        for block, seconds in point.step_times.items():
            times.setdefault(block, {})[point.world_size] = seconds
    ranks = _world_sizes(series)
    if series.kind == "strong":
        fits = [models.fit_amdahl(times), models.fit_usl(times, global_batch_size=series.baseline.global_batch_size)]
        rows = series.baseline.global_batch_size / ranks
    else:
        fits = [models.fit_usl(times, local_batch_size=round(series.baseline.local_batch_size))]
        rows = np.full_like(ranks, series.baseline.local_batch_size)
    works = np.stack([ranks, rows, np.full_like(ranks, series.points[-1].message_bytes)], axis=1)
    return [
        *(_model(fit, series, ranks, ranks) for fit in fits),
        _model(models.fit_mechanistic(_works(points)), series, ranks, works),
    ]


def _works(points: Sequence[Point]) -> dict[Hashable, dict[models.Work, float]]:
    times: dict[Hashable, dict[models.Work, float]] = {}
    message = max(point.message_bytes for point in points)  # of one rank too, which has none to send
    for point in points:
        work = models.Work(point.world_size, point.global_batch_size / point.world_size, message)
        for block, seconds in point.step_times.items():
            times.setdefault(block, {})[work] = seconds
    return times


def _world_sizes(series: Series) -> Vector:
    """Where a curve is told: the measured world sizes, others between, and as many ranks more as still have rows."""
    measured = [point.world_size for point in series.points]
    last = measured[-1] * _FURTHER
    if series.kind == "strong":
        last = max(min(last, series.baseline.global_batch_size), measured[-1])
    between = np.rint(np.geomspace(measured[0], last, _CURVE_POINTS))
    return np.unique([*between, *measured]).astype(float)


def _model(fit: Fit, series: Series, ranks: Vector, predict_at: Vector) -> dict[str, Any]:
    largest = series.points[-1].world_size
    curve = []
    if fit.identifiable:
        curve = [
            {"world_size": int(p), "step_time_s": float(seconds), "extrapolated": bool(p > largest)}
            for p, seconds in zip(ranks, fit.predict(predict_at), strict=True)
        ]
    return {**_fit_json(fit), "curve": curve}


def _fit_json(fit: Fit) -> dict[str, Any]:
    return {
        "model": fit.model,
        "formula": fit.formula,
        "source": fit.source,
        "identifiable": fit.identifiable,
        "why": fit.why,
        "parameters": [asdict(parameter) for parameter in fit.parameters],
        "held_out_error": fit.held_out_error,
    }


_ALLREDUCE_KEY = ["way", "sync", "num_nodes", "ranks_per_node", "world_size"]


def allreduce_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Time and bandwidth by message size for each way and number of ranks, with latency and bandwidth fitted."""
    found = []
    table = table.rename(columns={"backend": "way"})
    for _, rows in table.groupby(_ALLREDUCE_KEY, sort=True):
        times: dict[Hashable, dict[int, float]] = {}
        by_size: dict[int, list[float]] = {}
        for block, size, seconds in zip(
            rows["block"].tolist(), rows["message_bytes"].tolist(), rows["time_s"].tolist(), strict=True
        ):
            times.setdefault(block, {})[size] = seconds
            by_size.setdefault(size, []).append(seconds)
        sizes = [
            {"message_bytes": size, "time_s": over_launches(by_size[size]), "bandwidth": size / median(by_size[size])}
            for size in sorted(by_size)
        ]
        key = {name: rows[name].tolist()[0] for name in _ALLREDUCE_KEY}
        found.append({**key, "sizes": sizes, "fit": _fit_json(models.fit_allreduce(times))})
    return found
