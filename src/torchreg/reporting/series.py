"""Series of points of growing world size, and the models that are fitted to them and to all-reduces.

A series has the same global batch (strong scaling) or the same local batch (weak scaling).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from torchreg.reporting.groups import Json, over_launches, scaled
from torchreg.scaling import models
from torchreg.scaling.models import Fit
from torchreg.scaling.statistics import Estimate, karp_flatt, ratio_interval

_SETTING = ("optimizer", "sync", "num_features")
_CONSTANT = {"strong": "global_batch_size", "weak": "local_batch_size"}
_FURTHER = 8  # curves end at this multiple of the largest measured world size
_CURVE_POINTS = 24
_ALLREDUCE_KEY = ["backend", "sync", "num_nodes", "ranks_per_node", "world_size"]


def series_of(group: str, points: Sequence[Json], launches: Mapping[str, pd.DataFrame]) -> list[Json]:
    """All series of a group's points, as report.json has them; `launches` are those of each point by its id.

    A campaign of strong and weak series measures points that also form other, shorter series by coincidence. These are
    excluded where each of their points is in a series of full length.
    """
    # Within a node ranks communicate through its memory, across nodes through a network: the two are kept apart.
    scopes = {"within a node": [point for point in points if point["num_nodes"] == 1]}
    for per_node in sorted({point["ranks_per_node"] for point in points if point["num_nodes"] > 1}):
        inside = [point for point in points if point["ranks_per_node"] == per_node]
        scopes[f"across nodes, {per_node} rank{'s' * (per_node > 1)} a node"] = inside
    found = []
    for scope, inside in scopes.items():
        settings = [itemgetter(*_SETTING)(point) for point in inside]
        for optimizer, sync, num_features in dict.fromkeys(setting for setting in settings if setting[1] != "none"):
            alike = ((optimizer, sync, num_features), (optimizer, "none", num_features))
            own = [point for point, setting in zip(inside, settings, strict=True) if setting in alike]
            candidates = [
                (kind, list(chosen))
                for kind, field in _CONSTANT.items()
                for _, chosen in groupby(sorted(own, key=itemgetter(field, "world_size")), key=itemgetter(field))
            ]
            longest = max(len(chosen) for _, chosen in candidates)
            covered = {point["id"] for _, chosen in candidates if len(chosen) == longest for point in chosen}
            for kind, chosen in candidates:
                is_new = len(chosen) == longest or not covered.issuperset(point["id"] for point in chosen)
                if len(chosen) > 1 and is_new:
                    found.append(_series(group, kind, scope, chosen, launches))
    return found


def _series(group: str, kind: str, scope: str, points: Sequence[Json], launches: Mapping[str, pd.DataFrame]) -> Json:
    """A series, with speedup and efficiency over the baseline p0, the smallest world size, in its points."""
    baseline, last, rows = points[0], points[-1], []
    for point in points:
        k = point["world_size"] / baseline["world_size"]
        efficiency = Estimate(1.0, 1.0, 1.0, point["num_launches"])
        if point is not baseline:
            efficiency = ratio_interval(*(launches[one["id"]]["step_time_s"].to_dict() for one in (baseline, point)))
            if kind == "strong":  # T(p0)·p0 / (T(p)·p); weak: T(p0) / T(p)
                efficiency = scaled(efficiency, 1 / k)
        speedup = scaled(efficiency, k)
        serial = _serial_fraction(speedup, k) if kind == "strong" and k > 1 else None
        row = {field: point[field] for field in ("world_size", "num_nodes", "throughput", "step_time_s")}
        row |= {"speedup": asdict(speedup), "efficiency": asdict(efficiency), "karp_flatt": serial}
        rows.append({"point": point["id"], **row})
    batch = last[_CONSTANT[kind]]
    setting = f"{last['optimizer']}-{last['sync']}-features-{last['num_features']}-batch-{batch:g}"
    return {
        "id": f"{group}-{kind}-{scope.replace(',', '').replace(' ', '-')}-{setting}",
        "kind": kind,
        "scope": scope,
        **{field: last[field] for field in (*_SETTING, "message_bytes")},
        **dict.fromkeys(_CONSTANT.values()),
        _CONSTANT[kind]: batch,
        "baseline_world_size": baseline["world_size"],
        "points": rows,
    }


def _serial_fraction(speedup: Estimate, k: float) -> Json | None:
    """The Karp–Flatt metric; None where its interval is not within 0 to 1, so that it means no fraction."""
    found = karp_flatt(speedup, k)
    if found.low is None or found.high is None:
        return None
    return (
        asdict(found) if 0 <= round(found.low, 9) <= round(found.high, 9) <= 1 else None
    )  # exactly 0 or 1 are rounded


def models_of(series: Json, launches: Mapping[str, pd.DataFrame], others: Sequence[Json]) -> list[Json]:
    """Amdahl (strong scaling only), the universal scalability law, and compute + α–β; `launches` are those by point.

    The last is fitted to the points of all `others` with the same scope, optimizer, sync and number of features, strong
    and weak together, because only then local batch and world size vary independently.
    """
    own = pd.concat([launches[row["point"]] for row in series["points"]])
    times = _times(own["world_size"], own["step_time_s"])
    measured = [row["world_size"] for row in series["points"]]
    global_batch, local_batch, last = series["global_batch_size"], series["local_batch_size"], measured[-1] * _FURTHER
    if series["kind"] == "strong":
        fits = [models.fit_amdahl(times), models.fit_usl(times, global_batch_size=global_batch)]
        last = max(min(last, global_batch), measured[-1])  # each rank has a sample
    else:
        fits = [models.fit_usl(times, local_batch_size=round(local_batch))]
    doubled = [size for size in (2 * measured[-1], 4 * measured[-1]) if size < last]
    ranks = np.unique([*np.rint(np.geomspace(measured[0], last, _CURVE_POINTS)), *measured, *doubled])

    alike = [other for other in others if all(other[field] == series[field] for field in ("scope", *_SETTING))]
    rows = pd.concat([launches[name] for name in {row["point"]: None for other in alike for row in other["points"]}])
    message = int(rows["message_bytes"].max())  # of one rank too, which sends none
    sizes = zip(rows["world_size"], rows["global_batch_size"], strict=True)
    works = [models.Work(p, batch / p, message) for p, batch in sizes]
    local_batches = global_batch / ranks if series["kind"] == "strong" else np.full_like(ranks, local_batch)
    mechanistic = models.fit_mechanistic(_times(works, rows["step_time_s"]))
    at_works = np.stack([ranks, local_batches, np.full_like(ranks, series["message_bytes"])], 1)
    ideal = ranks[0] / ranks if series["kind"] == "strong" else np.ones(len(ranks))  # step time over that at p0
    found = []
    for fit, at in (*((fit, ranks) for fit in fits), (mechanistic, at_works)):
        step_times = fit.predict(at)
        columns = {
            "world_size": ranks.astype(int),
            "step_time_s": step_times,
            "efficiency": ideal * step_times[0] / step_times,
            "extrapolated": ranks > measured[-1],
        }
        curve = pd.DataFrame(columns).to_dict("records") if fit.identifiable else []
        found.append({**_fit(fit), "curve": curve})
    return found


def _times(sizes: Iterable[Any], seconds: pd.Series[float]) -> dict[Hashable, dict[Any, float]]:
    """{block: {size: seconds}}, as fits need them; the index of `seconds` is the block."""
    times: dict[Hashable, dict[Any, float]] = {}
    for size, (block, value) in zip(sizes, seconds.items(), strict=True):
        times.setdefault(block, {})[size] = value
    return times


def _fit(fit: Fit) -> Json:
    return {field: value for field, value in asdict(fit).items() if field != "predict"}


def allreduce_of(table: pd.DataFrame) -> list[Json]:
    """Time and bandwidth (B/s) by message size for each backend and world size, with a fit."""
    found = []
    for _, rows in table.groupby(_ALLREDUCE_KEY, sort=True):
        sizes = [
            {"message_bytes": size, "time_s": over_launches(own), "bandwidth": size / median(own)}
            for size, own in rows.groupby("message_bytes")["time_s"]
        ]
        key = {name: rows[name].tolist()[0] for name in _ALLREDUCE_KEY}
        fit = _fit(models.fit_allreduce(_times(rows["message_bytes"], rows.set_index("block")["time_s"])))
        found.append({**key, "sizes": sizes, "fit": fit})
    return found
