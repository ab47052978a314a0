"""A report as pages: one HTML file that needs nothing else, and Markdown with its pictures beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torchreg.core.checkpoint import write_atomically
from torchreg.plots.pictures import Picture
from torchreg.plots.rendering import inline_legend, inline_panels, picture_files
from torchreg.reporting.page_parts import Section
from torchreg.reporting.sections import sections_of
from torchreg.reporting.write import require_report_libraries

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
_STATUS = {"yes": "trains correctly", "no": "does not train correctly", "unknown": "not known to train correctly"}
_FEW_LINES = 6  # of the verdict's details that are shown unasked


def write_pages(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write report.html, report.md and the figures (PNG and SVG) of a `report.json`; each file appears whole.

    Every string of the report may come from somebody else's records: it is shown, never obeyed. The same report gives
    the same bytes. Raises `ValueError` where a library that it needs is not installed.
    """
    require_report_libraries()
    sections = sections_of(report)
    files: dict[str, bytes] = {}
    for picture in _pictures(sections):
        files |= picture_files(picture)
    files[MARKDOWN_FILE] = _render("report.md.j2", report, sections).encode()
    files[HTML_FILE] = _render("report.html.j2", report, sections).encode()
    for name, content in files.items():  # the pages last: what they point to is there already
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def _pictures(sections: list[Section] | tuple[Section, ...]) -> list[Picture]:
    return [picture for one in sections for picture in (*one.pictures, *_pictures(one.sections))]


def _render(template: str, report: dict[str, Any], sections: list[Section]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    is_markdown = template.endswith(".md.j2")

    def markdown(value: object) -> object:
        return value if hasattr(value, "__html__") else Markup(_in_markdown(str(value)))

    environment = Environment(
        loader=PackageLoader("torchreg.reporting"),
        autoescape=True,
        finalize=markdown if is_markdown else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.get_template(template).render(
        report=report,
        verdict=report["verdict"],
        status=_STATUS.get(report["verdict"]["correct"]["status"], _STATUS["unknown"]),
        verdict_lines=_verdict_lines(report),
        few=_FEW_LINES,
        sections=sections,
        panels=lambda picture: [Markup(element) for element in inline_panels(picture)],
        heading=lambda level: Markup("#" * level),
        legend=lambda picture: [(Markup(element), name) for element, name in inline_legend(picture)],
    )
    return re.sub(r"\n{3,}", "\n\n", page) if is_markdown else page


def _verdict_lines(report: dict[str, Any]) -> dict[str, list[str]]:
    """The verdict's sentences, none of them twice, by the group that they speak of; "" for those of all."""
    verdict, said = report["verdict"], {"": list[str]()}
    names = [name for group in report["groups"] for name in (group["title"], group["machine"]) if name]
    for line in verdict["lines"]:
        title = next((name for name in names if line.startswith(f"{name}: ")), "")
        if line != verdict["correct"]["text"]:
            said.setdefault(title, []).append(line.removeprefix(f"{title}: ") if title else line)
    for name in ("fastest", "lowest_node_hours"):
        best = verdict[name]
        if best and not any(best["text"] in line for lines in said.values() for line in lines):
            said[""].append(best["text"])
    return {title: lines for title, lines in said.items() if lines}


def _in_markdown(text: str) -> str:
    """Text that shows as it is in GitHub's Markdown, in a line or a cell of a table: no markup, no link, no break."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]|~#$!])", r"\\\1", line)
    line = re.sub(r"(?i)(:)(?=//)|(?<=\bwww)(\.)|(@)", r"\\\g<0>", line)
    return re.sub(r"^(\d+)([.)])(?=\s|$)|^([-+=])", lambda found: _escaped_start(found), line)


def _escaped_start(found: re.Match[str]) -> str:
    return f"{found[1]}\\{found[2]}" if found[1] else f"\\{found[3]}"
