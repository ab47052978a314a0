"""The models of a series and of an all-reduce, as the report tells them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from torchreg.report.points import Point, over_launches
from torchreg.report.series import Series
from torchreg.scaling import models

_FURTHER = 8  # times the largest measured world size is where curves end
_CURVE_POINTS = 24


def models_of(series: Series, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Amdahl (strong scaling alone), the universal scalability law, and compute + α–β.

    The last is fitted to all of `points` that share scope, features and way to train with the series, strong and weak
    together: only so do rows and ranks vary apart.
    """
    times: dict[int, dict[int, float]] = {}
    for point in series.points:
        for block, seconds in point.step_times.items():
            times.setdefault(block, {})[point.world_size] = seconds
    fits = [models.fit_amdahl(times)] if series.kind == "strong" else []
    fits.append(models.fit_usl(times, lambda world_sizes: _rows(series, world_sizes)))
    curve_at = _world_sizes(series)
    found = [_model(fit, series, curve_at, curve_at) for fit in fits]
    works = np.stack([curve_at, _rows(series, curve_at) / curve_at, np.full_like(curve_at, _message(series))], axis=1)
    return [*found, _model(models.fit_mechanistic(_works(points)), series, curve_at, works)]


def _works(points: Iterable[Point]) -> dict[int, dict[models.Work, float]]:
    times: dict[int, dict[models.Work, float]] = {}
    message = max(point.message_bytes for point in points)  # of one rank too, which has none to send
    for point in points:
        work = models.Work(point.world_size, point.global_batch_size / point.world_size, message)
        for block, seconds in point.step_times.items():
            times.setdefault(block, {})[work] = seconds
    return times


def _rows(series: Series, world_sizes: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Rows that all ranks take in a step."""
    if series.kind == "strong":
        return np.full(np.shape(world_sizes), float(series.baseline.global_batch_size))
    return world_sizes * series.baseline.local_batch_size


def _message(series: Series) -> int:
    return series.points[-1].message_bytes


def _world_sizes(series: Series) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Where a curve is told: the measured world sizes, others between, and as many ranks more as still have rows."""
    measured = [point.world_size for point in series.points]
    last = measured[-1] * _FURTHER
    if series.kind == "strong":
        last = max(min(last, series.baseline.global_batch_size), measured[-1])
    between = np.rint(np.geomspace(measured[0], last, _CURVE_POINTS))
    return np.unique([*between, *measured]).astype(float)


def _model(fit: models.Fit, series: Series, curve_at: Any, predict_at: Any) -> dict[str, Any]:
    largest = series.points[-1].world_size
    curve = []
    if fit.identifiable:
        curve = [
            {"world_size": int(p), "step_time_s": float(seconds), "extrapolated": bool(p > largest)}
            for p, seconds in zip(curve_at, fit.predict(predict_at), strict=True)
        ]
    return {**_fit_json(fit), "curve": curve}


def _fit_json(fit: models.Fit) -> dict[str, Any]:
    return {
        "model": fit.model,
        "formula": fit.formula,
        "source": fit.source,
        "identifiable": fit.identifiable,
        "why": fit.why,
        "parameters": [asdict(parameter) for parameter in fit.parameters],
        "held_out_error": fit.held_out_error,
    }


def allreduce_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Time and bandwidth by message size for each way and number of ranks, with latency and bandwidth fitted."""
    found = []
    keys = ["way", "sync", "num_nodes", "ranks_per_node", "world_size"]
    for values, rows in table.groupby(keys, sort=True):
        sizes = [
            {
                "message_bytes": int(size),
                "time_s": over_launches(same["time_s"]),
                "bandwidth": float(size / same["time_s"].median()),
            }
            for size, same in rows.groupby("message_bytes", sort=True)
        ]
        times: Mapping[int, Mapping[int, float]] = {
            int(block): {
                int(size): float(seconds) for size, seconds in zip(one["message_bytes"], one["time_s"], strict=True)
            }
            for block, one in rows.groupby("block", sort=True)
        }
        key = {name: value if isinstance(value, str) else int(value) for name, value in zip(keys, values, strict=True)}
        found.append({**key, "sizes": sizes, "fit": _fit_json(models.fit_allreduce(times))})
    return found
