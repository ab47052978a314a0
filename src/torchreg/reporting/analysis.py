"""Turn launch records into one dictionary of numbers, from which all pages and figures of a report are made."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from torchreg import __version__
from torchreg.console import printable
from torchreg.core.checkpoint import write_atomically
from torchreg.reporting.groups import Json, comparable_groups, launches_by_point, point_of
from torchreg.reporting.series import allreduce_of, models_of, series_of
from torchreg.reporting.verdict import best_of, bottleneck, prediction_error, scaling_limit, targets_of
from torchreg.runs.record import write_json
from torchreg.scaling.records import Records, allreduce_table, launches_table, points_table

KIND = "scaling-report"
SCHEMA_VERSION = 3

_OF_ONE_LAUNCH = r"(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|SLURM_(JOB_NUM_NODES|NTASKS)|TORCHELASTIC_.*"
_OF_SEVERAL_RANKS = ("backend", "effective", "mpi_library", "nccl_version", "ezpz_version")
_NOT_OF_ONE_RANK = frozenset(f"distributed.{field}" for field in _OF_SEVERAL_RANKS)
_DISTRIBUTED = (*_OF_SEVERAL_RANKS, "launcher", "requested", "device_name", "cpus_per_rank")


def analyse(records: Records) -> Json:
    """The content of report.json: numbers and identifiers. The same records give the same report.

    An interval is `{"value", "low", "high", "num_launches"}`; its ends are None where there are too few launches.
    Groups are never compared with each other. Every string may come from a record: pages must escape it.

    - `verdict`: `correct` (`status` yes, no or unknown), `scaling` and `bottlenecks` of each series, `targets` (one for
      each group, number of features and target; `fastest` and `lowest_node_hours` are the first's), `prediction_errors`
    - `groups`: `points` (times and the breakdown of a step), `series` (with `models`), `allreduce`, `targets`
    - `sources` (directory, campaign and machine), `cost`, `provenance`, `excluded`, `failed`, `method`
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


def sources(launches: pd.DataFrame) -> list[Json]:
    """One entry for each directory, campaign and machine."""
    found = []
    for (folder, campaign, machine), rows in launches.groupby(["source", "campaign", "machine"], sort=True):
        num_good, job_ids = int((rows["status"] == "ok").sum()), sorted(set(rows["job_id"].dropna()))
        origin = {"folder": folder, "campaign": campaign, "machine": machine, "job_ids": job_ids}
        found.append({**origin, "num_launches": num_good, "num_failed": len(rows) - num_good})
    return found


def cost(launches: pd.DataFrame) -> Json:
    """What all launches took, failed ones included; a partly used node counts whole."""
    node_s = launches["wall_s"] * launches["num_nodes"]
    failed = launches["status"] == "failed"
    return {
        "num_launches": len(launches),
        "num_failed": int(failed.sum()),
        "wall_s": float(launches["wall_s"].sum()),
        "node_hours": float(node_s.sum() / 3600),
        "failed_node_hours": float(node_s[failed].sum() / 3600),
    }


def provenance(records: Records) -> Json:
    """Fields that all launches have in common, and for the others each value with the number of its launches."""
    launches = [(launch.content["launch"]["world_size"] > 1, _fields(launch.content)) for launch in records.launches]
    same, differs = {}, []
    for field in sorted({field for _, fields in launches for field in fields}):
        values = (one.get(field) for is_several, one in launches if is_several or field not in _NOT_OF_ONE_RANK)
        found = sorted(Counter(values).items(), key=lambda pair: (pair[0] is None, pair[0] or ""))
        if len(found) > 1:
            differs.append({"field": field, "values": [{"value": value, "launches": n} for value, n in found]})
        elif found and found[0][0] is not None:
            same[field] = found[0][0]
    return {"same": same, "differs": differs}


def _fields(content: Mapping[str, Any]) -> dict[str, str | None]:
    """What a record has of its origin, as texts; None where it was not recorded."""
    campaign, communicator, origin = content["campaign"], content["distributed"], content["provenance"]
    sections = {
        "campaign.": {key: campaign[key] for key in ("name", "machine", "fingerprint")},
        "distributed.": {key: communicator[key] for key in _DISTRIBUTED},
        "source.": origin["source"],
        "libraries.": origin["libraries"],
        "environment.": {k: v for k, v in origin["environment"].items() if not re.fullmatch(_OF_ONE_LAUNCH, k)},
        "machine_facts.": content["machine_facts"],
        "": {key: origin[key] for key in ("python", "platform", "job_id")} | {"dtype": content["dtype"]},
    }
    fields = {prefix + key: value for prefix, section in sections.items() for key, value in section.items()}
    fields["campaign.without"] = " ".join(campaign["without"]) or None
    fields["devices"] = ", ".join(sorted({place["device"].split(":")[0] for place in communicator["placements"]}))
    return {key: one if one is None or isinstance(one, str) else json.dumps(one) for key, one in fields.items()}


def excluded(records: Records) -> list[Json]:
    """What is in no statistics, with reasons."""
    return [{**asdict(one), "file": printable(str(one.file))} for one in records.excluded]


def failures(records: Records) -> list[Json]:
    """The launches that failed, with their reasons; `is_retried` where a later try succeeded."""
    good, found = {launch.name for launch in records.launches}, []
    for one in sorted(records.failed, key=lambda one: (one.name, str(one.path))):
        launch = {key: one.content["launch"][key] for key in ("world_size", "num_nodes", "ranks_per_node")}
        launch |= {"launch": one.name, "machine": one.content["campaign"]["machine"], "is_retried": one.name in good}
        files = {"file": printable(str(one.path)), "log": one.log and printable(str(one.log))}
        found.append({**launch, **files, **{key: one.content[key] for key in ("exit_code", "reason")}})
    return found


def write_data(report: Mapping[str, Any], records: Records, folder: Path) -> list[Path]:
    """Write report.json, points and allreduce as CSV and Parquet, and launches.csv; the paths.

    The same records give the same bytes. Raises `ValueError` where the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out is {folder}, which cannot be made ({error.strerror}): give another --out") from error
    write_json(folder / "report.json", report)
    paths = [folder / "report.json"]
    for name, table_of in {"points": points_table, "allreduce": allreduce_table, "launches": launches_table}.items():
        table = table_of(records)
        files = {"csv": table.to_csv(index=False, lineterminator="\n").encode()}
        if name != "launches":
            files["parquet"] = table.to_parquet(index=False)
        for ending, content in files.items():
            paths.append(folder / f"{name}.{ending}")
            write_atomically(paths[-1], content)
    return paths
