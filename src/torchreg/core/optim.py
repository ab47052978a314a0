"""The updates: `torch.optim.SGD` with a rate for each parameter, and the update written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def make_sgd(model: nn.Linear, rates: tuple[float, float]) -> torch.optim.SGD:
    """`torch.optim.SGD` with one group for the weight and one for the bias, each with its own rate."""
    groups = [{"params": [model.weight], "lr": rates[0]}, {"params": [model.bias], "lr": rates[1]}]
    return torch.optim.SGD(groups, foreach=False)  # two small tensors: the fused loops only add overhead


def set_rates(optimizer: torch.optim.SGD, rates: tuple[float, float]) -> None:
    """Give the weight's and the bias's group their rates of this step."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def descend(parameter: Tensor, gradient: Tensor, rate: float) -> None:
    """parameter ← parameter − rate · gradient, in place: one step of gradient descent."""
    parameter.sub_(gradient, alpha=rate)
