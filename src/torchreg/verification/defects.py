"""Injected defects of a stack, each a wrapper of what is passed to `train`: each must make the right check fail."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from torchreg.core.batches import Batch, BatchLoader, BatchPlan
from torchreg.core.train import LearningRates, Step
from torchreg.distributed.communicator import Communicator
from torchreg.runs.run import Seams

Defect = Literal["wrong-average", "duplicate-shard", "skewed-start", "stale-rank"]
DEFECTS: tuple[Defect, ...] = get_args(Defect)


def inject(defect: Defect | None, communicator: Communicator) -> tuple[Communicator, Seams]:
    """The communicator and the seams of a stack with this defect; on the last rank, unless all ranks have it."""
    if defect == "wrong-average":
        return WrongAverage(**vars(communicator)), Seams()
    is_last = communicator.rank == communicator.world_size - 1
    if defect is None or not is_last:
        return communicator, Seams()
    return communicator, {
        "duplicate-shard": Seams(loader=first_shard),
        "skewed-start": Seams(model=skew_bias),
        "stale-rank": Seams(step=partial(without_update, 2)),
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
            parameter.register_post_accumulate_grad_hook(_enlarge)
        return super().wrap(model)


def _enlarge(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(1.001)


def first_shard(plan: BatchPlan, rank: int, x: Tensor, y: Tensor) -> BatchLoader:
    """The batches of rank 0, on another rank."""
    return BatchLoader(plan, 0, x, y)


def skew_bias(model: nn.Linear) -> nn.Linear:
    """The model with another initial bias."""
    with torch.no_grad():
        model.bias.add_(1.0)
    return model


def without_update(missing: int, step: Step) -> Step:
    """A step that takes part in all reductions, but does not update the model in step number `missing`."""

    def stale_step(batch: Batch, learning_rates: LearningRates) -> Tensor:
        return step(batch, (0.0, 0.0) if batch.step == missing else learning_rates)

    return stale_step
