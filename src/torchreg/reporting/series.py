"""Series: points of growing world size, with the same global batch (strong scaling) or local batch (weak scaling)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter

import pandas as pd

from torchreg.reporting.points import Json, scaled
from torchreg.scaling.statistics import Estimate, karp_flatt, ratio_interval

_SETTING = ("optimizer", "sync", "num_features")
_CONSTANT = {"strong": "global_batch_size", "weak": "local_batch_size"}


def series_of(group: str, points: Sequence[Json], launches: Mapping[str, pd.DataFrame]) -> list[Json]:
    """All series of a group's points, as report.json has them; `launches` are those of each point by its id.

    A campaign of strong and weak series measures points that also form other, shorter series by coincidence. These are
    excluded where each of their points is in a series of full length.
    """
    found = []
    for scope, inside in _scopes(points):
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


def _scopes(points: Sequence[Json]) -> Iterator[tuple[str, list[Json]]]:
    """Within a node ranks communicate through its memory, across nodes through a network: the two are kept apart."""
    yield "within a node", [point for point in points if point["num_nodes"] == 1]
    for per_node in sorted({point["ranks_per_node"] for point in points if point["num_nodes"] > 1}):
        scope = f"across nodes, {per_node} rank{'s' * (per_node > 1)} a node"
        yield scope, [point for point in points if point["ranks_per_node"] == per_node]


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
        serial = asdict(karp_flatt(speedup, k)) if kind == "strong" and k > 1 else None
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
