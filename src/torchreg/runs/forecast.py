"""Predictions for a run before its first step: stability, the expected end, and the steps to a target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from torchreg.console import number, percent
from torchreg.core.schedule import Schedule
from torchreg.theory import Dynamics, Matrix, learning_curve, steps_to

DEFAULT_TARGET_EXCESS = 0.01
_MOST_STEPS = 20_000  # of a curve
_LEVELLED = 0.01  # of the noise floor, what is left of the start


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

    `stability_limit` is the largest stable multiple of the schedule's learning rates, whose highest counts.
    `criterion` is what was predicted: "mean square", or only the "mean", without the noise of mini-batches, whose limit
    does not make a run stable. `mean_converges` is whether the mean does. `noise_floor` is infinite where the run is
    unstable, NaN where it is unknown. `curve` covers at most the first 20,000 steps; None where the run is unstable or
    the closed form's loss is 0. `expected_end` is its end, or the noise floor where a longer run has levelled off; None
    where neither is known. `simulated_ratio` is the mean end of simulated runs over the expected one, and its
    standard error; without them (None) the curve's bounds are only about those of 95 %. `steps_to_target` is where the
    expected excess is first at most `target_excess`, also beyond the run's end where the learning rates stay constant;
    None if never, or not within `steps_searched` (None: never at all).
    """

    criterion: str
    sampling: str
    stability_limit: float
    stability_limit_error: float
    mean_converges: bool
    noise_floor: float
    expected_end: float | None
    target_excess: float
    steps_to_target: int | None
    steps_searched: int | None
    curve: Curve | None
    simulated_ratio: tuple[float, float] | None

    @property
    def is_stable(self) -> bool | None:
        """Whether training with these learning rates converges; None if only its mean is known to."""
        return False if self.stability_limit <= 1 else None if self.criterion == "mean" else True

    @property
    def state(self) -> str:
        """`is_stable` in a word or two."""
        return {True: "stable", False: "diverges", None: "mean converges"}[self.is_stable]

    def message(self) -> str:
        """The prediction in one line, with its approximations."""
        accuracy, about, ratio = "exact", "", self.simulated_ratio
        if self.criterion == "mean" and self.sampling != "full":
            accuracy = "without the noise of mini-batches"
        elif self.sampling == "shuffle":
            accuracy, about = "approximate for shuffle sampling", "about "
        elif self.stability_limit_error:
            accuracy = "estimated from sampled batches"
        if self.is_stable is False:
            times = f"learning rate at {number(1 / self.stability_limit)} times the limit"
            if self.mean_converges:
                return f"diverges in the mean square: {times}, single runs may last for long ({accuracy})"
            return f"unstable: {times}; expected to diverge ({accuracy})"
        limit = "the limit" if self.is_stable else "the limit of the mean, which makes no run stable"
        state = f"{self.state}: learning rate at {percent(1 / self.stability_limit, digits=2)} of {limit}"
        if not self.curve:
            return f"{state} ({accuracy})"
        end, low, high = (percent(values[-1]) for values in (self.curve.excess, self.curve.low, self.curve.high))
        when = f"after {self.curve.steps[-1]:,} steps"
        if self.expected_end is not None:
            when, end = "end", percent(self.expected_end)
        if about and ratio:
            accuracy = f"simulated runs: {ratio[0]:.2f} ± {ratio[1]:.2f} times that"
        band = ""
        if low != high and not math.isnan(self.curve.low[-1]):
            band = f". {'95' if ratio else 'About 95'} % of runs: {low} to {high}"
        return f"{state}; expected {when} {about}{end} above the optimum ({accuracy}){band}"


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
    highest = max(schedule.factor(0), schedule.scale)  # a warm-up may go down
    limit = dynamics.largest_multiplier() / highest
    most = min(_MOST_STEPS, dynamics.independent.most_steps)
    target = DEFAULT_TARGET_EXCESS if target_excess is None else target_excess
    curve, ratio, expected_end, steps_to_target, searched = None, None, None, None, None
    noise_floor = math.nan if limit > 1 else math.inf
    if limit > 1 and best_loss > 0:
        noise_floor = dynamics.noise_floor(schedule.scale) / best_loss
        factors = [schedule.factor(step) for step in range(min(schedule.num_steps, most))]
        last = len(factors)
        at = np.unique(np.rint([np.geomspace(1, last + 1, 120) - 1, np.linspace(0, last, 120)]).astype(np.int64))
        expected = learning_curve(dynamics, start_error, factors, at, simulate=True)
        values = ((part / best_loss).tolist() for part in (expected.excess, expected.low, expected.high))
        curve = Curve(tuple(at.tolist()), *map(tuple, values))
        if expected.simulated is not None and expected.simulated_error is not None and expected.excess[-1]:
            ends = float(expected.simulated[-1]), float(expected.simulated_error[-1])
            ratio = ends[0] / float(expected.excess[-1]), ends[1] / float(expected.excess[-1])
        is_constant = schedule.decay == "constant"  # then the search continues beyond the end of the run
        if last == schedule.num_steps:
            expected_end = curve.excess[-1]
        elif is_constant and dynamics.radius(schedule.scale) ** last * curve.excess[0] <= _LEVELLED * noise_floor:
            expected_end = noise_floor
        last = schedule.warmup_steps if is_constant else schedule.num_steps
        hold = is_constant and last <= most
        searched = (
            dynamics.independent.most_steps if hold and not noise_floor >= target else most if last > most else None
        )
        factors = [schedule.factor(step) for step in range(min(last, most))] + [schedule.scale] * hold
        steps_to_target = steps_to(dynamics, target * best_loss, start_error, factors, hold=hold)
    return Forecast(
        criterion=dynamics.criterion,
        sampling=sampling,
        stability_limit=limit,
        stability_limit_error=dynamics.sampling_error(Dynamics.largest_multiplier) / highest,
        mean_converges=dynamics.contraction(highest) < 1,
        noise_floor=noise_floor,
        expected_end=expected_end,
        target_excess=target,
        steps_to_target=steps_to_target,
        steps_searched=searched if steps_to_target is None else None,
        curve=curve,
        simulated_ratio=ratio,
    )
