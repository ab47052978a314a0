"""Injected defects of a stack, each a wrapper of what is passed to `train`: each must make the right check fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from torchreg.core.batches import Batch, BatchLoader
from torchreg.core.train import LearningRates, Step
from torchreg.distributed.communicator import Communicator
from torchreg.runs.run import Seams

Defect = Literal["wrong-average", "duplicate-shard", "skewed-start", "stale-rank"]
DEFECTS: tuple[Defect, ...] = get_args(Defect)


def inject(defect: Defect | None, communicator: Communicator) -> tuple[Communicator, Seams]:
    """The communicator and the seams of a stack with this defect; on the last rank, unless all ranks have it."""
    if defect == "wrong-average":
        return WrongAverage(**vars(communicator)), Seams()
    if defect is None or communicator.rank < communicator.world_size - 1:
        return communicator, Seams()
    return communicator, {
        "duplicate-shard": Seams(loader=lambda plan, rank, x, y: BatchLoader(plan, 0, x, y)),
        "skewed-start": Seams(model=_skew_bias),
        "stale-rank": Seams(step=_without_third_update),
    }[defect]


@dataclass(frozen=True)
class WrongAverage(Communicator):
    """Every sum over ranks is a thousandth too large, through torch.distributed, DDP and MPI."""

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum, enlarged. Integers stay: they could not be multiplied."""
        super().all_reduce(tensor)
        if tensor.is_floating_point():
            tensor.mul_(1.001)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, whose gradients are enlarged."""
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: 1.001 * gradient)
        return super().wrap(model)


def _skew_bias(model: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        model.bias.add_(1.0)
    return model


def _without_third_update(step: Step) -> Step:
    """A step that takes part in all reductions, but does not update the model the third time."""

    def stale_step(batch: Batch, learning_rates: LearningRates) -> Tensor:
        return step(batch, (0.0, 0.0) if batch.step == 2 else learning_rates)

    return stale_step
