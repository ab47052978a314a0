"""The samples that a launch measures on, and the check that the timed step computes the right parameters on them."""

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
from torchreg.scaling.timed_training import TimedTraining
from torchreg.theory import Matrix, Moments

_EARLY_STEPS = 3
_CHECK_STEPS = (10, 100)
_CHECK_EXCESS = 1e-8  # which the steps of a check are to reach
_SOLVED_EXCESS = 1e-6  # up to which parameters count as the closed-form solution
_SAFE_FRACTION = 0.1  # of the learning rate at which a single sample could make a step unstable


@dataclass(frozen=True)
class Reference:
    """What full-batch gradient descent from zeros does on the samples, computed by NumPy.

    `safe_learning_rate` is stable for any batch. The parameters (num_features + 1,) are `early` after a few steps at
    half of `learning_rate`, where a wrong size of the gradient shows, and `end` after `num_steps` more at
    `learning_rate`. `moments`, which have the closed form, are None where it costs too much.
    """

    safe_learning_rate: float
    learning_rate: float
    num_steps: int
    early: Matrix
    end: Matrix
    moments: Moments | None

    @classmethod
    def of(cls, features: Matrix, target: Matrix) -> Reference:
        """That of samples x (num_rows, num_features) and y (num_rows,)."""
        num_rows, num_features = features.shape
        a = np.column_stack([features, np.ones(num_rows)])
        safe_learning_rate = _SAFE_FRACTION / float(np.square(a).sum(axis=1).max())
        moments, num_steps = None, _CHECK_STEPS[0]
        if num_features <= min(MOST_SOLVED_FEATURES, num_rows // 4):
            moments = Moments.of(features, target[:, None])
            moments.closed_form()  # solved here once, and not on every rank
            curvature = np.linalg.eigvalsh(a.T @ a / num_rows)
            low, high = float(curvature[0]), float(curvature[-1])
            learning_rate = 1 / (low + high)  # the fastest constant one: the excess shrinks by contraction² a step
            contraction = max((high - low) / (high + low), 1e-9)
            needed = math.ceil(math.log(_CHECK_EXCESS) / (2 * math.log(contraction)))
            num_steps = min(_CHECK_STEPS[1], max(_CHECK_STEPS[0], needed))
        else:  # power iteration from below, with a margin above, bounds the largest eigenvalue of aᵀa/n
            vector = np.ones(num_features + 1)
            for _ in range(30):
                vector = a.T @ (a @ (vector / np.linalg.norm(vector))) / num_rows
            learning_rate = 0.5 / (1.2 * float(np.linalg.norm(vector)))

        def descend(theta: Matrix, count: int, learning_rate: float) -> Matrix:
            for _ in range(count):
                theta = theta - 2 * learning_rate / num_rows * (a.T @ (a @ theta - target))
            return theta

        early = descend(np.zeros(num_features + 1), _EARLY_STEPS, learning_rate / 2)
        end = descend(early, num_steps, learning_rate)
        return cls(safe_learning_rate, learning_rate, num_steps, early, end, moments)

    def excess(self, theta: Matrix) -> float | None:
        """How far the loss at parameters (num_features + 1,) is above the closed form's, as a fraction of it."""
        if self.moments is None:
            return None
        return self.moments.excess(theta[:-1], float(theta[-1])) / self.moments.closed_form().loss


def make_samples(
    num_rows: int, num_features: int, communicator: Communicator, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Reference]:
    """Samples x (num_rows, num_features) and y (num_rows, 1) on every rank's device, made on the main rank.

    For one feature the synthetic houses, standardised; for more, normal noise, which is fast to make and well
    conditioned.
    """
    samples = torch.empty(num_rows, num_features + 1, dtype=torch.float64)

    def on_main() -> Reference:
        if num_features == 1:
            table = load_table("synthetic", num_rows=num_rows)
            features = Standardizer.of(table.features, standardize=True).apply(table.features)
            target = table.target[:, 0] / table.target.std()
        else:
            stream = np.random.RandomState(0)  # NumPy's frozen stream: the same samples in every release (NEP 19)
            features = stream.standard_normal((num_rows, num_features))
            target = features.sum(axis=1) / math.sqrt(num_features) + stream.standard_normal(num_rows)
        samples[:, :-1], samples[:, -1] = torch.from_numpy(features), torch.from_numpy(target)
        return Reference.of(features, target)

    reference = communicator.from_main(on_main)
    samples = communicator.broadcast(samples.to(dtype).to(communicator.device))
    return samples[:, :-1].contiguous(), samples[:, -1:].contiguous(), reference


def check(training: TimedTraining, reference: Reference, communicator: Communicator) -> dict[str, Any]:
    """Whether the timed step computes the right parameters on every rank: the `check_*` fields of a `Point`.

    All ranks must have the same parameters after the window. Then full-batch descent by the same step must be where
    NumPy's is, early and at its end.
    """
    own = training.parameters()
    training.reset()
    early = training.descend(_EARLY_STEPS, reference.learning_rate / 2)
    end = training.descend(reference.num_steps, reference.learning_rate)
    pairs = ((own, communicator.from_main(lambda: own)), (early, reference.early), (end, reference.end))
    difference = max(max(communicator.gather(_difference(*pair))) for pair in pairs)
    tolerance = 1e-9 if training.model.weight.dtype == torch.float64 else 1e-3
    expected, excess = reference.excess(reference.end), reference.excess(end)
    is_solved = expected is not None and expected <= _SOLVED_EXCESS
    passed = difference <= tolerance and not (is_solved and excess is not None and excess > _SOLVED_EXCESS + tolerance)
    what = "end at the closed form" if is_solved else "follow gradient descent"
    return {
        "check_passed": passed,
        "check_difference": difference if math.isfinite(difference) else None,
        "check_tolerance": tolerance,
        "check_excess": excess,
        "check_message": f"{_EARLY_STEPS + reference.num_steps} full-batch steps {'' if passed else 'do not '}{what}",
    }


def _difference(found: Matrix, expected: Matrix) -> float:
    """The largest difference of parameters, as a fraction of the largest parameter; infinite if one is not finite."""
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    return difference if math.isfinite(difference) else math.inf
