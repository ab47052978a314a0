"""The pictures of training to a target: steps by global batch, time and node-hours by world size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from torchreg.plots import pictures
from torchreg.plots.pictures import Json, Picture, Style, batch_text, by_title, combination_of, draw_estimates
from torchreg.plots.quantities import features, in_unit
from torchreg.plots.scaling_figures import draw_fits
from torchreg.plots.style import BLACK, BLUE, GREY, ORANGE

_SERIES = {"strong": Style("strong scaling", BLUE, "o", "-"), "weak": Style("weak scaling", ORANGE, "^", "-.")}
_UNSTABLE = Style("training diverges", GREY)
_PREDICTED = Style("predicted", BLACK, dashes="-", width=1)
_BOTH = Style("line: predicted; marker: measured", GREY, dashes="-", width=1)


def draw_headline(group: Json, number: int, headline: Json) -> Picture:
    """Efficiency and time to the target by world size, of what the first screen is about."""
    series = [{**one, "style": _SERIES[one["kind"]]} for one in group["series"]]
    named = {one["series"] for one in (headline["strong"], headline["weak"]) if one}
    shown, panels = [one for one in series if one["id"] in named], []
    if shown:
        panels.append(("efficiency", partial(draw_fits, shown, "efficiency")))
    if best := headline["best"] and headline["best"]["fastest"]:
        own = [{**one, **target} for one in series if one["id"] == best["series"] for target in one["targets"]]
        chosen = [one for one in own if one["target_excess"] == best["target_excess"]]
        title = f"time to {in_unit([best['target_excess']], '%')} above the optimum"
        panels.append((title, partial(_draw_by_ranks, chosen, is_time=True)))
    legend, title = pictures.legend_of(shown), "Efficiency and time to the target"
    return Picture(number, "headline", "", title, legend, tuple(panels), columns=2, height=1.8)


def draw_steps(group: Json, number: int) -> Picture:
    """Statistical efficiency: steps to the target and the fraction of the stability limit by global batch."""
    parts = _targets(group)
    legend = pictures.legend_of(itertools.chain(*parts.values()), _PREDICTED, _UNSTABLE)
    draws = (_draw_steps, _draw_limits)
    drawn = tuple((title, partial(draw, part)) for title, part in parts.items() for draw in draws)
    title = "Statistical efficiency: steps to the target"
    return Picture(number, "steps", "", title, legend, drawn, columns=2, margin=0.8)


def _draw_steps(targets: Sequence[Json], axes: Axes) -> None:
    rows = [row for target in targets for row in target["rows"] if row["predicted_steps"]]
    if predicted := {(row["global_batch_size"], row["predicted_steps"]) for row in rows}:
        axes.plot(*zip(*sorted(predicted), strict=True), color=BLACK, linewidth=1, label="predicted")
    by_combination = by_title((combination_of(target), target) for target in targets)
    for same, offset in pictures.with_offsets(list(by_combination.values()), 0.13):
        rows = [row for target in same for row in target["rows"]]
        draw_estimates(axes, rows, "global_batch_size", "measured_steps", same[0]["style"], offset)
    label = f"steps to {in_unit([targets[0]['target_excess']], '%')} above the optimum"
    _finish(axes, _limits(targets, "global_batch_size"), "global batch (samples)", label, "k")


def _draw_limits(targets: Sequence[Json], axes: Axes) -> None:
    limits = _limits(targets, "global_batch_size")
    axes.plot(list(limits), [1 / limit for limit in limits.values()], ".-", color=BLACK, linewidth=1, label="predicted")
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), max(high, 2))  # so that the limit is visible
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.yaxis.set_major_formatter(pictures.ticks("%"))
    _finish(axes, limits, "global batch (samples)", "fraction of the stability limit")


def draw_targets(group: Json, number: int, scope: str) -> Picture:
    """Statistical × hardware efficiency: time and node-hours to the target by world size."""
    parts = by_title(
        (f"{one['kind']}, {title}, {batch_text(one)}", one)
        for title, targets in _targets(group).items()
        for one in targets
        if one["scope"] == scope
    )
    legend = pictures.legend_of(itertools.chain(*parts.values()), _BOTH, _UNSTABLE)
    draws = (partial(_draw_by_ranks, is_time=True), partial(_draw_by_ranks, is_time=False))
    drawn = tuple((title, partial(draw, part)) for title, part in parts.items() for draw in draws)
    title = f"Time and node-hours to the target, {scope}"
    return Picture(number, "targets", scope, title, legend, drawn, columns=2)


def _draw_by_ranks(targets: Sequence[Json], axes: Axes, is_time: bool) -> None:
    for target, offset in pictures.with_offsets(targets):
        style, rows = target["style"], target["rows"]
        predicted = [(row["world_size"] * offset, row["predicted_time_s"]) for row in rows if row["predicted_time_s"]]
        if is_time and predicted:
            sizes, times = [size for size, _ in predicted], [time["value"] for _, time in predicted]
            axes.plot(sizes, times, color=style.colour, linestyle=style.dashes, label=f"predicted, {style.label}")
        measure = "measured_time_s" if is_time else "node_hours"
        draw_estimates(axes, rows, "world_size", measure, style, offset, line=not is_time)
    label, unit = ("time to the target", "s") if is_time else ("node-hours to the target", "")
    _finish(axes, _limits(targets, "world_size"), "ranks", label, unit)
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
    if next(iter(limits.values()), 1) < 1:
        return 0.0
    for (left, above), (right, below) in itertools.pairwise(limits.items()):
        if below < 1 <= above:
            return left * (right / left) ** (math.log(above) / math.log(above / below))
    return None


def _limits(targets: Sequence[Json], by: str) -> dict[float, float]:
    """The lowest stability limit at each size: optimizers may differ."""
    rows = pd.DataFrame([row for target in targets for row in target["rows"]])
    return dict(rows.groupby(by)["stability_limit"].min())


def _targets(group: Json) -> dict[str, list[Json]]:
    """Targets with the fields of their series, by number of features and, where there are several, by target."""
    series = pictures.styled(group["series"])
    targets = [{**one, **target} for one in series for target in one["targets"] if target["rows"]]
    several = len({target["target_excess"] for target in targets}) > 1
    return by_title(
        (features(one["num_features"]) + f", to {in_unit([one['target_excess']], '%')}" * several, one)
        for one in sorted(targets, key=lambda one: (one["num_features"], one["target_excess"]))
    )
