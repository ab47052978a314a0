"""The training loop of `train` without what it writes, to be timed, and to be checked afterwards."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg.core.batches import BatchPlan
from torchreg.core.model import make_model
from torchreg.core.optim import make_sgd
from torchreg.core.schedule import Schedule
from torchreg.distributed.communicator import AnySync, Communicator
from torchreg.runs.ordered import MicroBatches
from torchreg.runs.rows import manual_rows
from torchreg.runs.run import TakesNote, TakeStep, make_step, run_steps
from torchreg.runs.step_errors import MOST_WAITING, StepErrors
from torchreg.scaling.campaign import Setting
from torchreg.theory import Matrix


class LossSums:
    """What training does with losses between two lines of metrics: it adds them up over ranks, many at once."""

    def __init__(self, communicator: Communicator) -> None:
        self._waiting = StepErrors(communicator)

    def note(self, step: int, error: Tensor, num_samples: int) -> bool:
        """Take the squared error of a step; there is never a reason to stop."""
        waiting = self._waiting
        waiting.errors.append(error)
        waiting.num_samples.append(num_samples)
        return len(waiting.errors) == MOST_WAITING and self._flush()

    def _flush(self) -> bool:
        self._waiting.add_up()
        self._waiting.clear()
        return False


class Nothing:
    """No metrics, and nothing to save."""

    def note(self, step: int, error: Tensor, num_samples: int) -> bool:
        """Let the squared error go."""
        return False

    def is_due(self, num_steps: int) -> bool:
        """Never."""
        return False

    def save(self, num_steps: int) -> None:
        """Save nothing."""


@dataclass
class StepLoop:
    """The training loop of `train`, as often as asked: rows, rates, steps, and their losses to `metrics`.

    Steps go on where the last call ended. `x` and `y` are as `take_step` wants them, see `manual_rows`.
    """

    plan: BatchPlan
    rank: int
    x: Tensor
    y: Tensor
    model: torch.nn.Linear
    take_step: TakeStep
    schedule: Schedule
    is_manual: bool
    metrics: TakesNote
    num_steps: int = 0

    @classmethod
    def of(
        cls,
        setting: Setting,
        x: Tensor,
        y: Tensor,
        learning_rate: float,
        communicator: Communicator,
        *,
        averaged: bool = True,
    ) -> StepLoop:
        """The loop of a setting, from zeros, on rows x (num_rows, num_features) and y (num_rows, 1).

        Without averaging, ranks train alone, on the same rows as with it.
        """
        plan = BatchPlan.derive(len(x), communicator.world_size, global_batch_size=setting.global_batch_size)
        model = make_model([0.0] * setting.num_features, 0.0, device=communicator.device, dtype=x.dtype)
        is_manual = setting.optimizer == "manual"
        sgd = None if is_manual else make_sgd(model, (learning_rate, learning_rate))
        sync: AnySync = ("allreduce" if is_manual else "ddp") if setting.sync == "none" else setting.sync
        together = communicator if averaged else communicator.alone()
        take_step = make_step(sgd, sync, model, together)
        x, y = manual_rows(x, y) if is_manual else (x, y)
        schedule = Schedule((learning_rate, learning_rate), 1.0, num_steps=1)  # constant
        return cls(plan, communicator.rank, x, y, model, take_step, schedule, is_manual, LossSums(together))

    def take_steps(self, count: int) -> None:
        """Take so many steps."""
        self._run(count, self.take_step, self.metrics)

    def take_rows(self, count: int) -> None:
        """Take the rows of so many steps, and do nothing with them."""
        nothing = torch.zeros((), device=self.x.device)
        self._run(count, lambda learning_rates, micro_batches, num_samples: nothing, Nothing())

    def _run(self, count: int, take_step: TakeStep, metrics: TakesNote) -> None:
        steps = range(self.num_steps, self.num_steps + count)
        with torch.inference_mode() if self.is_manual else nullcontext():
            run_steps(self.plan, self.schedule, steps, self.rank, self.x, self.y, take_step, metrics, Nothing())
        self.num_steps = steps.stop

    def parameters(self) -> Matrix:
        """Weight and bias (num_features + 1,)."""
        both = torch.cat([self.model.weight.detach()[0], self.model.bias.detach()])
        parameters: Matrix = both.cpu().double().numpy()
        return parameters

    def begin_at_zero(self) -> None:
        """Set all parameters to zero."""
        with torch.no_grad():
            self.model.weight.zero_()
            self.model.bias.zero_()

    def descend(self, num_steps: int, learning_rate: float) -> Matrix:
        """Full-batch gradient descent by the same step; the parameters at its end."""
        shard = self.plan.shard(len(self.x), self.rank)
        rows: MicroBatches = [(self.x[shard], self.y[shard])]
        with torch.inference_mode() if self.is_manual else nullcontext():
            for _ in range(num_steps):
                self.take_step((learning_rate, learning_rate), rows, len(self.x))
        return self.parameters()
