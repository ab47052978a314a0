"""Reading and writing `launch.json`: its checksum, its schema version, and the check against `LaunchRecord`."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from typing import Any

import msgspec

from torchreg.runs.record import to_json
from torchreg.scaling.launch_record import FailedLaunch, OkLaunch

KIND = "scale-launch"
SCHEMA_VERSION = 2
CHECKSUM = "sha256"


def checksummed(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON will return it, with the SHA-256 of its content: what a `launch.json` holds.

    A flipped bit can turn 0.0012 into 0.0082, which is as plausible a time as any other.
    """
    content = json.loads(to_json(record))
    content.pop(CHECKSUM, None)
    return {**content, CHECKSUM: _digest(content)}


def check(text: bytes) -> dict[str, Any]:
    """The content of a `launch.json` with its strings made printable: that of an `OkLaunch` or a `FailedLaunch`.

    Raises `ValueError` in one line with the reason why it must be excluded.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"damaged: no JSON ({reason})") from None
    kind = content.get("kind") if isinstance(content, dict) else content
    if not isinstance(content, dict) or kind != KIND:
        raise ValueError(f"foreign: kind is {_shown(kind)}, not {KIND!r}")
    version = content.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise ValueError(f"foreign: schema_version is {_shown(version)}, not {SCHEMA_VERSION}")
    if version != SCHEMA_VERSION:
        age, remedy = ("newer", "update it") if version > SCHEMA_VERSION else ("older", "measure again")
        reads = f"this torchreg reads {SCHEMA_VERSION}"
        raise ValueError(f"{age}: schema_version is {_shown(version)}, and {reads}: {remedy}")
    checksum = content.pop(CHECKSUM, None)
    if not isinstance(checksum, str):
        raise ValueError(f"partial: {CHECKSUM}, the checksum of a finished record, is missing")
    try:
        if _digest(content) != checksum:
            raise ValueError(f"damaged: the content is not what was written ({CHECKSUM} differs)")
        content = _printable(content)
        msgspec.convert(content, OkLaunch | FailedLaunch)
    except RecursionError:
        raise ValueError("damaged: nested deeper than any record") from None
    except msgspec.ValidationError as error:
        raise ValueError(_message(str(error), content)) from None
    return dict(content)


def _message(error: str, content: Any) -> str:
    """A message of msgspec, such as "Expected `int`, got `str` - at `$.points[0].order`", with field and value."""
    error, _, path = error.replace("`", "").partition(" - at $")
    path = path.removeprefix(".").removesuffix("[...]")  # the latter stands for a key of a dictionary
    if missing := re.fullmatch(r"Object missing required field (\w+)", error):
        return f"partial: {path}{'.' * bool(path)}{missing[1]} is missing"
    if not error.startswith(("Expected ", "Invalid ", "Number out of range")):  # one of the checks of this module
        return f"{path}.{error}" if path else error
    for part in re.findall(r"\w+", path):
        content = content[int(part) if isinstance(content, list) else part]
    return f"{path} is {_shown(content)}: {error[0].lower()}{error[1:]}"


def _shown(value: Any) -> str:
    """A wrong value, short enough for a message."""
    return f"{reprlib.repr(value):.60}"


def printable(text: str) -> str:
    """The text without what could move a terminal's cursor or break a page: line ends become blanks, others U+FFFD."""
    return "".join(
        sign if sign.isprintable() else " " if sign.isspace() else "\N{REPLACEMENT CHARACTER}" for sign in text
    )


def _printable(content: Any) -> Any:
    if isinstance(content, str):
        return printable(content)
    if isinstance(content, dict):
        return {printable(key): _printable(value) for key, value in content.items()}
    return [_printable(item) for item in content] if isinstance(content, list) else content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
