"""The pictures of a scaling report: one panel for each batch and message size, one line for each combination.

A report may have dozens of series. Those with the same scope and kind (strong, weak) share a picture; each combination
of optimizer and sync has the same style in all of them. A page shows the panels one by one, readable on a phone; a file
shows them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from torchreg.console import printable
from torchreg.plots.pictures import (
    Json,
    Picture,
    Style,
    batch_text,
    best_model,
    by_title,
    combination_of,
    combination_styles,
    draw_estimates,
    legend_of,
    log_axis,
    offsets,
    placement_text,
    power_of_two,
    size_axis,
    slug,
    styles_of,
)
from torchreg.plots.quantities import bytes_text, features, in_unit
from torchreg.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_IDEAL = Style("ideal, from the baseline", GREY, dashes="--", width=1)
_EFFICIENT = Style("80 %", GREY, dashes=":", width=1.5)
_EXTRAPOLATED = Style("extrapolated beyond the measurements", GREY, dashes="--")
_FIT = Style("model, where measured", GREY, dashes="-")
_IMBALANCE = Style("slowest minus median rank", BLACK, hatch="///")
_PARTS = {
    "data_time_s": Style("data loading", SKY),
    "compute_time_s": Style("compute", BLUE),
    "exposed_time_s": Style("exposed communication", ORANGE),
    "undivided": Style("compute and communication", GREEN),
}
_MEASURES = {  # what is drawn, and the label of its axis
    "throughput": "throughput (samples/s)",
    "speedup": "speedup over p0",
    "efficiency": "efficiency",
    "karp_flatt": "Karp–Flatt serial fraction",
}
_CONSTANT = {
    "strong": "constant global batch: ideal is p/p0 times the throughput",
    "weak": "constant batch per rank: ideal is the same step time for p/p0 times the samples",
}


def draw_scaling(group: Json, number: int, kind: str, scope: str) -> Picture | None:
    """Throughput, efficiency and, in strong scaling, speedup and Karp–Flatt over world sizes."""
    series = _series(group, kind, scope)
    if not series:
        return None
    styles, panels = combination_styles(group), _by_size(series)
    has_karp_flatt = any(point["karp_flatt"] for one in series for point in one["points"])
    used = {"speedup": kind == "strong", "karp_flatt": has_karp_flatt}
    karp_flatt = " Karp–Flatt is the serial fraction that corresponds to the speedup: ideally small and constant."
    baselines = " or ".join(f"p0 = {size}" for size in sorted({one["baseline_world_size"] for one in series}))
    title = f"{kind.capitalize()} scaling, {scope}"
    return Picture(
        f"figure-{number}-{kind}-{slug(scope)}",
        title,
        f"{title} ({_CONSTANT[kind]}), baseline {baselines}. Medians over launches with 95 % intervals; markers are "
        f"slightly offset where they would overlap.{karp_flatt * has_karp_flatt} "
        f"Source: points and series of group {number} in report.json; points.csv.",
        legend_of(series, styles, _IDEAL, _EFFICIENT),
        tuple(
            (title, partial(_draw_measure, part, measure, styles, _shared_limits(series, measure)))
            for measure in _MEASURES
            if used.get(measure, True)
            for title, part in panels.items()
        ),
        _columns(panels),
    )


def _draw_measure(
    series: Sequence[Json], measure: str, styles: Mapping[str, Style], limits: tuple[float, float], axes: Axes
) -> None:
    sizes = sorted({point["world_size"] for one in series for point in one["points"]})
    for one, offset in zip(series, offsets(len(series)), strict=True):
        points = [point for point in one["points"] if point[measure]]
        ranks, estimates = [point["world_size"] for point in points], [point[measure] for point in points]
        if points:
            draw_estimates(axes, ranks, estimates, styles[combination_of(one)], offset)
        if points and measure in ("throughput", "speedup"):
            first = estimates[0]["value"] / ranks[0]
            axes.plot(sizes, [first * size for size in sizes], color=GREY, linestyle="--", linewidth=1, zorder=1)
    size_axis(axes, sizes, "ranks")
    axes.set(ylim=limits, ylabel=_MEASURES[measure])
    if measure == "throughput":
        log_axis(axes, "k")
    elif measure == "speedup":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(power_of_two)
    else:
        axes.axhline(1 if measure == "efficiency" else 0, color=GREY, linestyle="--", linewidth=1, zorder=1)
    if measure == "efficiency":
        axes.axhline(0.8, color=GREY, linestyle=":", linewidth=1.5, zorder=1)
        axes.yaxis.set_major_formatter(lambda value, _position: in_unit([value], "%"))


def _shared_limits(series: Sequence[Json], measure: str) -> tuple[float, float]:
    """The y limits of all panels of a measure: all values with their intervals, and the lines to compare with."""
    points = [point[measure] for one in series for point in one["points"] if point[measure]]
    ends = [point[end] for point in points for end in ("low", "value", "high") if point[end] is not None]
    if measure in ("throughput", "speedup"):
        for one in series:
            if first := one["points"][0][measure]:
                ends.append(first["value"] * one["points"][-1]["world_size"] / one["points"][0]["world_size"])
        return _padded(ends)
    low, high = min([0.0, *ends]), max([1.0 if measure == "efficiency" else 0.1, *ends])
    return low - 0.04 * (high - low) * (low < 0), high + 0.08 * (high - low)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis around positive values."""
    low, high = min(values), max(values)
    margin = max(1.1, (high / low) ** 0.06)
    return low / margin, high * margin


def draw_breakdown(group: Json, number: int, kind: str, scope: str) -> Picture | None:
    """The parts of a step, as fractions of its time."""
    series = _series(group, kind, scope)
    if not series:
        return None
    points = {point["id"]: point for point in group["points"]}
    panels = {
        title: {
            f"{combination_of(one)}  {row['world_size']}": points[row["point"]] for one in part for row in one["points"]
        }
        for title, part in _by_size(series).items()
    }
    bars = [point for part in panels.values() for point in part.values()]
    used = [style for name, style in _PARTS.items() if any(_part(point, name) for point in bars)]
    title = f"Parts of a step's time, {kind} scaling, {scope}"
    return Picture(
        f"figure-{number}-breakdown-{kind}-{slug(scope)}",
        title,
        f"{title}: a bar for each combination and number of ranks, as percent of the median step time (at the right). "
        "Exposed communication is the time of the step minus that of the same step without averaging. The medians are "
        "taken separately, so they need not sum to 100 %. Hatched: slowest minus median rank, contained in the other "
        f"parts. Source: points of group {number} in report.json; points.csv.",
        (*used, *[_IMBALANCE] * any(_part(point, "imbalance_time_s") for point in bars)),
        tuple((title, partial(_draw_bars, part)) for title, part in panels.items()),
        _columns(panels),
        height=0.3 + 0.2 * max(map(len, panels.values())),
        margin=1.22,
    )


def _part(point: Json, name: str) -> float:
    """A part of a step as a fraction of its time. A negative difference of noisy times counts as 0."""
    if name == "undivided":  # the step was not measured without averaging
        return 0.0 if point["compute_time_s"] else max(0.0, 1 - _part(point, "data_time_s"))
    return max(0.0, point[name]["value"]) / point["step_time_s"]["value"] if point[name] else 0.0


def _draw_bars(points: Mapping[str, Json], axes: Axes) -> None:
    rows, left = np.arange(len(points)), np.zeros(len(points))
    for name, style in _PARTS.items():
        parts = np.array([_part(point, name) for point in points.values()])
        if parts.any():
            axes.barh(rows, parts, left=left, height=0.74, facecolor=style.colour, linewidth=0, label=style.label)
        left = left + parts
    parts = np.array([_part(point, "imbalance_time_s") for point in points.values()])
    if parts.any():
        hatch, label = _IMBALANCE.hatch, _IMBALANCE.label
        axes.barh(rows, -parts, left=left, height=0.74, facecolor="none", hatch=hatch, linewidth=0, label=label)
    for row, point in enumerate(points.values()):
        time = in_unit([point["step_time_s"]["value"]], "s")
        axes.text(1.015, row, time, transform=axes.get_yaxis_transform(), va="center", fontsize=7.5)
    axes.set_yticks(rows, [printable(name) for name in points], fontsize=7.5)
    axes.set(ylim=(len(points) - 0.4, -0.6), xlim=(0, max(1.0, *left)), xlabel="part of the step time (at the right)")
    axes.xaxis.set_major_formatter(lambda value, _position: in_unit([value], "%"))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def draw_models(group: Json, number: int, kind: str, scope: str) -> Picture | None:
    """Measured step times, and the model with the smallest held-out error, dashed where it is extrapolated."""
    series = [one for one in _series(group, kind, scope) if best_model(one)]
    if not series:
        return None
    styles, panels = combination_styles(group), _by_size(series)
    title = f"Models of the step time, {kind} scaling, {scope}"
    return Picture(
        f"figure-{number}-models-{kind}-{slug(scope)}",
        title,
        f"{title}: measured medians with 95 % intervals, and for each series the identifiable model with the smallest "
        "held-out error (named in the table). Nothing was measured in the shaded part, where dashed lines are "
        f"extrapolated. Source: models of group {number} in report.json.",
        legend_of(series, styles, _FIT, _EXTRAPOLATED),
        tuple((title, partial(_draw_fits, part, styles)) for title, part in panels.items()),
        _columns(panels),
    )


def _draw_fits(series: Sequence[Json], styles: Mapping[str, Style], axes: Axes) -> None:
    measured = {point["world_size"] for one in series for point in one["points"]}
    sizes = set(measured)
    for one, offset in zip(series, offsets(len(series)), strict=True):
        style, fit = styles[combination_of(one)], best_model(one) or {"curve": []}
        ranks = [point["world_size"] for point in one["points"]]
        draw_estimates(axes, ranks, [point["step_time_s"] for point in one["points"]], style, offset, line=False)
        curve = [(at["world_size"] * offset, at["step_time_s"]) for at in fit["curve"]]
        num_inside = sum(not at["extrapolated"] for at in fit["curve"])
        for part, dashes in ((curve[:num_inside], "-"), (curve[max(0, num_inside - 1) :], "--")):
            if len(part) > 1:
                axes.plot(*zip(*part, strict=True), color=style.colour, linestyle=dashes, linewidth=1.2)
        sizes |= {at["world_size"] for at in fit["curve"]}
    # ticks at powers of two and at the ends; the curve may be finer
    size_axis(axes, [*(size for size in sizes if float(math.log2(size)).is_integer()), min(sizes), max(sizes)], "ranks")
    if max(sizes) > max(measured):
        axes.axvspan(max(measured) * 1.12, axes.get_xlim()[1], color=GREY, alpha=0.18, linewidth=0)
    axes.autoscale(axis="y")
    log_axis(axes, "s")
    axes.set_ylabel("step time")


def draw_allreduce(group: Json, number: int) -> Picture | None:
    """Time of one all-reduce over the message size, with α + β m."""
    measured = [one for one in group["allreduce"] if one["sizes"]]
    if not measured:
        return None
    styles = styles_of(one["backend"] for one in measured)
    ordered = sorted(measured, key=lambda one: (one["num_nodes"] > 1, one["num_nodes"], one["world_size"]))
    panels = by_title((placement_text(one), one) for one in ordered)
    limits = _padded([size["time_s"]["value"] for one in measured for size in one["sizes"]])
    return Picture(
        f"figure-{number}-allreduce",
        "All-reduce",
        "Time of one all-reduce: medians over launches with 95 % intervals, both axes logarithmic. Lines are the fits "
        "T(m) = α + β m; a backend without a line has no identifiable fit. "
        f"Source: allreduce of group {number} in report.json; allreduce.csv.",
        tuple(styles.values()),
        tuple((title, partial(_draw_times, part, styles, limits)) for title, part in panels.items()),
        min(3, len(panels)),
    )


def _draw_times(part: Sequence[Json], styles: Mapping[str, Style], limits: tuple[float, float], axes: Axes) -> None:
    for one, offset in zip(part, offsets(len(part)), strict=True):
        style = styles[one["backend"]]
        sizes = [size["message_bytes"] for size in one["sizes"]]
        draw_estimates(axes, sizes, [size["time_s"] for size in one["sizes"]], style, offset, line=False)
        if one["fit"] and one["fit"]["identifiable"]:
            found = {parameter["symbol"]: parameter["value"] for parameter in one["fit"]["parameters"]}
            at = np.geomspace(sizes[0], sizes[-1], 40)
            axes.plot(at, found["α"] + found["β"] * at, color=style.colour, linestyle=style.dashes, linewidth=1.2)
    size_axis(axes, {size["message_bytes"] for one in part for size in one["sizes"]}, "message size", 4, 1.6)
    axes.xaxis.set_major_formatter(lambda value, _position: bytes_text(value))
    axes.set(ylim=limits, ylabel="time of an all-reduce")
    log_axis(axes, "s")


def _series(group: Json, kind: str, scope: str) -> list[Json]:
    return [one for one in group["series"] if (one["kind"], one["scope"]) == (kind, scope) and one["points"]]


def _by_size(series: Iterable[Json]) -> dict[str, list[Json]]:
    """Series by sizes of message and batch, the smallest first."""
    order = sorted(series, key=lambda one: (one["message_bytes"], one["global_batch_size"] or one["local_batch_size"]))
    return by_title(
        (f"{features(one['num_features'])} ({bytes_text(one['message_bytes'])}), {batch_text(one)}", one)
        for one in order
    )


def _columns(panels: Mapping[str, object]) -> int:
    return len(panels) if len(panels) <= 4 else 3
