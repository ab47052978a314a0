"""Turn launch records into one dictionary of numbers, from which all pages and figures of a report are made."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median, mode
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from torchreg import __version__
from torchreg.console import printable
from torchreg.core.checkpoint import write_atomically
from torchreg.reporting.groups import Json, comparable_groups, launches_by_point, point_of
from torchreg.reporting.series import allreduce_of, models_of, series_of
from torchreg.reporting.verdict import best_of, bottleneck, headline, prediction_error, scaling_limit, targets_of
from torchreg.runs.record import write_json
from torchreg.scaling.records import Records, allreduce_table, launches_table, points_table

KIND = "scaling-report"
SCHEMA_VERSION = 3

_OF_ONE_LAUNCH = r"(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|SLURM_(JOB_NUM_NODES|NTASKS)|TORCHELASTIC_.*"
_OF_SEVERAL_RANKS = ("backend", "effective", "mpi_library", "nccl_version", "ezpz_version")
_NOT_OF_ONE_RANK = frozenset(f"distributed.{field}" for field in _OF_SEVERAL_RANKS)
_DISTRIBUTED = (*_OF_SEVERAL_RANKS, "launcher", "requested", "device_name", "cpus_per_rank")


def analyse(records: Records, min_efficiency: float = 0.8) -> Json:
    """The content of report.json: numbers and identifiers. The same records give the same report.

    `min_efficiency` is the efficiency that counts as scaling well. Raises `ValueError` for one not above 0, to 1.

    An interval is `{"value", "low", "high", "num_launches"}`; its ends are None where there are too few launches.
    Groups are never compared with each other. Every string may come from a record: pages must escape it.

    - `verdict`: `correct` (`status` yes, no or unknown), `headline` (what the first screen is about), `slow_hosts`
    - `groups`: `points` (times and the breakdown of a step), `series` (with `models`, `limit`, `bottleneck` and
      `targets`), `allreduce`, `best` (of each number of features and target), `prediction_error`
    - `sources` (directory, campaign and machine), `largest_launch`, `cost`, `provenance`
    - `excluded`, `failed`, `method`
    """
    if not 0 < min_efficiency <= 1:
        raise ValueError(f"min_efficiency is {min_efficiency}: give a fraction above 0, to 1, such as 0.8 for 80 %")
    launches, points = launches_table(records), points_table(records)
    tables = points, allreduce_table(records)
    groups = [_group(heading, own["launch"], tables, min_efficiency) for heading, own in comparable_groups(launches)]
    times = pd.concat([launches["finished_utc"], launches["started_utc"]]).dropna()
    largest = max((one.content for one in records.launches), key=lambda one: one["launch"]["world_size"], default=None)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "torchreg": __version__,
        "campaigns": list(dict.fromkeys(launches["campaign"])),
        "machines": list(dict.fromkeys(launches["machine"])),
        "data_from_utc": min(launches["started_utc"].dropna(), default=None),
        "data_to_utc": max(times, default=None),
        "sources": sources(launches),
        "verdict": {
            "correct": _correct(launches, points, records),
            "headline": headline(groups[0]) if groups else None,
            "slow_hosts": slow_hosts(records),
        },
        "groups": groups,
        "largest_launch": largest and {**largest["launch"], "command": shlex.join(largest["command"])},
        "cost": cost(launches),
        "provenance": provenance(records),
        "excluded": excluded(records),
        "failed": failures(records),
        "method": {"shortest_window_s": float(points["window_s"].min()) if len(points) else None},
    }


def _group(heading: Json, launches: pd.Series[str], tables: tuple[pd.DataFrame, ...], min_efficiency: float) -> Json:
    points, allreduce = tables
    by_point = launches_by_point(heading["id"], launches, points)
    found = [point_of(name, rows) for name, rows in by_point.items()]
    series, points_by_id = series_of(heading["id"], found, by_point), {point["id"]: point for point in found}
    for one in series:
        one["limit"] = scaling_limit(one, min_efficiency)
        one["bottleneck"] = bottleneck(one, points_by_id, min_efficiency)
        one |= {"models": models_of(one, by_point, series), "targets": targets_of(one, by_point)}
    return {
        **heading,
        "points": found,
        "series": series,
        "allreduce": allreduce_of(allreduce[allreduce["launch"].isin(launches)]),
        "best": best_of(series),
        "prediction_error": prediction_error(series),
    }


def _correct(launches: pd.DataFrame, points: pd.DataFrame, records: Records) -> Json:
    """Whether all runs end at the closed-form solution, those whose check failed included, and all of verify passed."""
    wrong = points[~points["check_passed"]]
    first = wrong[["launch", "optimizer", "sync", "num_features", "world_size"]].to_dict("records")[:1]
    good = {launch.name for launch in records.launches}
    latest = [*records.launches, *(launch for launch in records.failed if launch.name not in good)]
    verified = [launch.content.get("verification") for launch in latest]  # a failed record's fields may be anything
    checks = [check for rows in verified if isinstance(rows, list) for check in rows if isinstance(check, dict)]
    failed_checks = [f"{check.get('area')}: {check.get('name')}" for check in checks if check.get("status") == "FAIL"]
    return {
        "status": "no" if len(wrong) or failed_checks else "unknown" if points.empty else "yes",
        "num_checks": len(checks),
        "failed_checks": failed_checks,
        "num_runs": len(points),
        "num_wrong": len(wrong),
        "first_wrong": first[0] if first else None,
        "num_launches": int((launches["status"] == "ok").sum()),
        "num_failed": int((launches["status"] == "failed").sum()),
        "num_excluded": sum(not one.is_wrong_result for one in records.excluded),
    }


def slow_hosts(records: Records) -> list[Json]:
    """Hosts that had the slowest rank in more of their launches on several hosts than chance explains.

    By chance each host of a launch has it equally often: a binomial test, corrected for the number of hosts. A launch
    counts once, by most of its points. `slowdown` is the slowest rank over the median rank, less 1, in the median.
    """
    rows = []
    for content in (launch.content for launch in records.launches if launch.content["points"]):
        hosts = {one["host"] for one in content["distributed"]["placements"]}
        slowest = mode(point["slowest_host"] for point in content["points"])
        slowdown = median(point["rank_max_s"] / point["rank_median_s"] - 1 for point in content["points"])
        for host in hosts if len(hosts) > 1 else ():
            rows.append((content["campaign"]["machine"], host, host == slowest, slowdown, 1 / len(hosts)))
    table = pd.DataFrame(rows, columns=["machine", "host", "is_slowest", "slowdown", "chance"])
    by_host, found = table.groupby(["machine", "host"]), []
    for (machine, host), own in by_host:
        num_slowest, slow = int(own["is_slowest"].sum()), own.loc[own["is_slowest"], "slowdown"]
        p_value = binomtest(num_slowest, len(own), own["chance"].mean(), alternative="greater").pvalue * len(by_host)
        if p_value <= 0.05:
            counts = {"num_launches": len(own), "num_slowest": num_slowest, "slowdown": float(slow.median())}
            found.append({"machine": machine, "host": host, **counts, "p_value": float(p_value)})
    return found


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
        "campaign.": {**campaign, "without": " ".join(campaign["without"]) or None},
        "distributed.": {key: communicator[key] for key in _DISTRIBUTED},
        "source.": origin["source"],
        "libraries.": origin["libraries"],
        "environment.": {k: v for k, v in origin["environment"].items() if not re.fullmatch(_OF_ONE_LAUNCH, k)},
        "machine_facts.": content["machine_facts"],
        "": {key: origin[key] for key in ("python", "platform", "job_id")} | {"dtype": content["dtype"]},
    }
    fields = {prefix + key: value for prefix, section in sections.items() for key, value in section.items()}
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
