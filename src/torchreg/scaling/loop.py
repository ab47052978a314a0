"""The training loop of `train` without its metrics, to be timed, and to be checked afterwards."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg.batches import BatchPlan
from torchreg.model import make_model
from torchreg.optim import make_sgd
from torchreg.ordered import MicroBatches
from torchreg.rows import hand_rows, rows_of_steps
from torchreg.runtime import AnySync, Runtime
from torchreg.scaling.campaign import Setting
from torchreg.schedule import Schedule
from torchreg.theory import Matrix
from torchreg.train import TakeStep, make_step


@dataclass
class StepLoop:
    """The training loop of `train` without its metrics: rows, rates, step, as often as asked.

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
        take_step = make_step(sgd, sync, model, runtime if averaged else runtime.alone())
        x, y = hand_rows(x, y) if by_hand else (x, y)
        schedule = Schedule((rate, rate), 1.0, num_steps=1)  # constant
        return cls(plan, runtime.rank, x, y, model, take_step, schedule, by_hand)

    def take_steps(self, count: int) -> None:
        """Take so many steps; their losses stay on the device."""
        self._run(count, self.take_step)

    def take_rows(self, count: int) -> None:
        """Take the rows of so many steps, and do nothing with them."""
        nothing = torch.zeros((), device=self.x.device)
        self._run(count, lambda rates, micro_batches, step_rows: nothing)

    def _run(self, count: int, take_step: TakeStep) -> None:
        losses = []
        with torch.inference_mode() if self.by_hand else nullcontext():
            for block in self.plan.blocks(self.rank, self.num_steps, self.num_steps + count):
                for step, micro_batches, step_rows in rows_of_steps(block, self.x, self.y, copied=self.plan.ordered):
                    losses.append(take_step(self.schedule(step), micro_batches, step_rows))
        self.num_steps += count

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
