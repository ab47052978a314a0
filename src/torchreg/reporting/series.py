"""Series: points of growing world size, with the same global batch (strong scaling) or local batch (weak scaling)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import pandas as pd

from torchreg.reporting.points import Json, scaled
from torchreg.scaling.statistics import Estimate, karp_flatt, ratio_interval


def series_of(group: str, points: Sequence[Json], launches: Mapping[str, pd.DataFrame]) -> list[Json]:
    """All series of a group's points, as report.json has them; `launches` are those of each point by its id.

    A campaign of strong and weak series measures points that also form other, shorter series by coincidence. These are
    excluded where each of their points is in a series of full length.
    """
    candidates = [one for scope, inside in _scopes(points) for one in _candidates(scope, inside)]
    longest: dict[tuple[str, ...], int] = defaultdict(int)
    for one in candidates:
        longest[_family(one)] = max(longest[_family(one)], len(one["points"]))
    full = [one for one in candidates if len(one["points"]) == longest[_family(one)]]
    covered = {(one["scope"], one["sync"], point["id"]) for one in full for point in one["points"]}
    kept = [
        one
        for one in candidates
        if one in full or any((one["scope"], one["sync"], point["id"]) not in covered for point in one["points"])
    ]
    return [_with_ratios(group, one, launches) for one in kept]


def _family(series: Json) -> tuple[str, ...]:
    return series["scope"], series["optimizer"], series["sync"], str(series["num_features"])


def _scopes(points: Sequence[Json]) -> Iterator[tuple[str, list[Json]]]:
    """Within a node ranks communicate through its memory, across nodes through a network: the two are kept apart."""
    yield "within a node", [point for point in points if point["num_nodes"] == 1]
    for per_node in sorted({point["ranks_per_node"] for point in points if point["num_nodes"] > 1}):
        scope = f"across nodes, {per_node} rank{'s' * (per_node > 1)} a node"
        yield scope, [point for point in points if point["ranks_per_node"] == per_node]


def _candidates(scope: str, points: Sequence[Json]) -> Iterator[Json]:
    """Series whose `points` are still those of the group; the first is the baseline p0, the smallest world size."""
    settings = [(point["optimizer"], point["sync"], point["num_features"]) for point in points]
    for optimizer, sync, num_features in dict.fromkeys(setting for setting in settings if setting[1] != "none"):
        own = [
            point
            for point, setting in zip(points, settings, strict=True)
            if setting in ((optimizer, sync, num_features), (optimizer, "none", num_features))
        ]
        for kind, field in (("strong", "global_batch_size"), ("weak", "local_batch_size")):
            for batch in sorted({point[field] for point in own}):
                chosen = sorted((p for p in own if p[field] == batch), key=lambda point: point["world_size"])
                if len(chosen) > 1:
                    yield {
                        "kind": kind,
                        "scope": scope,
                        "optimizer": optimizer,
                        "sync": sync,
                        "num_features": num_features,
                        "message_bytes": chosen[-1]["message_bytes"],
                        "global_batch_size": batch if kind == "strong" else None,
                        "local_batch_size": batch if kind == "weak" else None,
                        "baseline_world_size": chosen[0]["world_size"],
                        "points": chosen,
                    }


def _with_ratios(group: str, series: Json, launches: Mapping[str, pd.DataFrame]) -> Json:
    """The series with its id, and with speedup and efficiency over the baseline in its points."""
    strong, batch = series["kind"] == "strong", series["global_batch_size"] or series["local_batch_size"]
    scope = series["scope"].replace(",", "").replace(" ", "-")
    setting = f"{series['optimizer']}-{series['sync']}-features-{series['num_features']}-batch-{batch:g}"
    baseline, rows = series["points"][0], []
    for point in series["points"]:
        k = point["world_size"] / baseline["world_size"]
        if point is baseline:
            efficiency = Estimate(1.0, 1.0, 1.0, point["num_launches"])
        else:
            ratio = ratio_interval(step_times(launches[baseline["id"]]), step_times(launches[point["id"]]))
            efficiency = scaled(ratio, 1 / k) if strong else ratio  # T(p0)·p0 / (T(p)·p); weak: T(p0) / T(p)
        speedup = scaled(efficiency, k)
        rows.append(
            {
                "point": point["id"],
                **{field: point[field] for field in ("world_size", "num_nodes", "throughput", "step_time_s")},
                "speedup": asdict(speedup),
                "efficiency": asdict(efficiency),
                "karp_flatt": asdict(karp_flatt(speedup, k)) if strong and k > 1 else None,
            }
        )
    return {"id": f"{group}-{series['kind']}-{scope}-{setting}", **series, "points": rows}


def step_times(launches: pd.DataFrame) -> dict[int, float]:
    """Block → seconds of a step, from the launches of a point."""
    return dict(zip(launches.index.tolist(), launches["step_time_s"].tolist(), strict=True))
