"""The trials of a sweep: one configuration each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torchreg.runs.config import TrainConfig
from torchreg.runs.setup import LeastSquares, base_learning_rates, scale_at
from torchreg.theory import Dynamics

_AROUND_LIMIT = (0.97, 1.03)
_LR_SCALING_WARMUP_STEPS = 100


class Trial(NamedTuple):
    """One run of a sweep. `multiplier` is what its base learning rates are multiplied by."""

    name: str
    config: TrainConfig
    multiplier: float


def batch_trials(config: TrainConfig, batch_sizes: Iterable[int], num_seeds: int) -> list[Trial]:
    """A trial for each global batch size and seed, all of as many epochs; learning rates by the configuration's rule.

    Raises `ValueError` for a configuration with a batch size of its own.
    """
    config, trials = _common(config, "--batch-sizes"), []
    for size, i in itertools.product(sorted(set(batch_sizes)), range(num_seeds)):
        trial = config.replace(global_batch_size=size, seed=config.batch.seed + i)
        trials.append(Trial(f"batch-{size}-seed-{i}", trial, scale_at(config, size)))
    return trials


def lr_scaling_trials(config: TrainConfig, multipliers: Sequence[float], num_seeds: int) -> list[Trial]:
    """(reference batch, base learning rates) × each multiplier: raw and standardised, both update orders, with and
    without warm-up.

    The batch grows with the learning rates up to the last multiple of the reference batch that the data has rows for;
    beyond it only the learning rates grow. The default multipliers are 1, 2, 4, 8, … up to the first that is predicted
    to diverge, and 3 % below and above the predicted limit. Standardised features have the default learning rates: the
    raw ones would hardly move them. Raises `ValueError` for a configuration with a batch size of its own.
    """
    config, trials = _common(config, "--reference-batch-size"), []
    warmups = (0, config.optimizer.warmup_steps or _LR_SCALING_WARMUP_STEPS)
    for standardize in (False, True):
        variant = config.replace(standardize=standardize, lr_scaling="linear", on_unstable="warn")
        data = LeastSquares.of(variant)
        base = base_learning_rates(variant.replace(base_learning_rate=None) if standardize else variant, data)
        for order in ("simultaneous", "sequential"):
            variant = variant.replace(update_order=order, base_learning_rate=base)
            for wanted in multipliers or _default_multipliers(lr_scaling_limit(variant, data)):
                scaled, multiplier = _scaled(variant, wanted, data)
                name = f"{'standardised' if standardize else 'raw'}-{order}-{multiplier:.5g}"
                for warmup_steps, i in itertools.product(warmups, range(num_seeds)):
                    trial = scaled.replace(warmup_steps=warmup_steps, seed=config.batch.seed + i)
                    trials.append(Trial(f"{name}-warmup-{warmup_steps}-seed-{i}", trial, multiplier))
    return trials


def lr_scaling_limit(config: TrainConfig, data: LeastSquares) -> float:
    """The multiplier at the stability limit of the batch size that an lr-scaling sweep has there."""
    limit, learning_rates = 1.0, base_learning_rates(config, data)
    for _ in range(8):  # a fixed point: the limit hardly depends on the batch size
        batch_size = _scaled(config, limit, data)[0].batch.global_batch_size
        assert batch_size
        before = limit
        limit = Dynamics.of(data.rows, learning_rates, batch_size, config.optimizer.update_order).largest_multiplier()
        if abs(limit - before) < 1e-6 * limit:
            break
    return limit


def _default_multipliers(limit: float) -> list[float]:
    doubling = [2.0**i for i in range(max(0, math.ceil(math.log2(limit))) + 1)]
    return sorted([*doubling, *(limit * side for side in _AROUND_LIMIT)])


def _scaled(config: TrainConfig, multiplier: float, data: LeastSquares) -> tuple[TrainConfig, float]:
    """The configuration at a multiplier, and the multiplier at which the batch is a whole number of samples."""
    reference = config.optimizer.reference_batch_size
    batch_size = max(1, round(multiplier * reference))
    largest = max(1, data.table.num_rows // reference) * reference
    if batch_size <= largest:
        return config.replace(global_batch_size=batch_size), batch_size / reference
    batch_size = min(largest, data.table.num_rows)
    factor = multiplier * reference / batch_size
    weight, bias = base_learning_rates(config, data)
    scaled = config.replace(global_batch_size=batch_size, base_learning_rate=(weight * factor, bias * factor))
    return scaled, multiplier


def _common(config: TrainConfig, remedy: str) -> TrainConfig:
    """What all trials have in common; their batch sizes are chosen by the option `remedy`."""
    for field in ("global_batch_size", "local_batch_size"):
        if value := getattr(config.batch, field):
            raise ValueError(f"{field} is {value}, and the sweep chooses the batch of each trial: give {remedy}")
    if config.batch.sampling == "full":
        raise ValueError(
            "sampling is full, which takes all rows in every step, and the sweep varies the batch: choose --sampling "
            "random or shuffle"
        )
    return config.replace(name=None, log_full_loss=True, plot=False, overwrite=True, resume="never")
