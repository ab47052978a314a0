"""Learning curves: the expected loss after each step, the band of single runs, and the steps to a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchreg.theory.dynamics import Dynamics
from torchreg.theory.maps import band, first_reached, matrices, polynomial
from torchreg.theory.moments import MAX_FEATURES, Matrix
from torchreg.theory.steps import MOST_EPOCH_STEPS, MOST_STEPS, MatrixFreeSteps

StepNumbers = NDArray[np.int64]

_BAND = (0.025, 0.975)


@dataclass(frozen=True)
class LearningCurve:
    """The expected excess loss L − L* after `steps` steps, and bounds of single runs.

    `excess` is exact where the dynamics are. `low` and `high` enclose 95 % of the simulated runs, whose mean and its
    standard error are `simulated` and `simulated_error`. Where nothing is simulated these are None, and the bounds
    enclose 95 % of runs if δ is normal with its exact mean and covariance: good for small learning rates and large
    batches, too narrow near the stability limit and for heavy tails. They are NaN then beyond `MAX_FEATURES`, and where
    only the mean is predicted. All are (len(steps),); losses are in the loss's own units.
    """

    steps: StepNumbers
    excess: Matrix
    low: Matrix
    high: Matrix
    simulated: Matrix | None = None
    simulated_error: Matrix | None = None


def learning_curve(
    dynamics: Dynamics,
    start: Matrix,
    factors: Sequence[float],
    at: Sequence[int] | StepNumbers | None = None,
    *,
    simulate: bool = False,
) -> LearningCurve:
    """The expected curve from δ = `start` (p,), in the model's units, with k = `factors[t]` in step t.

    `at` are increasing numbers of steps, from 0 to len(factors); by default all. With `simulate` runs are simulated
    too, where that is not too costly.
    """
    wanted = np.arange(len(factors) + 1) if at is None else np.asarray(at, dtype=np.int64)
    chosen, p = set(wanted.tolist()), len(dynamics.curvature)
    (low, high), runs, simulated, error = np.full((2, len(wanted)), np.nan), None, None, None
    with np.errstate(over="ignore", invalid="ignore"):
        states = np.array([state for step, state in enumerate(dynamics.states(start, factors)) if step in chosen])
        excess = np.nan_to_num(dynamics.excess(states), nan=np.inf)
        xs = [k * dynamics.lr_unit for k in factors]
        if simulate and dynamics.runs is not None:
            runs = dynamics.runs.excess(dynamics.basis @ start, xs, chosen)
        if runs is not None:
            runs = dynamics.error_unit**2 * np.nan_to_num(runs, nan=np.inf)
            simulated, error = runs.mean(axis=1), runs.std(axis=1, ddof=1) / math.sqrt(runs.shape[1])
            low, high = np.quantile(runs, _BAND, axis=1, method="weibull")
        elif dynamics.runs and p <= MAX_FEATURES + 1:
            turned, triangle = np.linalg.qr(dynamics.basis)  # the parameters' order, so that draws stay the same
            root = (turned * np.copysign(1.0, np.diag(triangle))).T
            low, high = dynamics.error_unit**2 * band(matrices(states), root, _BAND)
        elif dynamics.criterion == "mean square" and not dynamics.runs:
            low = high = excess
    return LearningCurve(wanted, excess, low, high, simulated, error)


def steps_to(
    dynamics: Dynamics,
    excess: float,
    start: Matrix,
    factors: Sequence[float],
    *,
    hold: bool = True,
    most_steps: int = MOST_STEPS,
) -> int | None:
    """Steps after which the expected excess loss is first at most `excess`, from δ = `start`; None if never.

    The k of step t is `factors[t]`, and after the last one that one, unless `hold` is False. More than about
    `most_steps` count as never. (The expected curve reaches the target there; the mean over single runs differs.)
    With constant learning rates `first_reached` defines which steps are checked.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        steps, independent = dynamics.steps, dynamics.independent
        period = steps.num_steps if dynamics.runs and steps.num_steps <= MOST_EPOCH_STEPS else 1
        more = -len(factors) % period  # to the end of an epoch
        if isinstance(independent, MatrixFreeSteps):
            more = min(most_steps, independent.most_steps) - len(factors)
        if hold:
            factors = [*factors, *[factors[-1]] * more]
        for step, state in enumerate(dynamics.states(start, factors)):
            if dynamics.excess(state) <= excess:
                return step
        if not hold or isinstance(steps, MatrixFreeSteps) or isinstance(independent, MatrixFreeSteps):
            return None
        x, weights = factors[-1] * dynamics.lr_unit, None
        if dynamics.runs:
            change, weights = steps.cycle(x, dynamics.weights)
        else:  # a short last batch hardly matters
            change = polynomial(independent.maps, x)

        def reached(states: Matrix) -> NDArray[np.bool_]:  # (len(states), period): in which steps of a cycle
            return np.asarray((dynamics.excess(states)[:, None] if weights is None else states @ weights.T) <= excess)

        found = first_reached(change, state, reached, most_steps // period)
        if found is None:
            return None
        cycles, state = found
        return len(factors) + cycles * period + int(np.argmax(reached(state[None])))
