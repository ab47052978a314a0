"""Turn launch records into one dictionary of numbers, from which all pages and figures of a report are made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from torchreg import __version__
from torchreg.core.checkpoint import write_atomically
from torchreg.reporting.groups import Json, comparable_groups, launches_by_point, point_of
from torchreg.reporting.provenance import cost, excluded, failures, provenance, sources
from torchreg.reporting.series import allreduce_of, models_of, series_of
from torchreg.reporting.verdict import best_of, bottleneck, prediction_error, scaling_limit, targets_of
from torchreg.runs.record import write_json
from torchreg.scaling.records import Records, allreduce_table, launches_table, points_table

KIND = "scaling-report"
SCHEMA_VERSION = 2


def analyse(records: Records) -> Json:
    """The content of report.json: numbers and identifiers. The same records give the same report.

    An interval is `{"value", "low", "high", "num_launches"}`; its ends are None where there are too few launches.
    Groups are never compared with each other. Every string may come from a record: pages must escape it.

    - `sources`: one for each directory, campaign and machine
    - `verdict`: `correct` (`status` yes, no or unknown), `scaling` and `bottlenecks` (one for each series), `targets`
      (one for each group, number of features and target), `fastest` and `lowest_node_hours` of the first of these,
      `prediction_errors` (one for each group)
    - `groups`: `points` (times with intervals, and the breakdown of a step), `series` (strong and weak, with `models`),
      `allreduce`, `targets`
    - `cost`, `provenance` (`same`, `differs`), `excluded`, `failed`, `method`
    """
    launches, points, allreduce = launches_table(records), points_table(records), allreduce_table(records)
    groups = [_group(heading, own, points, allreduce) for heading, own in comparable_groups(launches)]
    times = pd.concat([launches["finished_utc"], launches["started_utc"]]).dropna()
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "torchreg": __version__,
        "campaigns": list(dict.fromkeys(launches["campaign"])),
        "machines": list(dict.fromkeys(launches["machine"])),
        "data_from_utc": min(launches["started_utc"].dropna(), default=None),
        "data_to_utc": max(times, default=None),
        "sources": sources(launches),
        "verdict": {"correct": _correct(launches, points, records), **_verdict(groups)},
        "groups": groups,
        "cost": cost(launches),
        "provenance": provenance(records),
        "excluded": excluded(records),
        "failed": failures(records),
        "method": {"shortest_window_s": float(points["window_s"].min()) if len(points) else None},
    }


def _group(heading: Json, launches: pd.DataFrame, points: pd.DataFrame, allreduce: pd.DataFrame) -> Json:
    by_point = launches_by_point(heading["id"], launches["launch"], points)
    found = [point_of(name, rows) for name, rows in by_point.items()]
    series = series_of(heading["id"], found, by_point)
    return {
        **heading,
        "points": found,
        "series": [{**one, "models": models_of(one, by_point, series)} for one in series],
        "allreduce": allreduce_of(allreduce[allreduce["launch"].isin(launches["launch"])]),
        "targets": targets_of(series, by_point),
    }


def _correct(launches: pd.DataFrame, points: pd.DataFrame, records: Records) -> Json:
    """Whether all runs end at the closed-form solution, those whose check failed included."""
    wrong = points[~points["check_passed"]]
    first = wrong[["launch", "optimizer", "sync", "num_features", "world_size"]].to_dict("records")[:1]
    return {
        "status": "unknown" if points.empty else "yes" if wrong.empty else "no",
        "num_runs": len(points),
        "num_wrong": len(wrong),
        "first_wrong": first[0] if first else None,
        "num_launches": int((launches["status"] == "ok").sum()),
        "num_failed": int((launches["status"] == "failed").sum()),
        "num_excluded": sum(not one.is_wrong_result for one in records.excluded),
    }


def _verdict(groups: list[Json]) -> Json:
    points = {point["id"]: point for group in groups for point in group["points"]}
    series = [(group["id"], one) for group in groups for one in group["series"]]
    bottlenecks = [(group, bottleneck(one, points)) for group, one in series]
    best = [one for group in groups for one in best_of(group)]
    return {
        "scaling": [{"group": group, **scaling_limit(one)} for group, one in series],
        "bottlenecks": [{"group": group, **one} for group, one in bottlenecks if one],
        "targets": best,
        **{name: best[0][name] if best else None for name in ("fastest", "lowest_node_hours")},
        "prediction_errors": [error for group in groups if (error := prediction_error(group))],
    }


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
    tables = {
        "points": points_table(records),
        "allreduce": allreduce_table(records),
        "launches": launches_table(records),
    }
    for name, table in tables.items():
        files[f"{name}.csv"] = table.to_csv(index=False, lineterminator="\n").encode()
        if name != "launches":
            files[f"{name}.parquet"] = table.to_parquet(index=False)
    for file, content in files.items():
        write_atomically(folder / file, content)
    return [folder / name for name in ("report.json", *files)]
