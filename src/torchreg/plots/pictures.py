"""The pictures of a scaling report: panels with one legend, and what they share: styles, axes and markers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from torchreg.console import printable
from torchreg.plots.quantities import count, in_unit, nodes, ranks
from torchreg.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, SKY

Json: TypeAlias = dict[str, Any]
Panel: TypeAlias = tuple[str, Callable[[Axes], None]]  # a title, and a function that draws on axes

_STYLES: dict[str, tuple[str, str, str]] = {
    "manual/allreduce": (BLUE, "o", "-"),
    "manual/mpi": (GREEN, "s", "--"),
    "sgd/ddp": (ORANGE, "^", "-."),
    "sgd/mpi": (BLACK, "D", ":"),
}
_ALIKE = {"gloo": "sgd/ddp", "nccl": "manual/allreduce", "xccl": "manual/allreduce", "MPI": "manual/mpi"}
_MORE_STYLES = ((SKY, "v", "-"), (GREY, "P", "--"), (SKY, "X", ":"), (GREY, "*", "-."))


@dataclass(frozen=True)
class Style:
    """Of a line or an area, with its label. An area has neither marker nor dashes; a hatch replaces its fill."""

    label: str
    colour: str
    marker: str = ""
    dashes: Any = ""
    hatch: str = ""
    width: float = 1.5


@dataclass(frozen=True)
class Picture:
    """Panels with one legend and one caption; `name` is that of its files.

    `height` of the axes and the `margin` at their left are in inches.
    """

    name: str
    title: str
    caption: str
    legend: tuple[Style, ...]
    panels: tuple[Panel, ...]
    columns: int
    height: float = 2.4
    margin: float = 0.68


def styles_of(names: Iterable[str]) -> dict[str, Style]:
    """One style for each combination or backend; unknown ones have styles of their own."""
    more = iter(_MORE_STYLES)
    known = {name: _STYLES.get(_ALIKE.get(name, name)) for name in names}
    return {name: Style(printable(name), *(found or next(more, _MORE_STYLES[-1]))) for name, found in known.items()}


def combination_of(thing: Mapping[str, Any]) -> str:
    """Optimizer and sync, separated by a slash."""
    return f"{thing['optimizer']}/{thing['sync']}"


def legend_of(series: Iterable[Json], styles: Mapping[str, Style], *others: Style) -> tuple[Style, ...]:
    """The styles of the combinations of some series, then others."""
    return (*(styles[name] for name in dict.fromkeys(map(combination_of, series))), *others)


def by_title(titled: Iterable[tuple[str, Any]]) -> dict[str, list[Any]]:
    """Things by title, in the order of their first one."""
    found: dict[str, list[Any]] = {}
    for title, thing in titled:
        found.setdefault(title, []).append(thing)
    return found


def best_model(series: Json) -> Json | None:
    """The identifiable model with the smallest held-out error, which is the one that is drawn."""
    fits = [fit for fit in series["models"] if fit["identifiable"] and fit["curve"]]
    return min(fits, key=lambda fit: math.inf if fit["held_out_error"] is None else fit["held_out_error"], default=None)


def scopes_of(series: Iterable[Json]) -> list[str]:
    """The scopes of some series, within a node first."""
    return sorted(dict.fromkeys(one["scope"] for one in series), key=lambda scope: scope != "within a node")


def placement_text(thing: Mapping[str, Any]) -> str:
    """4 ranks on 2 nodes."""
    return f"{ranks(thing['world_size'])} on {nodes(thing['num_nodes'])}"


def batch_text(one: Json) -> str:
    """The batch size that a series keeps constant."""
    if one["kind"] == "strong":
        return f"{count(one['global_batch_size'])} samples"
    return f"{count(one['local_batch_size'])} samples per rank"


def slug(text: str) -> str:
    """ASCII letters, digits and dashes, for the name of a file or an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def draw_estimates(
    axes: Axes, points: Sequence[tuple[float, Json]], style: Style, offset: float, *, line: bool = True
) -> None:
    """Markers with intervals, where these have ends, at sizes times `offset` so that equal values stay visible."""
    ends = np.array([[one[end] for end in ("low", "value", "high")] for _, one in points], dtype=float)
    errors = np.nan_to_num(np.diff(ends, axis=1).T).clip(min=0)  # lengths down and up
    axes.errorbar(
        [size * offset for size, _ in points], ends[:, 1], yerr=errors if errors.any() else None, color=style.colour,
        marker=style.marker, linestyle=style.dashes if line else "none", linewidth=style.width, markersize=4.5,
        elinewidth=1, capsize=2, label=style.label,
    )  # fmt: skip


def offsets(number: int, octaves: float = 0.07) -> list[float]:
    """Factors around 1, with so many octaves from one to the next."""
    return [2 ** (octaves * (index - (number - 1) / 2)) for index in range(number)]


def size_axis(axes: Axes, sizes: Iterable[float], label: str, num_ticks: int = 10, margin: float = 1.25) -> None:
    """A logarithmic x axis with ticks at the sizes, as far as their labels have room."""
    ordered = sorted(set(sizes))
    step = 0.999 * (ordered[-1] / ordered[0]) ** (1 / (num_ticks - 1))
    ticks: list[float] = []
    for size in ordered:
        if not ticks or size / ticks[-1] >= step:
            ticks.append(size)
    axes.set_xscale("log")
    axes.set_xticks(ticks)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlim=(ordered[0] / margin, ordered[-1] * margin), xlabel=label)


def log_axis(axes: Axes, unit: str) -> None:
    """A logarithmic y axis with at least two labelled ticks; `unit` as for `in_unit`."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    digits = range(1, 9) if decades < 0.5 else (1, 2, 5) if decades < 1.8 else (1, 3) if decades < 2.6 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=digits, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _position: in_unit([value], unit))


def power_of_two(value: float, _position: float | None = None) -> str:
    """A power of two as 4 or as 1/4, for a tick."""
    return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"
