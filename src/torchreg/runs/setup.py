"""What is decided before the first step, once, on the main rank: batches, learning rates, closed form, forecast.

No torch: `torchreg plan` does all of it for many world sizes and trains nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from torchreg.core.batches import BatchPlan
from torchreg.core.schedule import Schedule, lr_scale
from torchreg.data.standardizer import Standardizer
from torchreg.data.table import Table, load_table
from torchreg.runs.config import DEFAULT_EPOCHS, DataConfig, TrainConfig
from torchreg.runs.forecast import Forecast, forecast
from torchreg.theory import (
    MAX_SEQUENTIAL,
    ClosedForm,
    Dynamics,
    Matrix,
    Moments,
    RowGradients,
    largest_stable_world_size,
)

if TYPE_CHECKING:
    from torchreg.core.checkpoint import Checkpoint
    from torchreg.runs.result import Result

DEFAULT_LEARNING_RATE = 0.05
SEQUENTIAL_NOT_PREDICTED = (
    f"update_order is sequential, which is predicted up to {MAX_SEQUENTIAL} features: the forecast is that of the "
    "simultaneous order"
)
_SAFE_FRACTION = 0.5  # of the stability limit: the default's and the cap's distance from it
_DIVERGENCE_FACTOR = 1_000.0  # times the loss at the start, and at the mean of the target
_LOG_LINES = 40
_MAX_LOG_EVERY = 1_000


@dataclass(frozen=True)
class LeastSquares:
    """What a configuration's table decides at any world size: the closed form, and how SGD moves towards it.

    `moments` and `closed_form` are in the data's units, `rows` and `start` (weight, bias) in the model's, and
    `standardizer` maps between them. `start_error` is start − optimum, (num_features + 1,), in the model's units.
    """

    table: Table
    standardizer: Standardizer
    moments: Moments
    closed_form: ClosedForm
    rows: RowGradients
    start: tuple[Matrix, float]
    start_error: Matrix

    @classmethod
    def of(cls, config: TrainConfig) -> LeastSquares:
        """Read the table and solve it. Raises `ValueError` for data that cannot be trained on."""
        table = read(config.data)
        moments = _moments(table)
        best = moments.closed_form()
        standardizer = Standardizer.of(table.features, standardize=config.data.standardize)
        weight = np.full(table.num_features, config.optimizer.initial_weight)
        error = standardizer.parameters_in(weight - best.weight, config.optimizer.initial_bias - best.bias)
        mean = moments.mean
        residual = table.target - mean[-1] - (table.features - mean[:-1]) @ best.weight[:, None]
        return cls(
            table=table,
            standardizer=standardizer,
            moments=moments,
            closed_form=best,
            rows=RowGradients.of(standardizer.apply(table.features), residual),
            start=standardizer.parameters_in(weight, config.optimizer.initial_bias),
            start_error=np.append(*error),
        )


@dataclass(frozen=True)
class RunState:
    """What a run is before its first step: the same on every rank.

    `moments` and `closed_form` are in the data's units, `start` (weight, bias) is in the model's, and `standardizer`
    maps between them.
    """

    feature_names: tuple[str, ...]
    target_name: str
    fingerprint: str
    num_dropped: int
    standardizer: Standardizer
    plan: BatchPlan
    schedule: Schedule
    moments: Moments
    closed_form: ClosedForm
    forecast: Forecast
    num_steps: int
    log_every: int
    start: tuple[Matrix, float]
    divergence_threshold: float
    target_loss: float | None
    warnings: tuple[str, ...]
    run_signature: dict[str, Any]
    """All that the run's numbers depend on, as plain JSON: a checkpoint is of this run if its signature is equal. The
    world size is not in it."""
    run_dir: str = ""
    checkpoint: Checkpoint | None = None
    """To resume from."""
    finished: Result | None = None
    """Of a run that needs no training."""
    messages: tuple[str, ...] = ()
    """How the run was resumed, for the user."""


def prepare(config: TrainConfig, world_size: int, least_squares: LeastSquares | None = None) -> tuple[RunState, Table]:
    """Read the data (unless `least_squares` has it), derive the batches and choose the learning rates of a run.

    Raises `ValueError` with the field, its value and the remedy for what cannot work.
    """
    least_squares = least_squares or LeastSquares.of(config)
    table, best = least_squares.table, least_squares.closed_form
    if config.run.target_excess is not None and best.loss == 0:
        raise ValueError(
            f"target_excess is {config.run.target_excess}, a fraction of the closed form's loss, which is 0 for this "
            "data: omit it"
        )
    plan = BatchPlan.derive(
        table.num_rows,
        world_size,
        global_batch_size=config.batch.global_batch_size,
        local_batch_size=config.batch.local_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        sampling=config.batch.sampling,
        seed=config.batch.seed,
        reproducible=config.batch.reduction == "reproducible",
    )
    num_steps = _num_steps(config, plan)
    schedule, dynamics, warnings = _learning_rates(config, least_squares, plan, num_steps)
    # One step sees at most num_rows / global_batch_size times the loss on all rows.
    at_start = best.loss + least_squares.moments.excess(
        np.full(table.num_features, config.optimizer.initial_weight), config.optimizer.initial_bias
    )
    worst_start = max(at_start, float(table.target.var()))
    state = RunState(
        feature_names=table.feature_names,
        target_name=table.target_name,
        fingerprint=table.fingerprint(),
        num_dropped=table.num_dropped,
        standardizer=least_squares.standardizer,
        plan=plan,
        schedule=schedule,
        moments=least_squares.moments,
        closed_form=best,
        forecast=forecast(
            dynamics, schedule, least_squares.start_error, best.loss, plan.sampling, config.run.target_excess
        ),
        num_steps=num_steps,
        log_every=config.run.log_every or min(_MAX_LOG_EVERY, math.ceil(num_steps / _LOG_LINES)),
        start=least_squares.start,
        divergence_threshold=_DIVERGENCE_FACTOR * worst_start * table.num_rows / plan.global_batch_size,
        target_loss=None if config.run.target_excess is None else best.loss * (1 + config.run.target_excess),
        warnings=(*warnings, *([best.warning] if best.warning else [])),
        run_signature={},
    )
    return replace(state, run_signature=_run_signature(config, state)), table


def _run_signature(config: TrainConfig, state: RunState) -> dict[str, Any]:
    """All that the run's numbers depend on. The number of steps is part of it only where the decay depends on it."""
    plan, schedule = state.plan, state.schedule
    decay: dict[str, Any] = {}
    if schedule.decay in ("linear", "cosine"):
        decay = {"decay_to": schedule.decay_to, "num_steps": schedule.num_steps}
    elif schedule.decay == "step":
        decay = {"decay_factor": schedule.decay_factor, "decay_every": schedule.steps_per_drop}
    same = (
        "standardize", "optimizer", "update_order", "reduction", "sampling", "seed", "initial_weight", "initial_bias",
        "target_excess", "log_full_loss", "dtype",
    )  # fmt: skip
    options = config.options()
    return {
        "data_fingerprint": state.fingerprint,
        "global_batch_size": plan.global_batch_size,
        "micro_batch_size": plan.micro_batch_size if plan.reproducible else None,  # else it changes only the rounding
        **{name: options[name] for name in same},
        "base_learning_rate": list(schedule.base),
        "learning_rate_scale": schedule.scale,
        "warmup_steps": schedule.warmup_steps,
        "decay": schedule.decay,
        **decay,
    }


def read(data: DataConfig) -> Table:
    """The table that a configuration names."""
    names = ("features", "target", "num_rows", "num_features", "data_seed", "drop_missing")
    return load_table(data.data, **{name: getattr(data, name) for name in names})


def scale_at(config: TrainConfig, global_batch_size: int) -> float:
    """The factor of the base learning rates at a global batch size."""
    return lr_scale(config.optimizer.lr_scaling, global_batch_size, config.optimizer.reference_batch_size)


def base_learning_rates(config: TrainConfig, least_squares: LeastSquares) -> tuple[float, float]:
    """The learning rates of weight and bias at the reference batch size, before any lowering for stability.

    By default the same fraction of the curvature in the weight's and in the bias's direction.
    """
    mean_square = float(np.sum(least_squares.rows.feature_unit**2))
    return config.optimizer.base_learning_rate or (DEFAULT_LEARNING_RATE / mean_square, DEFAULT_LEARNING_RATE)


def stable_world_size(config: TrainConfig, least_squares: LeastSquares, local_batch_size: int) -> int:
    """The most ranks at which the learning rates are stable, with `local_batch_size` samples each."""
    return largest_stable_world_size(
        least_squares.rows,
        base_learning_rates(config, least_squares),
        local_batch_size,
        lambda global_batch_size: scale_at(config, global_batch_size),
        config.optimizer.update_order,
        config.batch.sampling,
    )


def _moments(table: Table) -> Moments:
    with np.errstate(over="ignore", invalid="ignore"):
        moments = Moments.of(table.features, table.target)
        squares = np.square(moments.factor).sum() + np.square(moments.mean).sum() * table.num_rows
    if not np.isfinite(squares):
        raise ValueError(f"data is {table.source}, whose numbers are too large to square: rescale its columns")
    return moments


def _num_steps(config: TrainConfig, plan: BatchPlan) -> int:
    epochs = config.run.epochs if config.run.epochs or config.run.max_steps else DEFAULT_EPOCHS
    limits = [config.run.max_steps, None if epochs is None else math.ceil(epochs * plan.steps_per_epoch)]
    return min(limit for limit in limits if limit is not None)


def _learning_rates(
    config: TrainConfig, least_squares: LeastSquares, plan: BatchPlan, num_steps: int
) -> tuple[Schedule, Dynamics, tuple[str, ...]]:
    """The schedule, the dynamics of its base learning rates, and warnings."""
    scale = scale_at(config, plan.global_batch_size)
    base = base_learning_rates(config, least_squares)
    dynamics = Dynamics.of(
        least_squares.rows, base, plan.global_batch_size, config.optimizer.update_order, plan.sampling
    )
    limit = dynamics.largest_multiplier() / scale

    warnings: tuple[str, ...] = () if dynamics.order == config.optimizer.update_order else (SEQUENTIAL_NOT_PREDICTED,)
    lower = not config.optimizer.base_learning_rate and limit * _SAFE_FRACTION < 1
    if config.optimizer.base_learning_rate and limit < 1:
        reason = _unstable(config, least_squares, plan, limit, dynamics.criterion)
        if config.optimizer.on_unstable == "refuse":
            raise ValueError(f"{reason}; lower base_learning_rate, or train regardless with --on-unstable warn")
        lower = config.optimizer.on_unstable == "cap"
        warnings += (f"{reason}; {'lowered to half the limit' if lower else 'expect divergence'}",)
    if lower:
        base = (base[0] * limit * _SAFE_FRACTION, base[1] * limit * _SAFE_FRACTION)
        dynamics = dynamics.times(limit * _SAFE_FRACTION)
    schedule = Schedule(
        base,
        scale,
        num_steps,
        warmup_steps=config.optimizer.warmup_steps,
        decay=config.optimizer.decay,
        decay_to=config.optimizer.decay_to,
        decay_factor=config.optimizer.decay_factor,
        decay_every=config.optimizer.decay_every,
    )
    return schedule, dynamics, warnings


def _unstable(config: TrainConfig, least_squares: LeastSquares, plan: BatchPlan, limit: float, criterion: str) -> str:
    """How far the learning rates are above the limit, and the largest world size that keeps within it."""
    scale = scale_at(config, plan.global_batch_size)
    weight, bias = (learning_rate * scale for learning_rate in base_learning_rates(config, least_squares))
    reason = (
        f"scaled_learning_rate is {weight:.4g} (weight) and {bias:.4g} (bias) at global_batch_size "
        f"{plan.global_batch_size}, {1 / limit:.3g} times the stability limit ({criterion}) of {weight * limit:.4g} "
        f"and {bias * limit:.4g}"
    )
    if config.optimizer.lr_scaling == "none" or plan.sampling == "full" or config.batch.global_batch_size:
        return reason
    most = stable_world_size(config, least_squares, plan.local_batch_size)
    return f"{reason}; at {plan.local_batch_size} samples on each rank the largest stable world size is {most}"
