"""The last sections of a report: cost, where numbers come from, what is not in them, how they were measured."""

from __future__ import annotations

import json

from torchreg.reporting.page_parts import Json, Section, counted, table, word


def cost(report: Json) -> Section:
    """What the launches cost, and whose they are."""
    total = report["cost"]
    rows = [
        (
            *(word(source[name]) for name in ("folder", "campaign", "machine")),
            counted(source["num_launches"]), counted(source["num_failed"]), word(", ".join(source["job_ids"]) or None),
        )
        for source in report["sources"]
    ]  # fmt: skip
    columns = ("folder", "campaign", "machine", "launches", "failed", "jobs")
    return Section("cost", "Cost", (total["text"],), tables=(table("Sources", columns, rows),))


def provenance(report: Json) -> Section:
    """What all launches have in common, and what differs."""
    evidence = report["provenance"]
    same = [(word(field), word(_said(value))) for field, value in evidence["same"].items()]
    differs = [
        (word(difference["field"]), word(_said(value["value"])), counted(value["launches"]))
        for difference in evidence["differs"]
        for value in difference["values"]
    ]
    tables = [
        table("What differs between launches", ("field", "value", "launches"), differs),
        table("What all launches share", ("field", "value"), same),
    ]
    words = () if differs else ("All launches agree in everything that was recorded of where they come from.",)
    return Section("provenance", "Provenance", words, tables=tuple(one for one in tables if one.rows))


def excluded(report: Json) -> Section:
    """Failed launches and what is in no statistics, with reasons."""
    failed = [
        (
            *(word(launch[name]) for name in ("launch", "reason")),
            word("yes" if launch.get("is_retried") else "no"),
            *(word(launch[name]) for name in ("file", "log")),
        )
        for launch in report["failed"]
    ]
    excluded = [tuple(word(record[name]) for name in ("what", "reason", "file")) for record in report["excluded"]]
    tables = [
        table("Failed launches", ("launch", "reason", "a later try went well", "record", "log"), failed),
        table("Left out of all statistics", ("what", "reason", "file"), excluded),
    ]
    words = () if failed or excluded else ("No launch failed, and nothing was left out.",)
    return Section("excluded", "Failed and left out", words, tables=tuple(one for one in tables if one.rows))


def method(report: Json) -> Section:
    """How it was measured, in words."""
    return Section("method", "How it was measured", tuple(report["method"]))


def _said(value: object) -> str:
    """A recorded value in one line."""
    if value is None:
        return "not recorded"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
