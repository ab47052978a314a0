"""What a report concludes: scaling limit and bottleneck of a series, and the time to a target.

The time to a target is statistical efficiency (steps, predicted by theory) times hardware efficiency (step time).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import takewhile
from operator import itemgetter
from statistics import median

import pandas as pd

from torchreg.reporting.groups import Json, scaled
from torchreg.scaling.statistics import Estimate, median_interval

_NEVER = 1e300  # stands for "not reached" in a median, and sorts above every time


def scaling_limit(series: Json, min_efficiency: float) -> Json:
    """Up to which world size every efficiency is at least `min_efficiency`, and how certain that is.

    `largest_efficient_world_size` goes by the estimates, `shown_up_to` by the low ends of their intervals,
    `about_up_to` by the high ends: where they differ, an interval includes `min_efficiency`. The last two are None
    where there are too few launches for intervals.
    """
    baseline, *others = series["points"]

    def last(end: str) -> int:
        kept = takewhile(lambda point: (point["efficiency"][end] or 0) >= min_efficiency, others)
        return max((point["world_size"] for point in kept), default=baseline["world_size"])

    has_intervals = all(point["efficiency"]["low"] is not None for point in others)
    shown, about = (last("low"), last("high")) if has_intervals else (None, None)
    sizes = {"largest_efficient_world_size": last("value"), "shown_up_to": shown, "about_up_to": about}
    return {"min_efficiency": min_efficiency, **sizes}


def bottleneck(series: Json, points: Mapping[str, Json], min_efficiency: float) -> Json | None:
    """What the time beyond ideal scaling is spent on at the largest world size; None where it was not broken down.

    T(p) - k·T(p0), with k = p0/p for strong scaling and 1 for weak, is the lost time. It splits into exposed
    communication beyond k times that at p0, and data and compute beyond k times those at p0. `cause` is `none`
    where the efficiency is at least `min_efficiency`, else `communication`, `imbalance` (most of the exposed
    communication is waiting for the slowest rank) or `compute`.
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
    if lost <= 0 or (efficiency["low"] or 0) >= min_efficiency:
        cause = "none"
    elif exposed < lost - exposed:
        cause = "compute"
    else:
        cause = "imbalance" if imbalance > exposed / 2 else "communication"
    return {"cause": cause, "lost_s": lost, "exposed_s": exposed, "compute_s": lost - exposed, "imbalance_s": imbalance}


def targets_of(series: Json, launches: Mapping[str, pd.DataFrame]) -> list[Json]:
    """The rows of each target of a series; `launches` are those of each point by its id."""
    by_size, found = [(row, launches[row["point"]]) for row in series["points"]], []
    for target in sorted({value for _, own in by_size for value in own["target_excess"].dropna()}):
        rows = [_row(row, tried) for row, own in by_size if len(tried := own[own["target_excess"] == target])]
        stable = [row["world_size"] for row in takewhile(lambda row: row["is_stable"], rows)]
        found.append({"target_excess": target, "stable_up_to_world_size": max(stable, default=None), "rows": rows})
    return found


def headline(group: Json) -> Json:
    """What the first screen is about: `strong` and `weak` series, and the first of the `best` rows.

    Of each kind it is the series with the lowest efficiency at the largest world size of the group, of `num_settings`
    that were measured there.
    """
    found: Json = {"group": group["id"], "best": next(iter(group["best"]), None)}
    for kind in ("strong", "weak"):
        last = {one["id"]: one["points"][-1] for one in group["series"] if one["kind"] == kind}
        largest = max((point["world_size"] for point in last.values()), default=None)
        at = {name: point["efficiency"]["value"] for name, point in last.items() if point["world_size"] == largest}
        found[kind] = {"series": min(at, key=lambda name: at[name]), "num_settings": len(at)} if at else None
    return found


def _row(point: Json, launches: pd.DataFrame) -> Json:
    """Predicted steps times step time, and what was measured.

    `time_s` is the measured time where there is one, else the predicted time (`time_from`); `node_hours` are those of
    `time_s`. The stability limit is a multiple of the learning rates.
    """
    steps, measured_time, step_time = (launches[f] for f in ("predicted_steps", "measured_time_s", "step_time_s"))
    predicted_steps = None if steps.isna().any() else float(steps.median())
    step, measured = median_interval(step_time), _reached(measured_time)
    predicted = None if predicted_steps is None else scaled(step, predicted_steps)
    both = (steps * step_time / measured_time.where(measured_time > 0)).dropna()
    chosen, limit = measured or predicted, float(launches["stability_limit"].median())
    estimates = {
        "measured_steps": _reached(launches["measured_steps"]),
        "step_time_s": step,
        "predicted_time_s": predicted,
        "measured_time_s": measured,
        "predicted_over_measured": median_interval(both) if len(both) else None,
        "time_s": chosen,
        "node_hours": chosen and scaled(chosen, point["num_nodes"] / 3600),
    }
    return {
        "world_size": point["world_size"],
        "num_nodes": point["num_nodes"],
        "global_batch_size": int(launches["global_batch_size"].iloc[0]),
        "predicted_steps": predicted_steps,
        "num_reached": int(launches["measured_steps"].notna().sum()),
        "num_launches": len(launches),
        "time_from": "measured" if measured else "predicted" if predicted else None,
        "stability_limit": limit,
        "is_stable": limit >= 1,
        **{name: one and asdict(one) for name, one in estimates.items()},
    }


def _reached(values: pd.Series[float]) -> Estimate | None:
    """The median over launches, of which those that did not reach the target are the longest; None where it is one."""
    found = median_interval(values.fillna(_NEVER))
    if found.value > _NEVER / 1e6:
        return None
    return replace(found, high=None) if (found.high or 0) > _NEVER / 1e6 else found


def best_of(series: Sequence[Json]) -> list[Json]:
    """For each number of features and target that is reached: the fastest row and the one of the lowest node-hours.

    Measured times are compared with measured times. Predicted times are compared only where none was measured.
    """
    rows: dict[tuple[int, float], list[Json]] = {}
    for one, target in ((own, target) for own in series for target in own["targets"]):
        setting = {field: one[field] for field in ("optimizer", "sync", "num_features")}
        setting |= {"series": one["id"], "target_excess": target["target_excess"]}
        reached = [setting | row for row in target["rows"] if row["time_s"] is not None]
        rows.setdefault((one["num_features"], target["target_excess"]), []).extend(reached)
    return [
        {"fastest": _best(own, "time_s"), "lowest_node_hours": _best(own, "node_hours")}
        for _, own in sorted(rows.items(), key=itemgetter(0))
        if own
    ]


def _best(rows: Sequence[Json], criterion: str) -> Json:
    """The row where the criterion is lowest, and the next one of another world size (`runner_up`).

    `is_distinct` of the runner-up is whether its interval lies above that of the best, None without intervals.
    """
    measured = [row for row in rows if row["time_from"] == "measured"]
    best, *others = sorted(
        measured or rows, key=lambda row: (row[criterion]["value"], row["world_size"], row["series"])
    )
    runner_up = next((row for row in others if row["world_size"] != best["world_size"]), None)
    if runner_up:
        high, low = best[criterion]["high"], runner_up[criterion]["low"]
        runner_up = {**runner_up, "is_distinct": None if high is None or low is None else high < low}
    return {**best, "runner_up": runner_up}


def prediction_error(series: Sequence[Json]) -> Json | None:
    """How far predicted and measured times to a target differ: median and largest relative error, and where."""
    targets = [target for one in series for target in one["targets"]]
    rows = [row for target in targets for row in target["rows"] if row["predicted_over_measured"]]
    errors = [abs(row["predicted_over_measured"]["value"] - 1) for row in rows]
    if not errors:
        return None
    worst = {field: rows[errors.index(max(errors))][field] for field in ("world_size", "global_batch_size")}
    return {"median": median(errors), "largest": max(errors), **worst}
