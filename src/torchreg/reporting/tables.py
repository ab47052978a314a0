"""The tables of a report: columns as data; entries with units and intervals, and footnotes on missing numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torchreg.plots.pictures import best_model, combination_of
from torchreg.plots.quantities import bytes_text, count, in_unit, number, ranks
from torchreg.reporting.points import Json

_LONG = 14  # rows; a longer table is folded
_FEW, _NONE, _NEVER, _NOT_REACHED, _NOT_RECORDED = "abcde"
_NOTES = {
    _FEW: "too few launches for a 95 % interval: 6 are needed",
    _NONE: "not measured, or not defined at this point",
    _NEVER: "never: training diverges, or its noise floor lies above the target",
    _NOT_REACHED: "the target was not reached, or was not tried",
    _NOT_RECORDED: "not recorded",
}


class Entry(NamedTuple):
    """A value with its interval; `note` is the letter of a footnote."""

    text: str
    interval: str = ""
    note: str = ""
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """Columns, rows, and the footnotes that its entries refer to."""

    title: str
    columns: list[str]
    rows: list[list[Entry]]
    notes: list[tuple[str, str]]

    @property
    def is_long(self) -> bool:
        """Whether the table is folded until a reader opens it."""
        return len(self.rows) > _LONG


def text(value: object) -> Entry:
    """Words."""
    return Entry(value if isinstance(value, str) else str(value), is_number=False)


def whole(value: float) -> Entry:
    """A whole number, every digit of it."""
    return Entry(count(value))


def size(value: float) -> Entry:
    """A message size in bytes."""
    return Entry(bytes_text(value))


def plain(unit: str) -> Callable[[Any], Entry]:
    """A number without an interval, in `unit`."""
    return lambda value: Entry(in_unit([value], unit))


def estimate(unit: str) -> Callable[[Any], Entry]:
    """An estimate and its interval in `unit`; `steps` are written with every digit."""

    def shown(*values: float) -> str:
        return " – ".join(count(round(value)) for value in values) if unit == "steps" else in_unit(values, unit)

    def entry(found: Json) -> Entry:
        value, low, high = found["value"], found["low"], found["high"]
        if low is None:
            return Entry(shown(value), "–", _FEW)
        if high is None:  # so many launches missed the target that the interval has no upper end
            return Entry(shown(value), f"{shown(low)} or more")
        return Entry(shown(value), "" if low == high else shown(low, high))  # the baseline's ratio to itself is exact

    return entry


def as_is(value: Entry) -> Entry:
    """An entry that was made with its row."""
    return value


_COLUMNS: dict[str, tuple[str, Callable[[Any], Entry]]] = {
    "ranks": ("world_size", whole),
    "nodes": ("num_nodes", whole),
    "combination": ("combination", text),
    "message": ("message_bytes", size),
    "batch": ("batch", as_is),
    "global batch": ("global_batch_size", whole),
    "launches": ("num_launches", whole),
    "step time": ("step_time_s", estimate("s")),
    "spread": ("spread", plain("%")),
    "slowest / median rank": ("slowest_over_median", estimate("")),
    "samples/s": ("throughput", estimate("k")),
    "p0": ("baseline_world_size", whole),
    "speedup": ("speedup", estimate("")),
    "efficiency": ("efficiency", estimate("%")),
    "Karp–Flatt": ("karp_flatt", estimate("")),
    "data": ("data_time_s", estimate("s")),
    "compute": ("compute_time_s", estimate("s")),
    "exposed communication": ("exposed_time_s", estimate("s")),
    "slowest − median rank": ("imbalance_time_s", estimate("s")),
    "parameters": ("estimates", as_is),
    "held-out error": ("held_out_error", plain("%")),
    "backend": ("backend", text),
    "time": ("time_s", estimate("s")),
    "bandwidth": ("bandwidth", plain("B/s")),
    "learning rate / limit": ("limit_fraction", as_is),
    "predicted steps": ("steps", as_is),
    "measured steps": ("measured_steps", estimate("steps")),
    "predicted time": ("predicted_time_s", estimate("s")),
    "measured time": ("measured_time_s", estimate("s")),
    "predicted / measured": ("predicted_over_measured", estimate("")),
    "node-hours": ("node_hours", plain("")),
    "failed": ("num_failed", whole),
    "scaling limit (ranks)": ("limit", whole),
}
"""Key of a row by heading, and how its value is written; a heading that is not here is the key of a text."""


def make_table(title: str, columns: Sequence[str], rows: Iterable[Json], constant: Sequence[str] = ()) -> Table:
    """A table with the footnotes that its entries need.

    Of the columns named in `constant`, those with the same value in all rows move into the title, because a table that
    is too wide hides its last columns. A row's `missing` is the footnote of its missing numbers.
    """
    entries = [{heading: _entry(row, *_COLUMNS.get(heading, (heading, text))) for heading in columns} for row in rows]
    shared = {
        heading: entries[0][heading].text
        for heading in constant
        if heading in columns
        and len({row[heading] for row in entries}) == 1 < len(entries)
        and not entries[0][heading].note
    }
    kept = [heading for heading in columns if heading not in shared]
    used = {row[heading].note for row in entries for heading in kept}
    return Table(
        ": ".join([title, *([", ".join(f"{heading} {value}" for heading, value in shared.items())] if shared else [])]),
        kept,
        [[row[heading] for heading in kept] for row in entries],
        [(letter, note) for letter, note in _NOTES.items() if letter in used],
    )


def _entry(row: Json, key: str, written: Callable[[Any], Entry]) -> Entry:
    if row[key] is not None:
        return written(row[key])
    is_number = written is not text
    return Entry("–", note=row.get("missing", _NONE) if is_number else _NOT_RECORDED, is_number=is_number)


# Of a group

_POINT = ["ranks", "nodes", "combination", "message", "global batch"]
_PARTS = ["step time", "data", "compute", "exposed communication", "slowest − median rank"]
_SETTING = ["combination", "message", "batch"]
_FIT = ["model", "parameters", "held-out error"]


def points_tables(group: Json) -> list[Table]:
    """Step times within a node and across nodes."""
    columns = [*_POINT, "launches", "step time", "spread", "slowest / median rank", "samples/s"]
    tables = []
    for title, across in (("Within a node", False), ("Across nodes", True)):
        rows = (row for row in _points(group) if (row["num_nodes"] > 1) == across)
        tables.append(make_table(title, columns, rows, ("nodes", "launches")))
    return [one for one in tables if one.rows]


def _points(group: Json) -> list[Json]:
    keys = ("message_bytes", "optimizer", "global_batch_size", "world_size", "sync")
    points = sorted(group["points"], key=lambda point: [point[key] for key in keys])
    return [{**point, "combination": combination_of(point)} for point in points]


def breakdown_table(group: Json, scope: str) -> Table:
    """The parts of a step in the series of a scope."""
    named = {row["point"] for one in group["series"] if one["scope"] == scope for row in one["points"]}
    rows = (point for point in _points(group) if point["id"] in named)
    return make_table(f"Parts of a step, {scope}", [*_POINT, *_PARTS], rows, ("nodes",))


def _series(group: Json, kind: str, scope: str) -> Iterator[tuple[Json, Json]]:
    """Each series with the entries that name its setting, the smallest message first."""
    for one in sorted(group["series"], key=lambda one: one["message_bytes"]):
        if (one["kind"], one["scope"]) == (kind, scope):
            batch = count(one["global_batch_size"] or one["local_batch_size"]) + " a rank" * (kind == "weak")
            fields = ("message_bytes", "baseline_world_size")
            yield one, {"combination": combination_of(one), "batch": Entry(batch), **{key: one[key] for key in fields}}


def scaling_table(group: Json, kind: str, scope: str) -> Table:
    """Speedup and efficiency over the baseline p0."""
    rows = ({**setting, **point} for one, setting in _series(group, kind, scope) for point in one["points"])
    columns = [*_SETTING, "ranks", "nodes", "p0", "speedup", "efficiency", "samples/s"]
    columns += ["Karp–Flatt"] * (kind == "strong")
    return make_table(f"{kind.capitalize()} scaling, {scope}", columns, rows, ("nodes", "p0"))


def models_table(group: Json, kind: str, scope: str) -> Table:
    """The fitted models of the step time; the one that is drawn is marked."""
    rows = (
        {**setting, **_fit_row(fit), "drawn": "yes" if fit is best_model(one) else ""}
        for one, setting in _series(group, kind, scope)
        for fit in one["models"]
    )
    return make_table(f"Models, {kind} scaling, {scope}", [*_SETTING, *_FIT, "drawn"], rows)


def _fit_row(fit: Json) -> Json:
    if not fit["identifiable"]:
        return {"model": fit["model"], "estimates": text(f"not identifiable: {fit['why']}"), "held_out_error": None}
    parts, is_few = [], False
    for one in fit["parameters"]:
        unit = one["unit"] or ""
        interval = "" if one["low"] is None else f" [{in_unit([one['low'], one['high']], unit)}]"
        is_few |= not interval
        parts.append(f"{one['symbol']} = {in_unit([one['value']], unit)}{interval}")
    return {**fit, "estimates": Entry("; ".join(parts), note=_FEW if is_few else "", is_number=False)}


def allreduce_tables(group: Json) -> list[Table]:
    """The fits of α + β m, and the times by message size."""
    keys = ("num_nodes", "world_size")
    measured = [
        {**one, "where": f"{ranks(one['world_size'])} on {one['num_nodes']} node{'s' * (one['num_nodes'] > 1)}"}
        for one in sorted(group["allreduce"], key=lambda one: [one[key] for key in keys])
    ]
    fits = ({**one, **_fit_row(one["fit"])} for one in measured if one["fit"])
    sizes = ({**one, **of_size} for one in measured for of_size in one["sizes"])
    times = ["backend", "where", "message", "time", "bandwidth"]
    return [make_table("Fits", ["backend", "where", *_FIT], fits), make_table("Times", times, sizes)]


def targets_table(group: Json, kind: str, scope: str) -> Table:
    """Steps and time to the target, predicted and measured."""
    series = {one["id"]: setting for one, setting in _series(group, kind, scope)}
    rows = (
        {**series[target["series"]], **_target_row(row)}
        for target in group["targets"] if target["series"] in series for row in target["rows"]
    )  # fmt: skip
    columns = [
        "combination", "message", *(["batch"] if kind == "weak" else []), "ranks", "nodes", "global batch",
        "learning rate / limit", "predicted steps", "measured steps", "step time", "predicted time", "measured time",
        "predicted / measured", "node-hours",
    ]  # fmt: skip
    constant = ("message", "batch", "nodes", "global batch", "learning rate / limit")
    return make_table(f"Time to the target, {kind} scaling, {scope}", columns, rows, constant)


def _target_row(row: Json) -> Json:
    steps = row["predicted_steps"]
    return {
        **row,
        "missing": _NEVER if steps is None else _NOT_REACHED,
        "limit_fraction": Entry(number(1 / row["stability_limit"]) + ("" if row["is_stable"] else ", diverges")),
        "steps": Entry("–", note=_NEVER) if steps is None else whole(steps),
    }


# Of the whole report


def source_table(report: Json) -> Table:
    """The directories that were read."""
    rows = ({**source, "jobs": ", ".join(source["job_ids"]) or None} for source in report["sources"])
    return make_table("Sources", ["folder", "campaign", "machine", "launches", "failed", "jobs"], rows)


def provenance_tables(report: Json) -> list[Table]:
    """What differs between launches, and what is the same in all."""
    same = ({"field": field, "value": value} for field, value in report["provenance"]["same"].items())
    differs = (
        {"field": one["field"], "value": found["value"], "num_launches": found["launches"]}
        for one in report["provenance"]["differs"]
        for found in one["values"]
    )
    tables = [
        make_table("Differs between launches", ["field", "value", "launches"], differs),
        make_table("Same in all launches", ["field", "value"], same),
    ]
    return [one for one in tables if one.rows]


def excluded_tables(report: Json) -> list[Table]:
    """Failed launches, and what is in no statistics, with reasons."""
    retried = "a later try succeeded"
    failed = ({**one, retried: "yes" if one["is_retried"] else "no", "record": one["file"]} for one in report["failed"])
    tables = [
        make_table("Failed launches", ["launch", "reason", retried, "record", "log"], failed),
        make_table("Excluded from all statistics", ["what", "reason", "file"], report["excluded"]),
    ]
    return [one for one in tables if one.rows]
