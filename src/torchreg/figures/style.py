"""What all pictures share: colours, units, and how a file appears."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torchreg.files import PARTIAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; what shares axes differs in dashes too.
SKY, ORANGE, BLACK, BLUE, GREEN = "#56B4E9", "#D55E00", "#000000", "#0072B2", "#009E73"
GREY = "#8A8A8A"

_UNITS = {"GrLivArea": "living area (square feet)", "SalePrice": "sale price (US dollars)"}


def require_matplotlib() -> None:
    """Raise `ValueError`, before a run rather than after it, where pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("plot needs matplotlib, which is not installed: pip install matplotlib") from error


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


def label(column: str) -> str:
    """A column's name with its unit, where that is known."""
    return _UNITS.get(column, column)


def loss_unit(target: str) -> str:
    """The unit of a mean squared error."""
    return "US dollars²" if target in _UNITS else f"{target}²"
