"""Predictions for a run before its first step: stability, the expected end, and the steps to a target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from torchreg.console import number, percent
from torchreg.core.schedule import Schedule
from torchreg.theory import MOST_STEPS, Dynamics, Matrix

DEFAULT_TARGET_EXCESS = 0.01
_MOST_STEPS = 20_000  # of a curve


@dataclass(frozen=True)
class Curve:
    """Expected excess loss, and the bounds of 95 % of runs, after some numbers of steps."""

    steps: tuple[int, ...]
    excess: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Forecast:
    """The expected course of one run. Excess losses are fractions of the closed form's loss.

    `stability_limit` is the largest stable multiple of the scaled learning rates. `criterion` is what was predicted:
    "mean square", or "mean" beyond 16 features, without the noise of mini-batches. `noise_floor` is infinite where the
    run is unstable, NaN where it is unknown. `curve` covers at most the first 20,000 steps; None where the run is
    unstable or the closed form's loss is 0. `steps_to_target` is where the expected excess is first at most
    `target_excess`, also beyond the run's end where the learning rates stay constant; None if never, or not within
    `steps_searched` (None: never at all).
    """

    criterion: str
    sampling: str
    stability_limit: float
    stability_limit_error: float
    noise_floor: float
    target_excess: float
    steps_to_target: int | None
    steps_searched: int | None
    curve: Curve | None

    @property
    def is_stable(self) -> bool:
        """Whether training with the scaled learning rates converges."""
        return self.stability_limit > 1

    def message(self) -> str:
        """The prediction in one line, with its approximations."""
        accuracy = "estimated from sampled batches" if self.stability_limit_error else "exact"
        if self.criterion == "mean" and self.sampling != "full":
            accuracy = "without the noise of mini-batches"
        elif self.sampling == "shuffle":
            accuracy = "approximate for shuffle sampling"
        if not self.is_stable:
            times = f"{number(1 / self.stability_limit)} times"
            return f"unstable: learning rate at {times} the limit; expected to diverge ({accuracy})"
        stable = f"stable: learning rate at {percent(1 / self.stability_limit, digits=2)} of the limit"
        if not self.curve:
            return f"{stable} ({accuracy})"
        end, low, high = (percent(values[-1]) for values in (self.curve.excess, self.curve.low, self.curve.high))
        band = f". 95 % of runs: {low} to {high}" if low != high else ""
        return f"{stable}; expected end {end} above the optimum ({accuracy}){band}"


def forecast(
    dynamics: Dynamics,
    schedule: Schedule,
    start_error: Matrix,
    best_loss: float,
    sampling: str,
    target_excess: float | None = None,
) -> Forecast:
    """The forecast for a schedule, from the dynamics of its base learning rates.

    `start_error` is start − optimum, (num_features + 1,), in the model's units; `best_loss` the closed form's.
    """
    limit = dynamics.largest_multiplier() / schedule.scale
    target = DEFAULT_TARGET_EXCESS if target_excess is None else target_excess
    curve, steps_to_target, searched, noise_floor = None, None, None, math.nan if limit > 1 else math.inf
    if limit > 1 and best_loss > 0:
        noise_floor = dynamics.noise_floor(schedule.scale) / best_loss
        factors = [schedule.factor(step) for step in range(min(schedule.num_steps, _MOST_STEPS))]
        last = len(factors)
        at = np.unique(np.rint([np.geomspace(1, last + 1, 120) - 1, np.linspace(0, last, 120)]).astype(np.int64))
        expected = dynamics.learning_curve(start_error, factors, at)
        values = ((part / best_loss).tolist() for part in (expected.excess, expected.low, expected.high))
        curve = Curve(tuple(at.tolist()), *map(tuple, values))
        is_constant = schedule.decay == "constant"  # then the search continues beyond the end of the run
        last = schedule.warmup_steps if is_constant else schedule.num_steps
        hold = is_constant and last <= _MOST_STEPS
        searched = MOST_STEPS if hold and not noise_floor >= target else _MOST_STEPS if last > _MOST_STEPS else None
        factors = [schedule.factor(step) for step in range(min(last, _MOST_STEPS))] + [schedule.scale] * hold
        steps_to_target = dynamics.steps_to(target * best_loss, start_error, factors, hold=hold)
    return Forecast(
        criterion=dynamics.criterion,
        sampling=sampling,
        stability_limit=limit,
        stability_limit_error=dynamics.sampling_error(Dynamics.largest_multiplier) / schedule.scale,
        noise_floor=noise_floor,
        target_excess=target,
        steps_to_target=steps_to_target,
        steps_searched=searched if steps_to_target is None else None,
        curve=curve,
    )
