"""What is drawn on one pair of axes of a scaling report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchreg.console import printable
from torchreg.plots.quantities import bytes_text, in_unit
from torchreg.plots.style import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Json = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """How a line or an area is drawn and what the legend calls it; an area has neither marker nor dashes.

    An area that is not `filled` is hatched only, over what it is a part of.
    """

    label: str
    colour: str
    marker: str = ""
    dashes: Any = ""
    hatch: str = ""
    width: float = 1.5
    filled: bool = True

    @property
    def is_area(self) -> bool:
        """Drawn as an area rather than as a line."""
        return not (self.marker or self.dashes)


def combination_of(thing: Mapping[str, Any]) -> str:
    """Optimizer and sync in one word."""
    return f"{thing['optimizer']}/{thing['sync']}"


def best_model(series: Json) -> Json | None:
    """The identifiable model with the smallest held-out error, which is the one that is drawn."""
    fits = [fit for fit in series["models"] if fit["identifiable"] and fit["curve"]]
    return min(fits, key=lambda fit: math.inf if fit["held_out_error"] is None else fit["held_out_error"], default=None)


def padded(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis around positive values."""
    low, high = min(values), max(values)
    room = max(1.1, (high / low) ** 0.06)
    return low / room, high * room


def shared_limits(series: Sequence[Json], measure: str) -> tuple[float, float]:
    """What the panels of a row share: all their values with their intervals, and the lines to compare with."""
    points = [point for one in series for point in one["points"] if point[measure]]
    ends = [point[measure][end] for point in points for end in ("low", "value", "high")]
    ends = [end for end in ends if end is not None]
    if measure in ("throughput", "speedup"):
        ideal = [
            one["points"][0][measure]["value"] * point["world_size"] / one["points"][0]["world_size"]
            for one in series
            if one["points"][0][measure]
            for point in one["points"]
        ]
        return padded([*ends, *ideal])
    low, high = min([0.0, *ends]), max([1.0 if measure == "efficiency" else 0.1, *ends])
    return low - 0.04 * (high - low) * (low < 0), high + 0.08 * (high - low)


def _errors(estimates: Sequence[Json]) -> np.ndarray | None:
    """Lengths down and up of the intervals, shape (2, points); nothing where no interval has an end."""
    down = [0.0 if one["low"] is None else max(0.0, one["value"] - one["low"]) for one in estimates]
    up = [0.0 if one["high"] is None else max(0.0, one["high"] - one["value"]) for one in estimates]
    return np.array([down, up]) if any(down) or any(up) else None


def draw_estimates(
    axes: Axes, sizes: Sequence[float], estimates: Sequence[Json], look: Look, aside: float, line: bool = True
) -> None:
    """Markers with intervals, `aside` (a factor) from their place so that equal values can be told apart."""
    axes.errorbar(
        [size * aside for size in sizes],
        [one["value"] for one in estimates],
        yerr=_errors(estimates),
        color=look.colour,
        marker=look.marker,
        linestyle=look.dashes if line else "none",
        linewidth=look.width,
        markersize=4.5,
        elinewidth=1,
        capsize=2,
        label=look.label,
    )


def asides(number: int, octaves: float = 0.07) -> list[float]:
    """Factors around 1, so many octaves from one to the next."""
    return [2 ** (octaves * (index - (number - 1) / 2)) for index in range(number)]


def rank_axis(axes: Axes, sizes: Iterable[int]) -> None:
    """The axis of world sizes: each has its tick."""
    ticks = sorted(set(sizes))
    axes.set_xscale("log")  # the base is the ticks' business
    log2_axis(axes.xaxis, ticks)
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    axes.set_xlabel("ranks")


def log2_axis(axis: Axis, ticks: Sequence[float]) -> None:
    """Ticks where something was measured, as far as their labels have room."""
    from matplotlib.ticker import FixedLocator, NullLocator

    kept: list[float] = []
    for tick in ticks:
        if not kept or tick / kept[-1] >= (ticks[-1] / ticks[0]) ** (1 / 9):
            kept.append(tick)
    axis.set_major_locator(FixedLocator(kept))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def log_axis(axes: Axes, unit: str) -> None:
    """A logarithmic y axis with at least two labelled ticks, in units of µs, ms, k, M as they come."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    digits = (
        (1, 2, 3, 4, 5, 6, 7, 8) if decades < 0.5 else (1, 2, 5) if decades < 1.8 else (1, 3) if decades < 2.6 else (1,)
    )
    axes.yaxis.set_major_locator(LogLocator(subs=digits, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter(unit=unit))


def draw_measure(
    series: Sequence[Json], measure: str, looks: Mapping[str, Look], limits: tuple[float, float], axes: Axes
) -> None:
    """Throughput, speedup, efficiency or Karp–Flatt of each series, with the line of ideal scaling."""
    sizes = sorted({point["world_size"] for one in series for point in one["points"]})
    for one, aside in zip(series, asides(len(series)), strict=True):
        rows = [point for point in one["points"] if point[measure]]
        ranks = [row["world_size"] for row in rows]
        if rows:
            draw_estimates(axes, ranks, [row[measure] for row in rows], looks[combination_of(one)], aside)
        if measure in ("throughput", "speedup") and rows:
            first = rows[0][measure]["value"] / ranks[0]
            axes.plot(sizes, [first * size for size in sizes], color=GREY, linestyle="--", linewidth=1, zorder=1)
    rank_axis(axes, sizes)
    axes.set_ylim(*limits)
    if measure == "throughput":
        log_axis(axes, "")
        axes.set_ylabel("throughput (samples/s)")
    elif measure == "speedup":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(power_of_two)
        axes.set_ylabel("speedup over p0")
    elif measure == "efficiency":
        axes.axhline(1, color=GREY, linestyle="--", linewidth=1, zorder=1)
        axes.axhline(0.8, color=GREY, linestyle=":", linewidth=1.5, zorder=1)
        axes.yaxis.set_major_formatter(percent)
        axes.set_ylabel("efficiency")
    else:
        axes.axhline(0, color=GREY, linestyle="--", linewidth=1, zorder=1)
        axes.set_ylabel("Karp–Flatt serial fraction")


def _bytes_tick(value: float, _position: float | None = None) -> str:
    return bytes_text(value)


def percent(value: float, _position: float | None = None) -> str:
    """A fraction as percent, for a tick."""
    return f"{100 * value:.3g} %"


def power_of_two(value: float, _position: float | None = None) -> str:
    """A power of two as 4 or as 1/4, for a tick."""
    return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"


@dataclass(frozen=True)
class Bar:
    """A step: its parts as shares of its time, in seconds, and the share that `over` marks at its end."""

    name: str
    step_time_s: float
    shards: tuple[tuple[Look, float], ...]
    over: tuple[Look, float]


def draw_bars(bars: Sequence[Bar], axes: Axes) -> None:
    """One bar for each step, with its time at the right."""
    for height, bar in enumerate(bars):
        left = 0.0
        for look, shard in bar.shards:
            if shard > 0:
                axes.barh(height, shard, left=left, height=0.74, facecolor=look.colour, hatch=look.hatch, linewidth=0)
            left += shard
        look, shard = bar.over
        if shard > 0:
            axes.barh(height, -shard, left=left, height=0.74, facecolor="none", hatch=look.hatch, linewidth=0)
        time = in_unit([bar.step_time_s], "s")
        axes.text(1.015, height, time, transform=axes.get_yaxis_transform(), va="center", fontsize=7.5)
    axes.set_yticks(range(len(bars)), [printable(bar.name) for bar in bars], fontsize=7.5)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, max(1.0, *(sum(shard for _, shard in bar.shards) for bar in bars)))
    axes.xaxis.set_major_formatter(percent)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of the step time (at the right)")


def draw_fits(series: Sequence[Json], looks: Mapping[str, Look], axes: Axes) -> None:
    """Measured step times, and the curve of the best model of each series: solid where measured, dashed beyond."""
    sizes: set[int] = set()
    most = 0
    for one, aside in zip(series, asides(len(series)), strict=True):
        look, fit = looks[combination_of(one)], best_model(one)
        assert fit
        measured = [point["world_size"] for point in one["points"]]
        draw_estimates(axes, measured, [point["step_time_s"] for point in one["points"]], look, aside, line=False)
        within = [(at["world_size"], at["step_time_s"]) for at in fit["curve"] if not at["extrapolated"]]
        beyond = within[-1:] + [(at["world_size"], at["step_time_s"]) for at in fit["curve"] if at["extrapolated"]]
        for part, dashes in ((within, "-"), (beyond, "--")):
            if len(part) > 1:
                ranks, times = zip(*part, strict=True)
                axes.plot([rank * aside for rank in ranks], times, color=look.colour, linestyle=dashes, linewidth=1.2)
        sizes |= {at["world_size"] for at in fit["curve"]} | set(measured)
        most = max(most, *measured)
    # only powers of two and what was measured are worth a tick; the curve may be finer
    whole = [size for size in sizes if float(math.log2(size)).is_integer()]
    rank_axis(axes, [*whole, min(sizes), max(sizes)])
    if max(sizes) > most:
        axes.axvspan(most * 1.12, axes.get_xlim()[1], color=GREY, alpha=0.18, linewidth=0)
    axes.autoscale(axis="y")
    log_axis(axes, "s")
    axes.set_ylabel("step time")


def draw_times(part: Sequence[Json], looks: Mapping[str, Look], limits: tuple[float, float], axes: Axes) -> None:
    """Time of an all-reduce over the message's size, with the fitted α + β m."""
    sizes = sorted({size["message_bytes"] for one in part for size in one["sizes"]})
    for one, aside in zip(part, asides(len(part)), strict=True):
        look = looks[one["way"]]
        placements = [size["message_bytes"] for size in one["sizes"]]
        draw_estimates(axes, placements, [size["time_s"] for size in one["sizes"]], look, aside, line=False)
        line = fitted_line(one["fit"])
        if line:
            at = np.geomspace(placements[0], placements[-1], 40)
            axes.plot(at, line[0] + line[1] * at, color=look.colour, linestyle=look.dashes, linewidth=1.2)
    axes.set_xscale("log")  # the base is the ticks' business
    log2_axis(axes.xaxis, sizes)
    kept = axes.get_xticks()
    axes.set_xticks(kept[:: max(1, math.ceil(len(kept) / 4))])
    axes.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
    axes.xaxis.set_major_formatter(_bytes_tick)
    axes.set_ylim(*limits)
    log_axis(axes, "s")
    axes.set(xlabel="message size", ylabel="time of an all-reduce")


def fitted_line(fit: Json | None) -> tuple[float, float] | None:
    """α in seconds and β in seconds a byte, where the points determine them."""
    if not fit or not fit["identifiable"]:
        return None
    found = {parameter["symbol"]: parameter["value"] for parameter in fit["parameters"]}
    return (found["α"], found["β"]) if {"α", "β"} <= set(found) else None
