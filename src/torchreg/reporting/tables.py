"""The tables of a report: columns as data; entries with units and intervals, and words for missing numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any, NamedTuple

from torchreg.console import number
from torchreg.plots.pictures import batch_text, best_model, combination_of, placement_text
from torchreg.plots.quantities import count, counted, in_unit
from torchreg.reporting.groups import Json

_LONG = 14  # rows; a longer table is folded
_MISSING = "–"  # not measured, not recorded, or not defined; a column of nothing else is not shown
_WHOLE = "whole"  # the unit of counts, which are written with every digit
_HEADINGS = {
    _WHOLE: {
        "ranks": "world_size", "nodes": "num_nodes", "p0": "baseline_world_size", "global batch": "global_batch_size",
        "launches": "num_launches", "failed": "num_failed", "predicted steps": "predicted_steps",
        "measured steps": "measured_steps",
    },
    "s": {
        "step time": "step_time_s", "data": "data_time_s", "compute": "compute_time_s",
        "exposed communication": "exposed_time_s", "time": "time_s", "predicted time": "predicted_time_s",
        "measured time": "measured_time_s",
    },
    "%": {
        "spread": "spread", "efficiency": "efficiency", "held-out error": "held_out_error",
        "compute, of the step": "compute_fraction",
    },
    "B": {"message": "message_bytes"},
    "B/s": {"bandwidth": "bandwidth"},
    "k": {"samples/s": "throughput"},
    "": {
        "batch": "batch", "slowest / median rank": "slowest_over_median", "speedup": "speedup",
        "Karp–Flatt": "karp_flatt", "learning rate / limit": "limit_fraction",
        "predicted / measured": "predicted_over_measured", "node-hours": "node_hours",
    },
}  # fmt: skip
"""Keys of rows by unit and heading; a heading that is not here is the key of a text."""
_COLUMNS = {heading: (key, unit) for unit, keys in _HEADINGS.items() for heading, key in keys.items()}


class Entry(NamedTuple):
    """A value with its interval."""

    text: str
    interval: str = ""
    is_number: bool = True


class Table(NamedTuple):
    """A long table is folded until a reader opens it."""

    title: str
    columns: list[str]
    rows: list[list[Entry]]
    is_long: bool


def make_table(title: str, columns: Sequence[str], rows: Iterable[Json], constant: Sequence[str] = ()) -> Table:
    """A table without empty columns.

    Of the columns named in `constant`, those with the same value in all rows move into the title, because a table that
    is too wide hides its last columns. A row's `missing` is the word for its missing numbers.
    """

    def entry(row: Json, heading: str) -> Entry:
        key, unit = _COLUMNS.get(heading, (heading, None))
        value = combination_of(row) if heading == "combination" else row[key]
        return make_entry(value, unit, row.get("missing", _MISSING))

    entries = [[entry(row, heading) for heading in columns] for row in rows]
    shared = {
        heading: found[0].text
        for heading, *found in zip(columns, *entries, strict=True)
        if heading in constant and len(set(found)) == 1 < len(found)
    }
    filled = [any(entry.text != _MISSING for entry in column) for column in zip(*entries, strict=True)]
    kept = [heading not in shared and is_filled for heading, is_filled in zip(columns, filled, strict=False)]
    title = ": ".join(filter(None, [title, ", ".join(map(" ".join, shared.items()))]))
    rows_kept = [list(compress(row, kept)) for row in entries]
    return Table(title, list(compress(columns, kept)), rows_kept, len(entries) > _LONG)


def make_entry(value: Any, unit: str | None, missing: str = _MISSING) -> Entry:
    """A number or an estimate in `unit`, a text where that is None; `missing` is the word for a missing number."""
    if isinstance(value, Entry):
        return value
    if value is None or unit is None:
        return Entry(missing if value is None else str(value), is_number=unit is not None)

    def shown(*values: float) -> str:
        return " – ".join(count(round(one)) for one in values) if unit == _WHOLE else in_unit(values, unit)

    if not isinstance(value, dict):
        return Entry(shown(value))
    middle, low, high = (value[end] for end in ("value", "low", "high"))
    if low is None:
        return Entry(shown(middle))
    if high is None:  # so many launches missed the target that the interval has no upper end
        return Entry(shown(middle), f"{shown(low)} or more")
    return Entry(shown(middle), "" if low == high else shown(low, high))  # the baseline's ratio to itself is exact


# Of a group

_SETTING = ["combination", "message", "batch"]
_FIT = ["model", "parameters", "held-out error"]


def points_tables(group: Json) -> list[Table]:
    """Step times and their parts within a node and across nodes."""
    columns = ["ranks", "nodes", "combination", "message", "global batch", "launches", "step time", "spread"]
    columns += ["data", "compute", "exposed communication", "slowest / median rank"]
    keys = ("message_bytes", "optimizer", "global_batch_size", "world_size", "sync")
    points = sorted(group["points"], key=lambda point: [point[key] for key in keys])
    within, across = ([p for p in points if (p["num_nodes"] > 1) == is_across] for is_across in (False, True))
    parts = {"Within a node": within, "Across nodes": across}
    return [make_table(title, columns, own, ("nodes", "launches")) for title, own in parts.items()]


def series_tables(group: Json, kind: str, scope: str) -> tuple[Table, Table, Table]:
    """Of all series of a kind and scope, the smallest message first: scaling over the baseline p0, models, targets.

    The model that is drawn is marked. Steps and time to the target are predicted and measured.
    """
    scaling, models, targets = [], [], []
    for one in sorted(group["series"], key=lambda one: one["message_bytes"]):
        if (one["kind"], one["scope"]) != (kind, scope):
            continue
        batch = count(one["global_batch_size"] or one["local_batch_size"]) + " a rank" * (kind == "weak")
        setting = {**one, "batch": Entry(batch)}
        scaling += [{**setting, **point} for point in one["points"]]
        drawn = best_model(one)
        models += [{**setting, **_fit_row(fit), "drawn": "yes" if fit is drawn else ""} for fit in one["models"]]
        for row in (row for target in one["targets"] for row in target["rows"]):
            fraction = number(1 / row["stability_limit"]) + ("" if row["is_stable"] else ", diverges")
            missing = "never" if row["predicted_steps"] is None else "not reached"
            targets.append({**setting, **row, "limit_fraction": Entry(fraction), "missing": missing})
    scaling_columns = [*_SETTING, "ranks", "nodes", "p0", "speedup", "efficiency", "samples/s"]
    target_columns = [
        "combination", "message", *["batch"] * (kind == "weak"), "ranks", "nodes", "global batch",
        "learning rate / limit", "predicted steps", "measured steps", "step time", "predicted time", "measured time",
        "predicted / measured", "node-hours",
    ]  # fmt: skip
    constant = ("message", "batch", "nodes", "global batch", "learning rate / limit")
    title = f"{kind} scaling, {scope}"
    return (
        make_table(title.capitalize(), scaling_columns + ["Karp–Flatt"] * (kind == "strong"), scaling, ("nodes", "p0")),
        make_table(f"Models, {title}", [*_SETTING, *_FIT, "drawn"], models),
        make_table(f"Time to the target, {title}", target_columns, targets, constant),
    )


def _fit_row(fit: Json) -> Json:
    if not fit["identifiable"]:
        return {**fit, "parameters": f"not identifiable: {fit['why']}", "held_out_error": None}
    parts = []
    for one in fit["parameters"]:
        value, interval = in_unit([one["value"]], one["unit"]), in_unit([one["low"], one["high"]], one["unit"])
        parts.append(f"{one['symbol']} = {value} [{interval}]")
    return {**fit, "parameters": "; ".join(parts)}


def proposal_table(group: Json, series: Sequence[Json]) -> Table:
    """The measured points of series, and 2, 4 and 8 times the largest world size as their best models have them."""
    points, rows = {point["id"]: point for point in group["points"]}, []
    for one in series:
        scaling, last, fit = f"{one['kind']}, {batch_text(one)}", one["points"][-1], best_model(one)
        for row in one["points"]:
            point = points[row["point"]]
            compute, launches = point["compute_time_s"], counted(point["num_launches"], "launch")
            fraction = compute and compute["value"] / point["step_time_s"]["value"]
            rows.append({"scaling": scaling, **row, "compute_fraction": fraction, "basis": f"measured, {launches}"})
        for at in fit["curve"] if fit else ():
            if at["world_size"] in (factor * last["world_size"] for factor in (2, 4, 8)):
                num_nodes = math.ceil(at["world_size"] * last["num_nodes"] / last["world_size"])
                extrapolated = {"num_nodes": num_nodes, "compute_fraction": None, "basis": "extrapolated"}
                rows.append({"scaling": scaling, **at, **extrapolated})
    columns = ["scaling", "nodes", "ranks", "step time", "efficiency", "compute, of the step", "basis"]
    return make_table("Step times", columns, rows)


def allreduce_tables(group: Json) -> list[Table]:
    """The fits of α + β m, and the times by message size."""
    order = sorted(group["allreduce"], key=lambda one: (one["num_nodes"], one["world_size"]))
    measured = [{**one, "where": placement_text(one)} for one in order]
    fits = ({**one, **_fit_row(one["fit"])} for one in measured)
    sizes = ({**one, **of_size} for one in measured for of_size in one["sizes"])
    times = ["backend", "where", "message", "time", "bandwidth"]
    return [make_table("Fits", ["backend", "where", *_FIT], fits), make_table("Times", times, sizes)]


def report_tables(report: Json) -> dict[str, list[Table]]:
    """The tables of the whole report by section: sources, provenance, failed launches and what is excluded."""
    sources = ({**source, "jobs": ", ".join(source["job_ids"]) or None} for source in report["sources"])
    same = ({"field": field, "value": value} for field, value in report["provenance"]["same"].items())
    differs = (
        {"field": one["field"], "value": found["value"], "num_launches": found["launches"]}
        for one in report["provenance"]["differs"]
        for found in one["values"]
    )
    retried = "a later try succeeded"
    failed = ({**one, retried: "yes" if one["is_retried"] else "no", "record": one["file"]} for one in report["failed"])
    return {
        "cost": [make_table("Sources", ["folder", "campaign", "machine", "launches", "failed", "jobs"], sources)],
        "provenance": [
            make_table("Differs between launches", ["field", "value", "launches"], differs),
            make_table("Same in all launches", ["field", "value"], same),
        ],
        "excluded": [
            make_table("Failed launches", ["launch", "reason", retried, "record", "log"], failed),
            make_table("Excluded from all statistics", ["what", "reason", "file"], report["excluded"]),
        ],
    }
