"""Where the numbers of a report come from: sources, cost, what launches have in common, failures, exclusions."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

import pandas as pd

from torchreg.reporting.points import Json
from torchreg.scaling.records import Launch, Records
from torchreg.scaling.schema import printable

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
        found = [{"value": value, "launches": number} for value, number in sorted(values.items())]
        if missing > 0:
            found.append({"value": None, "launches": missing})
        if len(found) == 1:
            same[field] = found[0]["value"]
        else:
            differs.append({"field": field, "values": found})
    return {"same": same, "differs": differs}


def _fields(launch: Launch) -> Iterator[tuple[str, str]]:
    content = launch.content
    communicator, origin = content["distributed"], content["provenance"]
    fields = {f"campaign.{key}": content["campaign"][key] for key in ("name", "machine", "fingerprint")}
    fields |= {f"distributed.{key}": communicator.get(key) for key in _DISTRIBUTED}
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
