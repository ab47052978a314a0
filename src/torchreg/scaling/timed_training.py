"""The samples that a launch measures on, the training that is timed on them, and the check of its parameters."""

from __future__ import annotations

import math
from collections import deque
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from torchreg.core.batches import Batch, BatchLoader, BatchPlan
from torchreg.core.model import make_model
from torchreg.core.train import fit, make_sgd, manual_samples
from torchreg.data.table import Standardizer, load_table
from torchreg.distributed.communicator import Communicator
from torchreg.runs.logger import MOST_WAITING, LossBuffer
from torchreg.runs.run import Seams, make_step
from torchreg.scaling.campaign import MOST_SOLVED_FEATURES, Setting
from torchreg.theory import Matrix, Moments

_EARLY_STEPS = 3
_CHECK_STEPS = (10, 100)
_CHECK_EXCESS = 1e-8  # which the steps of a check are to reach
_SOLVED_EXCESS = 1e-6  # up to which parameters count as the closed-form solution
_SAFE_FRACTION = 0.1  # of the learning rate at which a single sample could make a step unstable


class TimedTraining:
    """The training of a setting at one learning rate, on x (num_rows, num_features) and y (num_rows, 1), from zeros.

    The loader, the step and the sums of losses are those of a run. Without `all_reduce` each rank trains alone, on the
    same samples as with it.
    """

    def __init__(
        self,
        setting: Setting,
        x: Tensor,
        y: Tensor,
        learning_rate: float,
        communicator: Communicator,
        *,
        all_reduce: bool = True,
        seams: Seams = Seams(),
    ) -> None:
        self._learning_rates = (learning_rate, learning_rate)
        self.rank = communicator.rank
        self.plan = BatchPlan.derive(len(x), communicator.world_size, global_batch_size=setting.global_batch_size)
        self.model = seams.model(make_model([0.0] * x.shape[1], 0.0, device=x.device, dtype=x.dtype))
        communicator = communicator.using("mpi" if setting.sync == "mpi" else "ddp")
        communicator = communicator if all_reduce else communicator.alone()
        optimizer = make_sgd(self.model, self._learning_rates) if setting.optimizer == "sgd" else None
        self.step = seams.step(make_step(self.model, optimizer, self.plan, communicator))
        self.samples = (x, y) if optimizer else manual_samples(x, y)
        self.loader = seams.loader(self.plan, self.rank, *self.samples)
        self.num_steps = 0
        self._context = nullcontext if optimizer else torch.inference_mode
        self._losses = LossBuffer(communicator)

    def take_steps(self, count: int) -> None:
        """Take the next steps; their losses are summed over ranks as often as in a run."""
        self.num_steps += count
        with self._context():
            batches = self.loader.iterate(self.num_steps - count, self.num_steps)
            fit(batches, self.step, lambda step: self._learning_rates, self._log)

    def take_samples(self, count: int) -> None:
        """Take the samples of the next steps, without an update."""
        self.num_steps += count
        with self._context():
            deque(self.loader.iterate(self.num_steps - count, self.num_steps), maxlen=0)

    def _log(self, batch: Batch, squared_error: Tensor) -> bool:
        """As `torchreg.runs.logger.Logger` between two lines of metrics."""
        self._losses.append(batch, squared_error)
        if len(self._losses.errors) == MOST_WAITING:
            self._losses.all_reduce()
            self._losses.clear()
        return False

    def descend(self, count: int, learning_rate: float) -> Matrix:
        """Full-batch gradient descent by the same step; the parameters (num_features + 1,) at its end."""
        plan = BatchPlan.derive(self.plan.num_rows, self.plan.world_size, sampling="full")
        batches = BatchLoader(plan, self.rank, *self.samples).iterate(0, count)
        with self._context():
            fit(batches, self.step, lambda step: (learning_rate, learning_rate), lambda batch, squared_error: False)
        return self.parameters()

    def parameters(self) -> Matrix:
        """Weight and bias, (num_features + 1,)."""
        return np.asarray(parameters_to_vector(self.model.parameters()).detach().cpu(), dtype=np.float64)


class Reference(NamedTuple):
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
        return _reference_of(features, target)

    reference = communicator.from_main(on_main)
    samples = communicator.broadcast(samples.to(dtype).to(communicator.device))
    return samples[:, :-1].contiguous(), samples[:, -1:].contiguous(), reference


def _reference_of(features: Matrix, target: Matrix) -> Reference:
    num_rows, num_features = features.shape
    a = np.column_stack([features, np.ones(num_rows)])
    safe_learning_rate = _SAFE_FRACTION / float(np.square(a).sum(axis=1).max())
    moments, num_steps = None, _CHECK_STEPS[0]
    if num_features <= min(MOST_SOLVED_FEATURES, num_rows // 4):
        moments = Moments.of(features, target[:, None])
        moments.closed_form()  # solved here once, and not on every rank
        low, *_, high = np.linalg.eigvalsh(a.T @ a / num_rows).tolist()
        learning_rate = 1 / (low + high)  # the fastest constant one: the excess shrinks by contraction² a step
        contraction = max((high - low) / (high + low), 1e-9)
        num_steps = int(np.clip(math.ceil(math.log(_CHECK_EXCESS) / (2 * math.log(contraction))), *_CHECK_STEPS))
    else:
        largest = float(svds(a, k=1, v0=np.ones(min(a.shape)), return_singular_vectors=False)[0])
        learning_rate = 0.4 * num_rows / largest**2  # of a stability limit of 1 over the largest curvature
    path = [np.zeros(num_features + 1)]
    for step_size in [learning_rate / 2] * _EARLY_STEPS + [learning_rate] * num_steps:
        path.append(path[-1] - 2 * step_size / num_rows * (a.T @ (a @ path[-1] - target)))
    return Reference(safe_learning_rate, learning_rate, num_steps, path[_EARLY_STEPS], path[-1], moments)


def check(training: TimedTraining, reference: Reference, communicator: Communicator) -> dict[str, Any]:
    """Whether the timed step computes the right parameters on every rank: the `check_*` fields of a `Point`.

    All ranks must have the same parameters after the window. Then full-batch descent by the same step must be where
    NumPy's is, early and at its end. A difference is that of the worst parameter, as a fraction of the largest one.
    """
    own = training.parameters()
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.zero_()
    early = training.descend(_EARLY_STEPS, reference.learning_rate / 2)
    end = training.descend(reference.num_steps, reference.learning_rate)
    pairs = ((own, communicator.from_main(lambda: own)), (early, reference.early), (end, reference.end))
    differences = [float(np.abs(found - expected).max() / np.abs(expected).max()) for found, expected in pairs]
    difference = float(np.max(communicator.gather(differences)))  # NaN, which fails, if a parameter is not finite
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
