"""The updates: `torch.optim.SGD` with a rate for each parameter, and the update written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def make_sgd(model: nn.Linear, learning_rates: tuple[float, float]) -> torch.optim.SGD:
    """`torch.optim.SGD` with one group for the weight and one for the bias, each with its own rate."""
    groups = [{"params": [model.weight], "lr": learning_rates[0]}, {"params": [model.bias], "lr": learning_rates[1]}]
    return torch.optim.SGD(groups, foreach=False)  # two small tensors: the fused loops only add overhead


def set_learning_rates(optimizer: torch.optim.SGD, learning_rates: tuple[float, float]) -> None:
    """Give the weight's and the bias's group their rates of this step."""
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate


def descend(parameter: Tensor, gradient: Tensor, learning_rate: float) -> None:
    """parameter ← parameter − rate · gradient, in place: one step of gradient descent."""
    parameter.sub_(gradient, alpha=learning_rate)
