"""What theory says a run will do, before its first step: stable or not, where it ends, how soon it is there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from torchreg.core.schedule import Schedule
from torchreg.theory import MOST_STEPS, Dynamics, Matrix

DEFAULT_TARGET_EXCESS = 0.01

_MOST_STEPS = 20_000
_CURVE_POINTS = 120


@dataclass(frozen=True)
class Forecast:
    """The expected course of one run. Excess losses are fractions of the closed form's loss.

    `stability_limit` is the largest stable multiple of the scaled rates; `criterion` is what was predicted, "mean
    square", or "mean" beyond 16 features, where the noise of mini-batches is left out. `noise_floor` is where the
    scaled rates level off: infinite where they are unstable, NaN where it is not known. `curve` has the expected
    excess and 95 % of single runs after `steps` steps, at most the first 20,000 of them; None where the run is
    unstable or the closed form's loss is 0. `steps_to_target` are those until the expected excess is at most
    `target_excess`, with the run's own warm-up and decay, and going on beyond its end where the rates stay constant;
    None if it never gets there, or not in `steps_searched`, which is None where all are looked at.
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
        """Whether the scaled rates converge."""
        return self.stability_limit > 1

    @property
    def is_exact(self) -> bool:
        """Whether the prediction is exact rather than approximate: `shuffle` is approximated."""
        return self.sampling != "shuffle"

    def told(self) -> str:
        """The prediction in one line."""
        if not self.is_stable:
            return (
                f"unstable: the rates are {1 / self.stability_limit:.3g} times the stability limit ({self.criterion})"
            )
        parts = [f"stable ({self.criterion}), the rates are {1 / self.stability_limit:.2g} of the limit"]
        if self.curve:
            about = "" if self.is_exact else "about "
            end = f"after {self.curve.steps[-1]} steps {about}{percent(self.curve.excess[-1])} above the best loss"
            if self.criterion == "mean":
                parts.append(f"{end}, and the noise of mini-batches on top (left out beyond 16 features)")
            else:
                parts.append(
                    f"{end}, 95 % of runs {percent(self.curve.low[-1])} to {percent(self.curve.high[-1])}; "
                    f"floor {'not known' if math.isnan(self.noise_floor) else percent(self.noise_floor)}"
                )
        return "; ".join(parts)


@dataclass(frozen=True)
class Curve:
    """Expected excess loss, and the bounds of 95 % of runs, after some numbers of steps."""

    steps: tuple[int, ...]
    excess: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def forecast(
    dynamics: Dynamics,
    schedule: Schedule,
    start_error: Matrix,
    best_loss: float,
    sampling: str,
    target_excess: float | None = None,
) -> Forecast:
    """The forecast for a schedule's rates; `dynamics` are those of its base rates.

    `start_error` is start − optimum, (num_features + 1,), in the model's units; `best_loss` the closed form's.
    """
    limit = dynamics.largest_multiplier() / schedule.scale
    target = DEFAULT_TARGET_EXCESS if target_excess is None else target_excess
    curve, steps_to_target, searched, floor = None, None, None, math.nan if limit > 1 else math.inf
    if limit > 1 and best_loss > 0:
        floor = dynamics.noise_floor(schedule.scale) / best_loss
        factors = [schedule.factor(step) for step in range(min(schedule.num_steps, _MOST_STEPS))]
        curve = _curve(dynamics, factors, start_error, best_loss)
        if schedule.decay == "constant":
            warmup = [schedule.factor(step) for step in range(min(schedule.warmup_steps, _MOST_STEPS))]
            hold = len(warmup) == schedule.warmup_steps  # a longer warm-up is looked at as far as the curve is
            steps_to_target = dynamics.steps_to(
                target * best_loss, start_error, warmup + [schedule.scale] * hold, hold=hold
            )
            searched = MOST_STEPS if hold else _MOST_STEPS
            if hold and floor >= target:
                searched = None  # it stays above
        else:  # the run ends where its rates do
            steps_to_target = dynamics.steps_to(target * best_loss, start_error, factors, hold=False)
            searched = _MOST_STEPS if schedule.num_steps > _MOST_STEPS else None
    return Forecast(
        criterion=dynamics.criterion,
        sampling=sampling,
        stability_limit=limit,
        stability_limit_error=dynamics.sampling_error(lambda d: d.largest_multiplier()) / schedule.scale,
        noise_floor=floor,
        target_excess=target,
        steps_to_target=steps_to_target,
        steps_searched=searched if steps_to_target is None else None,
        curve=curve,
    )


def percent(fraction: float) -> str:
    """A fraction as percent, three digits."""
    return f"{100 * fraction:.3g} %"


def _curve(dynamics: Dynamics, factors: list[float], start_error: Matrix, best_loss: float) -> Curve:
    ends = np.geomspace(1, len(factors) + 1, _CURVE_POINTS) - 1
    at = np.unique(
        np.append(ends.round().astype(np.int64), np.linspace(0, len(factors), _CURVE_POINTS, dtype=np.int64))
    )
    curve = dynamics.learning_curve(start_error, factors, at)
    return Curve(
        tuple(at.tolist()), *(tuple((values / best_loss).tolist()) for values in (curve.excess, curve.low, curve.high))
    )
