"""Where the numbers of a report come from: sources, cost, what launches have in common, failures, exclusions."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pandas as pd

from torchreg.console import printable
from torchreg.reporting.points import Json
from torchreg.scaling.records import Records

_OF_ONE_LAUNCH = re.compile(
    r"(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|SLURM_(JOB_NUM_NODES|NTASKS)|TORCHELASTIC_.*"
)
_NOT_OF_ONE_RANK = frozenset(
    f"distributed.{field}" for field in ("backend", "effective", "mpi_library", "nccl_version", "ezpz_version")
)
_DISTRIBUTED = (
    "launcher", "requested", "effective", "ezpz_version", "backend", "mpi_library", "nccl_version", "device_name",
    "cpus_per_rank",
)  # fmt: skip


def sources(launches: pd.DataFrame) -> list[Json]:
    """One entry for each directory, campaign and machine."""
    return [
        {
            "folder": folder,
            "campaign": campaign,
            "machine": machine,
            "num_launches": int((rows["status"] == "ok").sum()),
            "num_failed": int((rows["status"] != "ok").sum()),
            "job_ids": sorted(set(rows["job_id"].dropna())),
        }
        for (folder, campaign, machine), rows in launches.groupby(["source", "campaign", "machine"], sort=True)
    ]


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
        counts = Counter(
            fields.get(field) for is_several, fields in launches if is_several or field not in _NOT_OF_ONE_RANK
        )
        found = sorted(counts.items(), key=lambda pair: (pair[0] is None, pair[0] or ""))
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
        "environment.": {k: v for k, v in origin["environment"].items() if not _OF_ONE_LAUNCH.fullmatch(k)},
        "machine_facts.": content["machine_facts"],
        "": {key: origin[key] for key in ("python", "platform", "job_id")} | {"dtype": content["dtype"]},
    }
    fields = {prefix + key: value for prefix, section in sections.items() for key, value in section.items()}
    fields["campaign.without"] = " ".join(campaign["without"]) or None
    fields["devices"] = ", ".join(sorted({place["device"].split(":")[0] for place in communicator["placements"]}))
    return {
        field: value if value is None or isinstance(value, str) else json.dumps(value)
        for field, value in fields.items()
    }


def excluded(records: Records) -> list[Json]:
    """What is in no statistics, with reasons."""
    return [{**asdict(one), "file": printable(str(one.file))} for one in records.excluded]


def failures(records: Records) -> list[Json]:
    """The launches that failed, with their reasons; `is_retried` where a later try succeeded."""
    good = {launch.name for launch in records.launches}
    return [
        {
            "launch": one.name,
            **{key: one.content["launch"][key] for key in ("world_size", "num_nodes", "ranks_per_node")},
            "machine": one.content["campaign"]["machine"],
            "exit_code": one.content["exit_code"],
            "file": printable(str(one.path)),
            "reason": one.content["reason"],
            "log": None if one.log is None else printable(str(one.log)),
            "is_retried": one.name in good,
        }
        for one in sorted(records.failed, key=lambda one: (one.name, str(one.path)))
    ]
