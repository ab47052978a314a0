"""Turn launch records into one dictionary of numbers, from which all pages and figures of a report are made."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from torchreg import __version__
from torchreg.reporting.bottlenecks import bottleneck, scaling_limit
from torchreg.reporting.fits import allreduce_of, models_of
from torchreg.reporting.groups import VERSIONS, Group, comparable_groups
from torchreg.reporting.points import Json, launches_by_point, point_of
from torchreg.reporting.provenance import cost, excluded, failures, provenance, sources
from torchreg.reporting.series import series_of
from torchreg.reporting.targets import best_of, prediction_error, targets_of
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
    groups = [_group(group, launches, points, allreduce) for group in comparable_groups(launches)]
    num_unreadable = sum(not one.is_wrong_result for one in records.excluded)
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
        "verdict": {"correct": _correct(launches, points, num_unreadable), **_verdict(groups)},
        "groups": groups,
        "cost": cost(launches),
        "provenance": provenance(records),
        "excluded": excluded(records),
        "failed": failures(records),
        "method": {"shortest_window_s": float(points["window_s"].min()) if len(points) else None},
    }


def _group(group: Group, launches: pd.DataFrame, points: pd.DataFrame, allreduce: pd.DataFrame) -> Json:
    own = launches[launches["launch"].isin(group.launches)]
    num_cpus = pd.to_numeric(own["num_cpus"])
    by_point = launches_by_point(group, points)
    found = {name: point_of(name, rows) for name, rows in by_point.items()}
    series = series_of(group.id, list(found.values()), by_point)
    too_many = own.loc[own["ranks_per_node"] > num_cpus, "ranks_per_node"]
    return {
        "id": group.id,
        "title": group.title,
        **{field: group.key[field] for field in ("machine", "device_name", "backend", "dtype")},
        "distributed": group.key["effective"],
        "versions": {name: group.key[name] for name in VERSIONS},
        "num_launches": len(group.launches),
        "num_cpus": int(num_cpus.min()) if num_cpus.notna().any() else None,
        "oversubscribed_ranks_per_node": sorted(too_many.unique().tolist()),
        "points": list(found.values()),
        "series": [{**one, "models": models_of(one, found, by_point, series)} for one in series],
        "allreduce": allreduce_of(allreduce[allreduce["launch"].isin(group.launches)]),
        "targets": targets_of(series, by_point),
    }


def _correct(launches: pd.DataFrame, points: pd.DataFrame, num_unreadable: int) -> Json:
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
        "num_excluded": num_unreadable,
    }


def _verdict(groups: Sequence[Json]) -> Json:
    scaling, bottlenecks = [], []
    for group in groups:
        points = {point["id"]: point for point in group["points"]}
        scaling += [{"group": group["id"], **scaling_limit(one)} for one in group["series"]]
        found = [bottleneck(one, points) for one in group["series"]]
        bottlenecks += [{"group": group["id"], **one} for one in found if one]
    best = [one for group in groups for one in best_of(group)]
    return {
        "scaling": scaling,
        "bottlenecks": bottlenecks,
        "targets": best,
        "fastest": best[0]["fastest"] if best else None,
        "lowest_node_hours": best[0]["lowest_node_hours"] if best else None,
        "prediction_errors": [error for group in groups if (error := prediction_error(group))],
    }
