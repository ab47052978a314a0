"""The pictures of training to a target: steps by global batch, time and node-hours by world size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import TypeAlias

import pandas as pd
from matplotlib.axes import Axes

from torchreg.plots import pictures
from torchreg.plots.pictures import Json, Picture, Style, batch_text, by_title, combination_of, draw_estimates, offsets
from torchreg.plots.quantities import features, in_unit
from torchreg.plots.style import BLACK, GREY

Pairs: TypeAlias = list[tuple[Json, Json]]  # series with their targets

_UNSTABLE = Style("training diverges", GREY)
_PREDICTED = Style("predicted", BLACK, dashes="-", width=1)
_BOTH = Style("line: predicted; marker: measured", GREY, dashes="-", width=1)


def draw_steps(group: Json, number: int) -> Picture | None:
    """Statistical efficiency: steps to the target and the fraction of the stability limit by global batch."""
    styles, targets = pictures.styles_of(map(combination_of, group["series"])), _targets(group)
    if not targets:
        return None
    title = "Statistical efficiency: steps to the target"
    return Picture(
        f"figure-{number}-steps",
        title,
        f"{title} by global batch, predicted by theory (line) and measured (markers, medians with 95 % intervals); and "
        "the learning rate as a fraction of the stability limit. Above 1, shaded, training diverges. "
        f"Source: targets of group {number} in report.json.",
        pictures.legend_of((one for one, _ in itertools.chain(*targets.values())), styles, _PREDICTED, _UNSTABLE),
        tuple(
            (title, draw)
            for title, pairs in targets.items()
            for draw in (partial(_draw_steps, pairs, styles), partial(_draw_limits, pairs))
        ),
        columns=2,
        margin=0.8,
    )


def _draw_steps(pairs: Pairs, styles: Mapping[str, Style], axes: Axes) -> None:
    rows = [(combination_of(one), row) for one, target in pairs for row in target["rows"]]
    if predicted := {(row["global_batch_size"], row["predicted_steps"]) for _, row in rows if row["predicted_steps"]}:
        axes.plot(*zip(*sorted(predicted), strict=True), color=BLACK, linewidth=1, label="predicted")
    by_combination = by_title(rows)
    for (name, mine), offset in zip(by_combination.items(), offsets(len(by_combination), 0.13), strict=True):
        if measured := [(row["global_batch_size"], row["measured_steps"]) for row in mine if row["measured_steps"]]:
            draw_estimates(axes, measured, styles[name], offset, line=False)
    label = f"steps to {in_unit([pairs[0][1]['target_excess']], '%')} above the optimum"
    _finish(axes, _limits(pairs, "global_batch_size"), "global batch (samples)", label, "k")


def _draw_limits(pairs: Pairs, axes: Axes) -> None:
    limits = _limits(pairs, "global_batch_size")
    axes.plot(list(limits), [1 / limit for limit in limits.values()], ".-", color=BLACK, linewidth=1, label="predicted")
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), max(high, 2))  # so that the limit is visible
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.yaxis.set_major_formatter(pictures.power_of_two)
    _finish(axes, limits, "global batch (samples)", "fraction of the stability limit")


def draw_targets(group: Json, number: int, scope: str) -> Picture | None:
    """Statistical × hardware efficiency: time and node-hours to the target by world size."""
    styles = pictures.styles_of(map(combination_of, group["series"]))
    parts = by_title(
        (f"{one['kind']}, {title}, {batch_text(one)}", (one, target))
        for title, pairs in _targets(group).items()
        for one, target in pairs
        if one["scope"] == scope
    )
    if not parts:
        return None
    return Picture(
        f"figure-{number}-targets-{pictures.slug(scope)}",
        f"Time and node-hours to the target, {scope}",
        f"Statistical × hardware efficiency, {scope}: the time to the target is the number of steps × the step time; "
        "node-hours are that times the number of nodes (a partly used node counts whole). Lines: predicted steps × "
        "measured step time. Markers: measured times with 95 % intervals, and node-hours. Shaded world sizes are above "
        f"the stability limit. Source: targets of group {number} in report.json.",
        pictures.legend_of((one for one, _ in itertools.chain(*parts.values())), styles, _BOTH, _UNSTABLE),
        tuple(
            (title, partial(_draw_by_ranks, pairs, styles, is_time))
            for title, pairs in parts.items()
            for is_time in (True, False)
        ),
        columns=2,
    )


def _draw_by_ranks(pairs: Pairs, styles: Mapping[str, Style], is_time: bool, axes: Axes) -> None:
    """Predicted times as lines and measured ones as markers; or node-hours as lines with markers."""
    for (one, target), offset in zip(pairs, offsets(len(pairs)), strict=True):
        style, rows = styles[combination_of(one)], target["rows"]
        name = "predicted_time_s" if is_time else "node_hours"
        if found := [(row["world_size"], row[name]) for row in rows if row[name]]:
            axes.plot(
                [size * offset for size, _ in found], [value["value"] if is_time else value for _, value in found],
                color=style.colour, linestyle=style.dashes, linewidth=1, marker="" if is_time else style.marker,
                markersize=4.5, label=f"predicted, {style.label}",
            )  # fmt: skip
        measured = [(row["world_size"], row["measured_time_s"]) for row in rows if is_time and row["measured_time_s"]]
        if measured:
            draw_estimates(axes, measured, style, offset, line=False)
    label, unit = ("time to the target", "s") if is_time else ("node-hours to the target", "")
    _finish(axes, _limits(pairs, "world_size"), "ranks", label, unit)
    if axes.lines and not is_time:
        axes.yaxis.set_major_formatter("{x:g}")  # thousandths of a node-hour have no name


def _finish(axes: Axes, limits: Mapping[float, float], size: str, label: str, unit: str | None = None) -> None:
    """The axes of a panel, with stability limits by size; a unit makes the y axis logarithmic."""
    axes.set_ylabel(label)
    if not axes.lines:
        axes.text(0.5, 0.5, "never reached", transform=axes.transAxes, ha="center")
        axes.set_yticks([])
    elif unit is not None:
        pictures.log_axis(axes, unit)
    pictures.size_axis(axes, limits, size)
    start = unstable_from(limits)
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


def _limits(pairs: Pairs, by: str) -> dict[float, float]:
    """The lowest stability limit at each size: optimizers may differ."""
    rows = pd.DataFrame([row for _, target in pairs for row in target["rows"]])
    return dict(rows.groupby(by)["stability_limit"].min())


def _targets(group: Json) -> dict[str, Pairs]:
    """Series with their targets, by number of features and, where there are several, by target."""
    series = {one["id"]: one for one in group["series"]}
    several = len({target["target_excess"] for target in group["targets"]}) > 1
    pairs = [(series[target["series"]], target) for target in group["targets"] if target["rows"]]
    return by_title(
        (features(one["num_features"]) + f", to {in_unit([target['target_excess']], '%')}" * several, (one, target))
        for one, target in sorted(pairs, key=lambda pair: (pair[0]["num_features"], pair[1]["target_excess"]))
    )
