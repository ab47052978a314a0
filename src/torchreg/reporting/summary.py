"""The verdict in sentences: right or wrong, how far it scales, what bounds it, what reaches a target soonest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import pandas as pd

from torchreg.plots.quantities import features, in_unit, ranks
from torchreg.reporting.bottlenecks import bottleneck, scaling_limit
from torchreg.reporting.targets import fastest_and_lowest_node_hours

_MOST_NAMED = 2  # settings in one sentence


def verdict(
    launches: pd.DataFrame, points: pd.DataFrame, groups: Sequence[Mapping[str, Any]], num_excluded: int
) -> dict[str, Any]:
    """The first part of a report. `points` are all rows of `points_table`, those whose check failed included."""
    correct = _correct(launches, points, num_excluded)
    lines, scaling, bounds, best = [correct["text"]], [], [], []
    for group in groups:
        by_id = {point["id"]: point for point in group["points"]}
        far = {one["id"]: {"group": group["id"], **scaling_limit(one)} for one in group["series"]}
        bound_by = {
            one["id"]: {"group": group["id"], **bound}
            for one in group["series"]
            if (bound := bottleneck(one, by_id)) is not None
        }
        targets = list(_targets(group))
        told = [
            *_scaling_lines(group, far, bound_by),
            *_oversubscribed(group),
            *(choice["text"] for choices in targets for choice in choices),
        ]
        told += _agreement(group)
        lines += [_of_group(group, groups) + line for line in told]
        scaling += list(far.values())
        bounds += list(bound_by.values())
        best += targets
    return {
        "correct": correct,
        "lines": lines,
        "scaling": scaling,
        "bound_by": bounds,
        "fastest": best[0][0] if best else None,
        "lowest_node_hours": best[0][1] if best else None,
    }


def _of_group(group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> str:
    """What a sentence about one of several groups begins with: its machine, where that is enough."""
    if len(groups) == 1:
        return ""
    alone = sum(other["machine"] == group["machine"] for other in groups) == 1
    return f"{group['machine'] if alone else group['title']}: "


def _correct(launches: pd.DataFrame, points: pd.DataFrame, num_excluded: int) -> dict[str, Any]:
    wrong, runs = points[~points["check_passed"]], len(points)
    num_good, num_failed = (int((launches["status"] == status).sum()) for status in ("ok", "failed"))
    others = [f"{num_failed} launch{'es' * (num_failed != 1)} failed"] if num_failed else []
    others += [f"{num_excluded} record{'s' * (num_excluded != 1)} left out"] if num_excluded else []
    aside = f" ({' and '.join(others)}: see below)" if others else ""
    if runs == 0:
        return {"status": "unknown", "text": f"Whether it trains correctly is not known: no run was checked{aside}."}
    counted = f"{runs} run{'s' * (runs != 1)} in {num_good} launch{'es' * (num_good != 1)}"
    if wrong.empty:
        text = f"It trains correctly: all {counted} end at the known answer{aside}."
        return {"status": "yes", "text": text, "num_runs": runs, "num_wrong": 0}
    first = wrong.to_dict("records")[0]
    told = (
        f"{first['optimizer']}/{first['sync']} with {features(first['num_features'])} at {ranks(first['world_size'])}"
    )
    text = (
        f"It does NOT train correctly: {len(wrong)} of {counted} miss the known answer, the first in {first['launch']} "
        f"({told}); they are in no statistics{aside}."
    )
    return {"status": "no", "text": text, "num_runs": runs, "num_wrong": len(wrong)}


# How far, and what bounds it


def _scaling_lines(
    group: Mapping[str, Any], scaling: Mapping[str, Mapping[str, Any]], bounds: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """A sentence or two for strong and for weak scaling in each scope, with the baseline named."""
    headings: dict[str, list[Mapping[str, Any]]] = {}
    for one in group["series"]:
        p0 = ranks(one["baseline_world_size"])
        headings.setdefault(f"{one['kind'].capitalize()} scaling {one['scope']} (baseline {p0})", []).append(one)
    for heading, series in headings.items():
        far = _sorted_out(series, {name: told["summary"] for name, told in scaling.items()})
        cause = _sorted_out(
            series, {name: f"{bound['what']} at {ranks(bound['world_size'])}" for name, bound in bounds.items()}
        )
        yield f"{heading}: {far}." + (f" What bounds it: {cause}." if cause else "")


def _oversubscribed(group: Mapping[str, Any]) -> Iterator[str]:
    """Ranks that outnumber a node's CPUs measure the operating system."""
    if group["oversubscribed_ranks_per_node"]:
        counts = " and ".join(map(str, group["oversubscribed_ranks_per_node"]))
        cpus = f"{group['num_cpus']} CPU{'s' * (group['num_cpus'] > 1)}"
        yield (
            f"{counts} ranks share the {cpus} of a node: their times tell how an operating system shares CPUs, and "
            "little about scaling."
        )


def _sorted_out(series: Sequence[Mapping[str, Any]], told: Mapping[str, str]) -> str:
    """What is told of the series, each thing once, with those of which it is told."""
    whose: dict[str, list[str]] = {}
    for one in series:
        if one["id"] in told:
            whose.setdefault(told[one["id"]], []).append(_setting(one))
    if len(whose) == 1 and len(series) > 1:
        return f"{next(iter(whose))}, in {'both' if len(series) == 2 else f'all {len(series)}'} settings"
    ordered = sorted(whose.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{what} ({_named(settings)})" for what, settings in ordered)


def _setting(series: Mapping[str, Any]) -> str:
    strong = series["kind"] == "strong"
    batch = f"global batch {series['global_batch_size']}" if strong else f"local batch {series['local_batch_size']:g}"
    return f"{series['optimizer']}/{series['sync']}, {features(series['num_features'])}, {batch}"


def _named(settings: Sequence[str]) -> str:
    if len(settings) <= _MOST_NAMED:
        return "; ".join(settings)
    return f"{settings[0]}, and {len(settings) - 1} other settings"


# Time to target


def _targets(group: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    series = {one["id"]: one for one in group["series"]}
    num_features = {name: one["num_features"] for name, one in series.items()}
    problems = sorted({(num_features[table["series"]], table["target_excess"]) for table in group["targets"]})
    for number, target in problems:
        found = list(fastest_and_lowest_node_hours(group["targets"], number, target, num_features))
        if found:
            goal = f"{100 * target:.3g} % above the best loss ({features(number)})"
            fastest, lowest_node_hours = found
            yield (
                _choice(fastest, series, group, "Soonest", f"{goal} is reached", "time_s", target),
                _choice(lowest_node_hours, series, group, "Cheapest", f"{goal} is reached", "node_hours", target),
            )


def _agreement(group: Mapping[str, Any]) -> Iterator[str]:
    """How far predicted and measured times to a target are apart, at worst."""
    rows = [row for table in group["targets"] for row in table["rows"] if row["predicted_over_measured"] is not None]
    if rows:
        errors = [abs(row["predicted_over_measured"]["value"] - 1) for row in rows]
        worst = rows[errors.index(max(errors))]
        yield (
            f"Predicted steps × step time differs from the measured time to the target by {100 * median(errors):.2g} % "
            f"typically, and by {100 * max(errors):.2g} % at most, at {ranks(worst['world_size'])}, global batch "
            f"{worst['global_batch_size']}."
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
    text = f"{which}, {goal} with {ranks(row['world_size'])} ({how}): {_price(row, cost)}, {row['time_from']}"
    other = row["runner_up"]
    if other is not None:
        text += f"; next {ranks(other['world_size'])} with {_price(other, cost)}"
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


def _price(row: Mapping[str, Any], cost: str) -> str:
    return in_unit([row["time_s"]["value"]], "s") if cost == "time_s" else f"{row['node_hours']:.2g} node-hours"


def _overlap(row: Mapping[str, Any], other: Mapping[str, Any], cost: str) -> bool:
    """Whether the intervals do not tell which is less; without intervals they never do."""
    weight = (lambda one: one["num_nodes"]) if cost == "node_hours" else (lambda one: 1)
    high, low = row["time_s"]["high"], other["time_s"]["low"]
    return high is None or low is None or high * weight(row) >= low * weight(other)
