"""A picture as files, and its panels as SVG elements that live inside a page and take its colours, light or dark."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from functools import lru_cache
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from torchreg.console import printable
from torchreg.plots.pictures import Panel, Picture, Style
from torchreg.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, SKY, default_style, file_content

_TOP, _BOTTOM, _RIGHT = 0.3, 0.5, 0.12  # inches around the axes of a panel; its left margin is its own
_SETTINGS: Any = {
    "axes.axisbelow": True, "axes.grid": True, "axes.labelsize": 8.5, "axes.spines.right": False,
    "axes.spines.top": False, "axes.titlesize": 9, "font.size": 8, "grid.alpha": 0.3, "grid.color": GREY,
    "grid.linewidth": 0.6, "hatch.linewidth": 0.6, "legend.fontsize": 8.5,
    "svg.fonttype": "none",  # text stays text: small, searchable, and accessible
    "svg.hashsalt": "torchreg",  # the same report gives the same bytes
    "text.parse_math": False,  # a dollar in a name is a dollar
}  # fmt: skip
_NAMES = {BLUE: "blue", GREEN: "green", ORANGE: "orange", SKY: "sky", GREY: "grey"}
_PAGE_COLOURS = {BLACK: "currentColor"} | {colour: f"var(--{name})" for colour, name in _NAMES.items()}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@default_style(**_SETTINGS)
def picture_files(picture: Picture) -> dict[str, bytes]:
    """PNG and SVG of all panels with the legend above them, by the file's name."""
    num_rows, row_height = math.ceil(len(picture.panels) / picture.columns), picture.height + _TOP + _BOTTOM
    width = picture.columns * picture.panel_width
    legend_columns = min(len(picture.legend), max(1, round(width / 1.9)))
    height = num_rows * row_height + 0.35 + 0.2 * math.ceil(len(picture.legend) / legend_columns)
    figure = Figure(figsize=(width, height))
    figure.suptitle(picture.title, fontsize=10, y=1 - 0.04 / height, va="top")
    figure.legend(
        handles=list(map(_handle, picture.legend)), loc="upper center", bbox_to_anchor=(0.5, 1 - 0.2 / height),
        ncols=legend_columns, frameon=False,
    )  # fmt: skip
    for index, panel in enumerate(picture.panels):
        row, column = divmod(index, picture.columns)
        _add_panel(figure, picture, panel, column * picture.panel_width, (num_rows - 1 - row) * row_height)
    svg = file_content(figure, "svg", metadata={"Date": None})
    return {f"{picture.name}.png": file_content(figure, "png"), f"{picture.name}.svg": svg}


@default_style(**_SETTINGS)
def inline_panels(picture: Picture) -> list[str]:
    """Each panel as an `<svg>` element with its description as title; ids are unique in a page."""
    elements = []
    for index, panel in enumerate(picture.panels, 1):
        figure = Figure(figsize=(picture.panel_width, picture.height + _TOP + _BOTTOM))
        axes = _add_panel(figure, picture, panel, 0.0, 0.0)
        title = ET.Element("title", {"id": "title"})
        title.text = printable(f"{panel[0]}: {_description(axes)}")
        element = _svg(figure, title, role="img", **{"aria-labelledby": "title"})
        elements.append(_with_unique_ids(element, f"{picture.name}-{index}"))
    return elements


def _description(axes: Axes) -> str:
    """A panel in words: its axes, the first and last value of each line, the length of each bar, and its texts."""
    parts = []
    axis: Axis
    for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
        if isinstance(handle, BarContainer):
            axis, values = axes.xaxis, [abs(bar.get_width()) for bar in handle]
            names = [f"{label.get_text()} " for label in axes.get_yticklabels()]
        else:
            line: Any = handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle
            axis, values, names = axes.yaxis, line.get_ydata(orig=False)[[0, -1]], ["from ", "to "]
        texts = [axis.get_major_formatter().format_data_short(value).strip() for value in values]
        parts.append(f"{name}: {', '.join(map(''.join, zip(names, texts, strict=True)))}")
    labels = " over ".join(filter(None, (axes.get_ylabel(), axes.get_xlabel())))
    return "; ".join([labels, *parts, *(text.get_text() for text in axes.texts)])


def inline_legend(picture: Picture) -> list[tuple[str, str]]:
    """The sample of each style in the legend, as an `<svg>` element hidden from screen readers, and its label."""
    styles = [(f"{picture.name}-swatch-{index}", style) for index, style in enumerate(picture.legend, 1)]
    return [(_with_unique_ids(_swatch(style), name), style.label) for name, style in styles]


@lru_cache(maxsize=64)
@default_style(**_SETTINGS)
def _swatch(style: Style) -> str:
    figure = Figure(figsize=(0.42, 0.15))
    figure.add_artist(_handle(style))
    width, height = (f"{72 * inches:g}pt" for inches in figure.get_size_inches())
    return _svg(figure, **{"aria-hidden": "true", "width": width, "height": height})


def _add_panel(figure: Figure, picture: Picture, panel: Panel, left: float, bottom: float) -> Axes:
    """Axes whose box with its margins begins at `left` and `bottom` (inches)."""
    title, draw = panel
    width, height = figure.get_size_inches()
    bar_number = 0.5 * (picture.margin > 1)  # bars have a number at their right
    axes_width = picture.panel_width - picture.margin - _RIGHT - bar_number
    corner = ((left + picture.margin) / width, (bottom + _BOTTOM) / height)
    axes = figure.add_axes((*corner, axes_width / width, picture.height / height))
    middle = (picture.panel_width / 2 - picture.margin) / axes_width  # of the panel, so that a long title has room
    axes.set_title(title, x=middle, y=1.02)  # an automatic y takes a quarter of the time
    draw(axes)
    return axes


def _handle(style: Style) -> Artist:
    """The sample of a style, as large as its figure; matplotlib's legends have a size of their own."""
    if not (style.marker or style.dashes):
        return Rectangle(
            (0.02, 0.1), 0.96, 0.8, facecolor="none" if style.hatch else style.colour, hatch=style.hatch, linewidth=0,
            alpha=0.35 if style.colour == GREY else 1, label=style.label,  # as in the panels: grey shades a region
        )  # fmt: skip
    return Line2D(
        [0.02, 0.5, 0.98], [0.5] * 3, color=style.colour, marker=style.marker, linestyle=style.dashes,
        linewidth=style.width, markersize=4.5, markevery=[1], label=style.label,
    )  # fmt: skip


def _svg(figure: Figure, *children: ET.Element, **attributes: str) -> str:
    """A figure as an SVG element without namespaces, metadata, style sheets, and ids to which nothing refers."""
    root = ET.fromstring(file_content(figure, "svg", transparent=True, metadata=_NO_METADATA))
    for definitions in root.findall("{*}defs"):  # a style sheet would apply to the whole page
        definitions[:] = [child for child in definitions if not child.tag.endswith("}style")]
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        # matplotlib names its groups, as axes_1, to which nothing refers, unlike clips, markers and hatches
        kept = [(key.rpartition("}")[2], value) for key, value in element.items() if key != "id" or "_" not in value]
        element.attrib = {key: _page_value(key, value) for key, value in kept}
        element.text, element.tail = ((text or "").strip() and text for text in (element.text, element.tail))
    namespace, box = "http://www.w3.org/2000/svg", root.attrib["viewBox"]
    root.attrib = {"xmlns": namespace, "viewBox": box, "fill": "currentColor", **attributes}
    root[:0] = children
    return ET.tostring(root, encoding="unicode")


def _page_value(key: str, value: str) -> str:
    """The value of an attribute with the page's colours, and coordinates rounded to a hundredth of a point."""
    if key in ("d", "transform", "x", "y", "width", "height"):
        return re.sub(r"(\.\d\d)\d+", r"\1", value)
    if key in ("style", "fill", "stroke"):
        for colour, name in _PAGE_COLOURS.items():
            value = value.replace(colour.lower(), name)
    return value


def _with_unique_ids(element: str, name: str) -> str:
    """The ids in the tags of an element, and the references to them, with a name before them."""
    ids = re.compile(r' id="| aria-labelledby="| href="#|url\(#')
    return re.sub(r"<[^>]+>", lambda tag: ids.sub(rf"\g<0>{name}-", tag[0]), element)
