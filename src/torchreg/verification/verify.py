"""All checks, in order: each builds on those before it. Injected defects: each must make the right check fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from torchreg.core.batches import BatchLoader
from torchreg.distributed.communicator import Communicator
from torchreg.runs.run import Seams
from torchreg.verification.checks import Check
from torchreg.verification.collectives import collective_checks
from torchreg.verification.file_checks import file_checks
from torchreg.verification.known_answers import training_checks
from torchreg.verification.topology import arithmetic_checks, topology_checks

Defect = Literal["wrong-average", "duplicate-shard", "skewed-start", "stale-rank"]


def verify(
    communicator: Communicator, runs_dir: str, *, quick: bool = False, defect: Defect | None = None
) -> Iterator[Check]:
    """Check a stack, on all ranks together; every rank gets the same rows.

    Checkpoints are written in `runs_dir`. `quick` skips long messages and some combinations. A `defect` is injected.
    """
    communicator, seams = inject(defect, communicator)
    yield from topology_checks(communicator)
    yield from arithmetic_checks(communicator)
    yield from collective_checks(communicator, quick=quick)
    yield from training_checks(communicator, seams, quick=quick)
    yield from file_checks(communicator, runs_dir)


def inject(defect: Defect | None, communicator: Communicator) -> tuple[Communicator, Seams]:
    """The communicator and the seams of a stack with this defect; on the last rank, unless all ranks have it."""
    if defect == "wrong-average":
        return WrongAverage(**vars(communicator)), Seams()
    if defect is None or communicator.rank < communicator.world_size - 1:
        return communicator, Seams()
    return communicator, {
        "duplicate-shard": Seams(loader=lambda plan, rank, x, y: BatchLoader(plan, 0, x, y)),
        "skewed-start": Seams(model=_skew_bias),
        # It takes part in all reductions, but does not update the model the third time.
        "stale-rank": Seams(step=lambda step: lambda batch, lr: step(batch, (0.0, 0.0) if batch.step == 2 else lr)),
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
