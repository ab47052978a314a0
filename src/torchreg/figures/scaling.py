"""The pictures of a scaling report: small multiples, one panel for each message size, one line for each combination.

A report may hold dozens of series. Those that share a scope and a kind (strong, weak) share a picture; each optimizer
with its sync keeps its colour, marker and dashes in all of them, and each size of the batch and of the message has its
own panels. A page shows the panels one by one (they must be readable on a phone); a file holds them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from torchreg.figures.quantities import bytes_text, count, in_unit
from torchreg.figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Json = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """How a line or an area is drawn and what the legend calls it; an area has neither marker nor dashes."""

    label: str
    colour: str
    marker: str = ""
    dashes: str = ""
    hatch: str = ""
    width: float = 1.5

    @property
    def is_area(self) -> bool:
        """Drawn as an area rather than as a line."""
        return not (self.marker or self.dashes)


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `says` is for those who cannot see it; `height` in inches."""

    title: str
    says: str
    draw: Callable[[Axes], None]
    height: float = 2.4
    margin: float = 0.68


@dataclass(frozen=True)
class Picture:
    """Panels with one legend and one caption; `name` is that of its files."""

    name: str
    title: str
    caption: str
    legend: tuple[Look, ...]
    panels: tuple[Panel, ...]
    columns: int


_LOOKS = {
    "hand/allreduce": (BLUE, "o", "-"),
    "hand/mpi": (GREEN, "s", "--"),
    "sgd/ddp": (ORANGE, "^", "-."),
    "sgd/mpi": (BLACK, "D", ":"),
}
_MORE_LOOKS = ((SKY, "v", "-"), (GREY, "P", "--"), (SKY, "X", ":"), (GREY, "*", "-."))
_WAYS = {"gloo": (ORANGE, "^", "-."), "nccl": (BLUE, "o", "-"), "xccl": (BLUE, "o", "-"), "MPI": (GREEN, "s", "--")}

_IDEAL = Look("ideal, from the baseline", GREY, dashes="--", width=1)
_EFFICIENT = Look("80 %", GREY, dashes=":", width=1.5)
_UNSTABLE = Look("training diverges", GREY)
_EXTRAPOLATED = Look("extrapolated: beyond what was measured", GREY, dashes="--")
_FIT = Look("model, where measured", GREY, dashes="-")
_PREDICTED = Look("predicted", BLACK, dashes="-", width=1)
_PREDICTED_HERE = Look("line: predicted; marker: measured", GREY, dashes="-", width=1)
_PARTS = (
    Look("taking rows", SKY),
    Look("compute", BLUE),
    Look("exposed communication", ORANGE, hatch="//"),
    Look("waiting for the slowest rank", GREY, hatch="\\\\"),
)
_NOT_TOLD_APART = Look("compute and communication, not told apart", GREEN, hatch="xx")


def scopes_of(series: Iterable[Json]) -> list[str]:
    """The scopes in their order: within a node first."""
    return sorted(dict.fromkeys(one["scope"] for one in series), key=lambda scope: scope != "within a node")


def combination_of(thing: Mapping[str, Any]) -> str:
    """Optimizer and sync in one word."""
    return f"{thing['optimizer']}/{thing['sync']}"


def draw_scaling(group: Json, number: int, kind: str, scope: str) -> Picture | None:
    """Throughput, efficiency and, in strong scaling, speedup and Karp–Flatt over world sizes."""
    series = [one for one in group["series"] if one["kind"] == kind and one["scope"] == scope and one["points"]]
    if not series:
        return None
    looks = _combination_looks(group)
    measures = ["throughput", "speedup", "efficiency", "karp_flatt"] if kind == "strong" else ["throughput", "efficiency"]
    if not any(point["karp_flatt"] for one in series for point in one["points"]):
        measures = [measure for measure in measures if measure != "karp_flatt"]
    columns = _by_panel(series)
    panels = [
        Panel(
            title,
            f"{_MEASURES[measure]} over ranks, {title}, {scope}: {_last_values(part, measure)}",
            partial(_draw_measure, part, measure, looks, _limits(series, measure)),
        )
        for measure in measures
        for title, part in columns.items()
    ]
    keeps = "the global batch stays, so ideal is p/p0 times as fast" if kind == "strong" else (
        "the batch of each rank stays, so ideal is the same time for p/p0 times the rows"
    )  # fmt: skip
    baselines = " and ".join(f"p0 = {size}" for size in sorted({one["baseline_world_size"] for one in series}))
    extra = "; Karp–Flatt is the serial fraction that would explain the speedup, ideally constant and small" if (
        "karp_flatt" in measures
    ) else ""  # fmt: skip
    return Picture(
        f"figure-{number}-{kind}-{slug(scope)}",
        f"{kind.capitalize()} scaling, {scope}",
        f"{kind.capitalize()} scaling {scope} ({keeps}), baseline {baselines}: medians over launches with their 95 % "
        f"intervals, markers set apart sideways where they would hide each other{extra}. "
        f"Source: series and points of group {number} in report.json, points.csv.",
        (*(looks[name] for name in _combinations(series)), _IDEAL, _EFFICIENT),
        tuple(panels),
        len(columns),
    )


def draw_breakdown(group: Json, number: int, kind: str, scope: str) -> Picture | None:
    """Where a step's time goes, as shares of it."""
    points = {point["id"]: point for point in group["points"]}
    series = [one for one in group["series"] if one["kind"] == kind and one["scope"] == scope and one["points"]]
    if not series:
        return None
    columns = _by_panel(series)
    used, panels = set(), []
    for title, part in columns.items():
        bars = []
        for one in part:
            for row in one["points"]:
                shares = _shares(points[row["point"]])
                used |= {look for look, share in shares if share > 0}
                bars.append((f"{combination_of(one)}  {row['world_size']}", shares, row["step_time_s"]["value"]))
        says = "; ".join(
            f"{name.replace('  ', ' on ')}: "
            + ", ".join(f"{look.label} {in_unit([share], '%')}" for look, share in shares if share > 0)
            for name, shares, _ in bars
        )
        panels.append(
            Panel(title, f"shares of the step, {title}, {scope}: {says}", partial(_draw_bars, bars),
                  0.8 + 0.19 * len(bars), 1.22)
        )  # fmt: skip
    return Picture(
        f"figure-{number}-breakdown-{kind}-{slug(scope)}",
        f"Where a step's time goes, {kind} scaling {scope}",
        f"Where a step's time goes, {kind} scaling {scope}: one bar for each combination and number of ranks, as shares "
        "of the median step time that stands at its right. Exposed communication is the step minus the same step "
        "without averaging; waiting is the slowest rank's time minus the median rank's. Shares are medians taken one by "
        f"one, so they need not add up to 100 %. Source: points of group {number} in report.json, points.csv.",
        tuple(look for look in (*_PARTS, _NOT_TOLD_APART) if look in used),
        tuple(panels),
        len(columns),
    )


def draw_models(group: Json, number: int, kind: str, scope: str) -> Picture | None:
    """Measured step times under the model that predicts left-out world sizes best, carried on dashed."""
    series = [one for one in group["series"] if one["kind"] == kind and one["scope"] == scope and best_model(one)]
    if not series:
        return None
    looks = _combination_looks(group)
    columns = _by_panel(series)
    panels = [
        Panel(
            title,
            f"step time over ranks, {title}, {scope}: "
            + "; ".join(f"{combination_of(one)} under {(best_model(one) or {})['model']}" for one in part),
            partial(_draw_fits, part, looks),
        )
        for title, part in columns.items()
    ]
    return Picture(
        f"figure-{number}-models-{kind}-{slug(scope)}",
        f"Models of the step time, {kind} scaling {scope}",
        f"Models of the step time, {kind} scaling {scope}: measured medians with 95 % intervals, and of each series the "
        "identifiable model that predicts left-out world sizes best (the table tells which). In the shaded part nothing "
        f"was measured: there the lines are extrapolated. Source: models of group {number} in report.json.",
        (*(looks[name] for name in _combinations(series)), _FIT, _EXTRAPOLATED),
        tuple(panels),
        len(columns),
    )


def draw_allreduce(group: Json, number: int) -> Picture | None:
    """Time of one all-reduce over the message size, with α + β m."""
    measured = [one for one in group["allreduce"] if one["sizes"]]
    if not measured:
        return None
    more = iter(_MORE_LOOKS)
    looks = {}
    for way in dict.fromkeys(one["way"] for one in measured):
        looks[way] = Look(drawable(way), *(_WAYS.get(way) or next(more, _MORE_LOOKS[-1])))
    panels: dict[str, list[Json]] = {}
    for one in sorted(measured, key=lambda one: (one["num_nodes"] > 1, one["num_nodes"], one["world_size"])):
        panels.setdefault(place_text(one), []).append(one)
    limits = _padded([size["time_s"]["value"] for one in measured for size in one["sizes"]])
    return Picture(
        f"figure-{number}-allreduce",
        "All-reduce",
        "Time of one all-reduce: medians over launches with 95 % intervals, both axes logarithmic. The lines are the fits "
        "T(m) = α + β m; a way without a line has no identifiable fit. "
        f"Source: allreduce of group {number} in report.json, allreduce.csv.",
        tuple(looks.values()),
        tuple(
            Panel(
                title,
                f"time of an all-reduce over message size, {title}: "
                + "; ".join(
                    f"{one['way']} from {in_unit([one['sizes'][0]['time_s']['value']], 's')} at "
                    f"{bytes_text(one['sizes'][0]['message_bytes'])} to "
                    f"{in_unit([one['sizes'][-1]['time_s']['value']], 's')} at "
                    f"{bytes_text(one['sizes'][-1]['message_bytes'])}"
                    for one in part
                ),
                partial(_draw_allreduce, part, looks, limits),
            )
            for title, part in panels.items()
        ),
        min(3, len(panels)),
    )


def draw_steps(group: Json, number: int) -> Picture | None:
    """Statistical efficiency: steps to the target by global batch, and how near the rates are to the limit."""
    by_features = _targets_by_features(group)
    if not by_features:
        return None
    looks = _combination_looks(group)
    panels, named = [], []
    for features, pairs in by_features.items():
        name = _features(features)
        named += [combination_of(one) for one, _ in pairs]
        rows = [row for _, target in pairs for row in target["rows"]]
        told = "; ".join(
            f"{count(batch)} rows {'never' if steps is None else count(steps)}"
            for batch, steps in sorted({row["global_batch_size"]: row["predicted_steps"] for row in rows}.items())
        )
        nearness = "; ".join(
            f"{count(batch)} rows {limit:.3g}"
            for batch, limit in sorted({row["global_batch_size"]: 1 / row["stability_limit"] for row in rows}.items())
        )
        panels += [
            Panel(name, f"predicted steps to the target, {name}: {told}", partial(_draw_steps, pairs, looks)),
            Panel(name, f"rates over the stability limit, {name}: {nearness}", partial(_draw_limit, rows)),
        ]
    return Picture(
        f"figure-{number}-steps",
        "Statistical efficiency: steps to the target",
        "Statistical efficiency: steps to the target by global batch, predicted by theory (line) and measured (markers, "
        "medians with 95 % intervals), and the learning rates as a multiple of the stability limit. Where it is above 1, "
        f"shaded, training diverges and the target is never reached. Source: targets of group {number} in report.json.",
        (*(looks[name] for name in dict.fromkeys(named)), _PREDICTED, _UNSTABLE),
        tuple(panels),
        2,
    )


def draw_targets(group: Json, number: int, scope: str) -> Picture | None:
    """Statistical × hardware efficiency: time to the target and its node-hours by world size."""
    looks = _combination_looks(group)
    parts: dict[str, list[tuple[Json, Json]]] = {}
    for pairs in _targets_by_features(group).values():
        for one, target in pairs:
            if one["scope"] == scope:
                parts.setdefault(f"{one['kind']}, {_panel_title(one)}", []).append((one, target))
    if not parts:
        return None
    panels = []
    for title, pairs in parts.items():
        told = "; ".join(
            f"{combination_of(one)} "
            + ", ".join(
                f"{in_unit([_value(row['predicted_time_s']) or 0], 's')} on {row['world_size']}"
                for row in target["rows"]
                if row["predicted_time_s"]
            )
            for one, target in pairs
        )
        panels += [
            Panel(title, f"time to the target, {title}, {scope}: {told}", partial(_draw_time_to, pairs, looks), margin=0.74),
            Panel(title, f"node-hours to the target, {title}, {scope}", partial(_draw_node_hours, pairs, looks), margin=0.74),
        ]  # fmt: skip
    return Picture(
        f"figure-{number}-targets-{slug(scope)}",
        f"Time and node-hours to the target, {scope}",
        f"Statistical × hardware efficiency {scope}: steps to the target times step time is the time to the target; times "
        "the nodes held, its node-hours (a partly used node counts whole). Lines: predicted steps × measured step time; "
        "markers: measured, with 95 % intervals. Shaded world sizes are beyond the stability limit. "
        f"Source: targets of group {number} in report.json.",
        (*(looks[combination_of(one)] for one in _first_of_each(pair for pairs in parts.values() for pair in pairs)),
         _PREDICTED_HERE, _UNSTABLE),
        tuple(panels),
        2,
    )  # fmt: skip


def best_model(series: Json) -> Json | None:
    """The identifiable model with the smallest held-out error, which is the one that is drawn."""
    fits = [fit for fit in series["models"] if fit["identifiable"] and fit["curve"]]
    return min(fits, key=lambda fit: math.inf if fit["held_out_error"] is None else fit["held_out_error"], default=None)


def place_text(thing: Mapping[str, Any]) -> str:
    """Ranks and nodes in words."""
    ranks, nodes = thing["world_size"], thing["num_nodes"]
    return f"{ranks} rank{'s' * (ranks > 1)} on {nodes} node{'s' * (nodes > 1)}"


def drawable(text: str) -> str:
    """Text without what XML or a font cannot hold."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def slug(text: str) -> str:
    """Letters, digits and dashes, for the name of a file or an anchor."""
    return "-".join("".join(letter if letter.isascii() and letter.isalnum() else " " for letter in text.lower()).split())


def _features(num_features: int) -> str:
    return f"{num_features} feature{'s' * (num_features > 1)}"


def _panel_title(one: Json) -> str:
    batch = one["global_batch_size"] if one["kind"] == "strong" else one["local_batch_size"]
    rows = f"{count(batch)} rows{' a rank' * (one['kind'] == 'weak')}"
    return f"{bytes_text(one['message_bytes'])}, {rows}"


def _by_panel(series: Sequence[Json]) -> dict[str, list[Json]]:
    panels: dict[str, list[Json]] = {}
    ordered = sorted(
        series, key=lambda one: (one["message_bytes"], one["global_batch_size"] or one["local_batch_size"])
    )
    for one in ordered:
        panels.setdefault(_panel_title(one), []).append(one)
    return panels


def _combinations(series: Iterable[Json]) -> list[str]:
    return list(dict.fromkeys(combination_of(one) for one in series))


def _combination_looks(group: Json) -> dict[str, Look]:
    more = iter(_MORE_LOOKS)
    return {
        name: Look(drawable(name), *(_LOOKS.get(name) or next(more, _MORE_LOOKS[-1])))
        for name in _combinations(group["series"])
    }


def _targets_by_features(group: Json) -> dict[int, list[tuple[Json, Json]]]:
    series = {one["id"]: one for one in group["series"]}
    found: dict[int, list[tuple[Json, Json]]] = {}
    for target in group["targets"]:
        one = series[target["series"]]
        if target["rows"]:
            found.setdefault(one["num_features"], []).append((one, target))
    return dict(sorted(found.items()))


def _first_of_each(pairs: Iterable[tuple[Json, Json]]) -> list[Json]:
    return list({combination_of(one): one for one, _ in pairs}.values())


def _value(estimate: Json | None) -> float | None:
    return None if estimate is None else estimate["value"]


_MEASURES = {"throughput": "throughput", "speedup": "speedup", "efficiency": "efficiency", "karp_flatt": "Karp–Flatt"}


def _last_values(series: Sequence[Json], measure: str) -> str:
    told = []
    for one in series:
        last = one["points"][-1]
        if last[measure]:
            unit = {"efficiency": "%", "throughput": "samples/s"}.get(measure, "")
            told.append(f"{combination_of(one)} {in_unit([last[measure]['value']], unit)} at {last['world_size']}")
    return "; ".join(told) or "nothing to show"


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis around positive values."""
    low, high = min(values), max(values)
    room = max(1.1, (high / low) ** 0.06)
    return low / room, high * room


def _limits(series: Sequence[Json], measure: str) -> tuple[float, float]:
    """What the panels of a row share: all their values with their intervals, and the lines to compare with."""
    points = [point for one in series for point in one["points"] if point[measure]]
    ends = [end for point in points for end in point[measure].values() if end is not None and end != point[measure]["num_launches"]]
    ends += [point[measure]["value"] for point in points]
    if measure == "throughput":
        return _padded(ends)
    if measure == "speedup":
        return _padded([*ends, *(point["world_size"] / one["baseline_world_size"] for one in series for point in one["points"])])
    low, high = min([0.0, *ends]), max([1.0 if measure == "efficiency" else 0.1, *ends])
    return low - 0.04 * (high - low) * (low < 0), high + 0.08 * (high - low)


def _errors(estimates: Sequence[Json]) -> np.ndarray | None:
    """Lengths down and up of the intervals, shape (2, points); nothing where there is no interval."""
    lengths = [
        (0.0, 0.0) if one["low"] is None else (max(0.0, one["value"] - one["low"]), max(0.0, one["high"] - one["value"]))
        for one in estimates
    ]
    return np.array(lengths).T if any(map(any, lengths)) else None


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


def _asides(number: int) -> list[float]:
    """Factors around 1, close together: an octave is a factor of 2."""
    return [2 ** (0.07 * (index - (number - 1) / 2)) for index in range(number)]


def _rank_axis(axes: Axes, sizes: Iterable[int]) -> None:
    ticks = sorted(set(sizes))
    _log2_axis(axes.xaxis, ticks)
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    axes.set_xlabel("ranks")


def _log2_axis(axis: Axis, ticks: Sequence[float]) -> None:
    """Ticks where something was measured, as far as their labels have room."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})  # the base is the ticks' business
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
    digits = (1, 2, 3, 4, 5, 6, 7, 8) if decades < 0.5 else (1, 2, 5) if decades < 1.8 else (1, 3) if decades < 2.6 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=digits, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter(unit=unit))


def _draw_measure(
    series: Sequence[Json], measure: str, looks: Mapping[str, Look], limits: tuple[float, float], axes: Axes
) -> None:
    sizes = sorted({point["world_size"] for one in series for point in one["points"]})
    for one, aside in zip(series, _asides(len(series)), strict=True):
        rows = [point for point in one["points"] if point[measure]]
        ranks = [row["world_size"] for row in rows]
        if rows:
            _draw_estimates(axes, ranks, [row[measure] for row in rows], looks[combination_of(one)], aside)
        if measure == "throughput" and rows and ranks[0] == one["baseline_world_size"]:
            first = rows[0][measure]["value"] / ranks[0]
            axes.plot(ranks, [first * rank for rank in ranks], color=GREY, linestyle="--", linewidth=1, zorder=1)
    _rank_axis(axes, sizes)
    axes.set_ylim(*limits)
    if measure == "throughput":
        _log_axis(axes, "")
        axes.set_ylabel("throughput (samples/s)")
    elif measure == "speedup":
        for baseline in {one["baseline_world_size"] for one in series}:
            axes.plot(sizes, [size / baseline for size in sizes], color=GREY, linestyle="--", linewidth=1, zorder=1)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel("speedup over p0")
    elif measure == "efficiency":
        axes.axhline(1, color=GREY, linestyle="--", linewidth=1, zorder=1)
        axes.axhline(0.8, color=GREY, linestyle=":", linewidth=1.5, zorder=1)
        axes.yaxis.set_major_formatter(_percent)
        axes.set_ylabel("efficiency")
    else:
        axes.axhline(0, color=GREY, linestyle="--", linewidth=1, zorder=1)
        axes.set_ylabel("Karp–Flatt serial fraction")


def _percent(value: float, _position: int | None = None) -> str:
    return f"{100 * value:.3g} %"


def _shares(point: Json) -> list[tuple[Look, float]]:
    """The parts of a step as fractions of it. Differences of noisy times below zero are noise: no part."""
    step = point["step_time_s"]["value"]
    parts = [_value(point[name]) for name in ("rows_time_s", "compute_time_s", "exposed_time_s", "imbalance_time_s")]
    shares = [(look, max(0.0, part or 0.0) / step) for look, part in zip(_PARTS, parts, strict=True)]
    if parts[1] is None:  # the step was not measured without averaging
        shares.insert(1, (_NOT_TOLD_APART, max(0.0, 1 - sum(share for _, share in shares))))
    return shares


def _draw_bars(bars: Sequence[tuple[str, list[tuple[Look, float]], float]], axes: Axes) -> None:
    for height, (_, shares, step) in enumerate(bars):
        left = 0.0
        for look, share in shares:
            if share > 0:
                axes.barh(height, share, left=left, height=0.74, facecolor=look.colour, hatch=look.hatch, linewidth=0)
            left += share
        axes.text(1.015, height, in_unit([step], "s"), transform=axes.get_yaxis_transform(), va="center", fontsize=7.5)
    axes.set_yticks(range(len(bars)), [drawable(name) for name, _, _ in bars], fontsize=7.5)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, max(1.0, *(sum(share for _, share in shares) for _, shares, _ in bars)))
    axes.xaxis.set_major_formatter(_percent)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of the step time (at the right)")


def _draw_fits(series: Sequence[Json], looks: Mapping[str, Look], axes: Axes) -> None:
    sizes, most = set(), 0
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
    _rank_axis(axes, whole + [min(sizes), max(sizes)])
    if max(sizes) > most:
        axes.axvspan(most * 1.12, axes.get_xlim()[1], color=GREY, alpha=0.18, linewidth=0)
    axes.autoscale(axis="y")
    _log_axis(axes, "s")
    axes.set_ylabel("step time")


def _draw_allreduce(part: Sequence[Json], looks: Mapping[str, Look], limits: tuple[float, float], axes: Axes) -> None:
    sizes = sorted({size["message_bytes"] for one in part for size in one["sizes"]})
    for one, aside in zip(part, _asides(len(part)), strict=True):
        look = looks[one["way"]]
        places = [size["message_bytes"] for size in one["sizes"]]
        _draw_estimates(axes, places, [size["time_s"] for size in one["sizes"]], look, aside, line=False)
        line = fitted_line(one["fit"])
        if line:
            at = np.geomspace(places[0], places[-1], 40)
            axes.plot(at, line[0] + line[1] * at, color=look.colour, linestyle=look.dashes, linewidth=1.2)
    _log2_axis(axes.xaxis, sizes)
    kept = axes.get_xticks()
    axes.set_xticks(kept[:: max(1, math.ceil(len(kept) / 4))])
    axes.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
    axes.xaxis.set_major_formatter(lambda value, _position=None: bytes_text(value))
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
    for (left, above), (right, below) in zip(pairs, pairs[1:], strict=False):
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


def _draw_steps(pairs: Sequence[tuple[Json, Json]], looks: Mapping[str, Look], axes: Axes) -> None:
    rows = [row for _, target in pairs for row in target["rows"]]
    names = list(dict.fromkeys(combination_of(one) for one, _ in pairs))
    predicted = {(row["global_batch_size"], row["predicted_steps"]) for row in rows if row["predicted_steps"]}
    if predicted:
        axes.plot(*zip(*sorted(predicted), strict=True), color=BLACK, linewidth=1)
    for name, aside in zip(names, _asides(len(names)), strict=True):
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


def _draw_limit(rows: Sequence[Json], axes: Axes) -> None:
    limits = _limits_by_batch(rows)
    axes.plot(list(limits), [1 / limit for limit in limits.values()], color=BLACK, marker=".", linewidth=1)
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), max(high, 2))  # so that the limit is in the picture
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.yaxis.set_major_formatter("{x:g}")
    _batch_axis(axes, rows)
    axes.set_ylabel("rates over the stability limit")


def _draw_time_to(pairs: Sequence[tuple[Json, Json]], looks: Mapping[str, Look], axes: Axes) -> None:
    for (one, target), aside in zip(pairs, _asides(len(pairs)), strict=True):
        look = looks[combination_of(one)]
        line = [(row["world_size"] * aside, row["predicted_time_s"]["value"]) for row in target["rows"] if row["predicted_time_s"]]
        if line:
            axes.plot(*zip(*line, strict=True), color=look.colour, linestyle=look.dashes, linewidth=1)
        rows = [row for row in target["rows"] if row["measured_time_s"]]
        if rows:
            _draw_estimates(
                axes, [row["world_size"] for row in rows], [row["measured_time_s"] for row in rows], look, aside, line=False
            )  # fmt: skip
    _finish_target(axes, pairs, "s", "time to the target")


def _draw_node_hours(pairs: Sequence[tuple[Json, Json]], looks: Mapping[str, Look], axes: Axes) -> None:
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
