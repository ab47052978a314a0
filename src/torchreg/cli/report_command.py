"""`torchreg report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from torchreg.cli import EXIT_FAILED
from torchreg.cli.options import parse
from torchreg.console import show_lines, show_table
from torchreg.plots.style import require_libraries
from torchreg.runs.record import to_json

_LIBRARIES = ("jinja2", "matplotlib", "msgspec", "pyarrow", "scipy")


@dataclass(frozen=True)
class ReportArguments:
    """Turn the launch records of a campaign into a report: report.html, report.md, report.json, tables, figures.

    Several directories give one report, in which launches that are not comparable are kept apart.
    `torchreg report compare OLD NEW` shows whether a campaign has become slower.
    """

    # Campaign directories, as `torchreg scale run` made them.
    dirs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR [DIR ...]")]
    out: Path | None = None  # Where the report is written. Default: `report` in the campaign's directory.
    min_efficiency: float = 0.8  # The efficiency that counts as scaling well.
    json: bool = False  # Print the result as one JSON object on stdout, and nothing else there.


@dataclass(frozen=True)
class CompareArguments:
    """Compare a new campaign with an old one: exit code 1 where a step became slower, or a result wrong.

    Slower means that the low end of the 95 % interval of new over old is beyond the threshold, also after correction
    for all points; faster, the high end. Intervals cover launches, not the hours of two campaigns.
    """

    old: tyro.conf.Positional[Path]  # The old campaign's directory, or its report.json.
    new: tyro.conf.Positional[Path]  # The new campaign's directory, or its report.json.
    threshold: float = 0.05  # The fraction by which a step may take longer.
    json: bool = False  # Print the result as one JSON object on stdout, and nothing else there.


def run(argv: list[str]) -> int:
    """Write a report, or compare two campaigns."""
    if argv[:1] == ["compare"]:
        return _compare(argv[1:])
    arguments = parse(ReportArguments, "torchreg report", argv)
    if not arguments.dirs:
        raise ValueError("report got no directory: give one of a campaign, as in `torchreg report DIR`")
    if arguments.out is None and len(arguments.dirs) > 1:
        raise ValueError(f"report got {len(arguments.dirs)} directories: give the directory of their report with --out")

    require_libraries("report", *_LIBRARIES)

    from torchreg.reporting.analysis import analyse, write_data
    from torchreg.scaling.records import read_records

    records = read_records(arguments.dirs)
    report = analyse(records, arguments.min_efficiency)
    folder = arguments.out or arguments.dirs[0] / "report"
    written = write_data(report, records, folder)

    from torchreg.reporting.pages import summary_lines, write_pages  # imports matplotlib, slowly: after bad input

    written += write_pages(report, folder)
    if arguments.json:
        print(to_json(report))
        return 0
    lines = [f"verdict      {line}" for line in summary_lines(report)]
    lines += [f"{what:13}{one['file']}: {one['reason']}" for what in ("failed", "excluded") for one in report[what]]
    lines += [f"report       {path}" for path in written if path.suffix in (".html", ".md", ".json")]
    show_lines(lines)
    return 0


def _compare(argv: list[str]) -> int:
    arguments = parse(CompareArguments, "torchreg report compare", argv)

    require_libraries("report", *_LIBRARIES)

    from torchreg.reporting.comparison import compare, conclusion, table

    comparison = compare(arguments.old, arguments.new, arguments.threshold)
    if arguments.json:
        print(to_json(comparison))
    else:
        if comparison["rows"]:
            show_table(*table(comparison))
        show_lines(conclusion(comparison))
    return EXIT_FAILED if comparison["is_regression"] else 0
