"""What a report concludes: scaling limit and bottleneck of a series, and the time to a target.

The time to a target is statistical efficiency (steps, predicted by theory) times hardware efficiency (step time).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import takewhile
from statistics import median

import pandas as pd

from torchreg.reporting.groups import Json, over_launches, scaled
from torchreg.scaling.statistics import median_interval

GOOD = 0.8  # the efficiency that counts as scaling well
_NEVER = 1e300  # stands for "not reached" in a median, and sorts above every time


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


def targets_of(series: Sequence[Json], launches: Mapping[str, pd.DataFrame]) -> list[Json]:
    """One table for each series and target; `launches` are those of each point by its id."""
    found = []
    for one in series:
        by_size = [(row, launches[row["point"]]) for row in one["points"]]
        for target in sorted({value for _, own in by_size for value in own["target_excess"].dropna()}):
            rows = [_row(row, tried) for row, own in by_size if len(tried := own[own["target_excess"] == target])]
            stable = [row["world_size"] for row in takewhile(lambda row: row["is_stable"], rows)]
            heading = {"series": one["id"], "target_excess": target}
            found.append({**heading, "stable_up_to_world_size": max(stable, default=None), "rows": rows})
    return found


def _row(point: Json, launches: pd.DataFrame) -> Json:
    """Predicted steps times step time, and what was measured.

    `time_s` is the measured time where there is one, else the predicted time (`time_from`); `node_hours` are those of
    `time_s`. The stability limit is a multiple of the learning rates.
    """
    steps, measured_time, step_time = (launches[f] for f in ("predicted_steps", "measured_time_s", "step_time_s"))
    predicted_steps = None if steps.isna().any() else float(steps.median())
    step, measured = median_interval(step_time), _reached(measured_time)
    predicted = None if predicted_steps is None else asdict(scaled(step, predicted_steps))
    both = (steps * step_time / measured_time.where(measured_time > 0)).dropna()
    chosen, limit = measured or predicted, float(launches["stability_limit"].median())
    return {
        "world_size": point["world_size"],
        "num_nodes": point["num_nodes"],
        "global_batch_size": int(launches["global_batch_size"].iloc[0]),
        "predicted_steps": predicted_steps,
        "measured_steps": _reached(launches["measured_steps"]),
        "num_reached": int(launches["measured_steps"].notna().sum()),
        "num_launches": len(launches),
        "step_time_s": asdict(step),
        "predicted_time_s": predicted,
        "measured_time_s": measured,
        "predicted_over_measured": over_launches(both) if len(both) else None,
        "time_s": chosen,
        "time_from": "measured" if measured else "predicted" if predicted else None,
        "node_hours": chosen and chosen["value"] * point["num_nodes"] / 3600,
        "stability_limit": limit,
        "is_stable": limit >= 1,
    }


def _reached(values: pd.Series[float]) -> Json | None:
    """The median over launches, of which those that did not reach the target are the longest; None where it is one."""
    found = over_launches(values.fillna(_NEVER))
    if found["value"] > _NEVER / 1e6:
        return None
    is_open = found["high"] is not None and found["high"] > _NEVER / 1e6
    return {**found, "high": None} if is_open else found


def best_of(group: Json) -> list[Json]:
    """For each number of features and target that is reached: the fastest row and the one of the lowest node-hours.

    Measured times are compared with measured times. Predicted times are compared only where none was measured.
    """
    series = {one["id"]: one for one in group["series"]}
    rows: dict[tuple[int, float], list[Json]] = {}
    for table in group["targets"]:
        one, target = series[table["series"]], table["target_excess"]
        setting = {field: one[field] for field in ("optimizer", "sync", "num_features")}
        setting |= {"group": group["id"], "series": one["id"], "target_excess": target}
        reached = [setting | row for row in table["rows"] if row["time_s"] is not None]
        rows.setdefault((one["num_features"], target), []).extend(reached)
    found = []
    for (num_features, target), own in sorted(rows.items()):
        if own:
            best = {"fastest": _best(own, "time_s"), "lowest_node_hours": _best(own, "node_hours")}
            found.append({"group": group["id"], "num_features": num_features, "target_excess": target, **best})
    return found


def _best(rows: Sequence[Json], criterion: str) -> Json:
    """The row of the lowest cost, and the next one of another world size (`runner_up`).

    `is_distinct` of the runner-up is whether its interval lies above that of the best, None without intervals.
    """

    def cost(row: Json, end: str = "value") -> float | None:
        time_s, weight = row["time_s"][end], row["num_nodes"] / 3600 if criterion == "node_hours" else 1
        return None if time_s is None else time_s * weight

    measured = [row for row in rows if row["time_from"] == "measured"]
    best, *others = sorted(measured or rows, key=lambda row: (cost(row), row["world_size"], row["series"]))
    runner_up = next((row for row in others if row["world_size"] != best["world_size"]), None)
    if runner_up:
        high, low = cost(best, "high"), cost(runner_up, "low")
        runner_up = {**runner_up, "is_distinct": None if high is None or low is None else high < low}
    return {**best, "runner_up": runner_up}


def prediction_error(group: Json) -> Json | None:
    """How far predicted and measured times to a target differ: median and largest relative error, and where."""
    rows = [row for table in group["targets"] for row in table["rows"] if row["predicted_over_measured"]]
    errors = [abs(row["predicted_over_measured"]["value"] - 1) for row in rows]
    if not errors:
        return None
    worst = {field: rows[errors.index(max(errors))][field] for field in ("world_size", "global_batch_size")}
    return {"group": group["id"], "median": median(errors), "largest": max(errors), **worst}
