"""The pictures of a scaling report: panels with one legend, and what they share: styles, axes and markers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from torchreg.console import printable
from torchreg.plots.quantities import count, in_unit, nodes, ranks
from torchreg.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, SKY

Json: TypeAlias = dict[str, Any]
Panel: TypeAlias = tuple[str, Callable[[Axes], None]]  # a title, and a function that draws on axes
Thing = TypeVar("Thing")

_STYLES: dict[str, tuple[str, str, str]] = {
    "manual/allreduce": (BLUE, "o", "-"), "manual/mpi": (GREEN, "s", "--"),
    "sgd/ddp": (ORANGE, "^", "-."), "sgd/mpi": (BLACK, "D", ":"),
}  # fmt: skip
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
    """Panels (none without data) with one legend; `height` of the axes and `margin` at their left are in inches."""

    number: int
    kind: str
    scope: str
    title: str
    legend: tuple[Style, ...]
    panels: tuple[Panel, ...]
    columns: int
    height: float = 2.4
    margin: float = 0.68

    @property
    def panel_width(self) -> float:
        """Inches of a panel, so that its text has a similar size in two and in three columns."""
        return 3.7 if self.columns == 2 else 3.1

    @property
    def name(self) -> str:
        """The name of its files, without their ending."""
        return slug(f"figure {self.number} {self.kind} {self.scope}")


def combination_of(thing: Mapping[str, Any]) -> str:
    """Optimizer and sync, separated by a slash."""
    return f"{thing['optimizer']}/{thing['sync']}"


def styled(things: Iterable[Json], name_of: Callable[[Json], str] = combination_of) -> list[Json]:
    """Series, or fits of a backend, each with the `style` of its name; unknown names have styles of their own."""
    named, more = [(name_of(thing), thing) for thing in things], iter(_MORE_STYLES)
    known = {name: _STYLES.get(_ALIKE.get(name, name)) for name, _ in named}
    styles = {name: Style(printable(name), *(look or next(more, _MORE_STYLES[-1]))) for name, look in known.items()}
    return [{**thing, "style": styles[name]} for name, thing in named]


def legend_of(things: Iterable[Json], *others: Style) -> tuple[Style, ...]:
    """The styles of some things, then others."""
    return (*dict.fromkeys(thing["style"] for thing in things), *others)


def by_title(titled: Iterable[tuple[str, Thing]]) -> dict[str, list[Thing]]:
    """Things by title, in the order of their first one."""
    found: dict[str, list[Thing]] = {}
    for title, thing in titled:
        found.setdefault(title, []).append(thing)
    return found


def best_model(series: Json) -> Json | None:
    """The identifiable model with the smallest held-out error, which is the one that is drawn."""
    fits = [fit for fit in series["models"] if fit["identifiable"] and fit["curve"]]
    return min(fits, key=lambda fit: math.inf if fit["held_out_error"] is None else fit["held_out_error"], default=None)


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


def draw_estimates(axes: Axes, rows: Sequence[Json], x: str, y: str, style: Style, offset: float,
                   *, line: bool = False) -> None:  # fmt: skip
    """Markers at x times `offset`, so that equal values stay visible, with intervals where these have ends."""
    points = [(row[x] * offset, row[y]) for row in rows if row[y]]
    if not points:
        return
    ends = np.array([[one[end] for end in ("low", "value", "high")] for _, one in points], dtype=float)
    errors = np.nan_to_num(np.diff(ends, axis=1).T).clip(min=0)  # lengths down and up
    axes.errorbar(
        [size for size, _ in points], ends[:, 1], yerr=errors if errors.any() else None, color=style.colour,
        marker=style.marker, linestyle=style.dashes if line else "none", linewidth=style.width, markersize=4.5,
        elinewidth=1, capsize=2, label=style.label,
    )  # fmt: skip


def with_offsets(things: Sequence[Thing], octaves: float = 0.07) -> Iterator[tuple[Thing, float]]:
    """Each thing with a factor around 1, with so many octaves from one to the next."""
    return ((thing, 2 ** (octaves * (index - (len(things) - 1) / 2))) for index, thing in enumerate(things))


def size_axis(axes: Axes, sizes: Iterable[float], label: str, num_ticks: int = 10, margin: float = 1.25) -> None:
    """A logarithmic x axis with ticks at the sizes, or at every second or third of them where there are many."""
    ordered = sorted(set(sizes))
    axes.set(xscale="log", xlim=(ordered[0] / margin, ordered[-1] * margin), xlabel=label)
    axes.xaxis.set_major_locator(FixedLocator(ordered, nbins=num_ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")


def log_axis(axes: Axes, unit: str) -> None:
    """A logarithmic y axis with at least two labelled ticks; `unit` as for `in_unit`."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    digits = range(1, 9) if decades < 0.5 else (1, 2, 5) if decades < 1.8 else (1, 3) if decades < 2.6 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=digits, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ticks(unit))


def ticks(unit: str) -> Callable[[float, object], str]:
    """A formatter of ticks; `unit` as for `in_unit`."""
    return lambda value, _position: in_unit([value], unit)
