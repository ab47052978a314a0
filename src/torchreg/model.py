"""The model, its loss, and the gradient as derived on paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def make_model(
    weight: Tensor | list[float],
    bias: float,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> nn.Linear:
    """`nn.Linear(num_features, 1)` that starts at `weight` (num_features,) and `bias`."""
    start = torch.as_tensor(weight, dtype=dtype, device=device).reshape(1, -1)
    model = nn.Linear(start.shape[1], 1, device=device, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(start)
        model.bias.fill_(bias)
    return model


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over rows (rows, 1), a scalar; 0 for no rows."""
    return nn.functional.mse_loss(prediction, target, reduction="sum")


class Gradient:
    """Gradient of the weight (1, num_features) and of the bias (1,): two views of one flat buffer.

    One reduction of `flat` (num_features + 1,) then carries both.
    """

    def __init__(self, model: nn.Linear) -> None:
        self.flat = torch.zeros(model.in_features + 1, dtype=model.weight.dtype, device=model.weight.device)
        self.weight = self.flat[:-1].view(1, -1)
        self.bias = self.flat[-1:]

    def add(self, weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Add half the gradient of the squared error of the rows, and return that squared error.

        With the residual r = x w + b − y, the squared error Σ r² has ∂/∂w = 2 rᵀx and ∂/∂b = 2 Σ r; the factor 2
        is left to the caller, who scales anyway. `x` is (rows, num_features), `y` is (rows, 1).
        """
        residual = torch.addmm(bias, x, weight.T).sub_(y)
        self.weight.addmm_(residual.T, x)
        self.bias.add_(residual.sum())
        flat = residual.view(-1)
        return torch.dot(flat, flat)
