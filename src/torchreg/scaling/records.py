"""The launch records of campaigns: which can be used, which are left out and why, and the tables they make.

A campaign directory holds `launches/<id>/launch.json`, one a launch (see `torchreg.scaling.schema`). Reading never
fails because of what a record holds: what cannot be used is listed with its reason. Several directories can be read
as one, or merged into one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from torchreg.scaling import schema
from torchreg.scaling.merging import merge
from torchreg.scaling.sources import LAUNCH_FILE, LOGS, SUFFIX, File, distinct, has_text, launch_id, place

__all__ = [
    "Excluded",
    "Failure",
    "Launch",
    "Records",
    "allreduce_table",
    "launches_table",
    "merge",
    "points_table",
    "read_records",
]


@dataclass(frozen=True)
class Launch:
    """One launch that can be used. `name` is its id, with `~2` and so on behind it where two sources share the id."""

    name: str
    source: Path
    path: Path
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Failure:
    """One launch that failed, or an earlier try that did; `log` is what it said last, where it said something."""

    name: str
    source: Path
    path: Path
    log: Path | None
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Excluded:
    """Something that is in no statistics: the file, what it is, the reason, and whether it is a failed check."""

    file: Path
    what: str
    reason: str
    is_wrong_result: bool = False


@dataclass(frozen=True)
class Records:
    """What the directories hold: `launches` went well, `failed` did not, `excluded` cannot be used."""

    sources: tuple[Path, ...]
    launches: tuple[Launch, ...]
    failed: tuple[Failure, ...]
    excluded: tuple[Excluded, ...]


def read_records(folders: Sequence[Path]) -> Records:
    """All records of some campaign directories; identical copies in several directories count once.

    Raises `ValueError` for a directory without any launch, and says what to run.
    """
    sources = distinct(folders)
    launches: list[Launch] = []
    failed: list[Failure] = []
    excluded: list[Excluded] = []
    for name, folder in place(sources).items():
        log = next((folder.path / log for log in LOGS if has_text(folder.path / log)), None)
        for file in folder.files:
            try:
                content = _checked(file, folder.path)
            except ValueError as error:
                excluded.append(Excluded(file.path, "record", str(error)))
                continue
            if content["status"] == "failed":
                failed.append(Failure(name, folder.source, file.path, log, content))
            else:
                launches.append(Launch(name, folder.source, file.path, content))
                excluded += _failed_checks(file.path, name, content)
    return Records(tuple(sources), tuple(launches), tuple(failed), tuple(excluded))


def _checked(file: File, folder: Path) -> dict[str, Any]:
    """The record in a file. Raises `ValueError` with the reason why it cannot be used."""
    if file.problem is not None:
        raise ValueError(file.problem)
    content = schema.check(file.content)
    if content["launch"]["id"] != launch_id(folder):
        raise ValueError(f"launch.id is {content['launch']['id']!r}, not the folder's name")
    if content["status"] == "ok" and file.path.name != LAUNCH_FILE:
        raise ValueError("named as a failed try, and its status is ok")
    return content


def _failed_checks(path: Path, name: str, content: Mapping[str, Any]) -> Iterator[Excluded]:
    for point in content["points"]:
        if not point["check"]["passed"]:
            check = point["check"]
            setting = f"{point['optimizer']}/{point['sync']}, num_features {point['num_features']}"
            yield Excluded(
                path,
                f"point {setting}, global_batch_size {point['global_batch_size']} of {name}",
                f"wrong result: {check['told']} (difference {_shown(check['difference'])}, allowed "
                f"{_shown(check['tolerance'])})",
                is_wrong_result=True,
            )


def _shown(number: float | None) -> str:
    return "not a number" if number is None else f"{number:.3g}"


# Tables


def launches_table(records: Records) -> pd.DataFrame:
    """One row a launch, failed ones and earlier tries included: what it was, where it ran, how long, how it ended.

    `block` counts the blocks of all sources together, so that a number never stands for two of them.
    """
    tries: list[Launch | Failure] = [*records.launches, *records.failed]
    table = pd.DataFrame([_launch_row(one) for one in tries], columns=_LAUNCH_COLUMNS)
    table = table.sort_values(["status", "launch", "file"], ascending=[False, True, True], ignore_index=True)
    keys = ["fingerprint", "suffix", "recorded_block"]
    again = table.groupby([*keys, "status", "world_size", "num_nodes", "ranks_per_node"]).cumcount()
    table["block"] = table.assign(again=again).groupby([*keys, "again"], sort=True).ngroup()
    return table.drop(columns="suffix")


FACTS = ("driver", "cuda", "rocm", "oneccl", "libfabric", "kernel", "tf32")
"""What `torchreg.runs.record.machine_facts` has, and decides a number; a record that lacks one has None."""

_PLACEMENT = re.compile(
    r"\w*(VISIBLE_DEVICES|DEVICE_(ORDER|ORDINAL|SELECTOR|HIERARCHY)|AFFINITY|NUMA|(CPU|GPU|MEM|PROC)_BIND|PLACES)\w*"
)

_LAUNCH_COLUMNS = [
    "launch", "status", "campaign", "machine", "fingerprint", "suffix", "block", "recorded_block", "world_size",
    "num_nodes", "ranks_per_node", "seed", "exit_code", "reason", "started_utc", "finished_utc", "wall_s", "start_up_s",
    "num_points", "num_failed_checks", "launcher", "requested", "effective", "ezpz_version", "backend", "mpi_library",
    "nccl_version", "device_name", "num_cpus", "dtype", "torch", "numpy", *FACTS, "placement", "without", "python",
    "platform", "commit", "dirty", "job_id", "source", "file",
]  # fmt: skip


def _launch_row(one: Launch | Failure) -> dict[str, Any]:
    content = one.content
    row = {key: content["campaign"][key] for key in ("machine", "fingerprint")}
    row |= {key: content["launch"][key] for key in ("world_size", "num_nodes", "ranks_per_node", "seed")}
    row |= {key: content[key] for key in ("status", "exit_code", "reason", "started_utc", "wall_s") if key in content}
    suffix = SUFFIX.search(one.name)
    row |= {
        "launch": one.name,
        "campaign": content["campaign"]["name"],
        "suffix": suffix.group() if suffix else "",
        "recorded_block": content["launch"]["block"],
        "source": schema.printable(str(one.source)),
        "file": schema.printable(str(one.path)),
    }
    if isinstance(one, Failure):
        return row
    provenance, communicator = content["provenance"], content["distributed"]
    run_fields = "launcher requested effective ezpz_version backend mpi_library nccl_version"
    facts, environment = content.get("machine_facts") or {}, sorted(provenance["environment"].items())
    devices = {place["device_name"] for place in communicator["placements"] if place.get("device_name")}
    return row | {
        **{key: communicator[key] for key in run_fields.split()},
        "device_name": ", ".join(sorted(devices)) or communicator["device_name"],
        **{key: facts.get(key) for key in FACTS},
        "placement": " ".join(f"{name}={value}" for name, value in environment if _PLACEMENT.fullmatch(name)) or None,
        "without": " ".join(sorted(content["campaign"].get("without") or [])) or None,
        # Of a node whose ranks compute on them.
        "num_cpus": communicator.get("num_cpus") if communicator["placements"][0]["device"] == "cpu" else None,
        **{key: provenance[key] for key in ("python", "platform", "job_id", "finished_utc")},
        **{key: provenance["libraries"].get(key) for key in ("torch", "numpy")},
        **{key: provenance["source"][key] for key in ("commit", "dirty")},
        "start_up_s": content["start_up_s"],
        "dtype": content["dtype"],
        "num_points": len(content["points"]),
        "num_failed_checks": sum(not point["check"]["passed"] for point in content["points"]),
    }


_OF_LAUNCH = ["launch", "machine", "block", "world_size", "num_nodes", "ranks_per_node"]
_SETTING = ["optimizer", "sync", "num_features", "global_batch_size"]

_POINT_FIELDS: dict[str, type] = {
    "optimizer": str, "sync": str, "num_features": int, "global_batch_size": int, "local_batch_size": float,
    "message_bytes": int, "order": int, "num_warmup_steps": int, "num_steps": int, "window_s": float,
    "step_time_s": float, "local_step_time_s": float, "data_time_s": float, "throughput": float,
}  # fmt: skip
_RANK_FIELDS: dict[str, type] = {"min": float, "median": float, "max": float, "slowest_rank": int, "slowest_host": str}
_CHECK_FIELDS: dict[str, type] = {"passed": bool, "difference": float, "tolerance": float, "excess": float, "told": str}
_TARGET_FIELDS: dict[str, type] = dict.fromkeys(
    ["target_excess", "predicted_steps", "measured_steps", "measured_time_s", "stability_limit", "noise_floor"], float
)


def points_table(records: Records) -> pd.DataFrame:
    """One row a launch and point, those whose check failed included (`check_passed`); times in seconds.

    The step times over ranks are `rank_min_s`, `rank_median_s`, `rank_max_s`; a target's fields are NaN where none was
    asked for, and its steps are NaN for a target that is never reached.
    """
    rows = []
    for launch in records.launches:
        for point in launch.content["points"]:
            rows.append(
                {"launch": launch.name}
                | _part(point, _POINT_FIELDS)
                | _part(point["rank_step_time_s"], _RANK_FIELDS, _rank_column)
                | _part(point["check"], _CHECK_FIELDS, _check_column)
                | _part(point["target"] or {}, _TARGET_FIELDS)
            )
    columns = {
        **_POINT_FIELDS,
        **{_rank_column(field): kind for field, kind in _RANK_FIELDS.items()},
        **{_check_column(field): kind for field, kind in _CHECK_FIELDS.items()},
        **_TARGET_FIELDS,
    }
    return _with_launches(rows, columns, _SETTING, records)


_ALLREDUCE_FIELDS: dict[str, type] = {
    "way": str, "sync": str, "message_bytes": int, "time_s": float, "num_repeats": int,
}  # fmt: skip


def allreduce_table(records: Records) -> pd.DataFrame:
    """One row a launch, way and message size."""
    rows = [
        {"launch": launch.name} | _part(item, _ALLREDUCE_FIELDS)
        for launch in records.launches
        for item in launch.content["allreduce"]
    ]
    return _with_launches(rows, _ALLREDUCE_FIELDS, ["way", "sync", "message_bytes"], records)


def _part(content: Mapping[str, Any], fields: Mapping[str, type], column: Callable[[str], str] = str) -> dict[str, Any]:
    """These fields and no others, which a record may have beside them."""
    return {column(field): content.get(field) for field in fields}


def _rank_column(field: str) -> str:
    return field if field.startswith("slowest") else f"rank_{field}_s"


def _check_column(field: str) -> str:
    return f"check_{field}"


def _with_launches(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, type], order: Sequence[str], records: Records
) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["launch", *columns]).astype(dict(columns))
    launches = launches_table(records)
    launches = launches[launches["status"] == "ok"][_OF_LAUNCH]
    return launches.merge(table, on="launch", validate="one_to_many").sort_values(["launch", *order], ignore_index=True)
