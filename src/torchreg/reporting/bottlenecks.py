"""The scaling limit of a series, and its bottleneck at the largest world size."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile

from torchreg.reporting.points import Json

GOOD = 0.8  # the efficiency that counts as scaling well


def scaling_limit(series: Json) -> Json:
    """Up to which world size every efficiency is at least 80 %, and how certain that is.

    `largest_efficient_world_size` goes by the estimates, `shown_up_to` by the low ends of their intervals,
    `about_up_to` by the high ends: where they differ, an interval includes 80 %. The last two are None where there
    are too few launches for intervals. `efficiencies` are those that decide it, `first_world_size` and
    `largest_world_size` the ends of what was measured beyond the baseline.
    """
    baseline, *others = series["points"]

    def last(end: str) -> int:
        kept = takewhile(lambda point: (point["efficiency"][end] or 0) >= GOOD, others)
        return max((point["world_size"] for point in kept), default=baseline["world_size"])

    by_value = last("value")
    has_intervals = all(point["efficiency"]["low"] is not None for point in others)
    shown, about = (last("low"), last("high")) if has_intervals else (None, None)
    deciding = [point for point in others if point["world_size"] in (shown, about, by_value)]
    deciding += [point for point in others if point["world_size"] > (about or by_value)][:1]
    return {
        "series": series["id"],
        "baseline_world_size": baseline["world_size"],
        "first_world_size": others[0]["world_size"],
        "largest_world_size": others[-1]["world_size"],
        "largest_efficient_world_size": by_value,
        "shown_up_to": shown,
        "about_up_to": about,
        "efficiencies": [{field: point[field] for field in ("world_size", "efficiency")} for point in deciding],
    }


def bottleneck(series: Json, points: Mapping[str, Json]) -> Json | None:
    """What the time beyond ideal scaling is spent on at the largest world size; None where it was not broken down.

    T(p) - k·T(p0), with k = p0/p for strong scaling and 1 for weak, is the lost time. It splits into exposed
    communication beyond k times that at p0, and data and compute beyond k times those at p0. `bottleneck` is `none`
    where the efficiency is at least 80 %, else `communication`, `imbalance` (most of the exposed communication is
    waiting for the slowest rank) or `compute`.
    """
    first, last = (points[series["points"][index]["point"]] for index in (0, -1))
    is_divided = first["world_size"] == 1 or first["exposed_time_s"]
    if not (is_divided and last["exposed_time_s"] and last["compute_time_s"]):
        return None
    k = first["world_size"] / last["world_size"] if series["kind"] == "strong" else 1.0
    lost = last["step_time_s"]["value"] - k * first["step_time_s"]["value"]
    before = first["exposed_time_s"]["value"] if first["exposed_time_s"] else 0.0
    exposed = last["exposed_time_s"]["value"] - k * before
    imbalance, efficiency = last["imbalance_time_s"]["value"], series["points"][-1]["efficiency"]
    if lost <= 0 or (efficiency["low"] or 0) >= GOOD:
        cause = "none"
    elif exposed < lost - exposed:
        cause = "compute"
    else:
        cause = "imbalance" if imbalance > exposed / 2 else "communication"
    parts = {"lost_s": lost, "exposed_s": exposed, "compute_s": lost - exposed, "imbalance_s": imbalance}
    at = {"world_size": last["world_size"], "efficiency": efficiency}
    return {"series": series["id"], "kind": series["kind"], "bottleneck": cause, **at, **parts}
