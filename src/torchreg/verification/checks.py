"""What a check is: a row with a measured value and what was expected, on which all ranks agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torchreg.distributed.communicator import Communicator

_MOST_NAMED = 3  # ranks that a row names; there may be thousands


@dataclass(frozen=True)
class Check:
    """One row. `area` is the part of the stack, `name` what is checked there."""

    area: str
    name: str
    status: Literal["PASS", "FAIL", "SKIP"]
    measured: str
    expected: str


def agree(communicator: Communicator, area: str, name: str, problem: str | None, measured: str, expected: str) -> Check:
    """The row of a check that each rank has made for itself: it fails if any rank has a problem, which is named.

    `measured` is the main rank's; ranks with a problem tell theirs instead.
    """
    problems = communicator.gather(problem)
    found = [
        f"rank {place.rank} ({place.host}): {text}"
        for place, text in zip(communicator.placements, problems, strict=True)
        if text is not None
    ]
    if len(found) == communicator.world_size > 1 and len(set(problems)) == 1:
        found = [f"every rank: {problem}"]
    if not found:
        return Check(area, name, "PASS", measured, expected)
    more = f"; and {len(found) - _MOST_NAMED} ranks more" if len(found) > _MOST_NAMED else ""
    return Check(area, name, "FAIL", "; ".join(found[:_MOST_NAMED]) + more, expected)


def skipped(area: str, name: str, why: str) -> Check:
    """The row of a check that makes no sense here."""
    return Check(area, name, "SKIP", why, "")


def table(checks: Sequence[Check]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for a person; rows that fail begin with `!`."""
    rows = []
    for check in checks:
        mark = "!" if check.status == "FAIL" else ""
        rows.append([f"{mark}{check.status}", check.area, check.name, check.measured, check.expected])
    return ["", "part", "check", "measured", "expected"], rows


def lines(checks: Sequence[Check]) -> list[str]:
    """The verdict."""
    count = {status: sum(check.status == status for check in checks) for status in ("PASS", "FAIL", "SKIP")}
    counted = f"{count['PASS']} passed, {count['FAIL']} failed, {count['SKIP']} skipped"
    if count["FAIL"]:
        failed = ", ".join(f"{check.area}: {check.name}" for check in checks if check.status == "FAIL")
        return [f"verdict      this stack does NOT train correctly ({counted}): {failed}"]
    return [f"verdict      this stack trains correctly ({counted})"]
