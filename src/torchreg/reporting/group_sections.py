"""A group's part of a report: its points, series, parts of a step, all-reduce, models and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torchreg.plots.pictures import Picture, best_model, combination_of, placement_text, scopes_of, slug
from torchreg.plots.quantities import count, in_unit, number, ranks
from torchreg.plots.scaling_figures import draw_allreduce, draw_breakdown, draw_models, draw_scaling
from torchreg.plots.target_figures import draw_steps, draw_targets
from torchreg.reporting.page_parts import (
    FEW,
    NEVER,
    NONE,
    NOT_REACHED,
    Cell,
    Json,
    Section,
    Table,
    bytes_cell,
    counted,
    counted_estimate,
    estimate_cell,
    plain,
    table,
    word,
)


def group_section(group: Json, index: int) -> Section:
    """Everything that a group's launches say, most wanted first."""
    anchor = f"group-{index}"
    names = ("machine", "device_name", "backend", "dtype", "distributed")
    shared = [f"{name.replace('_name', '')} {group[name]}" for name in names if group[name]]
    shared += [f"{name} {version}" for name, version in group["versions"].items() if version]
    return Section(
        anchor,
        f"Measurements{f' {index}' if index > 1 else ''}: {group['title']}",
        (f"{', '.join(shared)}. Launches that differ in any of these are not compared with each other.",),
        sections=tuple(
            part
            for part in (
                _points(group, anchor),
                _scaling(group, index, "strong"),
                _scaling(group, index, "weak"),
                _breakdown(group, index),
                _allreduce(group, index),
                _models(group, index),
                _targets(group, index),
            )
            if part
        ),
    )


def _points(group: Json, anchor: str) -> Section:
    columns = (
        "ranks", "nodes", "combination", "message", "global batch", "launches", "step time", "spread",
        "slowest / median rank", "samples/s",
    )  # fmt: skip

    often_alike = ("nodes", "launches")

    def row(point: Json) -> tuple[Cell, ...]:
        return (
            counted(point["world_size"]), counted(point["num_nodes"]), word(combination_of(point)),
            bytes_cell(point["message_bytes"]), counted(point["global_batch_size"]), counted(point["num_launches"]),
            estimate_cell(point["step_time_s"], "s"), plain(point["spread"], "%"),
            estimate_cell(point["slowest_over_median"], ""), estimate_cell(point["throughput"], "k"),
        )  # fmt: skip

    points = sorted(group["points"], key=_order)
    tables = [
        table(name, columns, (row(point) for point in points if (point["num_nodes"] > 1) == across), often_alike)
        for name, across in (("Within a node", False), ("Across nodes", True))
    ]
    return Section(
        f"{anchor}-points",
        "Points",
        (
            "A step's time is the slowest rank's. Each number is the median over launches with its 95 % interval; "
            "spread is the interquartile range over the median.",
        ),
        tables=tuple(one for one in tables if one.rows),
    )


def _order(point: Json) -> tuple[Any, ...]:
    return point["message_bytes"], point["optimizer"], point["global_batch_size"], point["world_size"], point["sync"]


def _scaling(group: Json, index: int, kind: str) -> Section | None:
    columns = (
        "combination", "message", "batch", "ranks", "nodes", "p0", "speedup", "efficiency", "samples/s",
        *(("Karp–Flatt",) if kind == "strong" else ()),
    )  # fmt: skip

    def rows(scope: str) -> Iterable[tuple[Cell, ...]]:
        for one in _series(group, kind, scope):
            for point in one["points"]:
                yield (
                    *_setting(one), counted(point["world_size"]), counted(point["num_nodes"]),
                    counted(one["baseline_world_size"]), estimate_cell(point["speedup"], ""),
                    estimate_cell(point["efficiency"], "%"), estimate_cell(point["throughput"], "k"),
                    *((estimate_cell(point["karp_flatt"], ""),) if kind == "strong" else ()),
                )  # fmt: skip

    words = {
        "strong": "The global batch stays the same; speedup is T(p0) / T(p), efficiency is speedup × p0 / p. "
        "Karp–Flatt is (1/S − 1/q) / (1 − 1/q) with S the speedup and q = p / p0.",
        "weak": "The batch of each rank stays the same; efficiency is T(p0) / T(p), the scaled speedup is "
        "efficiency × p / p0.",
    }
    return _by_scope(
        group, f"group-{index}-{kind}", f"{kind.capitalize()} scaling", words[kind],
        lambda scope: [draw_scaling(group, index, kind, scope)],
        lambda scope: [table(f"{kind.capitalize()} scaling, {scope}", columns, rows(scope), ("nodes", "p0"))],
    )  # fmt: skip


def _breakdown(group: Json, index: int) -> Section | None:
    columns = (
        "ranks", "nodes", "combination", "message", "global batch", "step", "rows", "compute",
        "exposed communication", "slowest − median rank",
    )  # fmt: skip

    def parts(scope: str) -> Table:
        named = {row["point"] for one in group["series"] if one["scope"] == scope for row in one["points"]}
        rows = (
            (
                counted(point["world_size"]), counted(point["num_nodes"]), word(combination_of(point)),
                bytes_cell(point["message_bytes"]), counted(point["global_batch_size"]),
                *(
                    estimate_cell(point[name], "s")
                    for name in ("step_time_s", "data_time_s", "compute_time_s", "exposed_time_s", "imbalance_time_s")
                ),
            )
            for point in sorted((point for point in group["points"] if point["id"] in named), key=_order)
        )  # fmt: skip
        return table(f"Parts of a step, {scope}", columns, rows, ("nodes",))

    return _by_scope(
        group, f"group-{index}-breakdown", "Where a step's time goes", "",
        lambda scope: [draw_breakdown(group, index, kind, scope) for kind in ("strong", "weak")],
        lambda scope: [parts(scope)],
    )  # fmt: skip


def _allreduce(group: Json, index: int) -> Section | None:
    picture = draw_allreduce(group, index)
    if not picture:
        return None
    measured = sorted(group["allreduce"], key=lambda one: (one["num_nodes"] > 1, one["num_nodes"], one["world_size"]))
    fits = ((word(one["way"]), word(placement_text(one)), *_fit_cells(one["fit"])) for one in measured if one["fit"])
    sizes = (
        (
            word(one["way"]), word(placement_text(one)), bytes_cell(size["message_bytes"]),
            estimate_cell(size["time_s"], "s"), plain(size["bandwidth"], "B/s"),
        )
        for one in measured
        for size in one["sizes"]
    )  # fmt: skip
    return Section(
        f"group-{index}-allreduce",
        "All-reduce",
        ("Latency α and time per byte β of one all-reduce by itself, without any training. Bandwidth is the message's "
         "bytes over its time.",),
        tables=(
            table("Fits", ("way", "where", "model", "parameters", "held-out error"), fits),
            table("Times", ("way", "where", "message", "time", "bandwidth"), sizes),
        ),
        pictures=(picture,),
    )  # fmt: skip


def _models(group: Json, index: int) -> Section | None:
    fits = [fit for one in group["series"] for fit in one["models"]]
    if not fits:
        return None
    formulas = {fit["model"]: f"{fit['model']}: {fit['formula']} ({fit['source']})" for fit in fits}
    columns = ("combination", "message", "batch", "model", "parameters", "held-out error", "drawn")

    def tables(scope: str) -> list[Table]:
        found = []
        for kind in ("strong", "weak"):
            rows = [
                (*_setting(one), *_fit_cells(fit), word("yes" if fit is best_model(one) else ""))
                for one in _series(group, kind, scope)
                for fit in one["models"]
            ]
            found.append(table(f"Models, {kind} scaling, {scope}", columns, rows))
        return found

    section = _by_scope(
        group, f"group-{index}-models", "Models",
        "What bounds the step time, as three models see it. The held-out error is the largest relative error of "
        "predicting each left-out world size from the others.",
        lambda scope: [draw_models(group, index, kind, scope) for kind in ("strong", "weak")],
        tables,
    )  # fmt: skip
    return section and replace(section, points=tuple(formulas.values()))


def _targets(group: Json, index: int) -> Section | None:
    if not any(target["rows"] for target in group["targets"]):
        return None
    series = {one["id"]: one for one in group["series"]}
    often_alike = ("message", "batch", "nodes", "global batch", "rates / limit")

    def columns(kind: str) -> tuple[str, ...]:
        return (
            "combination", "message", *(("batch",) if kind == "weak" else ()), "ranks", "nodes", "global batch",
            "rates / limit", "predicted steps", "measured steps", "step time", "predicted time", "measured time",
            "predicted / measured", "node-hours",
        )  # fmt: skip

    def rows(scope: str, kind: str) -> Iterable[tuple[Cell, ...]]:
        for target in group["targets"]:
            one = series[target["series"]]
            if (one["scope"], one["kind"]) != (scope, kind):
                continue
            for row in target["rows"]:
                never = row["predicted_steps"] is None
                missing = NEVER if never else NOT_REACHED
                yield (
                    *(_setting(one) if kind == "weak" else _setting(one)[:2]),
                    counted(row["world_size"]), counted(row["num_nodes"]), counted(row["global_batch_size"]),
                    Cell(number(1 / row["stability_limit"]) + ("" if row["is_stable"] else ", diverges")),
                    Cell("–", note=NEVER[0]) if never else counted(row["predicted_steps"]),
                    counted_estimate(row["measured_steps"], missing), estimate_cell(row["step_time_s"], "s"),
                    estimate_cell(row["predicted_time_s"], "s", missing),
                    estimate_cell(row["measured_time_s"], "s", missing),
                    estimate_cell(row.get("predicted_over_measured"), "", missing),
                    plain(row["node_hours"], "", missing),
                )  # fmt: skip

    stable = tuple(
        f"{series[target['series']]['title']}: stable up to {place}"
        for target in group["targets"]
        if not all(row["is_stable"] for row in target["rows"])
        for most in [target["stable_up_to_world_size"]]
        for place in [ranks(most) if most else "no world size"]
    )
    steps = draw_steps(group, index)
    section = _by_scope(
        group, f"group-{index}-targets", "Time to the target",
        f"Statistical × hardware efficiency: the target is {_target_text(group)} above the best loss. Predicted steps "
        "come from theory alone; times step time they are the predicted time to it, times nodes the node-hours.",
        lambda scope: [draw_targets(group, index, scope)],
        lambda scope: [
            table(f"Time to the target, {kind} scaling, {scope}", columns(kind), rows(scope, kind), often_alike)
            for kind in ("strong", "weak")
        ],
    )  # fmt: skip
    return section and replace(section, pictures=(steps,) if steps else (), points=stable)


def _target_text(group: Json) -> str:
    return " or ".join(dict.fromkeys(in_unit([target["target_excess"]], "%") for target in group["targets"]))


def _by_scope(
    group: Json,
    anchor: str,
    title: str,
    words: str,
    pictures: Callable[[str], Sequence[Picture | None]],
    tables: Callable[[str], Sequence[Table]],
) -> Section | None:
    """A section with one below it for each scope that has something to show: within a node apart from across nodes."""
    parts = []
    for scope in scopes_of(group["series"]):
        drawn = tuple(picture for picture in pictures(scope) if picture)
        told = tuple(one for one in tables(scope) if one.rows)
        if drawn or told:
            name = scope[:1].upper() + scope[1:]
            parts.append(Section(f"{anchor}-{slug(scope)}", name, tables=told, pictures=drawn))
    return Section(anchor, title, (words,) if words else (), sections=tuple(parts)) if parts else None


def _series(group: Json, kind: str, scope: str) -> list[Json]:
    found = [one for one in group["series"] if one["kind"] == kind and one["scope"] == scope]
    return sorted(found, key=lambda one: one["message_bytes"])


def _setting(one: Json) -> tuple[Cell, Cell, Cell]:
    batch = one["global_batch_size"] if one["kind"] == "strong" else one["local_batch_size"]
    return (
        word(combination_of(one)), bytes_cell(one["message_bytes"]),
        Cell(f"{count(batch)}{' a rank' * (one['kind'] == 'weak')}"),
    )  # fmt: skip


def _fit_cells(fit: Json) -> tuple[Cell, Cell, Cell]:
    if not fit["identifiable"]:
        return word(fit["model"]), word(f"not identifiable: {fit['why']}"), Cell("–", note=NONE[0])
    told, few = [], False
    for parameter in fit["parameters"]:
        unit = parameter["unit"] or ""
        text = f"{parameter['symbol']} = {in_unit([parameter['value']], unit)}"
        if parameter["low"] is None:
            few = True
        else:
            text += f" [{in_unit([parameter['low'], parameter['high']], unit)}]"
        told.append(text)
    return (
        word(fit["model"]),
        Cell("; ".join(told), note=FEW[0] if few else "", is_number=False),
        plain(fit["held_out_error"], "%"),
    )
