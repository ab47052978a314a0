"""The largest stable world size and the critical batch size."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from torchreg.theory.curves import steps_to
from torchreg.theory.dynamics import Dynamics, Sampling
from torchreg.theory.moments import Matrix, RowGradients
from torchreg.theory.steps import MOST_STEPS, Order

_HIGHEST = 0.95  # of the stability limit
_BISECTIONS = 20
_WIDTHS = (8.0, 2.0, 1.2)  # of the ranges of learning rates that are searched one after the other


def largest_stable_world_size(
    rows: RowGradients,
    base_learning_rates: tuple[float, float],
    local_batch_size: int,
    scale: Callable[[int], float],
    order: Order = "simultaneous",
    sampling: Sampling = "random",
    scale_last_batch: bool = True,
) -> int:
    """The most ranks, with `local_batch_size` rows each, at which training is stable; 0 if not even one is.

    `scale` gives the factor of the learning rates at a global batch size. Stability is monotone in the world size for
    the scaling rules of `schedule`, so bisection finds the answer, up to the number of rows of the table.
    """

    def is_unstable(world_size: int) -> bool:
        batch_size = world_size * local_batch_size
        dynamics = Dynamics.of(
            rows, base_learning_rates, batch_size, order, sampling, scale_last_batch=scale_last_batch
        )
        return not scale(batch_size) < dynamics.largest_multiplier()

    most = max(1, rows.num_rows // local_batch_size)
    return bisect_left(range(1, most), True, key=is_unstable) if is_unstable(most) else most


@dataclass(frozen=True)
class CriticalBatch:
    """Steps to a target against batch size, each batch size with its best constant learning rates.

    `batch_sizes` double from one to the next; `steps[i]` is the fewest steps to the target at `batch_sizes[i]`, with
    the learning rates times `multipliers[i]`; None where no tried multiplier reaches it. `critical` is the batch size
    from which doubling saves less than a quarter of the steps, or None if that is beyond the table.
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
    B_crit, saves nothing far above it, and a quarter of them at B_crit. As in their and Shallue's (2019) measurements,
    each batch size has its own best learning rates: the given pair times the best multiplier, to about 5 %, of those
    below 0.95 of the stability limit whose noise floor is below the target. Valid for `random` sampling and up to
    `MAX_FEATURES` features.
    """

    @cache
    def fewest_steps(batch_size: int) -> tuple[int | None, float]:
        dynamics = Dynamics.of(rows, learning_rates, batch_size, order)
        low, highest = 0.0, _HIGHEST * dynamics.largest_multiplier()
        if dynamics.noise_floor(highest) >= target_excess:
            for _ in range(_BISECTIONS):
                middle = (low + highest) / 2
                low, highest = (middle, highest) if dynamics.noise_floor(middle) < target_excess else (low, middle)
            highest = low
        fewest, best = None, highest / _WIDTHS[0]
        for width in _WIDTHS:
            for k in [k for k in best * np.geomspace(1 / width, width, 9) if k <= highest]:
                steps = steps_to(dynamics, target_excess, start, [k], most_steps=fewest or MOST_STEPS)
                if steps is not None and (fewest is None or steps < fewest):
                    fewest, best = steps, float(k)
        return fewest, best if fewest is not None else math.nan

    def saves_little(batch_size: int) -> bool:
        now, doubled = fewest_steps(batch_size)[0], fewest_steps(2 * batch_size)[0]
        return bool(now and doubled and doubled > 0.75 * now)

    batch_sizes = tuple(2**i for i in range(rows.num_rows.bit_length()))
    steps, multipliers = zip(*map(fewest_steps, batch_sizes), strict=True)
    critical = next(filter(saves_little, batch_sizes[:-1]), None)
    if critical is not None:  # between it and half of it
        critical = bisect_left(range(critical), True, critical // 2 + 1, key=saves_little)
    return CriticalBatch(batch_sizes, steps, multipliers, critical)
