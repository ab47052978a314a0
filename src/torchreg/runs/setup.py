"""What is decided before the first step, once, on the main rank: batches, learning rates, closed form, forecast.

No torch: `torchreg plan` does all of it for many world sizes and trains nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchreg import theory
from torchreg.console import number
from torchreg.core.batches import BatchPlan
from torchreg.core.schedule import Schedule, lr_scale
from torchreg.data.table import Standardizer, Table, load_table
from torchreg.runs.config import DEFAULT_EPOCHS, DataConfig, TrainConfig
from torchreg.runs.forecast import Forecast, forecast
from torchreg.theory import MAX_SEQUENTIAL, ClosedForm, Dynamics, Matrix, Moments, RowGradients

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
        with np.errstate(over="ignore", invalid="ignore"):
            moments = Moments.of(table.features, table.target)
            squares = np.square(moments.factor).sum() + np.square(moments.mean).sum() * table.num_rows
        if not np.isfinite(squares):
            raise ValueError(f"data is {table.source}, whose numbers are too large to square: rescale its columns")
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
    """What a run is before its first step: the same on every rank. Units are those of `LeastSquares`.

    `run_signature` is all that the run's numbers depend on, as plain JSON: a checkpoint is of this run if its signature
    is equal. The world size is not in it. The last four fields are known once the run's folder is open: its path, the
    checkpoint to resume from, the result of a run that needs no training, and how the run was resumed, for the user.
    """

    feature_names: tuple[str, ...]
    target_name: str
    standardizer: Standardizer
    moments: Moments
    closed_form: ClosedForm
    start: tuple[Matrix, float]
    plan: BatchPlan
    schedule: Schedule
    forecast: Forecast
    log_every: int
    divergence_threshold: float
    target_loss: float | None
    warnings: tuple[str, ...]
    run_signature: dict[str, Any]
    run_dir: str = ""
    checkpoint: Checkpoint | None = None
    finished: Result | None = None
    messages: tuple[str, ...] = ()


def prepare(config: TrainConfig, world_size: int, least_squares: LeastSquares | None = None) -> tuple[RunState, Table]:
    """The state and table of a run; `least_squares` saves reading it. Raises `ValueError` for what cannot work."""
    data = least_squares or LeastSquares.of(config)
    table, best, target_excess = data.table, data.closed_form, config.run.target_excess
    if target_excess is not None and best.loss == 0:
        raise ValueError(f"target_excess is {target_excess}, a fraction of the closed form's loss, which is 0: omit it")
    options = dict(vars(config.batch))
    reproducible = options.pop("reduction") == "reproducible"
    plan = BatchPlan.derive(table.num_rows, world_size, reproducible=reproducible, **options)
    schedule, dynamics, warnings = _learning_rates(config, data, plan)
    # One step sees at most num_rows / global_batch_size times the loss on all rows.
    start = np.full(table.num_features, config.optimizer.initial_weight), config.optimizer.initial_bias
    worst_start = max(best.loss + data.moments.excess(*start), float(table.target.var()))
    state = RunState(
        feature_names=table.feature_names,
        target_name=table.target_name,
        standardizer=data.standardizer,
        moments=data.moments,
        closed_form=best,
        start=data.start,
        plan=plan,
        schedule=schedule,
        forecast=forecast(dynamics, schedule, data.start_error, best.loss, plan.sampling, target_excess),
        log_every=config.run.log_every or min(_MAX_LOG_EVERY, math.ceil(schedule.num_steps / _LOG_LINES)),
        divergence_threshold=_DIVERGENCE_FACTOR * worst_start * table.num_rows / plan.global_batch_size,
        target_loss=None if target_excess is None else best.loss * (1 + target_excess),
        warnings=(*warnings, *([best.warning] if best.warning else [])),
        run_signature=_run_signature(config, table.fingerprint(), plan, schedule),
    )
    return state, table


def _run_signature(config: TrainConfig, fingerprint: str, plan: BatchPlan, schedule: Schedule) -> dict[str, Any]:
    """The number of steps is part of it only where the decay depends on it."""
    same = (
        "standardize", "optimizer", "update_order", "reduction", "sampling", "seed", "initial_weight", "initial_bias",
        "target_excess", "log_full_loss", "dtype",
    )  # fmt: skip
    options = config.options()
    to_end = {"decay_to": schedule.decay_to, "num_steps": schedule.num_steps}
    by_steps = {"decay_factor": schedule.decay_factor, "decay_every": schedule.steps_per_drop}
    return {
        "data_fingerprint": fingerprint,
        "global_batch_size": plan.global_batch_size,
        "micro_batch_size": plan.micro_batch_size if plan.reproducible else None,  # else it changes only the rounding
        **{name: options[name] for name in same},
        "base_learning_rate": list(schedule.base),
        "learning_rate_scale": schedule.scale,
        "last_batch_factor": schedule.last_factor,
        "warmup_steps": schedule.warmup_steps,
        "decay": schedule.decay,
        **{"constant": {}, "linear": to_end, "cosine": to_end, "step": by_steps}[schedule.decay],
    }


def read(data: DataConfig) -> Table:
    """The table that a configuration names."""
    names = ("features", "target", "num_rows", "num_features", "data_seed", "drop_missing")
    return load_table(data.data, **{name: getattr(data, name) for name in names})


def scale_at(config: TrainConfig, global_batch_size: int) -> float:
    """The factor of the base learning rates at a global batch size."""
    return lr_scale(config.optimizer.lr_scaling, global_batch_size, config.optimizer.reference_batch_size)


def highest_scale_at(config: TrainConfig, global_batch_size: int) -> float:
    """The largest factor of the base learning rates in a run: the warm-up begins with 1."""
    return max(scale_at(config, global_batch_size), float(config.optimizer.warmup_steps > 0))


def base_learning_rates(config: TrainConfig, least_squares: LeastSquares) -> tuple[float, float]:
    """The learning rates of weight and bias at the reference batch size, before any lowering for stability.

    By default the same fraction of the curvature in the weight's and in the bias's direction.
    """
    mean_square = float(np.sum(least_squares.rows.feature_unit**2))
    return config.optimizer.base_learning_rate or (DEFAULT_LEARNING_RATE / mean_square, DEFAULT_LEARNING_RATE)


def stable_world_size(config: TrainConfig, least_squares: LeastSquares, local_batch_size: int) -> int:
    """The most ranks at which the learning rates are stable, with `local_batch_size` samples each."""
    return theory.largest_stable_world_size(
        least_squares.rows,
        base_learning_rates(config, least_squares),
        local_batch_size,
        lambda global_batch_size: highest_scale_at(config, global_batch_size),
        config.optimizer.update_order,
        config.batch.sampling,
        config.optimizer.last_batch_lr == "scaled",
    )


def _learning_rates(
    config: TrainConfig, data: LeastSquares, plan: BatchPlan
) -> tuple[Schedule, Dynamics, tuple[str, ...]]:
    """The schedule, the dynamics of its base learning rates, and warnings."""
    chosen, batch_size = config.optimizer, plan.global_batch_size
    scale, base = highest_scale_at(config, batch_size), base_learning_rates(config, data)
    is_scaled = chosen.last_batch_lr == "scaled"
    dynamics = Dynamics.of(data.rows, base, batch_size, chosen.update_order, plan.sampling, scale_last_batch=is_scaled)
    limit = dynamics.largest_multiplier() / scale

    warnings = [] if dynamics.order == chosen.update_order else [SEQUENTIAL_NOT_PREDICTED]
    lower = not chosen.base_learning_rate and limit * _SAFE_FRACTION < 1
    if chosen.base_learning_rate and limit < 1:
        weight, bias = (learning_rate * scale for learning_rate in base)
        scaled = f"scaled_learning_rate is {weight:.4g} (weight) and {bias:.4g} (bias)"
        times = f"{number(1 / limit)} times the stability limit ({dynamics.criterion})"
        bounds = f"{weight * limit:.4g} and {bias * limit:.4g}"
        reason = f"{scaled} at global_batch_size {batch_size}, {times} of {bounds}"
        if chosen.lr_scaling != "none" and plan.sampling != "full" and not config.batch.global_batch_size:
            most, local = stable_world_size(config, data, plan.local_batch_size), plan.local_batch_size
            reason += f"; at {local} samples on each rank the largest stable world size is {most}"
        if chosen.on_unstable == "refuse":
            raise ValueError(f"{reason}; lower base_learning_rate, or train regardless with --on-unstable warn")
        lower = chosen.on_unstable == "cap"
        warnings.append(f"{reason}; {'lowered to half the limit' if lower else 'expect divergence'}")
    if lower:
        base = (base[0] * limit * _SAFE_FRACTION, base[1] * limit * _SAFE_FRACTION)
        dynamics = dynamics.times(limit * _SAFE_FRACTION)
    epochs = config.run.epochs or (None if config.run.max_steps else DEFAULT_EPOCHS)
    limits = [config.run.max_steps, epochs and math.ceil(epochs * plan.steps_per_epoch)]
    num_steps = min(filter(None, limits))
    names = ("warmup_steps", "decay", "decay_to", "decay_factor", "decay_every")
    options = {name: getattr(chosen, name) for name in names}
    options["steps_per_epoch"] = plan.steps_per_epoch
    options["last_factor"] = plan.num_samples(plan.steps_per_epoch - 1) / batch_size if is_scaled else 1.0
    return Schedule(base, scale_at(config, batch_size), num_steps, **options), dynamics, tuple(warnings)
