"""The program: one step, written twice, and the loop around it.

`sgd_step` uses autograd, `torch.optim.SGD` and DistributedDataParallel; `manual_step` writes out the gradient and the
update. Both follow the same trajectory at any world size, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import Protocol

import torch
from torch import Tensor, nn

from torchreg.core.batches import Batch, BatchPlan
from torchreg.core.model import FlatParameters, add_half_gradient, squared_error
from torchreg.core.reduction import Communicator, Reduction

LearningRates = tuple[float, ...]
"""Of each parameter group: of the weight and of the bias."""

Step = Callable[[Batch, LearningRates], Tensor]
"""One update of the model: `sgd_step` or `manual_step` with all but these arguments bound by `functools.partial`.

Returns this rank's part of the batch's squared error before the update."""


def make_sgd(model: nn.Linear, learning_rates: LearningRates) -> torch.optim.SGD:
    """`torch.optim.SGD` with one parameter group for the weight and one for the bias."""
    pairs = zip((model.weight, model.bias), learning_rates, strict=True)
    groups = [{"params": [parameter], "lr": learning_rate} for parameter, learning_rate in pairs]
    return torch.optim.SGD(groups, foreach=False)  # for two small tensors foreach only adds overhead


def sgd_step(
    optimizer: torch.optim.Optimizer,
    compute_gradient: Callable[[Batch], Tensor],
    batch: Batch,
    learning_rates: LearningRates,
) -> Tensor:
    """One update by an optimizer that has a parameter group for each learning rate.

    `compute_gradient` leaves the gradient of the loss in the parameters' `.grad` and returns this rank's part of the
    squared error: `ddp_gradient` or `reproducible_gradient`. The loss of a step is the squared error summed over its
    samples on all ranks, divided by their number.
    """
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate
    optimizer.zero_grad()
    own_error = compute_gradient(batch)
    optimizer.step()
    return own_error


def ddp_gradient(
    model: nn.Module, world_size: int, batch: Batch, loss: Callable[[Tensor, Tensor], Tensor] = squared_error
) -> Tensor:
    """The gradient by autograd, averaged over ranks by DistributedDataParallel in the last micro-batch's backward.

    An average over ranks: each rank weighs its own sum by world_size / num_samples, so that uneven and empty shards
    count exactly as much as they should. `loss(model(x), y)` is a sum over samples, 0 for none.
    """
    errors = []
    for number, (x, y) in enumerate(batch.micro_batches, start=1):
        # The forward belongs inside: DDP decides there whether the backward reduces.
        with nullcontext() if number == len(batch.micro_batches) else no_sync(model):
            error = loss(model(x), y)
            (error * (world_size / batch.num_samples)).backward()
        errors.append(error.detach())
    return reduce(torch.add, errors)


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """A context whose backward only accumulates: DistributedDataParallel reduces in a later one."""
    context: Callable[[], AbstractContextManager[None]] = getattr(model, "no_sync", nullcontext)
    return context()


def reproducible_gradient(model: nn.Module, reduction: Reduction, batch: Batch) -> Tensor:
    """The gradient by autograd, summed over micro-batches and ranks by a reproducible `Reduction` instead of DDP."""
    parameters = list(model.parameters())

    def add_gradient(x: Tensor, y: Tensor, part: Tensor) -> Tensor:
        error = squared_error(model(x), y)
        gradients = torch.autograd.grad(error / batch.num_samples, parameters)
        torch.cat([gradient.view(-1) for gradient in gradients], out=part)
        return error.detach()

    own_error = reduction.sum(batch, add_gradient)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, gradient in zip(parameters, reduction.gradient.split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)
    return own_error


def manual_step(
    parameters: FlatParameters,
    gradient: FlatParameters,
    reduction: Reduction,
    sequential: bool,
    batch: Batch,
    learning_rates: LearningRates,
) -> Tensor:
    """The same update without autograd: the gradient as derived on paper, summed over ranks, applied.

    `gradient` names the parts of `reduction.gradient`, which is half the gradient of the squared error. `sequential` is
    the lesson's order: the weight, then the bias with the gradient at the new weight. Samples are `manual_samples`.
    """
    add_gradient = partial(add_half_gradient, parameters.flat)
    own_error = reduction.sum(batch, add_gradient)
    parameters.weight.sub_(gradient.weight, alpha=2 * learning_rates[0] / batch.num_samples)
    if sequential:
        reduction.sum(batch, add_gradient)
    parameters.bias.sub_(gradient.bias, alpha=2 * learning_rates[1] / batch.num_samples)
    return own_error


def manual_samples(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The samples as on paper: a = (x, 1), (num_rows, num_features + 1), and y as a vector (num_rows,)."""
    return torch.hstack([x, x.new_ones(len(x), 1)]), y[:, 0].contiguous()


class Checkpoints(Protocol):
    """Saves the state after some of the steps. All ranks call it."""

    def due(self, num_steps: int) -> bool: ...  # noqa: D102

    def save(self, num_steps: int) -> object: ...  # noqa: D102


def fit(
    batches: Iterable[Batch],
    step: Step,
    schedule: Callable[[int], LearningRates],
    log: Callable[[Batch, Tensor], bool],
    checkpoints: Checkpoints | None = None,
) -> None:
    """The training loop: one update for each batch, until `log` returns True, on all ranks after the same batch.

    `log` takes this rank's part of each batch's squared error; `schedule` gives the learning rates of a step.
    """
    for batch in batches:
        own_error = step(batch, schedule(batch.step))
        if log(batch, own_error):
            break
        if checkpoints is not None and checkpoints.due(batch.step + 1):
            checkpoints.save(batch.step + 1)


def evaluate(model: nn.Module, x: Tensor, y: Tensor, plan: BatchPlan, communicator: Communicator) -> float:
    """The mean squared error on all rows, the same on every rank.

    Each rank takes its shard; in reproducible reduction all rows, so that the bits do not depend on the world size.
    """
    shard = slice(None) if plan.reproducible else plan.shard(len(x), communicator.rank)
    with torch.no_grad():
        total = in_float64(model(x[shard]) - y[shard]).square().sum().reshape(1)
    if not plan.reproducible:
        communicator.all_reduce(total)
    return total.item() / len(x)


def in_float64(values: Tensor) -> Tensor:
    """The values in float64, where the device has it: sums over many samples lose digits otherwise."""
    return values if values.device.type == "mps" else values.double()
