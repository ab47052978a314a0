"""A check: a row with a measured and an expected value, on whose outcome all ranks agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torchreg.distributed.communicator import Communicator

_MOST_NAMED = 3  # ranks in a row, and checks in the verdict; there may be thousands


@dataclass(frozen=True)
class Check:
    """One row. `area` is the part of the stack, `name` what is checked there.

    `measured` of a check that is skipped, because it does not apply here, is the reason. The last three fields are for
    the record: what was timed, and what a known answer covers: training steps, and bytes of the longest message.
    """

    area: str
    name: str
    status: Literal["PASS", "FAIL", "SKIP"]
    measured: str
    expected: str = ""
    timings: tuple[Mapping[str, Any], ...] = ()
    num_steps: int = 0
    message_bytes: int = 0


def agree(communicator: Communicator, area: str, name: str, error: str | None, measured: str, expected: str) -> Check:
    """The row of a check that each rank has made for itself: it fails if any rank has an error.

    `measured` is the main rank's; where the check fails, it is the errors with their ranks.
    """
    errors = communicator.gather(error)
    pairs = zip(communicator.placements, errors, strict=True)
    found = [f"rank {placement.rank} ({placement.host}): {text}" for placement, text in pairs if text is not None]
    if not found:
        return Check(area, name, "PASS", measured, expected)
    if len(found) == communicator.world_size > 1 and len(set(errors)) == 1:
        found = [f"every rank: {error}"]
    return Check(area, name, "FAIL", _first(found, "; ", "ranks"), expected)


def table(checks: Sequence[Check]) -> tuple[list[str], list[list[str]]]:
    """Columns and human-readable rows; rows that fail begin with `!`."""
    rows = [["!" * (c.status == "FAIL") + c.status, c.area, c.name, c.measured, c.expected] for c in checks]
    return ["", "part", "check", "measured", "expected"], rows


def verdict(checks: Sequence[Check]) -> str:
    """Whether the stack trains correctly, and what fails."""
    counts = Counter(check.status for check in checks)
    counted = f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped"
    failed = [f"{check.area}: {check.name}" for check in checks if check.status == "FAIL"]
    if failed:
        return f"this stack does NOT train correctly ({counted}). Failed: {_first(failed, ', ', 'checks')}"
    num_steps, message_bytes = sum(c.num_steps for c in checks), max((c.message_bytes for c in checks), default=0)
    steps = f" in {num_steps:,} steps" if num_steps else ""
    messages = f", with messages to {size_text(message_bytes)}" if message_bytes else ""
    return f"this stack trains this model correctly{steps}{messages} ({counted})"


def size_text(num_bytes: int) -> str:
    """Bytes in the largest binary unit of which there is at least one."""
    power = max(0, num_bytes.bit_length() - 1) // 10
    return f"{num_bytes / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _first(found: Sequence[str], separator: str, what: str) -> str:
    """The first few, and how many there are besides."""
    more = [f"and {len(found) - _MOST_NAMED} {what} more"] * (len(found) > _MOST_NAMED)
    return separator.join([*found[:_MOST_NAMED], *more])
