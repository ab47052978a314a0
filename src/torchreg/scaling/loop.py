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
from torchreg.distributed.communicator import AnySync, Runtime
from torchreg.runs.ordered import MicroBatches
from torchreg.runs.rows import hand_rows
from torchreg.runs.run import TakesNote, TakeStep, make_step, run_steps
from torchreg.runs.step_errors import MOST_WAITING, StepErrors
from torchreg.scaling.campaign import Setting
from torchreg.theory import Matrix


class LossSums:
    """What training does with losses between two lines of metrics: it adds them up over ranks, many at once."""

    def __init__(self, runtime: Runtime) -> None:
        self._waiting = StepErrors(runtime)

    def note(self, step: int, error: Tensor, step_rows: int) -> bool:
        """Take the squared error of a step; there is never a reason to stop."""
        waiting = self._waiting
        waiting.errors.append(error)
        waiting.step_rows.append(step_rows)
        return len(waiting.errors) == MOST_WAITING and self._flush()

    def _flush(self) -> bool:
        self._waiting.add_up()
        self._waiting.clear()
        return False


class Nothing:
    """No metrics, and nothing to save."""

    def note(self, step: int, error: Tensor, step_rows: int) -> bool:
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

    Steps go on where the last call ended. `x` and `y` are as `take_step` wants them, see `hand_rows`.
    """

    plan: BatchPlan
    rank: int
    x: Tensor
    y: Tensor
    model: torch.nn.Linear
    take_step: TakeStep
    schedule: Schedule
    by_hand: bool
    metrics: TakesNote
    num_steps: int = 0

    @classmethod
    def of(
        cls, setting: Setting, x: Tensor, y: Tensor, rate: float, runtime: Runtime, *, averaged: bool = True
    ) -> StepLoop:
        """The loop of a setting, from zeros, on rows x (num_rows, num_features) and y (num_rows, 1).

        Without averaging, ranks train alone, on the same rows as with it.
        """
        plan = BatchPlan.derive(len(x), runtime.world_size, global_batch_size=setting.global_batch_size)
        model = make_model([0.0] * setting.num_features, 0.0, device=runtime.device, dtype=x.dtype)
        by_hand = setting.optimizer == "hand"
        sgd = None if by_hand else make_sgd(model, (rate, rate))
        sync: AnySync = ("allreduce" if by_hand else "ddp") if setting.sync == "none" else setting.sync
        together = runtime if averaged else runtime.alone()
        take_step = make_step(sgd, sync, model, together)
        x, y = hand_rows(x, y) if by_hand else (x, y)
        schedule = Schedule((rate, rate), 1.0, num_steps=1)  # constant
        return cls(plan, runtime.rank, x, y, model, take_step, schedule, by_hand, LossSums(together))

    def take_steps(self, count: int) -> None:
        """Take so many steps."""
        self._run(count, self.take_step, self.metrics)

    def take_rows(self, count: int) -> None:
        """Take the rows of so many steps, and do nothing with them."""
        nothing = torch.zeros((), device=self.x.device)
        self._run(count, lambda rates, micro_batches, step_rows: nothing, Nothing())

    def _run(self, count: int, take_step: TakeStep, metrics: TakesNote) -> None:
        steps = range(self.num_steps, self.num_steps + count)
        with torch.inference_mode() if self.by_hand else nullcontext():
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

    def descend(self, num_steps: int, rate: float) -> Matrix:
        """Full-batch gradient descent by the same step; the parameters at its end."""
        share = self.plan.share(len(self.x), self.rank)
        rows: MicroBatches = [(self.x[share], self.y[share])]
        with torch.inference_mode() if self.by_hand else nullcontext():
            for _ in range(num_steps):
                self.take_step((rate, rate), rows, len(self.x))
        return self.parameters()
