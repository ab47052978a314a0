"""The pictures of a scaling report: one panel for each batch and message size, one line for each combination.

Series with the same scope and kind share a picture. A page shows the panels one by one, a file shows them all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from torchreg.console import printable
from torchreg.plots import pictures
from torchreg.plots.pictures import Json, Picture, Style, combination_of, draw_estimates, with_offsets
from torchreg.plots.quantities import features, in_unit
from torchreg.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, SKY

_IDEAL = Style("ideal, from the baseline", GREY, dashes="--", width=1)
_EXTRAPOLATED = Style("extrapolated beyond the measurements", GREY, dashes="--")
_FIT = Style("model, where measured", GREY, dashes="-")
_PARTS = {  # of a step; a hatched one is contained in the others
    "data_time_s": Style("data loading", SKY),
    "compute_time_s": Style("compute", BLUE),
    "exposed_time_s": Style("exposed communication", ORANGE),
    "undivided": Style("compute and communication", GREEN),
    "imbalance_time_s": Style("slowest minus median rank", BLACK, hatch="///"),
}
_MEASURES = {"throughput": "throughput (samples/s)", "efficiency": "efficiency", "karp_flatt": "Karp–Flatt fraction"}


def draw_scaling(group: Json, number: int, kind: str, scope: str) -> Picture:
    """Throughput, efficiency and, where there is any, Karp–Flatt over world sizes."""
    panels = _panels(group, kind, scope)
    series = [*itertools.chain(*panels.values())]
    drawn = tuple(
        (title, partial(_draw_measure, part, measure, _shared_limits(series, measure)))
        for measure in _MEASURES
        for title, part in panels.items()
        if any(point[measure] for one in series for point in one["points"])
    )
    title, legend = f"{kind.capitalize()} scaling, {scope}", pictures.legend_of(series, _IDEAL, *_efficient(series))
    return Picture(number, kind, scope, title, legend, drawn, _columns(panels))


def _draw_measure(series: Sequence[Json], measure: str, limits: tuple[float, float], axes: Axes) -> None:
    sizes = sorted({point["world_size"] for one in series for point in one["points"]})
    for one, offset in with_offsets(series):
        draw_estimates(axes, one["points"], "world_size", measure, one["style"], offset, line=True)
        if measure == "throughput":
            first = one["points"][0][measure]["value"] / one["points"][0]["world_size"]
            axes.plot(sizes, first * np.array(sizes), color=GREY, linestyle="--", linewidth=1, zorder=1)
    pictures.size_axis(axes, sizes, "ranks")
    axes.set(ylim=limits, ylabel=_MEASURES[measure])
    if measure == "throughput":
        pictures.log_axis(axes, "k")
    elif measure == "efficiency":
        _mark_efficiency(axes, series)


def _mark_efficiency(axes: Axes, series: Sequence[Json]) -> None:
    axes.yaxis.set_major_formatter(pictures.ticks("%"))
    for height, style in zip((1, series[0]["limit"]["min_efficiency"]), (_IDEAL, *_efficient(series)), strict=True):
        axes.axhline(height, color=GREY, linestyle=style.dashes, linewidth=style.width, zorder=1)


def _efficient(series: Sequence[Json]) -> list[Style]:
    """The line of the lowest efficiency that counts as scaling well."""
    return [Style(in_unit([one["limit"]["min_efficiency"]], "%"), GREY, dashes=":") for one in series[:1]]


def _shared_limits(series: Sequence[Json], measure: str) -> tuple[float, float]:
    points = [point[measure] for one in series for point in one["points"] if point[measure]]
    ends = [point[end] for point in points for end in ("low", "value", "high") if point[end] is not None]
    if measure == "throughput":
        outer = [(one["points"][0], one["points"][-1]["world_size"]) for one in series]
        ideal = [first[measure]["value"] * last / first["world_size"] for first, last in outer]
        return _padded([*ends, *ideal])
    return 0.0, 1.08 * max([1.0 if measure == "efficiency" else 0.1, *ends])


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis around positive values."""
    low, high = min(values), max(values)
    margin = max(1.1, (high / low) ** 0.06)
    return low / margin, high * margin


def draw_breakdown(group: Json, number: int, kind: str, scope: str) -> Picture:
    """The parts of a step, as fractions of its time."""
    points = {point["id"]: point for point in group["points"]}
    panels = {
        title: {f"{combination_of(one)}  {row['world_size']}": points[row["point"]]
                for one in part for row in one["points"]}
        for title, part in _panels(group, kind, scope).items()
    }  # fmt: skip
    bars = [point for part in panels.values() for point in part.values()]
    legend = tuple(style for name, style in _PARTS.items() if any(_part(point, name) for point in bars))
    drawn = tuple((title, partial(_draw_bars, part)) for title, part in panels.items())
    title = f"Parts of a step's time, {kind} scaling, {scope}"
    height = 0.3 + 0.2 * max(map(len, panels.values()), default=0)
    return Picture(number, f"breakdown {kind}", scope, title, legend, drawn, _columns(panels), height, margin=1.22)


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
            looks: Json = {"facecolor": "none", "hatch": style.hatch} if style.hatch else {"facecolor": style.colour}
            widths = -parts if style.hatch else parts
            axes.barh(rows, widths, left=left, height=0.74, linewidth=0, label=style.label, **looks)
        left = left if style.hatch else left + parts
    for row, point in enumerate(points.values()):
        time = in_unit([point["step_time_s"]["value"]], "s")
        axes.text(1.015, row, time, transform=axes.get_yaxis_transform(), va="center", fontsize=7.5)
    axes.set_yticks(rows, [printable(name) for name in points], fontsize=7.5)
    axes.set(ylim=(len(points) - 0.4, -0.6), xlim=(0, max(1.0, *left)), xlabel="part of the step time (at the right)")
    axes.xaxis.set_major_formatter(pictures.ticks("%"))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def draw_models(group: Json, number: int, kind: str, scope: str) -> Picture:
    """Measured step times, and the model with the smallest held-out error, dashed where it is extrapolated."""
    panels = _panels(group, kind, scope, is_fitted=True)
    legend = pictures.legend_of(itertools.chain(*panels.values()), _FIT, _EXTRAPOLATED)
    drawn = tuple((title, partial(draw_fits, part, "step_time_s")) for title, part in panels.items())
    title = f"Models of the step time, {kind} scaling, {scope}"
    return Picture(number, f"models {kind}", scope, title, legend, drawn, _columns(panels))


def draw_fits(series: Sequence[Json], measure: str, axes: Axes) -> None:
    """The step time or the efficiency of series by world size: as measured, and as their best models have it."""
    measured = {point["world_size"] for one in series for point in one["points"]}
    sizes = set(measured)
    for one, offset in with_offsets(series):
        fitted = (pictures.best_model(one) or {"curve": []})["curve"]
        draw_estimates(axes, one["points"], "world_size", measure, one["style"], offset, line=not fitted)
        curve = [(at["world_size"] * offset, at[measure]) for at in fitted]
        num_inside = sum(not at["extrapolated"] for at in fitted)
        for part, dashes in ((curve[:num_inside], "-"), (curve[max(0, num_inside - 1) :], "--")):
            if len(part) > 1:
                axes.plot(*zip(*part, strict=True), color=one["style"].colour, linestyle=dashes, linewidth=1.2)
        sizes |= {at["world_size"] for at in fitted}
    labelled = [size for size in sizes if math.log2(size).is_integer() or size in (min(sizes), max(sizes))]
    pictures.size_axis(axes, labelled, "ranks")  # the curve may be finer
    if max(sizes) > max(measured):
        axes.axvspan(max(measured) * 1.12, axes.get_xlim()[1], color=GREY, alpha=0.18, linewidth=0)
    if measure == "efficiency":
        axes.set(ylim=_shared_limits(series, measure), ylabel="efficiency")
        _mark_efficiency(axes, series)
    else:
        axes.autoscale(axis="y")
        pictures.log_axis(axes, "s")
        axes.set_ylabel("step time")


def draw_allreduce(group: Json, number: int) -> Picture:
    """Time of one all-reduce over the message size, with α + β m."""
    measured = pictures.styled((one for one in group["allreduce"] if one["sizes"]), lambda one: one["backend"])
    ordered = sorted(measured, key=lambda one: (one["num_nodes"], one["world_size"]))
    panels = pictures.by_title((pictures.placement_text(one), one) for one in ordered)
    times = [size["time_s"]["value"] for one in measured for size in one["sizes"]]
    drawn = tuple((title, partial(_draw_times, part, times)) for title, part in panels.items())
    return Picture(number, "allreduce", "", "All-reduce", pictures.legend_of(measured), drawn, min(3, len(panels)))


def _draw_times(part: Sequence[Json], all_times: Sequence[float], axes: Axes) -> None:
    for one, offset in with_offsets(part):
        style, sizes = one["style"], [size["message_bytes"] for size in one["sizes"]]
        draw_estimates(axes, one["sizes"], "message_bytes", "time_s", style, offset)
        if one["fit"] and one["fit"]["identifiable"]:
            found = {parameter["symbol"]: parameter["value"] for parameter in one["fit"]["parameters"]}
            at = np.geomspace(sizes[0], sizes[-1], 40)
            axes.plot(at, found["α"] + found["β"] * at, color=style.colour, linestyle=style.dashes, linewidth=1.2)
    pictures.size_axis(axes, {size["message_bytes"] for one in part for size in one["sizes"]}, "message size", 4, 1.6)
    axes.xaxis.set_major_formatter(pictures.ticks("B"))
    axes.set(ylim=_padded(all_times), ylabel="time of an all-reduce")
    pictures.log_axis(axes, "s")


def _panels(group: Json, kind: str, scope: str, *, is_fitted: bool = False) -> dict[str, list[Json]]:
    """Series (only those with a model to draw) by sizes of message and batch, the smallest first."""
    series = [one for one in pictures.styled(group["series"]) if (one["kind"], one["scope"]) == (kind, scope)]
    series.sort(key=lambda one: (one["message_bytes"], one["global_batch_size"] or one["local_batch_size"]))
    return pictures.by_title(
        (f"{features(one['num_features'])} ({in_unit([one['message_bytes']], 'B')}), {pictures.batch_text(one)}", one)
        for one in series
        if not is_fitted or pictures.best_model(one)
    )


def _columns(panels: Mapping[str, object]) -> int:
    return 2 if len(panels) in (1, 2, 4) else 3
