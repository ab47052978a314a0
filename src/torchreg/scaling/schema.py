"""What a launch record must be: its fields, what they may hold, and the seal that tells damage from data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torchreg.runs.record import to_json
from torchreg.scaling.rules import (
    Each,
    ObjectOrNull,
    Optional,
    any_whole_number,
    flag,
    iso_time,
    list_of_texts,
    number,
    one_of,
    or_null,
    problems_of,
    shown,
    text,
    texts,
    texts_or_null,
    whole_number,
    zero,
)

KIND = "scale-launch"
SCHEMA_VERSION = 1
CHECKSUM = "sha256"


def checksummed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as JSON will give it back, with the SHA-256 of its content: whoever writes a launch.json seals it.

    A flipped bit can turn 0.0012 into 0.0082, which is as good a time as any other; the seal tells.
    """
    content = {key: value for key, value in json.loads(to_json(record)).items() if key != CHECKSUM}
    return {**content, CHECKSUM: _digest(content)}


def check(text: bytes) -> dict[str, Any]:
    """The record in the bytes of a launch.json; its texts made printable.

    Raises `ValueError` with the reason why it must be left out, in one line.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged: no JSON ({_in_one_line(error)})") from None
    if not isinstance(record, dict) or record.get("kind") != KIND:
        kind = record.get("kind") if isinstance(record, dict) else record
        raise ValueError(f"foreign: kind is {shown(kind)}, not {KIND!r}")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ValueError(_other_version(version))
    if not isinstance(record.get(CHECKSUM), str):
        raise ValueError(f"partial: {CHECKSUM}, the seal of a finished record, is missing")
    if _digest({key: value for key, value in record.items() if key != CHECKSUM}) != record[CHECKSUM]:
        raise ValueError(f"damaged: the content is not what was written ({CHECKSUM} differs)")
    is_failed = record.get("status") == "failed"
    for problem in problems_of(record, _FAILED if is_failed else _OK, ""):
        raise ValueError(problem)
    for problem in _contradictions(record, is_failed):
        raise ValueError(problem)
    found: dict[str, Any] = _printable(record)
    return found


def printable(text: str) -> str:
    """The text without what could move a terminal's cursor or break a page: line ends become blanks, others U+FFFD."""
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() else " " if sign.isspace() else "\N{REPLACEMENT CHARACTER}" for sign in text
    )


def _printable(content: Any) -> Any:
    if isinstance(content, str):
        return printable(content)
    if isinstance(content, dict):
        return {printable(key): _printable(value) for key, value in content.items()}
    return [_printable(item) for item in content] if isinstance(content, list) else content


def _digest(content: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    except (RecursionError, ValueError):
        return ""  # nested deeper, or with more digits, than anything that was ever sealed
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _other_version(version: Any) -> str:
    if isinstance(version, int) and not isinstance(version, bool):
        if version > SCHEMA_VERSION:
            return f"newer: schema_version is {shown(version)}, and this torchreg reads {SCHEMA_VERSION}: update it"
        return f"older: schema_version is {shown(version)}, and this torchreg reads {SCHEMA_VERSION}: measure again"
    return f"foreign: schema_version is {shown(version)}, not {SCHEMA_VERSION}"


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


# What belongs where

_WORD = text(r"[A-Za-z0-9_.+-]{1,40}")  # becomes part of names
_POSITIVE = number(above=0)
_NOT_NEGATIVE = number(at_least=0)
_SECONDS = number(at_least=0, at_most=1e9)
_DURATION = number(at_least=1e-12, at_most=1e9)  # ratios of such times stay far from the ends of float64

_LAUNCH = {
    "id": text(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"),
    "block": whole_number(0),
    "world_size": whole_number(),
    "num_nodes": whole_number(),
    "ranks_per_node": whole_number(),
    "seed": any_whole_number,
}
_CAMPAIGN = {
    "name": text(),
    "machine": text(),
    "fingerprint": text(),
    "device": Optional(text()),
    "without": Optional(list_of_texts),
}
_FAILED = {
    "status": one_of("ok", "failed"),
    "campaign": _CAMPAIGN,
    "launch": _LAUNCH,
    "exit_code": or_null(any_whole_number),
    "reason": text(),
    "started_utc": iso_time,
    "wall_s": or_null(_SECONDS),
}
_TARGET = {
    "target_excess": _POSITIVE,
    "predicted_steps": or_null(_NOT_NEGATIVE),
    "measured_steps": or_null(_NOT_NEGATIVE),
    "measured_time_s": or_null(_SECONDS),
    "stability_limit": _POSITIVE,
    "noise_floor": or_null(_NOT_NEGATIVE),
}
_POINT = {
    "optimizer": _WORD,
    "sync": _WORD,
    "num_features": whole_number(),
    "global_batch_size": whole_number(),
    "local_batch_size": _POSITIVE,
    "message_bytes": whole_number(0),
    "order": whole_number(0),
    "num_warmup_steps": whole_number(0),
    "num_steps": whole_number(),
    "window_s": _DURATION,
    "step_time_s": _DURATION,
    "rank_step_time_s": {
        "min": _DURATION,
        "median": _DURATION,
        "max": _DURATION,
        "slowest_rank": whole_number(0),
        "slowest_host": text(),
    },
    "local_step_time_s": or_null(_DURATION),
    "data_time_s": _SECONDS,
    "throughput": _POSITIVE,
    "check": {
        "passed": flag,
        "difference": or_null(number()),
        "tolerance": or_null(_NOT_NEGATIVE),
        "excess": or_null(number()),
        "told": text(),
    },
    "target": ObjectOrNull(_TARGET),
}
_OK = {
    "status": one_of("ok", "failed"),
    "campaign": _CAMPAIGN,
    "launch": _LAUNCH,
    "exit_code": zero,
    "started_utc": iso_time,
    "wall_s": _SECONDS,
    "start_up_s": or_null(_SECONDS),
    "distributed": {
        "launcher": text(),
        "requested": text(),
        "effective": text(),
        "ezpz_version": or_null(text()),
        "backend": text(),
        "world_size": whole_number(),
        "num_nodes": whole_number(),
        "mpi_library": or_null(text()),
        "nccl_version": or_null(text()),
        "device_name": or_null(text()),
        "num_cpus": Optional(or_null(whole_number())),
        "cpus_per_rank": Optional(or_null(whole_number())),
        "placements": Each(
            {
                "rank": whole_number(0),
                "host": text(),
                "local_rank": whole_number(0),
                "device": text(),
                "device_name": Optional(text()),
            }
        ),
    },
    "machine_facts": Optional(texts_or_null),
    "provenance": {
        "finished_utc": iso_time,
        "source": {"commit": or_null(text()), "dirty": or_null(flag)},
        "python": text(),
        "platform": text(),
        "libraries": texts,
        "job_id": or_null(text()),
        "environment": texts,
    },
    "dtype": text(),
    "points": Each(_POINT),
    "allreduce": Each(
        {
            "way": _WORD,
            "sync": _WORD,
            "message_bytes": whole_number(),
            "time_s": _DURATION,
            "num_repeats": whole_number(),
        }
    ),
}


def _kind_of(place: Mapping[str, Any]) -> str:
    return str(place["device"].split(":")[0])


def _contradictions(record: Mapping[str, Any], is_failed: bool) -> Iterator[str]:
    """Fields that are right by themselves and cannot be true together."""
    launch = record["launch"]
    world_size = launch["world_size"]
    if launch["num_nodes"] * launch["ranks_per_node"] != world_size:
        yield (
            f"launch.world_size is {world_size}, not num_nodes {launch['num_nodes']} × ranks_per_node "
            f"{launch['ranks_per_node']}"
        )
    if is_failed:
        return
    for field in ("world_size", "num_nodes"):
        if record["distributed"][field] != launch[field]:
            yield f"distributed.{field} is {record['distributed'][field]}, and {launch[field]} were asked for (launch.{field})"
    if len(record["distributed"]["placements"]) != world_size:
        yield f"partial: distributed.placements has {len(record['distributed']['placements'])} of {world_size} ranks"
    wanted, devices = (
        record["campaign"].get("device"),
        sorted({_kind_of(one) for one in record["distributed"]["placements"]}),
    )
    if wanted not in (None, "auto") and devices != [wanted]:
        yield f"distributed.places has {', '.join(devices)}, and {wanted} was asked for (campaign.device)"
    if not record["points"] and not record["allreduce"]:
        yield "partial: points and allreduce are empty"
    seen = set()
    for place, point in enumerate(record["points"]):
        name = f"points[{place}]"
        setting = tuple(point[field] for field in ("optimizer", "sync", "num_features", "global_batch_size"))
        if setting in seen:
            yield f"{name} is measured twice in one launch: {setting}"
        seen.add(setting)
        if (point["sync"] == "none") != (world_size == 1):
            yield f"{name}.sync is {point['sync']!r} at world size {world_size}"
        if world_size > 1 and point["message_bytes"] == 0:
            yield f"{name}.message_bytes is 0 at world size {world_size}"
        if point["target"] and (point["target"]["measured_steps"] is None) != (
            point["target"]["measured_time_s"] is None
        ):
            yield f"{name}.target has measured_steps without measured_time_s, or the other way round"
        if abs(point["global_batch_size"] / world_size - point["local_batch_size"]) >= 1:
            yield f"{name}.local_batch_size is {point['local_batch_size']:g}, not global_batch_size / world_size"
        if not math.isclose(point["throughput"] * point["step_time_s"], point["global_batch_size"], rel_tol=0.01):
            yield f"{name}.throughput is {point['throughput']:g}, not global_batch_size / step_time_s"
        ranks = point["rank_step_time_s"]
        if not ranks["min"] <= ranks["median"] <= ranks["max"]:
            yield f"{name}.rank_step_time_s is not in order: min, median, max"
    sizes = [(item["way"], item["sync"], item["message_bytes"]) for item in record["allreduce"]]
    if len(set(sizes)) < len(sizes):
        yield "allreduce has a way and message size twice"
