"""What is drawn on one pair of axes of a scaling report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchreg.figures.quantities import bytes_text, in_unit
from torchreg.figures.style import BLACK, GREY

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


def drawable(text: str) -> str:
    """Text without what XML or a font cannot hold."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


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


def _draw_estimates(
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


def _asides(number: int, octaves: float = 0.07) -> list[float]:
    """Factors around 1, so many octaves from one to the next."""
    return [2 ** (octaves * (index - (number - 1) / 2)) for index in range(number)]


def _rank_axis(axes: Axes, sizes: Iterable[int]) -> None:
    ticks = sorted(set(sizes))
    axes.set_xscale("log")  # the base is the ticks' business
    _log2_axis(axes.xaxis, ticks)
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    axes.set_xlabel("ranks")


def _log2_axis(axis: Axis, ticks: Sequence[float]) -> None:
    """Ticks where something was measured, as far as their labels have room."""
    from matplotlib.ticker import FixedLocator, NullLocator

    kept: list[float] = []
    for tick in ticks:
        if not kept or tick / kept[-1] >= (ticks[-1] / ticks[0]) ** (1 / 9):
            kept.append(tick)
    axis.set_major_locator(FixedLocator(kept))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _log_axis(axes: Axes, unit: str) -> None:
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
    for one, aside in zip(series, _asides(len(series)), strict=True):
        rows = [point for point in one["points"] if point[measure]]
        ranks = [row["world_size"] for row in rows]
        if rows:
            _draw_estimates(axes, ranks, [row[measure] for row in rows], looks[combination_of(one)], aside)
        if measure in ("throughput", "speedup") and rows:
            first = rows[0][measure]["value"] / ranks[0]
            axes.plot(sizes, [first * size for size in sizes], color=GREY, linestyle="--", linewidth=1, zorder=1)
    _rank_axis(axes, sizes)
    axes.set_ylim(*limits)
    if measure == "throughput":
        _log_axis(axes, "")
        axes.set_ylabel("throughput (samples/s)")
    elif measure == "speedup":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:.2g}")
        axes.set_ylabel("speedup over p0")
    elif measure == "efficiency":
        axes.axhline(1, color=GREY, linestyle="--", linewidth=1, zorder=1)
        axes.axhline(0.8, color=GREY, linestyle=":", linewidth=1.5, zorder=1)
        axes.yaxis.set_major_formatter(_percent)
        axes.set_ylabel("efficiency")
    else:
        axes.axhline(0, color=GREY, linestyle="--", linewidth=1, zorder=1)
        axes.set_ylabel("Karp–Flatt serial fraction")


def _bytes_tick(value: float, _position: float | None = None) -> str:
    return bytes_text(value)


def _percent(value: float, _position: float | None = None) -> str:
    return f"{100 * value:.3g} %"


@dataclass(frozen=True)
class Bar:
    """A step: its parts as shares of its time, in seconds, and the share that `over` marks at its end."""

    name: str
    step_time_s: float
    shares: tuple[tuple[Look, float], ...]
    over: tuple[Look, float]


def draw_bars(bars: Sequence[Bar], axes: Axes) -> None:
    """One bar for each step, with its time at the right."""
    for height, bar in enumerate(bars):
        left = 0.0
        for look, share in bar.shares:
            if share > 0:
                axes.barh(height, share, left=left, height=0.74, facecolor=look.colour, hatch=look.hatch, linewidth=0)
            left += share
        look, share = bar.over
        if share > 0:
            axes.barh(height, -share, left=left, height=0.74, facecolor="none", hatch=look.hatch, linewidth=0)
        time = in_unit([bar.step_time_s], "s")
        axes.text(1.015, height, time, transform=axes.get_yaxis_transform(), va="center", fontsize=7.5)
    axes.set_yticks(range(len(bars)), [drawable(bar.name) for bar in bars], fontsize=7.5)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, max(1.0, *(sum(share for _, share in bar.shares) for bar in bars)))
    axes.xaxis.set_major_formatter(_percent)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of the step time (at the right)")


def draw_fits(series: Sequence[Json], looks: Mapping[str, Look], axes: Axes) -> None:
    """Measured step times, and the curve of the best model of each series: solid where measured, dashed beyond."""
    sizes: set[int] = set()
    most = 0
    for one, aside in zip(series, _asides(len(series)), strict=True):
        look, fit = looks[combination_of(one)], best_model(one)
        assert fit
        measured = [point["world_size"] for point in one["points"]]
        _draw_estimates(axes, measured, [point["step_time_s"] for point in one["points"]], look, aside, line=False)
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
    _rank_axis(axes, [*whole, min(sizes), max(sizes)])
    if max(sizes) > most:
        axes.axvspan(most * 1.12, axes.get_xlim()[1], color=GREY, alpha=0.18, linewidth=0)
    axes.autoscale(axis="y")
    _log_axis(axes, "s")
    axes.set_ylabel("step time")


def draw_times(part: Sequence[Json], looks: Mapping[str, Look], limits: tuple[float, float], axes: Axes) -> None:
    """Time of an all-reduce over the message's size, with the fitted α + β m."""
    sizes = sorted({size["message_bytes"] for one in part for size in one["sizes"]})
    for one, aside in zip(part, _asides(len(part)), strict=True):
        look = looks[one["way"]]
        places = [size["message_bytes"] for size in one["sizes"]]
        _draw_estimates(axes, places, [size["time_s"] for size in one["sizes"]], look, aside, line=False)
        line = fitted_line(one["fit"])
        if line:
            at = np.geomspace(places[0], places[-1], 40)
            axes.plot(at, line[0] + line[1] * at, color=look.colour, linestyle=look.dashes, linewidth=1.2)
    axes.set_xscale("log")  # the base is the ticks' business
    _log2_axis(axes.xaxis, sizes)
    kept = axes.get_xticks()
    axes.set_xticks(kept[:: max(1, math.ceil(len(kept) / 4))])
    axes.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
    axes.xaxis.set_major_formatter(_bytes_tick)
    axes.set_ylim(*limits)
    _log_axis(axes, "s")
    axes.set(xlabel="message size", ylabel="time of an all-reduce")


def fitted_line(fit: Json | None) -> tuple[float, float] | None:
    """α in seconds and β in seconds a byte, where the points determine them."""
    if not fit or not fit["identifiable"]:
        return None
    found = {parameter["symbol"]: parameter["value"] for parameter in fit["parameters"]}
    return (found["α"], found["β"]) if {"α", "β"} <= set(found) else None


def unstable_from(places: Sequence[float], limits: Sequence[float]) -> float | None:
    """Where along increasing `places` the stability limit falls to 1, by a power law between neighbours.

    None where it does not. The limit is the factor by which the rates may still grow: below 1 training diverges.
    """
    pairs = sorted(zip(places, limits, strict=True))
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
    _log2_axis(axes.xaxis, sizes)
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
    for name, aside in zip(names, _asides(len(names), 0.13), strict=True):
        mine = [row for one, target in pairs if combination_of(one) == name for row in target["rows"]]
        measured = [row for row in mine if row["measured_steps"]]
        batches = [row["global_batch_size"] for row in measured]
        if measured:
            _draw_estimates(axes, batches, [row["measured_steps"] for row in measured], looks[name], aside, line=False)
    if axes.lines:
        _log_axis(axes, "")
    else:
        _say_never(axes)
    _batch_axis(axes, rows)
    axes.set_ylabel(f"steps to {_percent(pairs[0][1]['target_excess'])} above the best")


def draw_nearness(rows: Sequence[Json], axes: Axes) -> None:
    """The rates as a multiple of the stability limit, by global batch."""
    limits = _limits_by_batch(rows)
    axes.plot(list(limits), [1 / limit for limit in limits.values()], color=BLACK, marker=".", linewidth=1)
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), max(high, 2))  # so that the limit is in the picture
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.yaxis.set_major_formatter("{x:.2g}")
    _batch_axis(axes, rows)
    axes.set_ylabel("rates over the stability limit")


def draw_time_to(pairs: Sequence[tuple[Json, Json]], looks: Mapping[str, Look], axes: Axes) -> None:
    """Time to the target over ranks: predicted as lines, measured as markers."""
    for (one, target), aside in zip(pairs, _asides(len(pairs)), strict=True):
        look = looks[combination_of(one)]
        predicted = [row for row in target["rows"] if row["predicted_time_s"]]
        if predicted:
            ranks = [row["world_size"] * aside for row in predicted]
            times = [row["predicted_time_s"]["value"] for row in predicted]
            axes.plot(ranks, times, color=look.colour, linestyle=look.dashes, linewidth=1)
        rows = [row for row in target["rows"] if row["measured_time_s"]]
        if rows:
            ranks = [row["world_size"] for row in rows]
            _draw_estimates(axes, ranks, [row["measured_time_s"] for row in rows], look, aside, line=False)
    _finish_target(axes, pairs, "s", "time to the target")


def draw_node_hours(pairs: Sequence[tuple[Json, Json]], looks: Mapping[str, Look], axes: Axes) -> None:
    """Node-hours to the target over ranks."""
    for (one, target), aside in zip(pairs, _asides(len(pairs)), strict=True):
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
        _log_axis(axes, unit)
        if not unit:
            axes.yaxis.set_major_formatter("{x:g}")  # thousandths of a node-hour have no name
    else:
        _say_never(axes)
    _rank_axis(axes, [row["world_size"] for row in rows])
    lowest: dict[float, float] = {}
    for row in rows:
        lowest[row["world_size"]] = min(row["stability_limit"], lowest.get(row["world_size"], math.inf))
    _shade_unstable(axes, unstable_from(list(lowest), list(lowest.values())))
    axes.set_ylabel(name)


def _say_never(axes: Axes) -> None:
    axes.text(0.5, 0.5, "never reached", transform=axes.transAxes, ha="center")
    axes.set_yticks([])
