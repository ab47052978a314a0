"""The two steps with `--reduction reproducible`: the same arithmetic, added up in an order that no world size changes.

Each micro-batch's gradient is computed for itself, by the same operations on the same rows at every world size, and an
`OrderedSum` adds them up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchreg.core.model import WeightAndBias, add_gradient, squared_error
from torchreg.distributed.communicator import Communicator
from torchreg.distributed.ordered import OrderedGradients, OrderedSum

MicroBatches = Sequence[tuple[Tensor, Tensor]]
"""This rank's shard of a step: x (samples, num_features) and y (samples, 1), or those of `manual_rows`."""


def ordered_sgd_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: MicroBatches,
    num_samples: int,
    gradients: OrderedGradients,
    communicator: Communicator,
) -> Tensor:
    """`train.sgd_step` in order. Returns the squared error of the step's rows on all ranks."""
    parameters = list(model.parameters())
    optimizer.zero_grad()
    for number, (x, y) in enumerate(micro_batches, start=1):
        with communicator.averaging(model, now=number == len(micro_batches)):
            error = squared_error(model(x), y)
            gradients.expect(error if len(x) else None)
            (error / num_samples).backward()
        gradients.take(parameters)
    total = gradients.finish(parameters)
    optimizer.step()
    return total


def ordered_gradient(
    theta: WeightAndBias, gradient: WeightAndBias, micro_batches: MicroBatches, ordered: OrderedSum
) -> Tensor:
    """`train.sum_gradient` in order. Returns the squared error of the step's rows on all ranks."""
    for a, y in micro_batches:
        if len(y):
            part = torch.zeros_like(theta.flat)
            error = add_gradient(theta.flat, a, y, part)
            ordered.put([part, error])
    total = ordered.total()
    gradient.flat.copy_(total[:-1])
    return total[-1]
