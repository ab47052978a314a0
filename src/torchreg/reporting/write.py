"""The data files of a report: report.json and tidy tables, each written whole."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchreg.core.checkpoint import write_atomically
from torchreg.runs.record import write_json
from torchreg.scaling.records import Records, allreduce_table, launches_table, points_table


def require_report_libraries() -> None:
    """Raise `ValueError`, before any work, where a report cannot be made."""
    for library in ("jinja2", "matplotlib", "pyarrow", "scipy"):
        if find_spec(library) is None:
            raise ValueError(f"report needs {library}, which is not installed: pip install {library}")


def write_data(report: Mapping[str, Any], records: Records, folder: Path) -> list[Path]:
    """Write report.json, points and allreduce as CSV and Parquet, and launches.csv; the paths.

    The same records give the same bytes. Raises `ValueError` where the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out is {folder}, which cannot be made ({error.strerror}): give another --out") from error
    write_json(folder / "report.json", report)
    files = {}
    for name, table in (("points", points_table(records)), ("allreduce", allreduce_table(records))):
        files[f"{name}.csv"] = table.to_csv(index=False, lineterminator="\n").encode()
        files[f"{name}.parquet"] = table.to_parquet(index=False)
    files["launches.csv"] = launches_table(records).to_csv(index=False, lineterminator="\n").encode()
    for file, content in files.items():
        write_atomically(folder / file, content)
    return [folder / name for name in ("report.json", *files)]
