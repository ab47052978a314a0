"""A picture as files, and its panels as SVG elements that live inside a page and take its colours, light or dark."""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torchreg.console import printable
from torchreg.plots.style import BLUE, GREEN, GREY, ORANGE, SKY, new_figure, own_style

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

    from torchreg.plots.panels import Look
    from torchreg.plots.pictures import Panel, Picture

_PANEL_WIDTH = 3.1  # inches
_SWATCH = "swatch-of-a-look"  # what its ids begin with until it is in a picture's legend
_TOP, _BOTTOM, _RIGHT = 0.3, 0.5, 0.12  # inches around the axes of a panel; its left margin is its own
_STYLE: Any = {
    "axes.grid": True,
    "axes.labelsize": 8.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 8,
    "grid.alpha": 0.3,
    "grid.color": GREY,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",  # text stays text: small, searchable, and read aloud
    "svg.hashsalt": "torchreg",  # the same report gives the same bytes
    "text.parse_math": False,  # a dollar in somebody's name is a dollar
}
_VARIABLES = {BLUE: "--blue", GREEN: "--green", ORANGE: "--orange", SKY: "--sky", GREY: "--grey"}
_DECIMALS = re.compile(r"(\.\d\d)\d+")  # a hundredth of a point is finer than any screen
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def picture_files(picture: Picture) -> dict[str, bytes]:
    """PNG and SVG of all panels with the legend above them, by the file's name."""
    with own_style(**_STYLE):
        figure = _whole_figure(picture)
        files = {}
        for kind in ("png", "svg"):
            file = io.BytesIO()
            date = {"Date": None} if kind == "svg" else {}
            figure.savefig(file, format=kind, dpi=150, metadata=date)
            files[f"{picture.name}.{kind}"] = file.getvalue()
    return files


def inline_panels(picture: Picture) -> list[str]:
    """Each panel as an `<svg>` element with a title for those who cannot see it; ids are unique in a page."""
    elements = []
    with own_style(**_STYLE):
        for index, panel in enumerate(picture.panels):
            figure = new_figure(_PANEL_WIDTH, panel.height + _TOP + _BOTTOM)
            figure.set_layout_engine("none")
            _add_panel(figure, panel, 0.0, 0.0)
            elements.append(_as_element(figure, f"{picture.name}-{index + 1}", panel.says))
    return elements


def inline_legend(picture: Picture) -> list[tuple[str, str]]:
    """What stands before each name in the legend, as an `<svg>` element without a title, and the name."""
    return [
        (_swatch(look).replace(_SWATCH, f"{picture.name}-swatch-{index + 1}"), look.label)
        for index, look in enumerate(picture.legend)
    ]


@lru_cache(maxsize=64)
def _swatch(look: Look) -> str:
    with own_style(**_STYLE):
        figure = new_figure(0.42, 0.15)
        figure.set_layout_engine("none")
        figure.add_artist(_handle(look, [0.02, 0.98], 0.5))
        return _as_element(figure, _SWATCH, None)


def _whole_figure(picture: Picture) -> Figure:
    columns = picture.columns
    rows = [picture.panels[start : start + columns] for start in range(0, len(picture.panels), columns)]
    heights = [max(panel.height for panel in row) + _TOP + _BOTTOM for row in rows]
    legend_columns = min(len(picture.legend), max(1, round(columns * _PANEL_WIDTH / 1.9)))
    top = 0.35 + 0.2 * math.ceil(len(picture.legend) / legend_columns)
    width, height = columns * _PANEL_WIDTH, sum(heights) + top
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    figure.suptitle(picture.title, fontsize=10, y=1 - 0.04 / height, va="top")
    figure.legend(
        handles=[_handle(look, [0, 1], 0) for look in picture.legend],
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - 0.2 / height),
        ncols=legend_columns,
        frameon=False,
    )
    bottom = height - top
    for row, row_height in zip(rows, heights, strict=True):
        bottom -= row_height
        for column, panel in enumerate(row):
            _add_panel(figure, panel, column * _PANEL_WIDTH, bottom + row_height - panel.height - _TOP - _BOTTOM)
    return figure


def _add_panel(figure: Figure, panel: Panel, left: float, bottom: float) -> None:
    """Axes whose box with its margins begins at `left` and `bottom` (inches)."""
    width, height = figure.get_size_inches()
    right = _RIGHT + 0.5 * (panel.margin > 1)  # bars have a number at their right
    box = (left + panel.margin, bottom + _BOTTOM, _PANEL_WIDTH - panel.margin - right, panel.height)
    axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
    axes.set_axisbelow(True)
    middle = (_PANEL_WIDTH / 2 - panel.margin) / box[2]  # of the panel, so that a long title has room
    axes.set_title(panel.title, x=middle, y=1.02)  # finding y by itself costs a quarter of the time
    panel.draw(axes)


def _handle(look: Look, x: list[float], y: float) -> Artist:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    if look.is_area:
        alpha = 0.35 if look.colour == GREY else 1  # as in the panels, where grey is a shade over a region
        face = look.colour if look.filled else "none"
        return Rectangle(
            (x[0], 0.1), x[1] - x[0], 0.8, facecolor=face, hatch=look.hatch, alpha=alpha, linewidth=0, label=look.label
        )
    middle = [x[0], (x[0] + x[1]) / 2, x[1]]
    return Line2D(
        middle, [y] * 3, color=look.colour, marker=look.marker, linestyle=look.dashes, linewidth=look.width,
        markersize=4.5, markevery=[1], label=look.label,
    )  # fmt: skip


def _as_element(figure: Figure, name: str, says: str | None) -> str:
    file = io.BytesIO()
    figure.savefig(
        file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    root = ET.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # a style in a page would style all of it
                parent.remove(child)
    used = {
        reference
        for element in root.iter()
        for key, value in element.attrib.items()
        for reference in ([value[1:]] if key.endswith("href") else _REFERENCE.findall(value))
    }
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            key.rpartition("}")[2]: _in_page(key, value, name)
            for key, value in element.attrib.items()
            if key != "id" or value in used
        }
    view = root.attrib["viewBox"]
    root.attrib = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": view, "fill": "currentColor"}
    if says is None:
        root.attrib |= {"aria-hidden": "true", "width": f"{view.split()[2]}pt", "height": f"{view.split()[3]}pt"}
    else:
        root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title"}
        title = ET.Element("title", {"id": f"{name}-title"})
        title.text = printable(says)
        root.insert(0, title)
    return re.sub(r">\s+<", "><", ET.tostring(root, encoding="unicode"))


def _in_page(key: str, value: str, name: str) -> str:
    """An attribute as it is right inside a page: ids carry the picture's name, colours are the page's."""
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href"):
        return f"#{name}-{value[1:]}"
    if key in ("d", "transform", "x", "y", "width", "height"):
        return _DECIMALS.sub(r"\1", value)
    value = _REFERENCE.sub(rf"url(#{name}-\1)", value)
    if key in ("style", "fill", "stroke"):
        value = value.replace("#000000", "currentColor")
        for colour, variable in _VARIABLES.items():
            value = value.replace(colour.lower(), f"var({variable})")
    return value
