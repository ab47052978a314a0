"""Colours, labels and files of all figures."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.cells import cell_len, set_cell_size

from torchreg.console import printable
from torchreg.core.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can distinguish; lines in the same axes also differ in dashes.
SKY, ORANGE, BLACK, BLUE, GREEN = "#56B4E9", "#D55E00", "#000000", "#0072B2", "#009E73"
GREY = "#8A8A8A"

_LONGEST_NAME = 32  # cells (a wide letter takes two) that have room beside an axis
_UNITS = {"GrLivArea": "living area (square feet)", "SalePrice": "sale price (US dollars)"}


def require_matplotlib() -> None:
    """Raise `ValueError`, before a run rather than after it, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("plot needs matplotlib, which is not installed: pip install matplotlib") from error


@contextmanager
def default_style(**settings: Any) -> Iterator[None]:
    """Matplotlib's defaults with these settings, independent of a `matplotlibrc` or a notebook's settings."""
    from matplotlib import style

    with warnings.catch_warnings(), style.context(settings, after_reset=True):
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # it is drawn as a box
        yield


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure (inches) that needs no screen; 10-point text stays readable at 600 pixels up to 7.5 inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def file_content(figure: Figure, kind: str, **options: Any) -> bytes:
    """The content of a PNG or SVG file of a figure."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=150, **options)
    return file.getvalue()


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write name.png and name.svg, each of them atomically."""
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        write_atomically(path, file_content(figure, path.suffix[1:]))
    return paths


def plain(name: str) -> str:
    """Someone else's name as text for a figure: without formulas between dollars and control characters, shortened."""
    text = printable(name).replace("$", r"\$")
    return text if cell_len(text) <= _LONGEST_NAME else set_cell_size(text, _LONGEST_NAME - 1) + "…"


def label(column: str) -> str:
    """A column's name with its unit, where that is known."""
    return _UNITS.get(column) or plain(column)


def loss_label(target: str) -> str:
    """The label of a mean squared error's axis, on two lines where the target's name is long."""
    unit = "US dollars" if target in _UNITS else plain(target)
    return f"mean squared error{' ' if len(unit) <= 16 else chr(10)}({unit}²)"


def number_axes(axes: Axes) -> None:
    """Distinct tick labels at any magnitude: thousands in groups where these are short, else an offset or exponent."""
    axes.locator_params(axis="x", nbins=4)  # labels stand side by side
    for axis, longest in ((axes.xaxis, 1e6), (axes.yaxis, 1e8)):
        low, high = axis.get_view_interval()
        if 1e3 <= max(abs(low), abs(high)) < longest and high - low >= 100:
            axis.set_major_formatter("{x:,.0f}")
