"""What training would do at each of many world sizes, before a node-hour is spent. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torchreg.core.batches import DEFAULT_LOCAL_BATCH_SIZE
from torchreg.runs.config import LRScaling, TrainConfig
from torchreg.runs.forecast import Curve, Forecast, percent
from torchreg.runs.setup import (
    SEQUENTIAL_NOT_PREDICTED,
    LeastSquares,
    base_learning_rates,
    prepare,
    scale_at,
    stable_world_size,
)
from torchreg.theory import MAX_SEQUENTIAL, CriticalBatch, critical_batch_size

_POLARIS_NODE = 4  # ranks, one a GPU
_RULES: tuple[LRScaling, ...] = ("linear", "sqrt", "none")


@dataclass(frozen=True)
class WorldSize:
    """The forecast for one world size; `problem` says why there is none."""

    world_size: int
    global_batch_size: int
    scaled_learning_rate: tuple[float, float]
    forecast: Forecast | None
    problem: str | None = None

    @property
    def samples_to_target(self) -> int | None:
        """Rows that all ranks together see until the target is expected to be reached."""
        if self.forecast is None or self.forecast.steps_to_target is None:
            return None
        return self.forecast.steps_to_target * self.global_batch_size

    @property
    def end(self) -> Curve | None:
        """Where the run itself is expected to end."""
        return self.forecast.curve if self.forecast else None


@dataclass(frozen=True)
class Plan:
    """Forecasts for several world sizes, and what to make of them.

    `of_limit` has, for each scaling rule, pairs of world size and scaled rates as a multiple of the stability limit.
    `largest_stable` is the most ranks at which each scaling rule is stable with these rates, as far as the data has
    rows; empty where the global batch does not grow with the ranks. `critical` are the fewest steps to the target at
    each batch size with the best rates for it; None beyond 16 features, where noise is left out.
    """

    source: str
    num_rows: int
    num_features: int
    best_loss: float
    r_squared: float
    curvature: tuple[float, float]
    lr_scaling: str
    target_excess: float
    rows: tuple[WorldSize, ...]
    of_limit: dict[str, tuple[tuple[int, float | None], ...]]
    largest_stable: dict[LRScaling, int]
    most_ranks: int
    critical: CriticalBatch | None
    verdict: str
    notes: tuple[str, ...]

    def heading(self) -> list[str]:
        """What is planned for, in lines."""
        features = f"{self.num_features} feature{'s' * (self.num_features > 1)}"
        flattest, steepest = self.curvature
        ratio = f"{steepest / flattest:.3g}" if flattest > 0 else "more than 1e+16"
        return [
            f"plan         {self.source}: {self.num_rows} rows, {features}; lr_scaling {self.lr_scaling}",
            f"closed form  mean squared error {self.best_loss:.6g}, R² {self.r_squared:.3g}; losses below are in "
            "percent above it",
            f"curvature    {flattest:.4g} to {steepest:.4g}, the steepest direction {ratio} times the flattest",
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows for a person; rows that diverge begin with `!`."""
        target = percent(self.target_excess)
        columns = [
            "ranks", "global batch", "weight rate", "bias rate", "of limit", "", f"steps to {target}", "samples",
            "floor", "at the end",
        ]  # fmt: skip
        rows = []
        for row in self.rows:
            cells = [str(row.world_size), f"{row.global_batch_size:,}"]
            if row.forecast is None:
                rows.append([f"!{cells[0]}", cells[1], "", "", "", "impossible", "", "", "", ""])
                continue
            cells += [f"{learning_rate:.3g}" for learning_rate in row.scaled_learning_rate]
            over = f"{1 / row.forecast.stability_limit:.2f}"
            if not row.forecast.is_stable:
                rows.append([f"!{cells[0]}", *cells[1:], over, "diverges", "never", "", "", ""])
                continue
            steps, searched = row.forecast.steps_to_target, row.forecast.steps_searched
            rows.append([
                *cells, over, "stable",
                f"{steps:,}" if steps is not None else f"> {searched:,}" if searched else "never" if row.end else "",
                "" if row.samples_to_target is None else f"{row.samples_to_target:,}",
                "left out" if math.isnan(row.forecast.noise_floor) else percent(row.forecast.noise_floor),
                percent(row.end.excess[-1]) if row.end else "",
            ])  # fmt: skip
        return columns, rows

    def conclusion(self) -> list[str]:
        """The verdict, the batch size beyond which steps stop halving, and what the numbers are worth."""
        lines = [f"verdict      {self.verdict}"]
        if self.critical and self.critical.critical:
            lines.append(
                f"batch size   from {self.critical.critical:,} rows on, doubling the batch saves less than a quarter "
                f"of the steps to {percent(self.target_excess)}, even with the best rates"
            )
        elif self.critical:
            lines.append("batch size   doubling the batch goes on saving steps as far as the data has rows")
        problems = [f"note         {row.world_size} ranks: {row.problem}" for row in self.rows if row.problem]
        return lines + problems[:1] + [f"note         {note}" for note in self.notes]

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        rows = [
            {**asdict(row), "samples_to_target": row.samples_to_target, "is_stable": _is_stable(row)}
            for row in self.rows
        ]
        return {**asdict(self), "rows": rows}


def make_plan(config: TrainConfig, world_sizes: Sequence[int]) -> Plan:
    """The forecasts of a configuration at these world sizes (all at least 1).

    Raises `ValueError` for what no world size could make right.
    """
    problem = LeastSquares.of(config)
    forecasts = [_forecast(config, problem, world_size) for world_size in sorted(set(world_sizes))]
    first = forecasts[0].forecast
    if first is None:
        raise ValueError(forecasts[0].problem)
    grows = config.global_batch_size is None and config.sampling != "full"
    local_batch_size = config.local_batch_size or DEFAULT_LOCAL_BATCH_SIZE
    largest_stable: dict[LRScaling, int] = {}
    if grows:
        for rule in _RULES:
            largest_stable[rule] = stable_world_size(replace(config, lr_scaling=rule), problem, local_batch_size)
    critical = None
    if first.criterion == "mean square" and problem.closed_form.loss > 0:
        learning_rates, start = base_learning_rates(config, problem), problem.start_error
        target = first.target_excess * problem.closed_form.loss
        critical = critical_batch_size(problem.rows, learning_rates, start, target, config.update_order)
    most_ranks = problem.table.num_rows // local_batch_size if grows else problem.table.num_rows
    curvature = problem.rows.curvature()
    return Plan(
        source=config.data,
        num_rows=problem.table.num_rows,
        num_features=problem.table.num_features,
        best_loss=problem.closed_form.loss,
        r_squared=problem.closed_form.r_squared,
        curvature=(float(curvature[0]), float(curvature[-1])),
        lr_scaling=config.lr_scaling,
        target_excess=first.target_excess,
        rows=tuple(forecasts),
        of_limit={rule: tuple(_of_limit(config, problem, rule, row) for row in forecasts) for rule in _RULES},
        largest_stable=largest_stable,
        most_ranks=most_ranks,
        critical=critical,
        verdict=_verdict(config, problem, forecasts, largest_stable, most_ranks),
        notes=_notes(config, first, problem),
    )


def _forecast(config: TrainConfig, problem: LeastSquares, world_size: int) -> WorldSize:
    try:
        state, _ = prepare(replace(config, on_unstable="warn"), world_size, problem)
    except ValueError as error:
        local_batch_size = config.local_batch_size or DEFAULT_LOCAL_BATCH_SIZE
        batch_size = config.global_batch_size or local_batch_size * world_size
        return WorldSize(world_size, batch_size, (math.nan, math.nan), None, str(error))
    return WorldSize(world_size, state.plan.global_batch_size, state.schedule.scaled, state.forecast)


def _of_limit(config: TrainConfig, problem: LeastSquares, rule: LRScaling, row: WorldSize) -> tuple[int, float | None]:
    if row.forecast is None:
        return row.world_size, None
    scaled = base_learning_rates(config, problem)[1] * scale_at(replace(config, lr_scaling=rule), row.global_batch_size)
    return row.world_size, scaled / (row.scaled_learning_rate[1] * row.forecast.stability_limit)


def _is_stable(row: WorldSize) -> bool | None:
    return row.forecast.is_stable if row.forecast else None


def _verdict(
    config: TrainConfig,
    problem: LeastSquares,
    rows: Sequence[WorldSize],
    largest_stable: dict[LRScaling, int],
    most_ranks: int,
) -> str:
    """One line: stable or not, up to where, and what to do about it."""
    unstable = [row for row in rows if _is_stable(row) is False]
    if not largest_stable:
        batch = f"every step takes {rows[0].global_batch_size} rows at any world size"
        if not unstable:
            return f"{batch}, and these rates are stable"
        assert rows[0].forecast
        over = 1 / rows[0].forecast.stability_limit
        return f"{batch}, and these rates diverge: they are {over:.3g} times the limit; {_lower(config)}"
    rule = {"linear": "linear scaling from", "sqrt": "square-root scaling from", "none": "no scaling of"}
    name = f"{rule[config.lr_scaling]} these rates"
    if not unstable:
        asked = max(row.world_size for row in rows if row.forecast)
        most = max(asked, largest_stable[config.lr_scaling])
        enough = ", as many as the data has rows for" if most == most_ranks else ""
        return f"{name} is stable up to {most} rank{'s' * (most > 1)}{enough}"
    stable = largest_stable[config.lr_scaling]
    if stable == 0:
        return f"{name} diverges at every world size: {_lower(config)}"
    first = unstable[0].world_size
    node = ", one Polaris node," if first == _POLARIS_NODE else ""

    def up_to(world_size: int) -> str:
        return f"{world_size}{', all that the data has rows for' if world_size == most_ranks else ''}"

    remedies = []
    if not config.standardize:
        standard = replace(config, standardize=True, base_learning_rate=None)
        local_batch_size = config.local_batch_size or DEFAULT_LOCAL_BATCH_SIZE
        most = stable_world_size(standard, LeastSquares.of(standard), local_batch_size)
        if most > stable:
            remedies.append(f"standardise and leave base_learning_rate out (stable up to {up_to(most)})")
    if config.lr_scaling == "linear" and largest_stable["sqrt"] > stable:
        remedies.append(f"use --lr-scaling sqrt (stable up to {up_to(largest_stable['sqrt'])})")
    remedies.append(f"stay at {stable}, or let --on-unstable cap lower the rates")
    return f"{name} is stable up to {stable} rank{'s' * (stable > 1)}; at {first}{node} it diverges: " + "; or ".join(
        remedies
    )


def _lower(config: TrainConfig) -> str:
    standard = "" if config.standardize else "standardise and leave base_learning_rate out, "
    return f"{standard}lower base_learning_rate, or let --on-unstable cap do it"


def _notes(config: TrainConfig, forecast: Forecast, problem: LeastSquares) -> tuple[str, ...]:
    """What the numbers are worth."""
    notes = []
    if forecast.criterion == "mean":
        notes.append(
            f"{problem.table.num_features} features: only the mean is predicted (more than 16 cost too much), so the "
            "noise of mini-batches, its floor and its spread are left out, and steps are at least those given"
        )
    elif forecast.sampling == "shuffle":
        notes.append(
            "shuffle sampling is predicted to a few percent, with the floor at the end of an epoch; --sampling random "
            "is predicted exactly"
            if config.update_order == "simultaneous"
            else "shuffle sampling is approximated by independent batches, which puts the floor too high; --sampling "
            "random is predicted exactly"
        )
    if config.update_order == "sequential" and problem.table.num_features > MAX_SEQUENTIAL:
        notes.append(SEQUENTIAL_NOT_PREDICTED)
    if forecast.stability_limit_error:
        notes.append(
            "the sequential order is predicted from sampled batches: standard error of the limit "
            f"{percent(forecast.stability_limit_error / forecast.stability_limit)}"
        )
    if problem.closed_form.warning:
        notes.append(problem.closed_form.warning)
    if problem.closed_form.loss == 0:
        notes.append("the closed form's loss is 0, so there is no excess to speak of as a fraction of it")
    return tuple(notes)
