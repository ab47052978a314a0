"""What is decided before the first step, once, on the main rank: rows, batches, rates, and the right answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from torchreg.batches import BatchPlan
from torchreg.config import DEFAULT_EPOCHS, TrainConfig
from torchreg.data import Standardizer, Table, load_table
from torchreg.optim import Schedule, lr_scale
from torchreg.theory import ClosedForm, Matrix, Moments, Stability, largest_stable_world_size

DEFAULT_RATE = 0.05
_SAFE_FRACTION = 0.5  # of the stability limit: the default's and the cap's distance from it
_EXPLODING_FACTOR = 1_000.0  # times the loss at the start, and at the mean of the target
_LOG_LINES = 40
_MAX_LOG_EVERY = 1_000


@dataclass(frozen=True)
class Prepared:
    """Everything that the loop needs besides the rows and the model; the same on every rank.

    `moments` and `closed_form` are in the data's units, `start` is in the model's, and `standardizer` maps between
    them. `stability_limit` is the largest stable multiple of the scaled rates.
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
    stability_limit: float
    stability_criterion: str
    num_steps: int
    log_every: int
    start: tuple[Matrix, float]
    exploding_loss: float
    warnings: tuple[str, ...]


def prepare(config: TrainConfig, world_size: int) -> tuple[Prepared, Table]:
    """Read the data, derive the batches and choose the rates of a run.

    Raises `ValueError` with the field, its value and the remedy for what cannot work.
    """
    table = read(config)
    plan = BatchPlan.derive(
        table.num_rows,
        world_size,
        global_batch_size=config.global_batch_size,
        local_batch_size=config.local_batch_size,
        micro_batch_size=config.micro_batch_size,
        sampling=config.sampling,
        seed=config.seed,
    )
    moments = _moments(table)
    closed_form = moments.closed_form()
    if config.target_excess is not None and closed_form.loss == 0:
        raise ValueError(
            f"target_excess is {config.target_excess}, a fraction of the closed form's loss, which is 0 for this data: "
            "leave it out"
        )
    standardizer = Standardizer.of(table.features, standardize=config.standardize)
    features = standardizer.apply(table.features)
    num_steps = _num_steps(config, plan)
    schedule, limit, criterion, warnings = _rates(config, features, plan, num_steps)
    weight = np.full(table.num_features, config.initial_weight)
    # One step sees at most num_rows / global_batch_size times the loss on all rows.
    worst_start = max(moments.loss(weight, config.initial_bias), float(table.target.var()))
    exploding_loss = _EXPLODING_FACTOR * worst_start * table.num_rows / plan.global_batch_size
    prepared = Prepared(
        feature_names=table.feature_names,
        target_name=table.target_name,
        fingerprint=table.fingerprint(),
        num_dropped=table.num_dropped,
        standardizer=standardizer,
        plan=plan,
        schedule=schedule,
        moments=moments,
        closed_form=closed_form,
        stability_limit=limit,
        stability_criterion=criterion,
        num_steps=num_steps,
        log_every=config.log_every or min(_MAX_LOG_EVERY, math.ceil(num_steps / _LOG_LINES)),
        start=standardizer.parameters_in(weight, config.initial_bias),
        exploding_loss=exploding_loss,
        warnings=warnings,
    )
    return prepared, table


def read(config: TrainConfig) -> Table:
    """The table that a configuration names."""
    return load_table(config.data, **config.data_options())


def _moments(table: Table) -> Moments:
    with np.errstate(over="ignore", invalid="ignore"):
        moments = Moments.of(table.features, table.target)
        squares = np.square(moments.factor).sum() + np.square(moments.mean).sum() * table.num_rows
    if not np.isfinite(squares):
        raise ValueError(f"data is {table.source}, whose numbers are too large to square: rescale its columns")
    return moments


def _num_steps(config: TrainConfig, plan: BatchPlan) -> int:
    epochs = config.epochs if config.epochs or config.max_steps else DEFAULT_EPOCHS
    limits = [config.max_steps, None if epochs is None else math.ceil(epochs * plan.steps_per_epoch)]
    return min(limit for limit in limits if limit is not None)


def _rates(
    config: TrainConfig, features: Matrix, plan: BatchPlan, num_steps: int
) -> tuple[Schedule, float, str, tuple[str, ...]]:
    """The schedule, the largest stable multiple of its scaled rates, by which criterion, and what to tell the user."""

    def scale_at(global_batch_size: int) -> float:
        return lr_scale(config.lr_scaling, global_batch_size, config.reference_batch_size)

    scale = scale_at(plan.global_batch_size)
    # By default the same share of the curvature in the weight's and in the bias's direction.
    base = config.base_learning_rate or (DEFAULT_RATE / float(np.mean(np.sum(features**2, axis=1))), DEFAULT_RATE)
    scaled = (base[0] * scale, base[1] * scale)
    stability = Stability.of(features, scaled, plan.global_batch_size, config.update_order)
    limit = stability.largest_multiplier()

    warnings: tuple[str, ...] = ()
    lower = not config.base_learning_rate and limit * _SAFE_FRACTION < 1
    if config.base_learning_rate and limit < 1:
        told = _unstable(config, scaled, limit, stability.criterion, features, plan, scale_at)
        if config.on_unstable == "refuse":
            raise ValueError(f"{told}; lower base_learning_rate, or see it diverge with --on-unstable warn")
        lower = config.on_unstable == "cap"
        warnings = (f"{told}; {'the rates are lowered to half the limit' if lower else 'expect divergence'}",)
    if lower:
        base = (base[0] * limit * _SAFE_FRACTION, base[1] * limit * _SAFE_FRACTION)
        limit = 1 / _SAFE_FRACTION
    schedule = Schedule(
        base,
        scale,
        num_steps,
        warmup_steps=config.warmup_steps,
        decay=config.decay,
        decay_floor=config.decay_floor,
        decay_factor=config.decay_factor,
        decay_every=config.decay_every,
    )
    return schedule, limit, stability.criterion, warnings


def _unstable(
    config: TrainConfig,
    scaled: tuple[float, float],
    limit: float,
    criterion: str,
    features: Matrix,
    plan: BatchPlan,
    scale_at: Callable[[int], float],
) -> str:
    """What is wrong with the rates, with the limit and the largest world size that keeps within it."""
    told = (
        f"scaled_learning_rate is {scaled[0]:.4g} (weight) and {scaled[1]:.4g} (bias) at global_batch_size "
        f"{plan.global_batch_size}, {1 / limit:.3g} times the stability limit ({criterion}) of {scaled[0] * limit:.4g} "
        f"and {scaled[1] * limit:.4g}"
    )
    if config.lr_scaling == "none" or plan.sampling == "full" or config.global_batch_size:
        return told
    assert config.base_learning_rate is not None
    most = largest_stable_world_size(
        features, config.base_learning_rate, plan.local_batch_size, scale_at, config.update_order
    )
    return f"{told}; at {plan.local_batch_size} rows a rank the largest stable world size is {most}"
