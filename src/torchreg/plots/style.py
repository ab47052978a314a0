"""What all pictures share: colours, units, and how a file appears."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size

from torchreg.console import printable
from torchreg.core.checkpoint import PARTIAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; what shares axes differs in dashes too.
SKY, ORANGE, BLACK, BLUE, GREEN = "#56B4E9", "#D55E00", "#000000", "#0072B2", "#009E73"
GREY = "#8A8A8A"

_LONGEST_NAME = 32  # cells (a wide letter takes two) that have room beside an axis
_UNITS = {"GrLivArea": "living area (square feet)", "SalePrice": "sale price (US dollars)"}


def require_matplotlib() -> None:
    """Raise `ValueError`, before a run rather than after it, where pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("plot needs matplotlib, which is not installed: pip install matplotlib") from error


@contextmanager
def own_style(**settings: Any) -> Iterator[None]:
    """Matplotlib's own settings with these: neither those of a `matplotlibrc` nor those of a notebook around us."""
    from matplotlib import style

    with warnings.catch_warnings(), style.context(settings, after_reset=True):
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # it is drawn as a box
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure (inches) that needs no screen; 10-point text stays readable at 600 pixels up to 7.5 inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write name.png and name.svg; each appears whole or not at all."""
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        partial = path.with_name(path.name + PARTIAL)
        figure.savefig(partial, format=path.suffix[1:], dpi=150)
        partial.replace(path)
    return paths


def plain(name: str) -> str:
    """A name from elsewhere as text for a figure: no formula between dollars, nothing that a font cannot draw."""
    text = printable(name).replace("$", r"\$")
    return text if cell_len(text) <= _LONGEST_NAME else set_cell_size(text, _LONGEST_NAME - 1) + "…"


def label(column: str) -> str:
    """A column's name with its unit, where that is known."""
    return _UNITS.get(column) or plain(column)


def loss_label(target: str) -> str:
    """What a mean squared error's axis says, on two lines where the target's name is long."""
    unit = "US dollars" if target in _UNITS else plain(target)
    return f"mean squared error{' ' if len(unit) <= 16 else chr(10)}({unit}²)"


def number_axes(axes: Axes) -> None:
    """Ticks that differ, at any magnitude: thousands in groups where these are short, else a power of ten aside."""
    axes.locator_params(axis="x", nbins=4)  # labels stand side by side
    for axis, longest in ((axes.xaxis, 1e6), (axes.yaxis, 1e8)):
        low, high = axis.get_view_interval()
        if 1e3 <= max(abs(low), abs(high)) < longest and high - low >= 100:
            axis.set_major_formatter("{x:,.0f}")
