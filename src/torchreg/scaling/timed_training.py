"""Training by `torchreg.core.train.fit` as it is timed: the same loader, step and sums of losses as in a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from torchreg.core.batches import Batch, BatchLoader, BatchPlan
from torchreg.core.model import make_model
from torchreg.core.train import Step, fit, make_sgd, manual_samples
from torchreg.distributed.communicator import Communicator
from torchreg.runs.logger import MOST_WAITING, LossBuffer
from torchreg.runs.run import Seams, make_step
from torchreg.scaling.campaign import Setting
from torchreg.theory import Matrix


class TimedTraining:
    """The training of a setting at one learning rate, on x (num_rows, num_features) and y (num_rows, 1), from zeros.

    Without `all_reduce` each rank trains alone, on the same samples as with it.
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
        self._fit(count, self.step, self._log)

    def take_samples(self, count: int) -> None:
        """Take the samples of the next steps, without an update."""
        no_error = torch.zeros((), device=self.model.weight.device)
        self._fit(count, lambda batch, learning_rates: no_error, _ignore)

    def _fit(self, count: int, step: Step, log: Callable[[Batch, Tensor], bool]) -> None:
        first, self.num_steps = self.num_steps, self.num_steps + count
        with self._context():
            fit(self.loader.iterate(first, self.num_steps), step, lambda step: self._learning_rates, log)

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
            fit(batches, self.step, lambda step: (learning_rate, learning_rate), _ignore)
        return self.parameters()

    def reset(self) -> None:
        """Set all parameters to zero."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()

    def parameters(self) -> Matrix:
        """Weight and bias, (num_features + 1,)."""
        parameters = torch.cat([parameter.detach().view(-1) for parameter in self.model.parameters()])
        return np.asarray(parameters.cpu(), dtype=np.float64)


def _ignore(batch: Batch, squared_error: Tensor) -> bool:
    return False
