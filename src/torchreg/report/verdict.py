"""The verdict in sentences: right or wrong, how far it scales, what bounds it, what reaches a target soonest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from torchreg.report.points import features, ranks
from torchreg.report.targets import soonest_and_cheapest

GOOD = 0.8  # the efficiency that counts as scaling well

_MOST_NAMED = 3  # settings in one sentence


def verdict(
    launches: pd.DataFrame, points: pd.DataFrame, groups: Sequence[Mapping[str, Any]], num_left_out: int
) -> dict[str, Any]:
    """The first part of a report. `points` are all rows of `points_table`, those whose check failed included."""
    correct = _correct(launches, points, num_left_out)
    scaling = [{"group": group["id"], **_scaling(one)} for group in groups for one in group["series"]]
    bounds = [
        {"group": group["id"], **bound} for group in groups for one in group["series"] if (bound := _bound(one, group))
    ]
    lines = [correct["text"]]
    for group in groups:
        where = f"{group['title']}: " if len(groups) > 1 else ""
        lines += [where + line for line in _scaling_lines(group, scaling)]
        lines += [where + line for line in _bound_lines(group, bounds)]
    best = [(group, *found) for group in groups for found in _targets(group)]
    for group, soonest, cheapest in best:
        where = f"{group['title']}: " if len(groups) > 1 else ""
        lines += [where + soonest["text"], where + cheapest["text"]]
    return {
        "correct": correct,
        "lines": lines,
        "scaling": scaling,
        "bound_by": bounds,
        "soonest": best[0][1] if best else None,
        "cheapest": best[0][2] if best else None,
    }


def _correct(launches: pd.DataFrame, points: pd.DataFrame, num_left_out: int) -> dict[str, Any]:
    wrong, runs = points[~points["check_passed"]], len(points)
    num_good, num_failed = (int((launches["status"] == status).sum()) for status in ("ok", "failed"))
    others = [f"{num_failed} launch{'es' * (num_failed != 1)} failed"] if num_failed else []
    others += [f"{num_left_out} record{'s' * (num_left_out != 1)} left out"] if num_left_out else []
    aside = f" ({' and '.join(others)}: see below)" if others else ""
    if runs == 0:
        return {"status": "unknown", "text": f"Whether it trains correctly is not known: no run was checked{aside}."}
    counted = f"{runs} run{'s' * (runs != 1)} in {num_good} launch{'es' * (num_good != 1)}"
    if wrong.empty:
        text = f"It trains correctly: all {counted} end at the known answer{aside}."
        return {"status": "yes", "text": text, "num_runs": runs, "num_wrong": 0}
    first = wrong.iloc[0]
    told = (
        f"{first['optimizer']}/{first['sync']} with {features(first['num_features'])} at {ranks(first['world_size'])}"
    )
    text = (
        f"It does NOT train correctly: {len(wrong)} of {counted} miss the known answer, the first in {first['launch']} "
        f"({told}); they are in no statistics{aside}."
    )
    return {"status": "no", "text": text, "num_runs": runs, "num_wrong": len(wrong)}


# How far


def _scaling(series: Mapping[str, Any]) -> dict[str, Any]:
    """The largest world size up to which every efficiency is at least 80 %, and how sure that is."""
    baseline, *others = series["points"]
    last, failing = baseline, None
    for point in others:
        if point["efficiency"]["value"] < GOOD:
            failing = point
            break
        last = point
    p0 = baseline["world_size"]
    kept = others[: others.index(last) + 1] if last is not baseline else []
    lows = [point["efficiency"]["low"] for point in kept]
    largest, told = last["world_size"], f"{_percent(last['efficiency'])} at {ranks(last['world_size'])}"
    if not kept:
        status, text = "none", f"efficiency falls below 80 % at once: {_at(failing)}"
    elif any(low is None for low in lows):
        status, text = "too few launches", f"80 % seems kept up to {largest} ({told}), too few launches for an interval"
    elif all(low >= GOOD for low in lows):
        status, text = "shown", f"at least 80 % is shown up to {largest} ({told})"
    else:
        status, text = "about", f"about 80 % up to {largest}: {told}, and the interval straddles 80 %"
    if kept and failing is None:
        text += ", the most that was measured"
    elif kept:
        text += f"; {_at(failing)}"
    if failing is not None and (high := failing["efficiency"]["high"]) is not None and high >= GOOD:
        status = "about"
        text += ", whose interval straddles 80 %"
    return {
        "series": series["id"],
        "largest_efficient_world_size": largest,
        "status": status,
        "text": f"{series['title']} (baseline {ranks(p0)}): {text}.",
    }


def _at(point: Mapping[str, Any] | None) -> str:
    return "" if point is None else f"{_percent(point['efficiency'])} at {ranks(point['world_size'])}"


def _percent(estimate: Mapping[str, Any]) -> str:
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    return (
        f"{100 * value:.0f} %"
        if low is None or high is None
        else f"{100 * value:.0f} % ({100 * low:.0f}–{100 * high:.0f} %)"
    )


def _kinds(group: Mapping[str, Any]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """The series of a group, strong and weak apart and each scope by itself, with a heading that names p0."""
    headings: dict[str, list[Mapping[str, Any]]] = {}
    for one in group["series"]:
        p0 = ranks(one["baseline_world_size"])
        headings.setdefault(f"{one['kind'].capitalize()} scaling {one['scope']} (baseline {p0})", []).append(one)
    yield from headings.items()


_SURE = {
    "shown": "at least 80 % shown up to {}",
    "about": "about 80 % up to {}",
    "too few launches": "perhaps 80 % up to {}, too few launches to tell",
    "none": "below 80 % at once",
}


def _scaling_lines(group: Mapping[str, Any], scaling: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = {one["series"]: one for one in scaling}
    for heading, series in _kinds(group):
        levels: dict[tuple[int, str], list[str]] = {}
        for one in series:
            told = found[one["id"]]
            levels.setdefault((told["largest_efficient_world_size"], told["status"]), []).append(_setting(one))
        order = list(_SURE)
        parts = [
            f"{_SURE[status].format(ranks(largest))} by {_named(settings)}"
            for (largest, status), settings in sorted(
                levels.items(), key=lambda item: (-item[0][0], order.index(item[0][1]))
            )
        ]
        yield f"{heading}: {'; '.join(parts)}."


def _setting(series: Mapping[str, Any]) -> str:
    strong = series["kind"] == "strong"
    batch = f"global batch {series['global_batch_size']}" if strong else f"local batch {series['local_batch_size']:g}"
    return f"{series['optimizer']}/{series['sync']} ({features(series['num_features'])}, {batch})"


def _named(settings: Sequence[str]) -> str:
    if len(settings) <= _MOST_NAMED + 1:
        return ", ".join(settings)
    return ", ".join(settings[:_MOST_NAMED]) + f" and {len(settings) - _MOST_NAMED} others"


# What bounds it


def _bound(series: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where the time beyond ideal scaling goes at the largest world size.

    T(p) − k·T(p0), with k = p0/p for strong scaling and 1 for weak, is what was lost; it splits into what exposed
    communication and what taking rows and computing take beyond k times what they took at p0.
    """
    points = {point["id"]: point for point in group["points"]}
    first, last = (points[series["points"][place]["point"]] for place in (0, -1))
    if last["exposed_time_s"] is None or last["compute_time_s"] is None:
        return None
    share = first["world_size"] / last["world_size"] if series["kind"] == "strong" else 1.0
    lost = last["step_time_s"]["value"] - share * first["step_time_s"]["value"]
    before = first["exposed_time_s"]["value"] if first["exposed_time_s"] else 0.0
    exposed = last["exposed_time_s"]["value"] - share * before
    compute = lost - exposed
    imbalance = last["imbalance_time_s"]["value"]
    efficiency = series["points"][-1]["efficiency"]
    fractions = {"exposed_s": exposed, "compute_s": compute, "imbalance_s": imbalance, "lost_s": lost}
    where = f"at {ranks(last['world_size'])}"
    if lost <= 0 or (efficiency["low"] or 0) >= GOOD:
        what = "nothing much"
        text = f"nothing bounds it much {where}: efficiency {_percent(efficiency)}"
    elif exposed >= compute:
        what = "imbalance" if imbalance > exposed / 2 else "exposed communication"
        text = f"{what} bounds it {where}: {_of_lost(imbalance if what == 'imbalance' else exposed, lost)}"
    else:
        what = "compute that does not shrink"
        if series["kind"] == "weak":
            what = "compute that grows"
        text = f"{what} (overhead of a step) bounds it {where}: {_of_lost(compute, lost)}"
    return {"series": series["id"], "what": what, **fractions, "text": f"{series['title']}: {text}."}


def _of_lost(part: float, lost: float) -> str:
    return f"{_seconds(part)} of the {_seconds(lost)} a step beyond ideal scaling"


def _seconds(value: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if abs(value) * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def _bound_lines(group: Mapping[str, Any], bounds: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = {bound["series"]: bound for bound in bounds}
    for heading, series in _kinds(group):
        causes: dict[str, list[str]] = {}
        for one in series:
            if bound := found.get(one["id"]):
                causes.setdefault(bound["what"], []).append(_setting(one))
        if causes:
            last = max(one["points"][-1]["world_size"] for one in series)
            parts = [
                f"{what} for {_named(settings)}"
                for what, settings in sorted(causes.items(), key=lambda item: -len(item[1]))
            ]
            yield f"What bounds {heading[0].lower()}{heading[1:].split(' (')[0]} at {ranks(last)}: {'; '.join(parts)}."


# Time to target


def _targets(group: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    series = {one["id"]: one for one in group["series"]}
    num_features = {name: one["num_features"] for name, one in series.items()}
    problems = sorted({(num_features[table["series"]], table["target_excess"]) for table in group["targets"]})
    for number, target in problems:
        found = list(soonest_and_cheapest(group["targets"], number, target, num_features))
        if found:
            goal = f"{100 * target:.3g} % above the best loss ({features(number)})"
            soonest, cheapest = found
            yield (
                _choice(soonest, series, group, "Soonest", f"{goal} is reached", "time_s", target),
                _choice(cheapest, series, group, "Cheapest", f"{goal} is reached", "node_hours", target),
            )


def _choice(
    row: Mapping[str, Any],
    series: Mapping[str, Mapping[str, Any]],
    group: Mapping[str, Any],
    which: str,
    goal: str,
    cost: str,
    target: float,
) -> dict[str, Any]:
    one = series[row["series"]]
    how = f"{one['optimizer']}/{one['sync']}, global batch {row['global_batch_size']}"
    price = _seconds(row["time_s"]["value"]) if cost == "time_s" else f"{row['node_hours']:.2g} node-hours"
    text = f"{which}, {goal} with {ranks(row['world_size'])} ({how}): {price}, {row['time_from']}"
    other = row["runner_up"]
    if other is not None:
        amount = _seconds(other["time_s"]["value"]) if cost == "time_s" else f"{other['node_hours']:.2g} node-hours"
        text += f"; next {ranks(other['world_size'])} with {amount}"
        if _overlap(row, other, cost):
            text += ", which is no clear difference"
    fields = ("world_size", "num_nodes", "global_batch_size", "time_s", "time_from", "node_hours", "series")
    return {
        "text": text + ".",
        "group": group["id"],
        "target_excess": target,
        "num_features": one["num_features"],
        "optimizer": one["optimizer"],
        "sync": one["sync"],
        **{field: row[field] for field in fields},
    }


def _overlap(row: Mapping[str, Any], other: Mapping[str, Any], cost: str) -> bool:
    """Whether the intervals do not tell which is less; without intervals they never do."""
    weight = (lambda one: one["num_nodes"]) if cost == "node_hours" else (lambda one: 1)
    high, low = row["time_s"]["high"], other["time_s"]["low"]
    return high is None or low is None or high * weight(row) >= low * weight(other)
