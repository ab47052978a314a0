"""A report as pages: one self-contained HTML file, and Markdown with its figures beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from torchreg.core.checkpoint import write_atomically
from torchreg.plots.pictures import Picture, by_title, slug
from torchreg.plots.quantities import count, counted, features, in_unit, ranks
from torchreg.plots.rendering import inline_legend, inline_panels, picture_files
from torchreg.plots.scaling_figures import draw_allreduce, draw_breakdown, draw_models, draw_scaling
from torchreg.plots.target_figures import draw_steps, draw_targets
from torchreg.reporting import tables
from torchreg.reporting.groups import Json

_KINDS = ("strong", "weak")


def write_pages(report: Json, folder: Path) -> list[Path]:
    """Write report.html, report.md and the figures (PNG and SVG) of the content of a report.json; each file whole.

    Every string of the report may come from records of others: it is escaped. The same report gives the same bytes.
    """
    groups = [(group, _parts(group, number)) for number, group in enumerate(report["groups"], 1)]
    files: dict[str, bytes] = {}
    for section in (section for _, parts in groups for part in parts.values() for section in part):
        for picture in section["pictures"]:
            files |= picture_files(picture)
    markdown = _render("report.md.j2", _environment("markdown"), report, groups)
    files["report.md"] = re.sub(r"\n{3,}", "\n\n", markdown).encode()
    files["report.html"] = _render("report.html.j2", _environment("html"), report, groups).encode()
    for name, content in files.items():  # the pages last, when the figures that they show are there
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def summary_lines(report: Json) -> list[str]:
    """The verdict in plain sentences, the most important first."""
    verdict = _verdict(report, _environment("text"))
    found = [f"{title}: {line}" if title else line for title, lines in verdict["by_group"] for line in lines]
    return [f"{verdict['status']}. {verdict['correctness']}", *found]


def _environment(language: Literal["html", "markdown", "text"]) -> Environment:
    environment = Environment(
        loader=PackageLoader("torchreg.reporting"), autoescape=language != "text",
        finalize=escape_markdown if language == "markdown" else None, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, extensions=["jinja2.ext.do"],
    )  # fmt: skip
    environment.globals |= {
        "count": count, "features": features, "in_unit": in_unit, "ranks": ranks, "counted": counted, "slug": slug,
        "percent": _percent, "duration": _duration, "by_sentence": _by_sentence, "panels": inline_panels,
        "legend": inline_legend,
    }  # fmt: skip
    return environment


def _render(template: str, environment: Environment, report: Json, groups: list[tuple[Json, Any]]) -> str:
    title = f"Scaling of {', '.join(report['campaigns'])} on {', '.join(report['machines'])}"
    return environment.get_template(template).render(
        report=report,
        title=title if groups else "Scaling: no usable launch",
        groups=groups,
        sections=[],
        series={one["id"]: one for group in report["groups"] for one in group["series"]},
        tables=tables.report_tables(report),
        **_verdict(report, environment),
    )


def _line(text: str) -> str:
    """A sentence of a macro in one line, still marked as escaped."""
    return type(text)(" ".join(text.split()))


def _verdict(report: Json, environment: Environment) -> Json:
    """The sentences of the verdict, `by_group` in pairs of its name ("" where there is one) and lines; a table."""
    sentences: Any = environment.get_template("sentences.j2").module
    verdict, groups, by_group, rows = report["verdict"], report["groups"], [], []
    limits, causes = ({one["series"]: one for one in verdict[name]} for name in ("scaling", "bottlenecks"))
    for group in groups:
        own = [{**one, **limits[one["id"]], "bottleneck": None, **causes.get(one["id"], {})} for one in group["series"]]
        lines = [sentences.scaling(some) for some in by_title((sentences.baseline(one), one) for one in own).values()]
        if group["oversubscribed_ranks_per_node"]:
            lines.append(sentences.oversubscribed(group))
        for target in verdict["targets"]:
            if target["group"] == group["id"]:
                lines.append(sentences.best(target["fastest"], "Fastest", "time_s"))
                lines.append(sentences.best(target["lowest_node_hours"], "Lowest node-hours", "node_hours"))
        lines += [sentences.prediction(one) for one in verdict["prediction_errors"] if one["group"] == group["id"]]
        is_alone = sum(other["machine"] == group["machine"] for other in groups) == 1
        name = "" if len(groups) == 1 else group["machine"] if is_alone else group["title"]
        by_group.append((name, [_line(line) for line in lines]))
        for one in own:
            series, details = _line(sentences.series_title(one)), _line(sentences.limit_details(one))
            cause = _line(sentences.bottleneck_details(one)) if one["bottleneck"] else None
            rows.append({**one, "series": series, "details": details, "bottleneck": cause})
    correct = {name: _line(getattr(sentences, name)(verdict["correct"])) for name in ("status", "correctness")}
    columns = ["series", "scaling limit (ranks)", "details", "bottleneck"]
    return {**correct, "by_group": by_group, "series_table": tables.make_table("Series", columns, rows)}


def _by_sentence(items: Iterable[Json], sentence: Callable[[Json], str]) -> list[tuple[str, list[Json]]]:
    """Items with the same sentence together, the most frequent sentence first."""
    return sorted(by_title((_line(sentence(one)), one) for one in items).items(), key=lambda pair: -len(pair[1]))


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
        breakdowns = (draw_breakdown(group, number, kind, scope) for kind in _KINDS)
        add("breakdown", scope, breakdowns, [tables.breakdown_table(group, scope)])
        add("models", scope, (draw_models(group, number, kind, scope) for kind in _KINDS), models)
        add("targets", scope, [draw_targets(group, number, scope)], targets)
    return parts


def _percent(estimate: Json) -> str:
    value, low, high = (estimate[end] for end in ("value", "low", "high"))
    return f"{100 * value:.0f} %" + ("" if low is None or high is None else f" ({100 * low:.0f}–{100 * high:.0f} %)")


def _duration(seconds: float) -> str:
    scale, unit = (1, "s") if seconds < 120 else (60, "min") if seconds < 7200 else (3600, "h")
    return f"{seconds / scale:.{int(unit == 'h')}f} {unit}"


def escape_markdown(value: object) -> object:
    """Text that shows as it is in GitHub's Markdown, in a line or in a table: no markup, no link, no break."""
    if hasattr(value, "__html__"):
        return value
    line = html.escape(" ".join(str(value).split()), quote=False)
    line = re.sub(r"([\\`*_\[\]|~#$!])", r"\\\1", line)
    line = re.sub(r"(?i)(:)(?=//)|(?<=\bwww)(\.)|(@)", r"\\\g<0>", line)
    return Markup(re.sub(r"^(\d+)(?=[.)](?:\s|$))|^(?=[-+=])", r"\1" "\\\\", line))
