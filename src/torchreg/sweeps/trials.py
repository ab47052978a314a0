"""Which runs a sweep is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchreg.runs.config import TrainConfig
from torchreg.runs.setup import LeastSquares, base_learning_rates, scale_at
from torchreg.theory import Dynamics

_AROUND_LIMIT = (0.97, 1.03)
_LR_SCALING_WARMUP_STEPS = 100


@dataclass(frozen=True)
class Cell:
    """One run of a sweep, and what its base rates are multiplied by."""

    config: TrainConfig
    multiplier: float

    @property
    def name(self) -> str:
        """The name of the run's folder in the sweep."""
        assert self.config.name
        return self.config.name


def batch_trials(config: TrainConfig, batch_sizes: Iterable[int], num_seeds: int) -> list[Cell]:
    """A run for each global batch size and seed, all over as many epochs, with rates by the configuration's rule.

    Raises `ValueError` for a configuration that leaves nothing to vary.
    """
    _refuse_batch_size(config, "--batch-sizes")
    return [
        Cell(
            _with(config, global_batch_size=size, seed=config.seed + i, name=f"batch-{size}-seed-{i}"),
            scale_at(config, size),
        )
        for size in sorted(set(batch_sizes))
        for i in range(num_seeds)
    ]


def lr_scaling_trials(config: TrainConfig, multipliers: Sequence[float], num_seeds: int) -> list[Cell]:
    """(reference batch, base rates) × each multiplier, raw and standardised, in both update orders, warmed up and not.

    The batch grows with the rates to the last multiple of the reference batch that the data has rows for; from there on
    only the rates do. Without `multipliers`:
    1, 2, 4, 8, … up to the first that is predicted to diverge, and a rung 3 % below and 3 % above the predicted limit.
    Standardised features have the default rates: the raw ones would hardly move them. Raises `ValueError` for a
    configuration that leaves nothing to vary.
    """
    _refuse_batch_size(config, "--reference-batch-size")
    cells = []
    for standardize in (False, True):
        variant = replace(config, standardize=standardize, lr_scaling="linear", on_unstable="warn")
        problem = LeastSquares.of(variant)
        if standardize:
            variant = replace(variant, base_learning_rate=None)
        variant = replace(variant, base_learning_rate=base_learning_rates(variant, problem))
        for order in ("simultaneous", "sequential"):
            ordered = replace(variant, update_order=order)
            for rung in multipliers or _rungs(lr_scaling_limit(ordered, problem)):
                on_rung, multiplier = _on_rung(ordered, rung, problem)
                for warmup_steps in (0, config.warmup_steps or _LR_SCALING_WARMUP_STEPS):
                    features = "standardised" if standardize else "raw"
                    name = f"{features}-{order}-{multiplier:.5g}-warmup-{warmup_steps}"
                    cells += [
                        Cell(
                            _with(on_rung, warmup_steps=warmup_steps, seed=config.seed + i, name=f"{name}-seed-{i}"),
                            multiplier,
                        )
                        for i in range(num_seeds)
                    ]
    return cells


def _refuse_batch_size(config: TrainConfig, instead: str) -> None:
    for field in ("global_batch_size", "local_batch_size"):
        if getattr(config, field):
            raise ValueError(
                f"{field} is {getattr(config, field)}, and the sweep chooses the batch of each run: give {instead}"
            )
    if config.sampling == "full":
        raise ValueError(
            "sampling is full, which takes all rows in every step, and the sweep varies the rows of a step: choose "
            "--sampling random or shuffle"
        )


def lr_scaling_limit(config: TrainConfig, problem: LeastSquares) -> float:
    """The multiplier from which on a ladder is unstable: the limit of the batch size that the ladder has there."""
    limit, learning_rates = 1.0, base_learning_rates(config, problem)
    for _ in range(8):  # the limit hardly depends on the batch size, so a few rounds settle it
        batch_size = _on_rung(config, limit, problem)[0].global_batch_size
        assert batch_size
        before, limit = (
            limit,
            Dynamics.of(problem.rows, learning_rates, batch_size, config.update_order).largest_multiplier(),
        )
        if abs(limit - before) < 1e-6 * limit:
            break
    return limit


def _rungs(limit: float) -> list[float]:
    doubling = [1.0]
    while doubling[-1] < limit:
        doubling.append(2 * doubling[-1])
    return sorted([*doubling, *(limit * side for side in _AROUND_LIMIT)])


def _on_rung(config: TrainConfig, multiplier: float, problem: LeastSquares) -> tuple[TrainConfig, float]:
    """The configuration of a rung, and its multiplier, which has to make a whole number of rows."""
    reference = config.reference_batch_size
    batch_size = max(1, round(multiplier * reference))
    largest = max(1, problem.table.num_rows // reference) * reference
    if batch_size <= largest:
        return replace(config, global_batch_size=batch_size), batch_size / reference
    batch_size = min(largest, problem.table.num_rows)
    more = multiplier * reference / batch_size
    weight, bias = base_learning_rates(config, problem)
    return replace(config, global_batch_size=batch_size, base_learning_rate=(weight * more, bias * more)), multiplier


def _with(config: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(config, local_batch_size=None, log_full_loss=True, plot=False, overwrite=True, **changes)
