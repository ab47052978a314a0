"""What is drawn on one pair of axes of the way to a target: steps, times, node-hours, where training diverges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torchreg.plots.panels import (
    Json,
    Look,
    asides,
    combination_of,
    draw_estimates,
    log2_axis,
    log_axis,
    percent,
    power_of_two,
    rank_axis,
)
from torchreg.plots.style import BLACK, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def unstable_from(placements: Sequence[float], limits: Sequence[float]) -> float | None:
    """Where along increasing `placements` the stability limit falls to 1, by a power law between neighbours.

    None where it does not. The limit is the factor by which the rates may still grow: below 1 training diverges.
    """
    pairs = sorted(zip(placements, limits, strict=True))
    if pairs and pairs[0][1] < 1:
        return 0.0
    for (left, above), (right, below) in itertools.pairwise(pairs):
        if below < 1 <= above:
            part = math.log(above) / math.log(above / below)
            return left * (right / left) ** part
    return None


def _shade_unstable(axes: Axes, start: float | None) -> None:
    if start is not None:
        low, high = axes.get_xlim()
        axes.axvspan(max(low, start), high, color=GREY, alpha=0.3, linewidth=0)
        axes.set_xlim(low, high)


def _batch_axis(axes: Axes, rows: Sequence[Json]) -> None:
    sizes = sorted({row["global_batch_size"] for row in rows})
    axes.set_xscale("log")  # the base is the ticks' business
    log2_axis(axes.xaxis, sizes)
    axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
    axes.set_xlabel("global batch (rows)")
    _shade_unstable(axes, unstable_from(*zip(*_limits_by_batch(rows).items(), strict=True)))


def _limits_by_batch(rows: Sequence[Json]) -> dict[float, float]:
    """The lowest limit at each global batch: optimizers may differ."""
    found: dict[float, float] = {}
    for row in rows:
        batch = row["global_batch_size"]
        found[batch] = min(row["stability_limit"], found.get(batch, math.inf))
    return dict(sorted(found.items()))


def draw_steps_to(pairs: Sequence[tuple[Json, Json]], looks: Mapping[str, Look], axes: Axes) -> None:
    """Steps to the target by global batch: predicted as a line, measured as markers."""
    rows = [row for _, target in pairs for row in target["rows"]]
    names = list(dict.fromkeys(combination_of(one) for one, _ in pairs))
    predicted = {(row["global_batch_size"], row["predicted_steps"]) for row in rows if row["predicted_steps"]}
    if predicted:
        axes.plot(*zip(*sorted(predicted), strict=True), color=BLACK, linewidth=1)
    for name, aside in zip(names, asides(len(names), 0.13), strict=True):
        mine = [row for one, target in pairs if combination_of(one) == name for row in target["rows"]]
        measured = [row for row in mine if row["measured_steps"]]
        batches = [row["global_batch_size"] for row in measured]
        if measured:
            draw_estimates(axes, batches, [row["measured_steps"] for row in measured], looks[name], aside, line=False)
    if axes.lines:
        log_axis(axes, "")
    else:
        _say_never(axes)
    _batch_axis(axes, rows)
    axes.set_ylabel(f"steps to {percent(pairs[0][1]['target_excess'])} above the best")


def draw_nearness(rows: Sequence[Json], axes: Axes) -> None:
    """The rates as a multiple of the stability limit, by global batch."""
    limits = _limits_by_batch(rows)
    axes.plot(list(limits), [1 / limit for limit in limits.values()], color=BLACK, marker=".", linewidth=1)
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), max(high, 2))  # so that the limit is in the picture
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.yaxis.set_major_formatter(power_of_two)
    _batch_axis(axes, rows)
    axes.set_ylabel("rates over the stability limit")


def draw_time_to(pairs: Sequence[tuple[Json, Json]], looks: Mapping[str, Look], axes: Axes) -> None:
    """Time to the target over ranks: predicted as lines, measured as markers."""
    for (one, target), aside in zip(pairs, asides(len(pairs)), strict=True):
        look = looks[combination_of(one)]
        predicted = [row for row in target["rows"] if row["predicted_time_s"]]
        if predicted:
            ranks = [row["world_size"] * aside for row in predicted]
            times = [row["predicted_time_s"]["value"] for row in predicted]
            axes.plot(ranks, times, color=look.colour, linestyle=look.dashes, linewidth=1)
        rows = [row for row in target["rows"] if row["measured_time_s"]]
        if rows:
            ranks = [row["world_size"] for row in rows]
            draw_estimates(axes, ranks, [row["measured_time_s"] for row in rows], look, aside, line=False)
    _finish_target(axes, pairs, "s", "time to the target")


def draw_node_hours(pairs: Sequence[tuple[Json, Json]], looks: Mapping[str, Look], axes: Axes) -> None:
    """Node-hours to the target over ranks."""
    for (one, target), aside in zip(pairs, asides(len(pairs)), strict=True):
        look = looks[combination_of(one)]
        line = [(row["world_size"] * aside, row["node_hours"]) for row in target["rows"] if row["node_hours"]]
        if line:
            axes.plot(
                *zip(*line, strict=True), color=look.colour, linestyle=look.dashes, linewidth=1, marker=look.marker,
                markersize=4.5,
            )  # fmt: skip
    _finish_target(axes, pairs, "", "node-hours to the target")


def _finish_target(axes: Axes, pairs: Sequence[tuple[Json, Json]], unit: str, name: str) -> None:
    rows = [row for _, target in pairs for row in target["rows"]]
    if axes.lines:
        log_axis(axes, unit)
        if not unit:
            axes.yaxis.set_major_formatter("{x:g}")  # thousandths of a node-hour have no name
    else:
        _say_never(axes)
    rank_axis(axes, [row["world_size"] for row in rows])
    lowest: dict[float, float] = {}
    for row in rows:
        lowest[row["world_size"]] = min(row["stability_limit"], lowest.get(row["world_size"], math.inf))
    _shade_unstable(axes, unstable_from(list(lowest), list(lowest.values())))
    axes.set_ylabel(name)


def _say_never(axes: Axes) -> None:
    axes.text(0.5, 0.5, "never reached", transform=axes.transAxes, ha="center")
    axes.set_yticks([])
