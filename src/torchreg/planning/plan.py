"""Forecasts for many world sizes, without training and without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torchreg.console import number, percent
from torchreg.core.batches import DEFAULT_LOCAL_BATCH_SIZE
from torchreg.runs import setup
from torchreg.runs.config import LRScaling, TrainConfig
from torchreg.runs.forecast import Forecast
from torchreg.runs.setup import LeastSquares
from torchreg.theory import MAX_FEATURES, MAX_SEQUENTIAL, CriticalBatch, critical_batch_size

_RULES: dict[LRScaling, str] = {"linear": "linear scaling from", "sqrt": "square-root scaling from", "none": "keeping"}


@dataclass(frozen=True)
class WorldSize:
    """The forecast for one world size, or the `reason` why there is none. Samples are those of all ranks."""

    world_size: int
    global_batch_size: int
    scaled_learning_rate: tuple[float, float] = (math.nan, math.nan)
    forecast: Forecast | None = None
    reason: str | None = None
    is_stable: bool | None = None
    samples_to_target: int | None = None


@dataclass(frozen=True)
class Plan:
    """Forecasts for several world sizes, and conclusions.

    For each scaling rule `fraction_of_stability_limit` has pairs of world size and scaled learning rate over the limit,
    and `largest_stable` the largest stable world size, up to the number of rows; it is empty where the global batch
    does not grow with the ranks. `critical` is None beyond 16 features.
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
    fraction_of_stability_limit: dict[str, tuple[tuple[int, float | None], ...]]
    largest_stable: dict[LRScaling, int]
    critical: CriticalBatch | None
    verdict: str
    notes: tuple[str, ...]

    def heading(self) -> list[str]:
        """Data, closed-form solution and curvature, in lines."""
        flattest, steepest = self.curvature
        ratio = number(steepest / flattest) if flattest > 0 else "more than 1e+28"
        features = _count(self.num_features, "feature")
        return [
            f"plan         {self.source}: {self.num_rows} rows, {features}; lr_scaling {self.lr_scaling}",
            f"closed form  mean squared error {self.best_loss:.6g}, R² {self.r_squared:.3g}; losses are in % above it",
            f"curvature    {flattest:.4g} to {steepest:.4g}, the steepest direction {ratio} times the flattest",
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows as text; rows that diverge or are impossible begin with `!`."""
        columns = [
            "ranks", "global batch", "weight lr", "bias lr", "lr / limit", "",
            f"steps to {percent(self.target_excess)}", "samples", "noise floor", "expected end",
        ]  # fmt: skip
        rows = []
        for row in self.rows:
            f = row.forecast
            entries = [f"{'!' if not f or f.is_stable is False else ''}{row.world_size}", f"{row.global_batch_size:,}"]
            if f:
                entries += [*(f"{value:.3g}" for value in row.scaled_learning_rate), number(1 / f.stability_limit)]
            if f and f.is_stable is not False:
                steps = f"> {f.steps_searched:,}" if f.steps_searched else "never" if f.curve else ""
                entries += [
                    f.state,
                    steps if f.steps_to_target is None else f"{f.steps_to_target:,}",
                    "" if row.samples_to_target is None else f"{row.samples_to_target:,}",
                    "not predicted" if math.isnan(f.noise_floor) else percent(f.noise_floor),
                    percent(f.expected_end) if f.expected_end is not None else "not predicted" if f.curve else "",
                ]
            else:
                entries += ["diverges", "never"] if f else ["", "", "", "impossible"]
            rows.append(entries + [""] * (len(columns) - len(entries)))
        return columns, rows

    def conclusion(self) -> list[str]:
        """The verdict, the critical batch size and the accuracy of the numbers, in lines."""
        lines = [f"verdict      {self.verdict}"]
        if self.critical:
            size = self.critical.critical
            saves = f"from {size:,} samples, doubling saves less than" if size else "doubling saves at least"
            lines.append(f"batch size   {saves} a quarter of the steps, with the best learning rates of each size")
        impossible = [f"{_count(row.world_size, 'rank')}: {row.reason}" for row in self.rows if row.reason]
        return lines + [f"note         {note}" for note in (*impossible[:1], *self.notes)]


def plan(config: TrainConfig, world_sizes: Sequence[int]) -> Plan:
    """The forecasts at these world sizes, all at least 1. Raises `ValueError` where the smallest is impossible."""
    least_squares = LeastSquares.of(config)
    table, best, curvature = least_squares.table, least_squares.closed_form, least_squares.rows.curvature()
    local_batch_size = config.batch.local_batch_size or DEFAULT_LOCAL_BATCH_SIZE
    rows = tuple(_forecast(config, least_squares, local_batch_size, size) for size in sorted(set(world_sizes)))
    first = rows[0].forecast
    if first is None:
        raise ValueError(rows[0].reason)
    learning_rates = setup.base_learning_rates(config, least_squares)
    limits = [_bias_limit(config, row) for row in rows]
    largest: dict[LRScaling, int] = {}
    fractions: dict[str, tuple[tuple[int, float | None], ...]] = {}
    for rule in _RULES:
        scaled = config.replace(lr_scaling=rule)
        if not config.batch.global_batch_size and config.batch.sampling != "full":  # the batch grows with the ranks
            largest[rule] = setup.stable_world_size(scaled, least_squares, local_batch_size)
        fractions[rule] = tuple(
            (
                row.world_size,
                limit and learning_rates[1] * setup.highest_scale_at(scaled, row.global_batch_size) / limit,
            )
            for row, limit in zip(rows, limits, strict=True)
        )
    critical, target = None, first.target_excess * best.loss
    if table.num_features <= MAX_FEATURES and target > 0:
        start = least_squares.start_error
        critical = critical_batch_size(least_squares.rows, learning_rates, start, target, config.optimizer.update_order)
    return Plan(
        source=config.data.data,
        num_rows=table.num_rows,
        num_features=table.num_features,
        best_loss=best.loss,
        r_squared=best.r_squared,
        curvature=(float(curvature[0]), float(curvature[-1])),
        lr_scaling=config.optimizer.lr_scaling,
        target_excess=first.target_excess,
        rows=rows,
        fraction_of_stability_limit=fractions,
        largest_stable=largest,
        critical=critical,
        verdict=_verdict(config, rows, largest, local_batch_size, table.num_rows),
        notes=_notes(config, [row.forecast for row in rows if row.forecast], least_squares),
    )


def _forecast(config: TrainConfig, least_squares: LeastSquares, local_batch_size: int, world_size: int) -> WorldSize:
    try:
        state, _ = setup.prepare(config.replace(on_unstable="warn"), world_size, least_squares)
    except ValueError as error:
        size = config.batch.global_batch_size or local_batch_size * world_size
        return WorldSize(world_size, size, reason=str(error))
    forecast, size = state.forecast, state.plan.global_batch_size
    samples = None if forecast.steps_to_target is None else forecast.steps_to_target * size
    return WorldSize(world_size, size, state.schedule.scaled, forecast, None, forecast.is_stable, samples)


def _bias_limit(config: TrainConfig, row: WorldSize) -> float | None:
    """The largest stable learning rate of the bias, with that of the weight in proportion."""
    if row.forecast is None:
        return None
    size = row.global_batch_size
    highest = row.scaled_learning_rate[1] * setup.highest_scale_at(config, size) / setup.scale_at(config, size)
    return row.forecast.stability_limit * highest


def _verdict(
    config: TrainConfig, rows: Sequence[WorldSize], largest: dict[LRScaling, int], local_batch_size: int, num_rows: int
) -> str:
    """Whether training is stable, up to which world size, and the remedies, in sentences."""
    unstable = [(row.world_size, row.forecast) for row in rows if row.forecast and row.is_stable is False]
    is_mean = any(row.forecast and row.forecast.criterion == "mean" for row in rows)
    state = "expected to converge in the mean" if is_mean else "stable"
    omit = "standardise and omit base_learning_rate"
    lower = f"{'' if config.data.standardize else f'{omit}, '}lower base_learning_rate, or use --on-unstable cap"
    if not largest:
        name = f"every step takes {rows[0].global_batch_size} samples at any world size, and these learning rates"
        if not unstable:
            return f"{name} are {state}"
        return f"{name} diverge: they are {number(1 / unstable[0][1].stability_limit)} times the limit. Remedy: {lower}"

    def up_to(world_size: int) -> str:
        is_most = world_size == num_rows // local_batch_size
        return f"{state} up to {_count(world_size, 'rank')}{', the most for this data' * is_most}"

    name, stable = f"{_RULES[config.optimizer.lr_scaling]} these learning rates", largest[config.optimizer.lr_scaling]
    if not unstable:
        return f"{name} is {up_to(max(stable, *(row.world_size for row in rows if row.forecast)))}"
    if stable == 0:
        return f"{name} diverges at every world size. Remedy: {lower}"
    remedies = [f"stay at {stable}, or use --on-unstable cap to lower the learning rates"]
    if config.optimizer.lr_scaling == "linear" and largest["sqrt"] > stable:
        remedies.insert(0, f"use --lr-scaling sqrt ({up_to(largest['sqrt'])})")
    if not config.data.standardize:
        standardized = config.replace(standardize=True, base_learning_rate=None)
        most = setup.stable_world_size(standardized, LeastSquares.of(standardized), local_batch_size)
        if most > stable:
            remedies.insert(0, f"{omit} ({up_to(most)})")
    first = unstable[0][0]
    node = ", one Polaris node," * (first == 4)  # one rank a GPU
    return f"{name} is {up_to(stable)}. At {first}{node} it diverges. Remedy: {'. Or '.join(remedies)}"


def _notes(config: TrainConfig, forecasts: Sequence[Forecast], least_squares: LeastSquares) -> tuple[str, ...]:
    num_features, best, forecast = least_squares.table.num_features, least_squares.closed_form, forecasts[0]
    error = forecast.stability_limit_error / forecast.stability_limit
    is_mean, is_sequential = forecast.criterion == "mean", config.optimizer.update_order == "sequential"
    is_shuffled = not is_mean and forecast.sampling == "shuffle"
    only_square = any(each.is_stable is False and each.mean_converges for each in forecasts)
    ratios = [forecast.simulated_ratio[0] for forecast in forecasts if forecast.simulated_ratio]
    shuffle = f"runs that were simulated end at {min(ratios):.2f} to {max(ratios):.2f} times that" if ratios else ""
    notes = {
        f"{num_features} features{' in the sequential order' * is_sequential}: only the mean is predicted (more costs "
        "too much), not the noise of mini-batches: its limit makes no run stable, its steps are a lower bound": is_mean,
        f"shuffle sampling is predicted approximately{'; ' * bool(ratios)}{shuffle}": is_shuffled,
        "it is the mean square that diverges: single runs may last for long, until a rare batch throws them far off": (
            only_square
        ),
        setup.SEQUENTIAL_NOT_PREDICTED: is_sequential and num_features > MAX_SEQUENTIAL,
        f"the sequential order is predicted from sampled batches: standard error of the limit {percent(error)}": error,
        best.warning: best.warning,
        "the closed form's loss is 0, so no excess can be given as a fraction of it": best.loss == 0,
    }
    return tuple(note for note, applies in notes.items() if note and applies)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"
