"""The rows that a launch measures on, and whether the step that was timed computes the right thing on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreg.data.standardizer import Standardizer
from torchreg.data.table import load_table
from torchreg.distributed.communicator import Communicator
from torchreg.scaling.campaign import MOST_SOLVED_FEATURES
from torchreg.scaling.loop import StepLoop
from torchreg.theory import Matrix, Moments

_EARLY_STEPS = 3
_CHECK_STEPS = (10, 100)
_SOLVED = 1e-8  # the excess that a check's steps are to reach
_NEAR = 1e-6  # an excess up to which one may say that the closed form is reached
_SAFE = 0.1  # of the rate at which a single row could make a step unstable


@dataclass(frozen=True)
class Rows:
    """Rows to measure on, and what full-batch gradient descent on them does.

    `x` (num_rows, num_features) and `y` (num_rows, 1) are on the device. `safe_learning_rate` is stable for any batch.
    From zeros, as NumPy reckons, full-batch steps are at `early` (num_features + 1,) after the first few at half of
    `check_learning_rate`, where a wrong size of the gradient shows, and at `end` after `check_steps` more at
    `check_learning_rate`.
    `moments` know the closed form; None where it costs too much.
    """

    x: Tensor
    y: Tensor
    safe_learning_rate: float
    check_learning_rate: float
    check_steps: int
    early: Matrix
    end: Matrix
    moments: Moments | None

    def excess(self, theta: Matrix) -> float | None:
        """How far the loss at parameters (num_features + 1,) is above the closed form's, as a fraction of it."""
        if self.moments is None:
            return None
        return self.moments.excess(theta[:-1], float(theta[-1])) / self.moments.closed_form().loss


def make_rows(num_rows: int, num_features: int, communicator: Communicator, dtype: torch.dtype) -> Rows:
    """The rows for a number of features, made on the main rank.

    For one feature the built-in houses, standardised; for more, rows of normal noise, which are quick to make and well
    conditioned.
    """
    made: list[tuple[Matrix, Matrix]] = []

    def reckon() -> tuple[float, float, int, Matrix, Matrix, Moments | None]:
        made.append(_houses(num_rows) if num_features == 1 else _noise(num_rows, num_features))
        return _reckon(*made[0])

    reckoned = communicator.from_main(reckon)
    both = torch.empty(num_rows, num_features + 1, dtype=torch.float64)
    if made:
        both[:, :-1], both[:, -1] = (torch.from_numpy(part) for part in made[0])
    both = communicator.broadcast(both.to(dtype).to(communicator.device))
    return Rows(both[:, :-1].contiguous(), both[:, -1:].contiguous(), *reckoned)


def _houses(num_rows: int) -> tuple[Matrix, Matrix]:
    table = load_table("synthetic", num_rows=num_rows)
    price = table.target[:, 0]
    return Standardizer.of(table.features, standardize=True).apply(table.features), price / price.std()


def _noise(num_rows: int, num_features: int) -> tuple[Matrix, Matrix]:
    stream = np.random.RandomState(0)  # NumPy's frozen stream: the same rows in every release (NEP 19)
    features = stream.standard_normal((num_rows, num_features))
    return features, features.sum(axis=1) / math.sqrt(num_features) + stream.standard_normal(num_rows)


def _reckon(features: Matrix, target: Matrix) -> tuple[float, float, int, Matrix, Matrix, Moments | None]:
    """`Rows` from `safe_learning_rate` on: the trajectory of full-batch gradient descent, in NumPy, without torch."""
    num_rows, num_features = features.shape
    a = np.column_stack([features, np.ones(num_rows)])
    safe_learning_rate = _SAFE / float(np.square(a).sum(axis=1).max())
    if num_features <= min(MOST_SOLVED_FEATURES, num_rows // 4):
        moments = Moments.of(features, target[:, None])
        curvature = np.linalg.eigvalsh(a.T @ a / num_rows)
        learning_rate = 1 / float(curvature[0] + curvature[-1])  # the quickest constant one
        contraction = float((curvature[-1] - curvature[0]) / (curvature[-1] + curvature[0]))
        fewest, most = _CHECK_STEPS
        # The excess shrinks by contraction² a step.
        needed = math.log(_SOLVED) / (2 * math.log(max(contraction, 1e-9)))
        num_steps = min(most, max(fewest, math.ceil(needed)))
    else:
        moments, learning_rate, num_steps = None, 0.5 / _largest_curvature(a), _CHECK_STEPS[0]

    def descend(theta: Matrix, count: int, learning_rate: float) -> Matrix:
        for _ in range(count):
            theta = theta - 2 * learning_rate / num_rows * (a.T @ (a @ theta - target))
        return theta

    early = descend(np.zeros(num_features + 1), _EARLY_STEPS, learning_rate / 2)
    if moments:
        moments.closed_form()  # solved here once, and not on every rank
    return safe_learning_rate, learning_rate, num_steps, early, descend(early, num_steps, learning_rate), moments


def _largest_curvature(a: Matrix) -> float:
    """An upper bound of the largest eigenvalue of aᵀa/n: power iteration from below, with room above."""
    vector = np.ones(a.shape[1])
    for _ in range(30):
        vector = a.T @ (a @ (vector / np.linalg.norm(vector))) / len(a)
    return 1.2 * float(np.linalg.norm(vector))


def check(loop: StepLoop, rows: Rows, communicator: Communicator) -> dict[str, Any]:
    """Did the step that was timed compute the right thing on every rank?

    All ranks must have the same parameters after the window; then full-batch descent with the same step must be where
    NumPy's is, on its way and at its end.
    """
    replica = loop.parameters()
    loop.begin_at_zero()
    early = loop.descend(_EARLY_STEPS, rows.check_learning_rate / 2)
    end = loop.descend(rows.check_steps, rows.check_learning_rate)
    pairs = ((replica, communicator.from_main(lambda: replica)), (early, rows.early), (end, rows.end))
    worst = max(max(communicator.gather(_difference(own, right))) for own, right in pairs)
    tolerance = 1e-9 if rows.x.dtype == torch.float64 else 1e-3
    predicted, excess = rows.excess(rows.end), rows.excess(end)
    solves = predicted is not None and predicted <= _NEAR
    passed = worst <= tolerance and not (solves and excess is not None and excess > _NEAR + tolerance)
    what = "end at the closed form" if solves else "follow gradient descent"
    return {
        "passed": passed,
        "difference": worst if math.isfinite(worst) else None,
        "tolerance": tolerance,
        "excess": excess,
        "told": f"{_EARLY_STEPS + rows.check_steps} full-batch steps {what if passed else f'do not {what}'}",
    }


def _difference(own: Matrix, right: Matrix) -> float:
    """The largest difference of parameters, as a fraction of the largest parameter; infinite if one is not finite."""
    difference = float(np.abs(own - right).max() / np.abs(right).max())
    return difference if math.isfinite(difference) else math.inf
