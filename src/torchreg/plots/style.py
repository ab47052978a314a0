"""Colours, settings and files of all figures."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchreg.core.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can distinguish; lines in the same axes also differ in dashes.
SKY, ORANGE, BLACK, BLUE, GREEN = "#56B4E9", "#D55E00", "#000000", "#0072B2", "#009E73"
GREY = "#8A8A8A"


def require_libraries(purpose: str, *libraries: str) -> None:
    """Raise `ValueError`, before any work rather than after it, where a library that the purpose needs is missing."""
    for library in libraries:
        if find_spec(library) is None:
            raise ValueError(f"{purpose} needs {library}, which is not installed: pip install {library}")


@contextmanager
def default_style(**settings: Any) -> Iterator[None]:
    """Matplotlib's defaults with these settings, independent of a `matplotlibrc` or a notebook's settings."""
    from matplotlib import style

    with warnings.catch_warnings(), style.context(settings, after_reset=True):
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # it is drawn as a box
        yield


def file_content(figure: Figure, kind: str, **options: Any) -> bytes:
    """The content of a PNG or SVG file of a figure."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=150, **options)
    return file.getvalue()


@default_style()
def save(draw: Callable[[Path], Figure | None], folder: Path, name: str) -> list[Path]:
    """Write the figure that `draw` makes of a folder there, as name.png and name.svg, each of them atomically."""
    if (figure := draw(folder)) is None:
        return []
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        write_atomically(path, file_content(figure, path.suffix[1:]))
    return paths
