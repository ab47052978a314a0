"""The pictures of the way to a target: steps by global batch, time and node-hours by world size."""

from __future__ import annotations

from functools import partial

from torchreg.plots.panels import Json, Look, combination_of
from torchreg.plots.pictures import Panel, Picture, batch_text, combination_looks, combinations, slug
from torchreg.plots.quantities import count, features, in_unit
from torchreg.plots.style import BLACK, GREY
from torchreg.plots.target_panels import draw_nearness, draw_node_hours, draw_steps_to, draw_time_to

_UNSTABLE = Look("training diverges", GREY)
_PREDICTED = Look("predicted", BLACK, dashes="-", width=1)
_PREDICTED_HERE = Look("line: predicted; marker: measured", GREY, dashes="-", width=1)


def draw_steps(group: Json, number: int) -> Picture | None:
    """Statistical efficiency: steps to the target by global batch, and how near the rates are to the limit."""
    looks = combination_looks(group)
    panels: list[Panel] = []
    named: dict[str, Look] = {}
    for title, pairs in _targets_by_problem(group).items():
        named |= {name: looks[name] for name in combinations(one for one, _ in pairs)}
        rows = [row for _, target in pairs for row in target["rows"]]
        steps = {row["global_batch_size"]: row["predicted_steps"] for row in rows}
        nearness = {row["global_batch_size"]: 1 / row["stability_limit"] for row in rows}
        told = (f"{count(batch)} rows {'never' if n is None else count(n)}" for batch, n in sorted(steps.items()))
        near = (f"{count(batch)} rows {times:.3g}" for batch, times in sorted(nearness.items()))
        panels += [
            Panel(title, f"predicted steps, {title}: {'; '.join(told)}", partial(draw_steps_to, pairs, looks)),
            Panel(title, f"rates over the limit, {title}: {'; '.join(near)}", partial(draw_nearness, rows), margin=0.8),
        ]
    if not panels:
        return None
    return Picture(
        f"figure-{number}-steps",
        "Statistical efficiency: steps to the target",
        "Statistical efficiency: steps to the target by global batch, predicted by theory (line) and measured "
        "(markers, medians with 95 % intervals); and the learning rates as a multiple of the stability limit. Where "
        f"that is above 1, shaded, training diverges. Source: targets of group {number} in report.json.",
        (*named.values(), _PREDICTED, _UNSTABLE),
        tuple(panels),
        2,
    )


def draw_targets(group: Json, number: int, scope: str) -> Picture | None:
    """Statistical × hardware efficiency: time to the target and its node-hours by world size."""
    looks = combination_looks(group)
    parts: dict[str, list[tuple[Json, Json]]] = {}
    for problem, pairs in _targets_by_problem(group).items():
        for one, target in pairs:
            if one["scope"] == scope:
                title = f"{one['kind']}, {problem}, {batch_text(one)}"
                parts.setdefault(title, []).append((one, target))
    if not parts:
        return None
    panels: list[Panel] = []
    for title, pairs in parts.items():
        told = "; ".join(f"{combination_of(one)} {_say_times(target)}" for one, target in pairs)
        panels += [
            Panel(title, f"time to the target, {title}, {scope}: {told}", partial(draw_time_to, pairs, looks)),
            Panel(title, f"node-hours to the target, {title}, {scope}", partial(draw_node_hours, pairs, looks)),
        ]
    names = combinations(one for pairs in parts.values() for one, _ in pairs)
    return Picture(
        f"figure-{number}-targets-{slug(scope)}",
        f"Time and node-hours to the target, {scope}",
        f"Statistical × hardware efficiency, {scope}: steps to the target × step time is the time to the target, and "
        "times the nodes held its node-hours (a partly used node counts whole). Lines: predicted steps × measured step "
        "time. "
        "Markers: measured times with 95 % intervals, and the node-hours. Shaded world sizes are beyond the stability "
        f"limit. Source: targets of group {number} in report.json.",
        (*(looks[name] for name in names), _PREDICTED_HERE, _UNSTABLE),
        tuple(panels),
        2,
    )


def _say_times(target: Json) -> str:
    times = (
        f"{in_unit([row['predicted_time_s']['value']], 's')} on {row['world_size']}"
        for row in target["rows"]
        if row["predicted_time_s"]
    )
    return ", ".join(times) or "never"


def _targets_by_problem(group: Json) -> dict[str, list[tuple[Json, Json]]]:
    """Series with their targets, by number of features and, where there are several, by target."""
    series = {one["id"]: one for one in group["series"]}
    several = len({target["target_excess"] for target in group["targets"]}) > 1
    found: dict[str, list[tuple[Json, Json]]] = {}
    for target in sorted(
        group["targets"], key=lambda one: (series[one["series"]]["num_features"], one["target_excess"])
    ):
        one = series[target["series"]]
        if target["rows"]:
            title = features(one["num_features"])
            if several:
                title += f", to {in_unit([target['target_excess']], '%')}"
            found.setdefault(title, []).append((one, target))
    return found
