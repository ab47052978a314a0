"""The pictures of training to a target: steps by global batch, time and node-hours by world size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from torchreg.plots.pictures import (
    Json,
    Picture,
    Style,
    batch_text,
    by_title,
    combination_of,
    combination_styles,
    draw_estimates,
    legend_of,
    log_axis,
    offsets,
    power_of_two,
    size_axis,
    slug,
)
from torchreg.plots.quantities import features, in_unit
from torchreg.plots.style import BLACK, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pairs: TypeAlias = list[tuple[Json, Json]]  # series with their targets

_UNSTABLE = Style("training diverges", GREY)
_PREDICTED = Style("predicted", BLACK, dashes="-", width=1)
_BOTH = Style("line: predicted; marker: measured", GREY, dashes="-", width=1)


def draw_steps(group: Json, number: int) -> Picture | None:
    """Statistical efficiency: steps to the target and the fraction of the stability limit by global batch."""
    styles, targets = combination_styles(group), _targets(group)
    if not targets:
        return None
    title = "Statistical efficiency: steps to the target"
    return Picture(
        f"figure-{number}-steps",
        title,
        f"{title} by global batch, predicted by theory (line) and measured (markers, medians with 95 % intervals); and "
        "the learning rate as a fraction of the stability limit. Above 1, shaded, training diverges. "
        f"Source: targets of group {number} in report.json.",
        legend_of((one for pairs in targets.values() for one, _ in pairs), styles, _PREDICTED, _UNSTABLE),
        tuple(
            (title, partial(draw, pairs, styles))
            for title, pairs in targets.items()
            for draw in (_draw_steps, _draw_limits)
        ),
        columns=2,
        margin=0.8,
    )


def _draw_steps(pairs: Pairs, styles: Mapping[str, Style], axes: Axes) -> None:
    rows = _rows(pairs)
    predicted = {(row["global_batch_size"], row["predicted_steps"]) for row in rows if row["predicted_steps"]}
    if predicted:
        axes.plot(*zip(*sorted(predicted), strict=True), color=BLACK, linewidth=1, label="predicted")
    by_combination = by_title((combination_of(one), row) for one, target in pairs for row in target["rows"])
    for (name, mine), offset in zip(by_combination.items(), offsets(len(by_combination), 0.13), strict=True):
        if measured := [row for row in mine if row["measured_steps"]]:
            batches, steps = zip(*((row["global_batch_size"], row["measured_steps"]) for row in measured), strict=True)
            draw_estimates(axes, batches, steps, styles[name], offset, line=False)
    _finish(
        axes,
        rows,
        "global_batch_size",
        f"steps to {in_unit([pairs[0][1]['target_excess']], '%')} above the optimum",
        "k",
    )


def _draw_limits(pairs: Pairs, _styles: Mapping[str, Style], axes: Axes) -> None:
    rows = _rows(pairs)
    limits = _limits(rows, "global_batch_size")
    axes.plot(list(limits), [1 / limit for limit in limits.values()], ".-", color=BLACK, linewidth=1, label="predicted")
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), max(high, 2))  # so that the limit is visible
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.yaxis.set_major_formatter(power_of_two)
    _finish(axes, rows, "global_batch_size", "fraction of the stability limit")


def draw_targets(group: Json, number: int, scope: str) -> Picture | None:
    """Statistical × hardware efficiency: time and node-hours to the target by world size."""
    styles = combination_styles(group)
    parts = by_title(
        (f"{one['kind']}, {title}, {batch_text(one)}", (one, target))
        for title, pairs in _targets(group).items()
        for one, target in pairs
        if one["scope"] == scope
    )
    if not parts:
        return None
    return Picture(
        f"figure-{number}-targets-{slug(scope)}",
        f"Time and node-hours to the target, {scope}",
        f"Statistical × hardware efficiency, {scope}: the time to the target is the number of steps × the step time; "
        "node-hours are that times the number of nodes (a partly used node counts whole). Lines: predicted steps × "
        "measured step time. Markers: measured times with 95 % intervals, and node-hours. Shaded world sizes are above "
        f"the stability limit. Source: targets of group {number} in report.json.",
        legend_of((one for pairs in parts.values() for one, _ in pairs), styles, _BOTH, _UNSTABLE),
        tuple(
            (title, partial(draw, pairs, styles))
            for title, pairs in parts.items()
            for draw in (_draw_times, _draw_node_hours)
        ),
        columns=2,
    )


def _draw_times(pairs: Pairs, styles: Mapping[str, Style], axes: Axes) -> None:
    for (one, target), offset in zip(pairs, offsets(len(pairs)), strict=True):
        style = styles[combination_of(one)]
        predicted = [row for row in target["rows"] if row["predicted_time_s"]]
        _draw_line(axes, predicted, [row["predicted_time_s"]["value"] for row in predicted], style, offset)
        if rows := [row for row in target["rows"] if row["measured_time_s"]]:
            ranks, times = zip(*((row["world_size"], row["measured_time_s"]) for row in rows), strict=True)
            draw_estimates(axes, ranks, times, style, offset, line=False)
    _finish(axes, _rows(pairs), "world_size", "time to the target", "s")


def _draw_node_hours(pairs: Pairs, styles: Mapping[str, Style], axes: Axes) -> None:
    for (one, target), offset in zip(pairs, offsets(len(pairs)), strict=True):
        style, rows = styles[combination_of(one)], [row for row in target["rows"] if row["node_hours"]]
        _draw_line(axes, rows, [row["node_hours"] for row in rows], style, offset, style.marker)
    _finish(axes, _rows(pairs), "world_size", "node-hours to the target", "")
    if axes.lines:
        axes.yaxis.set_major_formatter("{x:g}")  # thousandths of a node-hour have no name


def _draw_line(
    axes: Axes, rows: Sequence[Json], values: Sequence[float], style: Style, offset: float, marker: str = ""
) -> None:
    if rows:
        axes.plot(
            [row["world_size"] * offset for row in rows], values, color=style.colour, linestyle=style.dashes,
            linewidth=1, marker=marker, markersize=4.5, label=f"predicted, {style.label}",
        )  # fmt: skip


def _finish(axes: Axes, rows: Sequence[Json], by: str, label: str, unit: str | None = None) -> None:
    """The axes of a panel by world size or global batch; a unit makes the y axis logarithmic."""
    axes.set_ylabel(label)
    if not axes.lines:
        axes.text(0.5, 0.5, "never reached", transform=axes.transAxes, ha="center")
        axes.set_yticks([])
    elif unit is not None:
        log_axis(axes, unit)
    size_axis(axes, [row[by] for row in rows], {"world_size": "ranks"}.get(by, "global batch (samples)"))
    start = unstable_from(_limits(rows, by))
    if start is not None:
        low, high = axes.get_xlim()
        axes.axvspan(max(low, start), high, color=GREY, alpha=0.3, linewidth=0)
        axes.set_xlim(low, high)


def unstable_from(limits: Mapping[float, float]) -> float | None:
    """The size from which training diverges, interpolated by a power law; None if it is stable at all of them.

    `limits` are by increasing size: the factor by which the learning rate may still grow.
    """
    pairs = list(limits.items())
    if pairs and pairs[0][1] < 1:
        return 0.0
    for (left, above), (right, below) in itertools.pairwise(pairs):
        if below < 1 <= above:
            return left * (right / left) ** (math.log(above) / math.log(above / below))
    return None


def _limits(rows: Iterable[Json], by: str) -> dict[float, float]:
    """The lowest stability limit at each size: optimizers may differ."""
    limits: dict[float, float] = {}
    for row in sorted(rows, key=lambda row: row[by]):
        limits[row[by]] = min(row["stability_limit"], limits.get(row[by], math.inf))
    return limits


def _rows(pairs: Pairs) -> list[Json]:
    return [row for _, target in pairs for row in target["rows"]]


def _targets(group: Json) -> dict[str, Pairs]:
    """Series with their targets, by number of features and, where there are several, by target."""
    series = {one["id"]: one for one in group["series"]}
    several = len({target["target_excess"] for target in group["targets"]}) > 1
    pairs = [(series[target["series"]], target) for target in group["targets"] if target["rows"]]
    return by_title(
        (features(one["num_features"]) + f", to {in_unit([target['target_excess']], '%')}" * several, (one, target))
        for one, target in sorted(pairs, key=lambda pair: (pair[0]["num_features"], pair[1]["target_excess"]))
    )
