"""What a launch record must be: its fields, what they may hold, and the seal that tells damage from data."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from torchreg.record import to_json

KIND = "scale-launch"
SCHEMA_VERSION = 1
SEAL = "sha256"

_LONGEST_TEXT = 4_000  # characters; a reason or a version is shorter
_LARGEST_NUMBER = 1e18  # beyond any count, byte or second that a campaign can have
_SHOWN = 40  # characters of a wrong value in a message

Rule = Callable[[Any], str | None]
"""Takes a value; None where it is right, otherwise what belongs there."""


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as JSON will give it back, with the SHA-256 of its content: whoever writes a launch.json seals it.

    A flipped bit can turn 0.0012 into 0.0082, which is as good a time as any other; the seal tells.
    """
    content = {key: value for key, value in json.loads(to_json(record)).items() if key != SEAL}
    return {**content, SEAL: _digest(content)}


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
        raise ValueError(f"foreign: kind is {_shown(kind)}, not {KIND!r}")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ValueError(_other_version(version))
    if not isinstance(record.get(SEAL), str):
        raise ValueError(f"partial: {SEAL}, the seal of a finished record, is missing")
    if _digest({key: value for key, value in record.items() if key != SEAL}) != record[SEAL]:
        raise ValueError(f"damaged: the content is not what was written ({SEAL} differs)")
    is_failed = record.get("status") == "failed"
    for problem in _problems(record, _FAILED if is_failed else _OK, ""):
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
            return f"newer: schema_version is {_shown(version)}, and this torchreg reads {SCHEMA_VERSION}: update it"
        return f"older: schema_version is {_shown(version)}, and this torchreg reads {SCHEMA_VERSION}: measure again"
    return f"foreign: schema_version is {_shown(version)}, not {SCHEMA_VERSION}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists nested without end
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


# Rules


def _number(*, above: float = -math.inf, at_least: float = -math.inf, at_most: float = _LARGEST_NUMBER) -> Rule:
    belongs = "a finite number"
    if above > -math.inf:
        belongs = f"a number above {above:g}"
    elif at_least > -math.inf:
        belongs = f"a number of at least {at_least:g}"
    if at_most < _LARGEST_NUMBER:
        belongs += f" and at most {at_most:g}"

    def rule(value: Any) -> str | None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (
            None
            if is_number and -_LARGEST_NUMBER <= value <= at_most and value > above and value >= at_least
            else belongs
        )

    return rule


def _count(at_least: int = 1) -> Rule:
    def rule(value: Any) -> str | None:
        is_count = isinstance(value, int) and not isinstance(value, bool) and at_least <= value <= _LARGEST_NUMBER
        return None if is_count else f"a whole number of at least {at_least}"

    return rule


def _text(pattern: str = r".*") -> Rule:
    form = re.compile(pattern, re.DOTALL)

    def rule(value: Any) -> str | None:
        if not isinstance(value, str):
            return "a text"
        if len(value) > _LONGEST_TEXT:
            return f"a text of at most {_LONGEST_TEXT} characters"
        return None if form.fullmatch(value) else f"a text like {pattern}"

    return rule


def _time(value: Any) -> str | None:
    try:
        datetime.fromisoformat(value.replace("Z", "+00:00"))
    except (AttributeError, ValueError):
        return "a time in ISO 8601"
    return None


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _whole(value: Any) -> str | None:
    return _count(-(2**63))(value) and "a whole number"


def _zero(value: Any) -> str | None:
    return None if _whole(value) is None and value == 0 else "0, as of a launch that went well,"


def _one_of(*words: str) -> Rule:
    return lambda value: None if value in words else f"one of {', '.join(words)}"


def _texts(value: Any) -> str | None:
    """A mapping of names to texts, as of libraries to versions."""
    right = isinstance(value, dict) and all(
        _text()(key) is None and _text()(item) is None for key, item in value.items()
    )
    return None if right else "names with a text each"


def _or_null(rule: Rule) -> Rule:
    return lambda value: None if value is None else rule(value)


@dataclass(frozen=True)
class _Each:
    """A list, each item of which has these fields."""

    fields: Mapping[str, Any]


@dataclass(frozen=True)
class _ObjectOrNull:
    """Null, or one object with these fields."""

    fields: Mapping[str, Any]


_WORD = _text(r"[A-Za-z0-9_.+-]{1,40}")  # becomes part of names
_POSITIVE = _number(above=0)
_NOT_NEGATIVE = _number(at_least=0)
_SECONDS = _number(at_least=0, at_most=1e9)
_DURATION = _number(at_least=1e-12, at_most=1e9)  # ratios of such times stay far from the ends of float64

_LAUNCH = {
    "id": _text(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"),
    "block": _count(0),
    "world_size": _count(),
    "num_nodes": _count(),
    "ranks_per_node": _count(),
    "seed": _whole,
}
_CAMPAIGN = {"name": _text(), "machine": _text(), "fingerprint": _text()}
_FAILED = {
    "status": _one_of("ok", "failed"),
    "campaign": _CAMPAIGN,
    "launch": _LAUNCH,
    "exit_code": _or_null(_whole),
    "reason": _text(),
    "started_utc": _time,
    "wall_s": _or_null(_SECONDS),
}
_TARGET = {
    "target_excess": _POSITIVE,
    "predicted_steps": _or_null(_NOT_NEGATIVE),
    "measured_steps": _or_null(_NOT_NEGATIVE),
    "measured_time_s": _or_null(_SECONDS),
    "stability_limit": _POSITIVE,
    "noise_floor": _or_null(_NOT_NEGATIVE),
}
_POINT = {
    "optimizer": _WORD,
    "sync": _WORD,
    "num_features": _count(),
    "global_batch_size": _count(),
    "local_batch_size": _POSITIVE,
    "message_bytes": _count(0),
    "order": _count(0),
    "num_warmup_steps": _count(0),
    "num_steps": _count(),
    "window_s": _DURATION,
    "step_time_s": _DURATION,
    "rank_step_time_s": {
        "min": _DURATION,
        "median": _DURATION,
        "max": _DURATION,
        "slowest_rank": _count(0),
        "slowest_host": _text(),
    },
    "local_step_time_s": _or_null(_DURATION),
    "rows_time_s": _SECONDS,
    "throughput": _POSITIVE,
    "check": {
        "passed": _flag,
        "difference": _or_null(_number()),
        "tolerance": _or_null(_NOT_NEGATIVE),
        "excess": _or_null(_number()),
        "told": _text(),
    },
    "target": _ObjectOrNull(_TARGET),
}
_OK = {
    "status": _one_of("ok", "failed"),
    "campaign": _CAMPAIGN,
    "launch": _LAUNCH,
    "exit_code": _zero,
    "started_utc": _time,
    "wall_s": _SECONDS,
    "start_up_s": _or_null(_SECONDS),
    "runtime": {
        "launcher": _text(),
        "requested": _text(),
        "effective": _text(),
        "ezpz_version": _or_null(_text()),
        "backend": _text(),
        "world_size": _count(),
        "num_nodes": _count(),
        "mpi_library": _or_null(_text()),
        "nccl_version": _or_null(_text()),
        "device_name": _or_null(_text()),
        "places": _Each({"rank": _count(0), "host": _text(), "local_rank": _count(0), "device": _text()}),
    },
    "provenance": {
        "finished_utc": _time,
        "source": {"commit": _or_null(_text()), "dirty": _or_null(_flag)},
        "python": _text(),
        "platform": _text(),
        "libraries": _texts,
        "job_id": _or_null(_text()),
        "environment": _texts,
    },
    "dtype": _text(),
    "points": _Each(_POINT),
    "allreduce": _Each(
        {"way": _WORD, "sync": _WORD, "message_bytes": _count(), "time_s": _DURATION, "num_repeats": _count()}
    ),
}


def _problems(content: Any, fields: Any, name: str) -> Iterator[str]:
    """What is wrong with an object's fields, told by name."""
    if isinstance(fields, _ObjectOrNull):
        if content is not None:
            yield from _problems(content, fields.fields, name)
    elif isinstance(fields, _Each):
        if isinstance(content, list):
            for place, item in enumerate(content):
                yield from _problems(item, fields.fields, f"{name}[{place}]")
        else:
            yield f"{name} is {_shown(content)}, where a list belongs"
    elif not isinstance(fields, dict):
        if belongs := fields(content):
            yield f"{name} is {_shown(content)}, where {belongs} belongs"
    elif isinstance(content, dict):
        for field, rule in fields.items():
            full = f"{name}.{field}" if name else field
            if field in content:
                yield from _problems(content[field], rule, full)
            else:
                yield f"partial: {full} is missing"
    else:
        yield f"{name} is {_shown(content)}, where an object belongs"


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
        if record["runtime"][field] != launch[field]:
            yield f"runtime.{field} is {record['runtime'][field]}, and {launch[field]} were asked for (launch.{field})"
    if len(record["runtime"]["places"]) != world_size:
        yield f"partial: runtime.places has {len(record['runtime']['places'])} of {world_size} ranks"
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
