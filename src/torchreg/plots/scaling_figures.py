"""The pictures of a scaling report: small multiples, one panel for each message size, one line for each combination.

A report may hold dozens of series. Those that share a scope and a kind (strong, weak) share a picture; each optimizer
with its sync keeps its colour, marker and dashes in all of them, and each size of the batch and of the message has its
own panels. A page shows the panels one by one (they must be readable on a phone); a file holds them all.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torchreg.console import printable
from torchreg.plots.panels import (
    Bar,
    Json,
    Look,
    best_model,
    combination_of,
    draw_bars,
    draw_fits,
    draw_measure,
    draw_times,
    padded,
    shared_limits,
)
from torchreg.plots.pictures import (
    MORE_LOOKS,
    Panel,
    Picture,
    batch_text,
    columns,
    combination_looks,
    combinations,
    place_text,
    slug,
)
from torchreg.plots.quantities import bytes_text, features, in_unit
from torchreg.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, SKY

_WAYS = {"gloo": (ORANGE, "^", "-."), "nccl": (BLUE, "o", "-"), "xccl": (BLUE, "o", "-"), "MPI": (GREEN, "s", "--")}

_IDEAL = Look("ideal, from the baseline", GREY, dashes="--", width=1)
_EFFICIENT = Look("80 %", GREY, dashes=":", width=1.5)
_EXTRAPOLATED = Look("extrapolated: beyond what was measured", GREY, dashes="--")
_FIT = Look("model, where measured", GREY, dashes="-")
_ROWS, _COMPUTE, _EXPOSED = Look("taking rows", SKY), Look("compute", BLUE), Look("exposed communication", ORANGE)
_NOT_TOLD_APART = Look("compute and communication, not told apart", GREEN)
_IMBALANCE = Look("of it, the slowest rank over the median rank", BLACK, hatch="///", filled=False)

_MEASURES = {"throughput": "throughput", "speedup": "speedup", "efficiency": "efficiency", "karp_flatt": "Karp–Flatt"}
_KEEPS = {
    "strong": "the global batch stays, so ideal is p/p0 times as fast",
    "weak": "the batch of each rank stays, so ideal is the same step time for p/p0 times the rows",
}


def draw_scaling(group: Json, number: int, kind: str, scope: str) -> Picture | None:
    """Throughput, efficiency and, in strong scaling, speedup and Karp–Flatt over world sizes."""
    series = [one for one in group["series"] if one["kind"] == kind and one["scope"] == scope and one["points"]]
    if not series:
        return None
    looks = combination_looks(group)
    measures = ["throughput", *(["speedup"] if kind == "strong" else []), "efficiency"]
    explained = ""
    if any(point["karp_flatt"] for one in series for point in one["points"]):
        measures.append("karp_flatt")
        explained = " Karp–Flatt is the serial fraction that would explain the speedup: ideally small, and constant."
    panels = _by_panel(series)
    baselines = " or ".join(f"p0 = {size}" for size in sorted({one["baseline_world_size"] for one in series}))
    return Picture(
        f"figure-{number}-{kind}-{slug(scope)}",
        f"{kind.capitalize()} scaling, {scope}",
        f"{kind.capitalize()} scaling, {scope} ({_KEEPS[kind]}), baseline {baselines}. Medians over launches with 95 % "
        f"intervals; markers stand a little aside where they would hide each other.{explained} "
        f"Source: points and series of group {number} in report.json; points.csv.",
        (*(looks[name] for name in combinations(series)), _IDEAL, _EFFICIENT),
        tuple(
            Panel(
                title,
                f"{_MEASURES[measure]} over ranks, {title}, {scope}: {_last_values(part, measure)}",
                partial(draw_measure, part, measure, looks, shared_limits(series, measure)),
            )
            for measure in measures
            for title, part in panels.items()
        ),
        columns(len(panels)),
    )


def draw_breakdown(group: Json, number: int, kind: str, scope: str) -> Picture | None:
    """Where a step's time goes, as shares of it."""
    points = {point["id"]: point for point in group["points"]}
    series = [one for one in group["series"] if one["kind"] == kind and one["scope"] == scope and one["points"]]
    if not series:
        return None
    bars = {
        title: [
            _bar(f"{combination_of(one)}  {row['world_size']}", points[row["point"]])
            for one in part
            for row in one["points"]
        ]
        for title, part in _by_panel(series).items()
    }
    used = {look for part in bars.values() for bar in part for look, shard in (*bar.shards, bar.over) if shard > 0}
    return Picture(
        f"figure-{number}-breakdown-{kind}-{slug(scope)}",
        f"Where a step's time goes, {kind} scaling, {scope}",
        f"Where a step's time goes, {kind} scaling, {scope}: a bar for each combination and number of ranks, its parts "
        "as shares of the median step time, which stands at its right. Exposed communication is the step minus the "
        "same step without averaging. Parts are medians taken one by one, so they need not add up to 100 %. Hatched is "
        "by how much the slowest rank is slower than the median one: a part of the others, not one more. "
        f"Source: points of group {number} in report.json; points.csv.",
        tuple(look for look in (_ROWS, _COMPUTE, _EXPOSED, _NOT_TOLD_APART, _IMBALANCE) if look in used),
        tuple(
            Panel(
                title,
                f"shares of the step, {title}, {scope}: {'; '.join(map(_say_bar, part))}",
                partial(draw_bars, part),
                height=0.3 + 0.2 * len(part),
                margin=1.22,
            )
            for title, part in bars.items()
        ),
        columns(len(bars)),
    )


def _bar(name: str, point: Json) -> Bar:
    """The parts of a step as fractions of it. Differences of noisy times below zero are noise: no part."""
    step = point["step_time_s"]["value"]

    def shard(field: str) -> float:
        return max(0.0, _value(point[field]) or 0.0) / step

    rows, compute, exposed = shard("data_time_s"), shard("compute_time_s"), shard("exposed_time_s")
    if point["compute_time_s"] is None:  # the step was not measured without averaging
        parts = [(_ROWS, rows), (_NOT_TOLD_APART, max(0.0, 1 - rows))]
    else:
        parts = [(_ROWS, rows), (_COMPUTE, compute), (_EXPOSED, exposed)]
    return Bar(name, step, tuple(parts), (_IMBALANCE, shard("imbalance_time_s")))


def _say_bar(bar: Bar) -> str:
    parts = ", ".join(f"{look.label} {in_unit([shard], '%')}" for look, shard in bar.shards if shard > 0)
    return f"{bar.name.replace('  ', ' on ')}: {parts}"


def draw_models(group: Json, number: int, kind: str, scope: str) -> Picture | None:
    """Measured step times under the model that predicts left-out world sizes best, carried on dashed."""
    series = [one for one in group["series"] if one["kind"] == kind and one["scope"] == scope and best_model(one)]
    if not series:
        return None
    looks = combination_looks(group)
    panels = _by_panel(series)
    return Picture(
        f"figure-{number}-models-{kind}-{slug(scope)}",
        f"Models of the step time, {kind} scaling, {scope}",
        f"Models of the step time, {kind} scaling, {scope}: measured medians with 95 % intervals, and for each series "
        "the identifiable model that predicts left-out world sizes best (the table says which). In the shaded part "
        f"nothing was measured: dashed lines are extrapolated. Source: models of group {number} in report.json.",
        (*(looks[name] for name in combinations(series)), _FIT, _EXTRAPOLATED),
        tuple(
            Panel(
                title,
                f"step time over ranks, {title}, {scope}: "
                + "; ".join(f"{combination_of(one)} under {(best_model(one) or {})['model']}" for one in part),
                partial(draw_fits, part, looks),
            )
            for title, part in panels.items()
        ),
        columns(len(panels)),
    )


def draw_allreduce(group: Json, number: int) -> Picture | None:
    """Time of one all-reduce over the message size, with α + β m."""
    measured = [one for one in group["allreduce"] if one["sizes"]]
    if not measured:
        return None
    more = iter(MORE_LOOKS)
    looks = {}
    for way in dict.fromkeys(one["way"] for one in measured):
        looks[way] = Look(printable(way), *(_WAYS.get(way) or next(more, MORE_LOOKS[-1])))
    panels: dict[str, list[Json]] = {}
    for one in sorted(measured, key=lambda one: (one["num_nodes"] > 1, one["num_nodes"], one["world_size"])):
        panels.setdefault(place_text(one), []).append(one)
    limits = padded([size["time_s"]["value"] for one in measured for size in one["sizes"]])

    def says(one: Json) -> str:
        ends = (
            f"{in_unit([size['time_s']['value']], 's')} at {bytes_text(size['message_bytes'])}"
            for size in (one["sizes"][0], one["sizes"][-1])
        )
        return f"{one['way']} from {' to '.join(ends)}"

    return Picture(
        f"figure-{number}-allreduce",
        "All-reduce",
        "Time of one all-reduce: medians over launches with 95 % intervals, both axes logarithmic. Lines are the fits "
        "T(m) = α + β m; a way without a line has no identifiable fit. "
        f"Source: allreduce of group {number} in report.json; allreduce.csv.",
        tuple(looks.values()),
        tuple(
            Panel(
                title,
                f"time of an all-reduce over message size, {title}: {'; '.join(map(says, part))}",
                partial(draw_times, part, looks, limits),
            )
            for title, part in panels.items()
        ),
        min(3, len(panels)),
    )


def _by_panel(series: Iterable[Json]) -> dict[str, list[Json]]:
    """Series by size of message and batch, the smallest first."""
    panels: dict[str, list[Json]] = {}
    for one in sorted(
        series, key=lambda one: (one["message_bytes"], one["global_batch_size"] or one["local_batch_size"])
    ):
        title = f"{features(one['num_features'])} ({bytes_text(one['message_bytes'])}), {batch_text(one)}"
        panels.setdefault(title, []).append(one)
    return panels


def _value(estimate: Json | None) -> float | None:
    return None if estimate is None else estimate["value"]


def _last_values(series: Iterable[Json], measure: str) -> str:
    """What the lines end at."""
    unit = {"efficiency": "%", "throughput": "samples/s"}.get(measure, "")
    per = " samples/s" if measure == "throughput" else ""
    ends = ((one, one["points"][-1]) for one in series)
    told = (
        f"{combination_of(one)} {in_unit([last[measure]['value']], unit)}{per} at {last['world_size']}"
        for one, last in ends
        if last[measure]
    )
    return "; ".join(told) or "nothing to show"
