"""A check: a row with a measured and an expected value, on whose outcome all ranks agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torchreg.distributed.communicator import Communicator

_MOST_NAMED = 3  # ranks in a row, and checks in the verdict; there may be thousands


@dataclass(frozen=True)
class Check:
    """One row. `area` is the part of the stack, `name` what is checked there.

    `measured` of a check that is skipped, because it does not apply here, is the reason.
    """

    area: str
    name: str
    status: Literal["PASS", "FAIL", "SKIP"]
    measured: str
    expected: str = ""


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
    if not failed:
        return f"verdict      this stack trains correctly ({counted})"
    return f"verdict      this stack does NOT train correctly ({counted}). Failed: {_first(failed, ', ', 'checks')}"


def _first(found: Sequence[str], separator: str, what: str) -> str:
    """The first few, and how many there are besides."""
    more = [f"and {len(found) - _MOST_NAMED} {what} more"] * (len(found) > _MOST_NAMED)
    return separator.join([*found[:_MOST_NAMED], *more])
