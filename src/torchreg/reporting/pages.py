"""A report as pages: one self-contained HTML file, and Markdown with its figures beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from torchreg.core.checkpoint import write_atomically
from torchreg.plots.pictures import Picture, best_model, slug
from torchreg.plots.quantities import count, counted, features, in_unit, nodes, ranks
from torchreg.plots.rendering import inline_legend, inline_panels, picture_files
from torchreg.plots.scaling_figures import draw_allreduce, draw_breakdown, draw_models, draw_scaling
from torchreg.plots.target_figures import draw_headline, draw_steps, draw_targets
from torchreg.reporting import tables
from torchreg.reporting.groups import Json

Language: TypeAlias = Literal["html", "markdown", "text"]

_KINDS = ("strong", "weak")


def write_pages(report: Json, folder: Path) -> list[Path]:
    """Write report.html, report.md and the figures (PNG and SVG) of the content of a report.json; each file whole.

    Every string of the report may come from records of others: it is escaped. The same report gives the same bytes.
    """
    groups = [(group, _parts(group, number)) for number, group in enumerate(report["groups"], 1)]
    first = [draw_headline(report["groups"][0], 1, report["verdict"]["headline"])] if groups else []
    first = [picture for picture in first if picture.panels]
    sections = [section for _, parts in groups for part in parts.values() for section in part]
    files: dict[str, bytes] = {}
    for picture in (*first, *(picture for section in sections for picture in section["pictures"])):
        files |= picture_files(picture)
    markdown = _render("markdown", report, groups, first)
    files["report.md"] = re.sub(r"\n{3,}", "\n\n", markdown).encode()
    files["report.html"] = _render("html", report, groups, first).encode()
    for name, content in files.items():  # the pages last, when the figures that they show are there
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def summary_lines(report: Json) -> list[str]:
    """The verdict in at most six sentences, the most important first."""
    return list(_first_screen(report, _environment("text"))["lines"])


def _environment(language: Language) -> Environment:
    environment = Environment(
        loader=PackageLoader("torchreg.reporting"), autoescape=language != "text",
        finalize=escape_markdown if language == "markdown" else None, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, extensions=["jinja2.ext.do"],
    )  # fmt: skip
    environment.globals |= {
        "count": count, "features": features, "in_unit": in_unit, "ranks": ranks, "counted": counted, "slug": slug,
        "nodes": nodes, "percent": _percent, "timedelta": timedelta, "best_model": best_model, "panels": inline_panels,
        "legend": inline_legend,
    }  # fmt: skip
    return environment


def _render(language: Language, report: Json, groups: list[tuple[Json, Any]], pictures: list[Picture]) -> str:
    environment = _environment(language)
    first = _first_screen(report, environment)
    title = f"Scaling of {', '.join(report['campaigns'])} on {', '.join(report['machines'])}"
    return environment.get_template({"html": "report.html.j2", "markdown": "report.md.j2"}[language]).render(
        report=report,
        title=title if groups else "Scaling: no usable launch",
        groups=groups,
        sections=[],
        tables=tables.report_tables(report),
        series_table=_series_table(report["groups"], environment),
        first=first | {"pictures": pictures},
        proposal=[tables.proposal_table(group, first["figures"]["shown"]) for group in report["groups"][:1]],
    )


def _line(text: str) -> str:
    """A sentence of a macro in one line, still marked as escaped."""
    return type(text)(" ".join(text.split()))


def _first_screen(report: Json, environment: Environment) -> Json:
    """The verdict: at most six sentences (`lines`), and what the four figures are made of."""
    sentences: Any = environment.get_template("sentences.j2").module
    correct, headline = report["verdict"]["correct"], report["verdict"]["headline"]
    lines, shown, best, limited = [sentences.correctness(correct)], [], None, []
    if headline:
        group = next(one for one in report["groups"] if one["id"] == headline["group"])
        series, best = {one["id"]: one for one in group["series"]}, headline["best"]
        shown = [series[one["series"]] | one for one in (headline["strong"], headline["weak"]) if one]
        limited = [one for one in shown if one["bottleneck"]][:1]
        lines += [*map(sentences.scaling, shown), *map(sentences.limited, limited)]
        lines += [sentences.target(best)] if best else []
        lines += [sentences.caution(report, group)]
    lines = [line for line in map(_line, lines) if line]
    figures = {"correct": correct, "shown": shown, "best": best, "limited": limited}
    return {"lines": lines, "figures": figures}


def _series_table(groups: list[Json], environment: Environment) -> tables.Table:
    """How far each series scales, and what limits it."""
    sentences: Any = environment.get_template("sentences.j2").module
    rows = [
        {
            "series": _line(sentences.series_title(one)),
            **one["points"][-1],
            "scaling limit": _line(sentences.limit(one)),
            "bottleneck": _line(sentences.limited(one)) if one["bottleneck"] else None,
        }
        for group in groups
        for one in group["series"]
    ]
    return tables.make_table("Series", ["series", "ranks", "efficiency", "scaling limit", "bottleneck"], rows)


def _parts(group: Json, number: int) -> dict[str, list[Json]]:
    """The parts of a group that have anything to show, by scope ("" is all)."""
    parts: dict[str, list[Json]] = {}

    def add(name: str, scope: str, pictures: Iterable[Picture], found: Iterable[tables.Table]) -> None:
        drawn, filled = [one for one in pictures if one.panels], [one for one in found if one.rows]
        if drawn or filled:
            parts.setdefault(name, []).append({"scope": scope, "pictures": drawn, "tables": filled})

    add("points", "", [], tables.points_tables(group))
    add("allreduce", "", [draw_allreduce(group, number)], tables.allreduce_tables(group))
    add("targets", "", [draw_steps(group, number)], [])
    for scope in dict.fromkeys(one["scope"] for one in group["series"]):  # within a node first
        scaling, models, targets = zip(*(tables.series_tables(group, kind, scope) for kind in _KINDS), strict=True)
        for kind, table in zip(_KINDS, scaling, strict=True):
            add(kind, scope, [draw_scaling(group, number, kind, scope)], [table])
        add("breakdown", scope, (draw_breakdown(group, number, kind, scope) for kind in _KINDS), [])
        add("models", scope, (draw_models(group, number, kind, scope) for kind in _KINDS), models)
        add("targets", scope, [draw_targets(group, number, scope)], targets)
    return parts


def _percent(estimate: Json) -> str:
    value, low, high = (estimate[end] for end in ("value", "low", "high"))
    return f"{100 * value:.0f} %" + ("" if low is None or high is None else f" ({100 * low:.0f}–{100 * high:.0f} %)")


def escape_markdown(value: object) -> object:
    """Text that shows as it is in GitHub's Markdown, in a line or in a table: no markup, no link, no break."""
    if hasattr(value, "__html__"):
        return value
    line = html.escape(" ".join(str(value).split()), quote=False)
    line = re.sub(r"([\\`*_\[\]|~#$!])", r"\\\1", line)
    line = re.sub(r"(?i)(:)(?=//)|(?<=\bwww)(\.)|(@)", r"\\\g<0>", line)
    return Markup(re.sub(r"^(\d+)(?=[.)](?:\s|$))|^(?=[-+=])", r"\1" "\\\\", line))
