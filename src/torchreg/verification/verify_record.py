"""The record of a verification, its comparison with a baseline, and the same checks for continuous integration."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from torchreg.core.checkpoint import read_regular
from torchreg.distributed.communicator import Communicator
from torchreg.runs.environment import machine_facts, provenance
from torchreg.runs.files import create
from torchreg.runs.record import to_json
from torchreg.verification.checks import Check, size_text, verdict

SCHEMA_VERSION = 1
KIND = "verify"

_SAME = "world_size", "num_nodes", "backend", "device_name"
_MOST_DEVIATIONS = 3.0  # of both spreads together
_MOST_DRIFT = 0.2  # of a median, from one launch to the next


def timing(operation: str, num_bytes: int, bus_factor: float, times_s: list[float]) -> dict[str, Any]:
    """A record's entry on a collective of one size. `spread_s` is the standard deviation by the quartiles."""
    median_s = statistics.median(times_s)
    low_s, _, high_s = statistics.quantiles(times_s, n=4)
    return {
        "operation": operation,
        "message_bytes": num_bytes,
        "num_repeats": len(times_s),
        "median_s": median_s,
        "spread_s": (high_s - low_s) / 1.349,  # a normal distribution's quartiles are so many deviations apart
        "algorithm_bytes_per_s": num_bytes / median_s,
        "bus_bytes_per_s": bus_factor * num_bytes / median_s,
    }


def times_text(timings: Sequence[Mapping[str, Any]]) -> str:
    """The time of the shortest message, and the bandwidths of the longest one."""
    first, last = timings[0], timings[-1]
    algorithm, bus = (last[f"{kind}_bytes_per_s"] / 1e9 for kind in ("algorithm", "bus"))
    latency = f"{size_text(first['message_bytes'])} {1e6 * first['median_s']:.0f} µs"
    return f"{latency}, {size_text(last['message_bytes'])} {algorithm:.2g} GB/s (bus {bus:.2g})"


def make_record(communicator: Communicator, requested: str, checks: Sequence[Check], started: str) -> dict[str, Any]:
    """All checks with their timings, and what decides them; `requested` is the option `distributed`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "passed": not any(check.status == "FAIL" for check in checks),
        "verdict": verdict(checks),
        "checks": [asdict(check) for check in checks],
        "distributed": communicator.describe_environment(requested),
        "machine_facts": machine_facts(),
        "provenance": provenance(started),
    }


def write_record(runs_dir: Path, record: Mapping[str, Any]) -> Path:
    """Write a record that appears whole, under a name of its own: `verify-<date>-<time>.json` in UTC."""
    name, content = datetime.now(timezone.utc).strftime("verify-%Y%m%d-%H%M%S"), to_json(record, indent=2) + "\n"
    paths = (runs_dir / f"{name}{f'-{number}' * (number > 1)}.json" for number in itertools.count(1))
    return next(path for path in paths if create(path, content.encode()))


def read_timings(path: str, communicator: Communicator) -> list[dict[str, Any]]:
    """The timings of a record, which has to be of as many ranks and nodes, and of the same device and backend.

    Raises `ValueError` with the reason why it cannot be a baseline.
    """
    here = {"kind": KIND, "schema_version": SCHEMA_VERSION, **communicator.describe_environment("")}
    try:
        record = json.loads(read_regular(Path(path)))
        there = {**record, **record["distributed"]}
        differing = [name for name in ("kind", "schema_version", *_SAME) if there[name] != here[name]]
        timings = [timing for check in record["checks"] for timing in check["timings"]]
        _by_case(timings)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"baseline is {path!r}, which is no record of torchreg verify ({error!r})") from error
    for name in differing:
        what = f"baseline is {path!r}, where {name} is {there[name]}, and here it is {here[name]}"
        raise ValueError(f"{what}: compare with a record of the same ranks and devices")
    return timings


def _by_case(timings: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], tuple[float, float]]:
    """Median and spread in seconds, by operation and bytes."""
    return {
        (each["operation"], each["message_bytes"]): (float(each["median_s"]), float(each["spread_s"]))
        for each in timings
    }


def compare(checks: Sequence[Check], baseline: Sequence[Mapping[str, Any]]) -> list[Check]:
    """A row for each collective that both have timed: it fails where a time is longer than the baseline's by more than
    the spreads of both explain, and by more than launches differ.
    """
    before, rows = _by_case(baseline), []
    for now in (_by_case(check.timings) for check in checks):
        ratios, slower = list[float](), list[str]()
        for (operation, num_bytes), (median_s, spread_s) in now.items():
            before_s, before_spread_s = before.get((operation, num_bytes), (math.inf, 0.0))
            ratios += [median_s / before_s] * (before_s < math.inf)
            explained_s = max(_MOST_DEVIATIONS * math.hypot(spread_s, before_spread_s), _MOST_DRIFT * before_s)
            if median_s - before_s > explained_s:
                slower.append(f"{size_text(num_bytes)} takes {ratios[-1]:.2f} times as long")
        if ratios:
            measured = "; ".join(slower) or f"{min(ratios):.2f} to {max(ratios):.2f} times as long"
            rows.append(Check("baseline", operation, "FAIL" if slower else "PASS", measured, "1, but for the spreads"))
    return rows


def junit(checks: Sequence[Check]) -> bytes:
    """The checks as a test suite in JUnit's XML."""
    failures, skipped = (str(sum(check.status == status for check in checks)) for status in ("FAIL", "SKIP"))
    counts = {"tests": str(len(checks)), "failures": failures, "skipped": skipped}
    suite = ElementTree.Element("testsuite", {"name": "torchreg verify", **counts})
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=check.area, name=check.name)
        kind = {"PASS": "system-out", "FAIL": "failure", "SKIP": "skipped"}[check.status]
        ElementTree.SubElement(case, kind).text = f"{check.measured}; expected: {check.expected}"
    return bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))
