"""A report as pages: one self-contained HTML file, and Markdown with its figures beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from torchreg.core.checkpoint import write_atomically
from torchreg.plots.pictures import Picture, slug
from torchreg.plots.quantities import count, features, in_unit, ranks
from torchreg.plots.rendering import inline_legend, inline_panels, picture_files
from torchreg.plots.scaling_figures import draw_allreduce, draw_breakdown, draw_models, draw_scaling
from torchreg.plots.target_figures import draw_steps, draw_targets
from torchreg.reporting import tables
from torchreg.reporting.points import Json

_FEW_NOTES = 6  # more are folded
_KINDS = ("strong", "weak")


@dataclass(frozen=True)
class Part:
    """Pictures and tables under one heading, and the same for each scope below it; `anchor` is unique in the page."""

    anchor: str
    title: str
    pictures: list[Picture]
    tables: list[tables.Table]
    scopes: tuple[Part, ...] = ()


def write_pages(report: Json, folder: Path) -> list[Path]:
    """Write report.html, report.md and the figures (PNG and SVG) of the content of a report.json; each file whole.

    Every string of the report may come from records of others: it is escaped. The same report gives the same bytes.
    """
    groups = [(group, _parts(group, number)) for number, group in enumerate(report["groups"], 1)]
    files: dict[str, bytes] = {}
    for one in (one for _, parts in groups for part in parts for one in (part, *part.scopes)):
        for picture in one.pictures:
            files |= picture_files(picture)
    markdown = _render("report.md.j2", _environment(is_markdown=True), report, groups)
    files["report.md"] = re.sub(r"\n{3,}", "\n\n", markdown).encode()
    files["report.html"] = _render("report.html.j2", _environment(), report, groups).encode()
    for name, content in files.items():  # the pages last, when the figures that they show are there
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def summary_lines(report: Json) -> list[str]:
    """The verdict in plain sentences, the most important first."""
    environment = _environment(escaped=False)
    status, correctness, verdict = _verdict(report, environment)
    found = [f"{title}: {line}" if title else line for title, lines in verdict for line in lines]
    return [f"{status}. {correctness}", *found]


def _environment(*, escaped: bool = True, is_markdown: bool = False) -> Environment:
    environment = Environment(
        loader=PackageLoader("torchreg.reporting"),
        autoescape=escaped,
        finalize=escape_markdown if is_markdown else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        extensions=["jinja2.ext.do"],
    )
    environment.globals |= {
        "count": count, "features": features, "in_unit": in_unit, "ranks": ranks, "plural": _plural,
        "percent": _percent, "duration": _duration, "by_sentence": _by_sentence, "few": _FEW_NOTES,
        "heading": lambda level: Markup("#" * level),
        "panels": lambda picture: [Markup(element) for element in inline_panels(picture)],
        "legend": lambda picture: [(Markup(element), name) for element, name in inline_legend(picture)],
    }  # fmt: skip
    return environment


def _render(template: str, environment: Environment, report: Json, groups: list[tuple[Json, list[Part]]]) -> str:
    status, correctness, verdict = _verdict(report, environment)
    series = {one["id"]: one for group in report["groups"] for one in group["series"]}
    title = f"Scaling of {', '.join(report['campaigns'])} on {', '.join(report['machines'])}"
    return environment.get_template(template).render(
        report=report,
        title=title if groups else "Scaling: no usable launch",
        status=status,
        correctness=correctness,
        verdict_lines=verdict,
        groups=groups,
        sections=[],
        series=series,
        series_table=_series_table(report, series, environment),
        source_table=tables.source_table(report),
        provenance_tables=tables.provenance_tables(report),
        excluded_tables=tables.excluded_tables(report),
    )


def _line(text: str) -> str:
    """A sentence of a macro in one line, still marked as escaped."""
    return type(text)(" ".join(text.split()))


def _verdict(report: Json, environment: Environment) -> tuple[str, str, list[tuple[str, list[str]]]]:
    """Status, correctness, and the sentences about each group under its name, which is "" where there is one group."""
    sentences: Any = environment.get_template("sentences.j2").module
    verdict, groups, found = report["verdict"], report["groups"], []

    def own(name: str, key: str, wanted: Container[str]) -> list[Json]:
        return [one for one in verdict[name] if one[key] in wanted]

    for group in groups:
        headings: dict[tuple[Any, ...], dict[str, Json]] = {}
        for one in group["series"]:
            headings.setdefault((one["kind"], one["scope"], one["baseline_world_size"]), {})[one["id"]] = one
        lines = [
            sentences.scaling(series, own("scaling", "series", series), own("bottlenecks", "series", series))
            for series in headings.values()
        ]
        if group["oversubscribed_ranks_per_node"]:
            lines.append(sentences.oversubscribed(group))
        for target in own("targets", "group", [group["id"]]):
            lines.append(sentences.best(target["fastest"], "Fastest", "time_s"))
            lines.append(sentences.best(target["lowest_node_hours"], "Lowest node-hours", "node_hours"))
        lines += map(sentences.prediction, own("prediction_errors", "group", [group["id"]]))
        is_alone = sum(other["machine"] == group["machine"] for other in groups) == 1
        name = "" if len(groups) == 1 else group["machine"] if is_alone else group["title"]
        found.append((name, [_line(line) for line in lines]))
    correct = verdict["correct"]
    return _line(sentences.status(correct)), _line(sentences.correctness(correct)), found


def _by_sentence(items: Iterable[Json], sentence: Callable[[Json], str]) -> list[tuple[str, list[Json]]]:
    """Items with the same sentence together, the most frequent sentence first."""
    found: dict[str, list[Json]] = {}
    for item in items:
        found.setdefault(_line(sentence(item)), []).append(item)
    return sorted(found.items(), key=lambda pair: -len(pair[1]))


def _series_table(report: Json, series: Mapping[str, Json], environment: Environment) -> tables.Table:
    sentences: Any = environment.get_template("sentences.j2").module
    bottlenecks = {one["series"]: _line(sentences.bottleneck_details(one)) for one in report["verdict"]["bottlenecks"]}
    rows = (
        {
            "series": _line(sentences.series_title(series[one["series"]])),
            "limit": one["largest_efficient_world_size"],
            "details": _line(sentences.limit_details(one)),
            "bottleneck": bottlenecks.get(one["series"]),
        }
        for one in report["verdict"]["scaling"]
    )
    return tables.make_table("Series", ["series", "scaling limit (ranks)", "details", "bottleneck"], rows)


def _parts(group: Json, number: int) -> list[Part]:
    """The parts of a group that have anything to show, in their order on the page."""
    anchor = f"group-{number}"
    scopes = sorted(dict.fromkeys(one["scope"] for one in group["series"]), key=lambda scope: scope != "within a node")

    def by_scope(name: str, pictures: Callable[[str], list[Picture | None]],
                 found: Callable[[str], list[tables.Table]], above: Picture | None = None) -> Part:  # fmt: skip
        below = [
            Part(f"{anchor}-{name}-{slug(scope)}", scope, [one for one in pictures(scope) if one],
                 [one for one in found(scope) if one.rows])
            for scope in scopes
        ]  # fmt: skip
        shown = tuple(one for one in below if one.pictures or one.tables)
        return Part(f"{anchor}-{name}", name, [above] if above else [], [], shown)

    def scaling(kind: str) -> Part:
        return by_scope(kind, lambda scope: [draw_scaling(group, number, kind, scope)],
                        lambda scope: [tables.scaling_table(group, kind, scope)])  # fmt: skip

    allreduce = draw_allreduce(group, number)
    found = [
        Part(f"{anchor}-points", "points", [], tables.points_tables(group)),
        *map(scaling, _KINDS),
        by_scope("breakdown", lambda scope: [draw_breakdown(group, number, kind, scope) for kind in _KINDS],
                 lambda scope: [tables.breakdown_table(group, scope)]),
        Part(f"{anchor}-allreduce", "allreduce", [allreduce] if allreduce else [], tables.allreduce_tables(group)),
        by_scope("models", lambda scope: [draw_models(group, number, kind, scope) for kind in _KINDS],
                 lambda scope: [tables.models_table(group, kind, scope) for kind in _KINDS]),
        by_scope("targets", lambda scope: [draw_targets(group, number, scope)],
                 lambda scope: [tables.targets_table(group, kind, scope) for kind in _KINDS],
                 draw_steps(group, number)),
    ]  # fmt: skip
    return [part for part in found if part.pictures or part.scopes or any(one.rows for one in part.tables)]


def _plural(word: str, number: int) -> str:
    return word if number == 1 else word + ("es" if word.endswith("ch") else "s")


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
    line = " ".join(str(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]|~#$!])", r"\\\1", line)
    line = re.sub(r"(?i)(:)(?=//)|(?<=\bwww)(\.)|(@)", r"\\\g<0>", line)
    return Markup(re.sub(r"^(\d+)(?=[.)](?:\s|$))|^(?=[-+=])", r"\1" "\\\\", line))
