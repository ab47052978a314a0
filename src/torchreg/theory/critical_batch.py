"""What the dynamics mean for a world size or a batch size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from torchreg.theory.dynamics import MOST_STEPS, Dynamics, Sampling
from torchreg.theory.moments import Matrix
from torchreg.theory.row_gradients import RowGradients
from torchreg.theory.steps import Order

_TRIED_MULTIPLIERS = np.geomspace(0.95, 1 / 64, 25)  # of the stability limit


def largest_stable_world_size(
    rows: RowGradients,
    base_learning_rates: tuple[float, float],
    local_batch_size: int,
    scale: Callable[[int], float],
    order: Order = "simultaneous",
    sampling: Sampling = "random",
) -> int:
    """The most ranks, with `local_batch_size` rows each, at which the scaled rates are stable; 0 if not even one is.

    `scale` gives the factor of the rates at a global batch size. Stability is monotone in the world size for
    the scaling rules of `schedule`, so the answer is found by bisection. No world size with more rows than the table
    has is looked at.
    """

    def is_stable(world_size: int) -> bool:
        batch_size = world_size * local_batch_size
        return (
            scale(batch_size) < Dynamics.of(rows, base_learning_rates, batch_size, order, sampling).largest_multiplier()
        )

    low, high = 0, max(1, rows.num_rows // local_batch_size)
    if is_stable(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_stable(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class CriticalBatch:
    """How steps to a target fall with the batch size, each with the best constant rates for it.

    `batch_sizes` double from one to the next; `steps[i]` is the fewest steps to the target at `batch_sizes[i]`, None
    where no tried rate gets there, with the rates times `multipliers[i]`. `critical` is the batch size from which
    doubling saves less than a quarter of the steps, or None if that is beyond the table.
    """

    batch_sizes: tuple[int, ...]
    steps: tuple[int | None, ...]
    multipliers: tuple[float, ...]
    critical: int | None


def critical_batch_size(
    rows: RowGradients,
    learning_rates: tuple[float, float],
    start: Matrix,
    target_excess: float,
    order: Order = "simultaneous",
) -> CriticalBatch:
    """The batch size where steps to `target_excess` stop halving, from the error `start` (p,).

    McCandlish et al. (2018) find steps S(B) = S_min (1 + B_crit / B): doubling the batch halves the steps far below
    B_crit, saves nothing far above it, and a quarter of them just there. As in their and Shallue's (2019)
    measurements, each batch size has its own best rates: the given pair times the best of 25 multipliers from 1/64 to
    0.95 of the stability limit, of those whose noise floor is below the target. Valid for `random` sampling and up to
    `MAX_FEATURES` features.
    """
    num_rows = rows.num_rows
    batch_sizes = [2**i for i in range(num_rows.bit_length()) if 2**i <= num_rows]
    best = [_fewest_steps(Dynamics.of(rows, learning_rates, size, order), start, target_excess) for size in batch_sizes]
    steps = [found[0] for found in best]
    critical = None
    for size, now, doubled in zip(batch_sizes, steps, steps[1:], strict=False):
        if now and doubled and doubled > 0.75 * now:
            critical = size
            break
    return CriticalBatch(tuple(batch_sizes), tuple(steps), tuple(found[1] for found in best), critical)


def _fewest_steps(dynamics: Dynamics, start: Matrix, target_excess: float) -> tuple[int | None, float]:
    fewest, best = None, math.nan
    for k in dynamics.largest_multiplier() * _TRIED_MULTIPLIERS:
        if dynamics.noise_floor(k) < target_excess:
            most_steps = MOST_STEPS if fewest is None else fewest
            steps = dynamics.steps_to(target_excess, start, [k], most_steps=most_steps)
            if steps is not None and (fewest is None or steps < fewest):
                fewest, best = steps, float(k)
    return fewest, best
