"""Where a report's numbers come from: sources, cost, and what the launches have in common and what not."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import pandas as pd

from torchreg.scaling.records import Launch, Records
from torchreg.scaling.schema import printable

_OF_ONE_LAUNCH = re.compile(
    r"(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|SLURM_(JOB_NUM_NODES|NTASKS)|TORCHELASTIC_.*"
)
_NOT_OF_ONE_RANK = frozenset(
    f"distributed.{field}" for field in ("backend", "effective", "mpi_library", "nccl_version", "ezpz_version")
)
_RUNTIME = (
    "launcher",
    "requested",
    "effective",
    "ezpz_version",
    "backend",
    "mpi_library",
    "nccl_version",
    "device_name",
    "cpus_per_rank",
)


def sources(launches: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry for each directory, campaign and machine."""
    found = []
    for (folder, campaign, machine), rows in launches.groupby(["source", "campaign", "machine"], sort=True):
        good = rows["status"] == "ok"
        found.append(
            {
                "folder": folder,
                "campaign": campaign,
                "machine": machine,
                "num_launches": int(good.sum()),
                "num_failed": int((~good).sum()),
                "job_ids": sorted(set(rows["job_id"].dropna())),
            }
        )
    return found


def cost(launches: pd.DataFrame) -> dict[str, Any]:
    """What all launches took, failed ones included; a partly used node counts whole."""
    wall_s = float(launches["wall_s"].sum())
    node_hours = float((launches["wall_s"] * launches["num_nodes"]).sum() / 3600)
    failed = launches[launches["status"] == "failed"]
    text = f"{len(launches)} launches took {node_hours:.3g} node-hours, {_duration(wall_s)} one after the other"
    if len(failed):
        lost = float((failed["wall_s"] * failed["num_nodes"]).sum() / 3600)
        text += f"; {lost:.3g} of the node-hours went into {len(failed)} that failed"
    return {"node_hours": node_hours, "wall_s": wall_s, "launches": len(launches), "text": text + "."}


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def provenance(records: Records) -> dict[str, Any]:
    """Fields that all launches have in common, and for the others each value with the number of its launches."""
    counts: dict[str, Counter[str]] = {}
    for launch in records.launches:
        for field, value in _fields(launch):
            counts.setdefault(field, Counter())[value] += 1
    total = len(records.launches)
    of_several = sum(launch.content["launch"]["world_size"] > 1 for launch in records.launches)
    same, differs = {}, []
    for field, values in sorted(counts.items()):
        expected = of_several if field in _NOT_OF_ONE_RANK else total
        missing = expected - sum(values.values())
        told = [{"value": value, "launches": number} for value, number in sorted(values.items())]
        if missing > 0:
            told.append({"value": None, "launches": missing})
        if len(told) == 1:
            same[field] = told[0]["value"]
        else:
            differs.append({"field": field, "values": told})
    return {"same": same, "differs": differs}


def _fields(launch: Launch) -> Iterator[tuple[str, str]]:
    content: Mapping[str, Any] = launch.content
    communicator, origin = content["distributed"], content["provenance"]
    fields = {f"campaign.{key}": content["campaign"][key] for key in ("name", "machine", "fingerprint")}
    fields |= {f"distributed.{key}": communicator.get(key) for key in _RUNTIME}
    fields |= {f"source.{key}": origin["source"][key] for key in ("commit", "dirty")}
    fields |= {key: origin[key] for key in ("python", "platform", "job_id")}
    fields |= {f"libraries.{name}": version for name, version in origin["libraries"].items()}
    fields |= {
        f"environment.{name}": value
        for name, value in origin["environment"].items()
        if not _OF_ONE_LAUNCH.fullmatch(name)
    }
    fields |= {f"machine_facts.{key}": value for key, value in (content.get("machine_facts") or {}).items()}
    fields["campaign.without"] = " ".join(content["campaign"].get("without") or []) or None
    fields["dtype"] = content["dtype"]
    fields["devices"] = ", ".join(sorted({place["device"].split(":")[0] for place in communicator["placements"]}))
    alone = content["launch"]["world_size"] == 1
    for field, value in fields.items():
        if value is not None and not (alone and field in _NOT_OF_ONE_RANK):
            yield field, value if isinstance(value, str) else json.dumps(value)


def excluded(records: Records) -> list[dict[str, Any]]:
    """What is in no statistics, with reasons."""
    return [{**asdict(one), "file": printable(str(one.file))} for one in records.excluded]


def failures(records: Records) -> list[dict[str, Any]]:
    """The launches that failed, with their reasons; `is_retried` where a later try went well."""
    good = {launch.name for launch in records.launches}
    return [
        _failure(one, one.name in good) for one in sorted(records.failed, key=lambda one: (one.name, str(one.path)))
    ]


def _failure(one: Launch, is_retried: bool) -> dict[str, Any]:
    return {
        "launch": one.name,
        **{key: one.content["launch"][key] for key in ("world_size", "num_nodes", "ranks_per_node")},
        "machine": one.content["campaign"]["machine"],
        "exit_code": one.content["exit_code"],
        "file": printable(str(one.path)),
        "reason": one.content["reason"],
        "log": None if one.log is None else printable(str(one.log)),
        "is_retried": is_retried,
    }
