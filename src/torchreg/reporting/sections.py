"""A report as sections of words, tables and pictures: what the HTML page and the Markdown page both show."""

from __future__ import annotations

from torchreg.reporting import closing_sections as closing_sections
from torchreg.reporting.group_sections import group_section
from torchreg.reporting.page_parts import Json, Section, counted, table, word


def sections_of(report: Json) -> list[Section]:
    """Everything below the verdict, in the order in which a reader asks for it."""
    groups = [group_section(group, index) for index, group in enumerate(report["groups"], 1)]
    if not groups:
        groups = [Section("groups", "Measurements", ("No launch left a valid record, so there is nothing to show.",))]
    return [
        *_series_verdicts(report),
        *groups,
        closing_sections.cost(report),
        closing_sections.provenance(report),
        closing_sections.excluded(report),
        closing_sections.method(report),
    ]


def _series_verdicts(report: Json) -> list[Section]:
    verdict = report["verdict"]
    series = {one["id"]: one for group in report["groups"] for one in group["series"]}
    scaling = {one["series"]: one for one in verdict["scaling"]}
    bounds = {one["series"]: one for one in verdict["bound_by"]}
    rows = []
    for name in dict.fromkeys([*scaling, *bounds]):
        far, bound = scaling.get(name), bounds.get(name)
        title = series[name]["title"] if name in series else name
        rows.append(
            (
                word(title),
                counted(far["largest_efficient_world_size"] if far else None),
                word(_after(title, far["text"]) if far else None),
                word(_after(title, bound["text"]) if bound else None),
            )
        )
    if not rows:
        return []
    columns = ("series", "scales well up to (ranks)", "that is", "bound by")
    return [
        Section("series", "How far each series scales, and what bounds it", tables=(table("Series", columns, rows),))
    ]


def _after(title: str, text: str) -> str:
    """A sentence without the title that stands before it in the same row."""
    return text.removeprefix(title).lstrip(" :")
