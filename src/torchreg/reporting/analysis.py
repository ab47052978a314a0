"""Tables in, everything that a report says out: one plain dictionary, from which all pages and pictures are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from torchreg import __version__
from torchreg.reporting.fits import allreduce_of, models_of
from torchreg.reporting.groups import VERSIONS, Group, comparable_groups
from torchreg.reporting.method import method
from torchreg.reporting.points import Point, point_json, points_of
from torchreg.reporting.provenance import cost, excluded, failures, provenance, sources
from torchreg.reporting.series import Series, series_json, series_of
from torchreg.reporting.summary import verdict
from torchreg.reporting.targets import targets_of
from torchreg.scaling.records import Records, allreduce_table, launches_table, points_table

KIND = "scaling-report"
SCHEMA_VERSION = 1


def analyse(records: Records) -> dict[str, Any]:
    """What the records say, as report.json has it; the same records give the same report.

    An interval is `{"value", "low", "high", "num_launches"}`, its ends None where there are too few launches. Groups
    are never compared with each other. Every string may come from a record: pages must escape it.

    - `sources`: one for each directory, campaign and machine
    - `verdict`: `correct` (`status` yes, no or unknown), `lines` (sentences, the most important first), `scaling` and
      `bound_by` (one for each series), `fastest` and `lowest_node_hours` (None where no target was reached)
    - `groups`: `points` (times with intervals, and the breakdown of a step), `series` (strong and weak, with `models`),
      `allreduce`, `targets`
    - `cost`, `provenance` (`same`, `differs`), `excluded`, `failed`, `method` (paragraphs)
    """
    launches, points = launches_table(records), points_table(records)
    allreduce = allreduce_table(records)
    groups = [_group(group, launches, points, allreduce) for group in comparable_groups(launches)]
    excluded_records = excluded(records)
    machines = ", ".join(dict.fromkeys(launches["machine"]))
    campaigns = ", ".join(dict.fromkeys(launches["campaign"]))
    num_unreadable = sum(not one.is_wrong_result for one in records.excluded)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "torchreg": __version__,
        "title": f"Scaling of {campaigns} on {machines}" if len(launches) else "Scaling: no launch can be used",
        "data_from_utc": _first(launches["started_utc"]),
        "data_to_utc": _last(pd.concat([launches["finished_utc"], launches["started_utc"]])),
        "sources": sources(launches),
        "verdict": verdict(launches, points, groups, num_unreadable),
        "groups": groups,
        "cost": cost(launches),
        "provenance": provenance(records),
        "excluded": excluded_records,
        "failed": failures(records),
        "method": method(points),
    }


def _group(group: Group, launches: pd.DataFrame, points: pd.DataFrame, allreduce: pd.DataFrame) -> dict[str, Any]:
    own = launches[launches["launch"].isin(group.launches)]
    num_cpus = pd.to_numeric(own["num_cpus"])
    mine = points[points["launch"].isin(group.launches) & points["check_passed"]]
    found = points_of(group.id, mine)
    series = series_of(group.id, found)
    return {
        "id": group.id,
        "title": group.title,
        "machine": group.key["machine"],
        "device_name": group.key["device_name"],
        "backend": group.key["backend"],
        "dtype": group.key["dtype"],
        "distributed": group.key["effective"],
        "versions": {name: group.key[name] for name in VERSIONS},
        "num_launches": len(group.launches),
        "num_cpus": int(num_cpus.min()) if num_cpus.notna().any() else None,
        "oversubscribed_ranks_per_node": sorted(
            own.loc[own["ranks_per_node"] > num_cpus, "ranks_per_node"].unique().tolist()
        ),
        "points": [point_json(point) for point in found],
        "series": [{**series_json(one), "models": models_of(one, _alike(one, series))} for one in series],
        "allreduce": allreduce_of(allreduce[allreduce["launch"].isin(group.launches)]),
        "targets": targets_of(series),
    }


def _alike(series: Series, others: Sequence[Series]) -> list[Point]:
    """The points of all series that differ from this one in the batch at most."""

    def setting(one: Series) -> tuple[str, str, str, int]:
        return one.scope, one.optimizer, one.sync, one.num_features

    found: Mapping[str, Point] = {
        point.id: point for other in others if setting(other) == setting(series) for point in other.points
    }
    return list(found.values())


def _first(times: pd.Series[str]) -> str | None:
    return min(times.dropna(), default=None)


def _last(times: pd.Series[str]) -> str | None:
    return max(times.dropna(), default=None)
