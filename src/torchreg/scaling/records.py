"""The launch records of campaigns: which can be used, which are excluded and why, and the tables of them.

Reading never fails because of what a record holds: what cannot be used is listed with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
from msgspec import inspect

from torchreg.console import printable
from torchreg.scaling.launch_record import AllReduce, Point, check
from torchreg.scaling.sources import LAUNCH_FILE, distinct, name_folders


@dataclass(frozen=True)
class Launch:
    """One launch that can be used, or one attempt that failed, with the path of its log where it has any output.

    `name` is its id, followed by `~2` and so on where two sources share the id. `content` has the fields of an
    `OkLaunch` or of a `FailedLaunch`.
    """

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
    """What the directories hold."""

    launches: list[Launch] = field(default_factory=list)
    failed: list[Launch] = field(default_factory=list)
    excluded: list[Excluded] = field(default_factory=list)


def read_records(folders: Sequence[Path]) -> Records:
    """All records of some campaign directories; identical copies in several directories count once.

    Raises `ValueError`, with the command to run, for a directory without any launch.
    """
    records = Records()
    for name, folder in name_folders(distinct(folders)).items():
        for path, attempt in folder.attempts.items():
            try:
                if isinstance(attempt, str):
                    raise ValueError(attempt)
                content = check(attempt)
                if content["launch"]["id"] != folder.id:
                    raise ValueError(f"launch.id is {content['launch']['id']!r}, not the folder's name")
                if content["status"] == "ok" and path.name != LAUNCH_FILE:
                    raise ValueError("status is ok, and the file's name is that of a failed attempt")
            except ValueError as error:
                records.excluded.append(Excluded(path, "record", str(error)))
                continue
            launch = Launch(name, folder.source, path, next(iter(folder.logs), None), content)
            (records.failed if content["status"] == "failed" else records.launches).append(launch)
            for point in content.get("points", ()):
                if not point["check_passed"]:
                    numbers = (point["check_difference"], point["check_tolerance"])
                    difference, tolerance = ("not a number" if one is None else f"{one:.3g}" for one in numbers)
                    what = (
                        "point {optimizer}/{sync}, num_features {num_features}, global_batch_size {global_batch_size}"
                    )
                    reason = f"wrong result: {point['check_message']} (difference {difference}, allowed {tolerance})"
                    records.excluded.append(Excluded(path, f"{what.format(**point)} of {name}", reason, True))
    return records


FACTS = ("driver", "cuda", "rocm", "oneccl", "libfabric", "fabric", "kernel", "tf32")  # of `torchreg.runs.environment`

_PLACEMENT = re.compile(  # on devices, CPUs and networks. Not NCCL_NET, which a machine may need across nodes only
    r"\w*(VISIBLE_DEVICES|DEVICE_(ORDER|ORDINAL|SELECTOR|HIERARCHY)|AFFINITY|NUMA|(CPU|GPU|MEM|PROC)_BIND|PLACES)\w*|"
    r"FI_PROVIDER|CCL_ATL_TRANSPORT|UCX_(TLS|NET_DEVICES)|NCCL_IB_(DISABLE|HCA)|(NCCL|GLOO)_SOCKET_IFNAME"
)

_LAUNCH_COLUMNS = [
    "launch", "status", "campaign", "machine", "fingerprint", "block", "recorded_block", "world_size", "num_nodes",
    "ranks_per_node", "seed", "exit_code", "reason", "started_utc", "finished_utc", "wall_s", "start_up_s",
    "num_points", "num_failed_checks", "num_verified", "launcher", "requested", "effective", "ezpz_version", "backend",
    "mpi_library", "nccl_version", "device_name", "num_cpus", "dtype", "torch", "numpy", *FACTS, "placement", "without",
    "python", "platform", "commit", "dirty", "job_id", "source", "file",
]  # fmt: skip


def launches_table(records: Records) -> pd.DataFrame:
    """One row a launch, failed ones and earlier attempts included: what it was, where it ran, how it ended.

    `block` counts the blocks of all sources together, so that no number stands for two of them.
    """
    table = pd.DataFrame(map(_launch_row, (*records.launches, *records.failed)), columns=_LAUNCH_COLUMNS)
    table = table.sort_values(["status", "launch", "file"], ascending=[False, True, True], ignore_index=True)
    source = table["launch"].str.extract(r"((?:~\d+)*)$", expand=False)  # what distinguishes launches of the same id
    keys = [table["fingerprint"], source, table["recorded_block"]]
    again = table.groupby([*keys, "status", "world_size", "num_nodes", "ranks_per_node"]).cumcount()
    table["block"] = table.groupby([*keys, again], sort=True).ngroup()
    return table


def _launch_row(launch: Launch) -> dict[str, Any]:
    """The fields of a record, of which the columns are taken, and those that are computed."""
    content = launch.content
    row = {
        **(content["campaign"] | content["launch"] | content),
        "launch": launch.name,
        "campaign": content["campaign"]["name"],
        "recorded_block": content["launch"]["block"],
        "source": printable(str(launch.source)),
        "file": printable(str(launch.path)),
        "without": None,
    }
    if content["status"] == "failed":
        return row
    origin, distributed, points = content["provenance"], content["distributed"], content["points"]
    placements, environment = distributed["placements"], sorted(origin["environment"].items())
    placement = " ".join(f"{name}={value}" for name, value in environment if _PLACEMENT.fullmatch(name))
    return {
        **(content["machine_facts"] | origin["libraries"] | origin["source"] | origin | distributed | row),
        "device_name": ", ".join(sorted({one["device_name"] for one in placements})),
        "placement": placement or None,
        "without": " ".join(sorted(content["campaign"]["without"])) or None,
        # Of a node whose ranks compute on them.
        "num_cpus": distributed["num_cpus"] if placements[0]["device"] == "cpu" else None,
        "num_points": len(points),
        "num_failed_checks": sum(not point["check_passed"] for point in points),
        "num_verified": sum(one.get("status") == "PASS" for one in content.get("verification") or ()),
    }


def points_table(records: Records) -> pd.DataFrame:
    """One row a launch and point, those whose check failed included; the columns are the fields of `Point`."""
    return _table(records, "points", Point, ["optimizer", "sync", "num_features", "global_batch_size"])


def allreduce_table(records: Records) -> pd.DataFrame:
    """One row a launch, backend and message size; the columns are the fields of `AllReduce`."""
    return _table(records, "allreduce", AllReduce, ["backend", "sync", "message_bytes"])


def _table(records: Records, key: str, row: type[msgspec.Struct], order: Sequence[str]) -> pd.DataFrame:
    """The items of all launches under a key: the fields of `row`, without others that a record may have."""
    kinds = {inspect.IntType: int, inspect.FloatType: float, inspect.BoolType: bool, inspect.StrType: str}
    fields = {one.name: kinds.get(type(inspect.type_info(one.type)), float) for one in msgspec.structs.fields(row)}
    items = [{"launch": launch.name, **item} for launch in records.launches for item in launch.content[key]]
    table = pd.DataFrame(items, columns=["launch", *fields]).astype(fields)
    shared = ["launch", "machine", "block", "world_size", "num_nodes", "ranks_per_node"]
    launches = launches_table(records).query("status == 'ok'")[shared]
    return launches.merge(table, on="launch", validate="one_to_many").sort_values(["launch", *order], ignore_index=True)
