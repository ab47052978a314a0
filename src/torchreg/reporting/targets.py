"""Time to a target: statistical efficiency (steps, which theory predicts) times hardware efficiency (step time)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from torchreg.reporting.points import Point, over_launches, scaled
from torchreg.reporting.series import Series
from torchreg.scaling.statistics import Estimate, median_interval

_NEVER = 1e300  # stands for "not reached" in a median, which it leaves in the order where it belongs


def targets_of(series: Sequence[Series]) -> list[dict[str, Any]]:
    """One table for each series and target that was asked for."""
    return [
        _target(one, target)
        for one in series
        for target in sorted({value for point in one.points for value in point.launches["target_excess"].dropna()})
    ]


def _target(series: Series, target: float) -> dict[str, Any]:
    rows = []
    for point in series.points:
        launches = point.launches[point.launches["target_excess"] == target]
        if len(launches):
            rows.append(_row(point, launches))
    stable = []
    for row in rows:
        if not row["is_stable"]:
            break
        stable.append(row["world_size"])
    return {
        "series": series.id,
        "title": series.title,
        "target_excess": target,
        "stable_up_to_world_size": stable[-1] if stable else None,
        "rows": rows,
    }


def _row(point: Point, launches: pd.DataFrame) -> dict[str, Any]:
    """Steps times step time, and what was measured beside it; `node_hours` are those of `time_s`.

    `time_s` is the measured time where it was measured, and the predicted one elsewhere (`time_from`).
    """
    predicted_steps = None if launches["predicted_steps"].isna().any() else float(launches["predicted_steps"].median())
    step_time = median_interval(launches["step_time_s"])
    predicted = None if predicted_steps is None else scaled(step_time, predicted_steps)
    measured = _reached(launches["measured_time_s"])
    steps = _reached(launches["measured_steps"])
    measured_time = launches["measured_time_s"].where(launches["measured_time_s"] > 0)
    both = (launches["predicted_steps"] * launches["step_time_s"] / measured_time).dropna()
    chosen = measured or predicted
    limit = float(launches["stability_limit"].median())
    return {
        "world_size": point.world_size,
        "num_nodes": point.num_nodes,
        "global_batch_size": point.global_batch_size,
        "predicted_steps": predicted_steps,
        "measured_steps": steps and asdict(steps),
        "num_reached": int(launches["measured_steps"].notna().sum()),
        "num_launches": len(launches),
        "step_time_s": asdict(step_time),
        "predicted_time_s": predicted and asdict(predicted),
        "measured_time_s": measured and asdict(measured),
        "predicted_over_measured": over_launches(both) if len(both) else None,
        "time_s": chosen and asdict(chosen),
        "time_from": "measured" if measured else "predicted" if predicted else None,
        "node_hours": chosen and chosen.value * point.num_nodes / 3600,
        "stability_limit": limit,
        "is_stable": limit >= 1,
    }


def _reached(values: pd.Series[float]) -> Estimate | None:
    """The median over launches, those that did not reach the target counting as longest; None where it is theirs."""
    found = median_interval(values.fillna(_NEVER))
    if found.value > _NEVER / 1e6:
        return None
    if found.high is not None and found.high > _NEVER / 1e6:
        return Estimate(found.value, found.low, None, found.num_launches)
    return found


def fastest_and_lowest_node_hours(
    targets: Sequence[dict[str, Any]], num_features: int, target: float, features_of: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """The row that reaches a target soonest, and the one that needs the fewest node-hours, each with its runner-up.

    Measured times are compared with measured ones: predicted ones are taken only where nothing was measured.
    """
    rows = [
        {**row, "series": table["series"]}
        for table in targets
        if table["target_excess"] == target and features_of[table["series"]] == num_features
        for row in table["rows"]
        if row["time_s"] is not None
    ]
    measured = [row for row in rows if row["time_from"] == "measured"]
    costs: tuple[Callable[[dict[str, Any]], float], ...] = (
        lambda row: row["time_s"]["value"],
        lambda row: row["node_hours"],
    )
    for cost in costs:
        ordered = sorted(measured or rows, key=lambda row: (cost(row), row["world_size"], row["series"]))
        if ordered:
            best = ordered[0]
            others = [row for row in ordered if row["world_size"] != best["world_size"]]
            yield {**best, "runner_up": others[0] if others else None}
