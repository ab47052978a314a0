"""The model, its loss, and the gradient as derived on paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def make_model(
    weight: Sequence[float] | NDArray[np.float64],
    bias: float,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> nn.Linear:
    """`nn.Linear(num_features, 1)` with the initial parameters `weight` (num_features,) and `bias`."""
    model = nn.Linear(len(weight), 1, device=device, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(weight, dtype=dtype))
        model.bias.fill_(bias)
    return model


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over samples (samples, 1), a scalar; 0 for no samples."""
    return nn.functional.mse_loss(prediction, target, reduction="sum")


class FlatParameters:
    """θ = (weight, bias), or its gradient, as one flat buffer (num_features + 1,) of which both are views.

    One reduction over ranks, and one product with samples a = (x, 1), then serve both.
    """

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.weight = flat[:-1]
        self.bias = flat[-1:]

    @classmethod
    def of(cls, model: nn.Linear) -> FlatParameters:
        """The model's parameters, which become views of the new buffer: changing one changes the other."""
        parameters = cls(torch.cat([model.weight.detach().view(-1), model.bias.detach()]))
        model.weight.data = parameters.weight.view(1, -1)
        model.bias.data = parameters.bias
        return parameters


def add_half_gradient(theta: Tensor, a: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """Add half the gradient of the samples' squared error to `gradient`, and return that squared error.

    With the residual r = aθ − y the squared error is rᵀr, and its gradient 2 aᵀr; the caller applies the factor 2.
    `a` is (samples, num_features + 1), `y` (samples,), `theta` and `gradient` (num_features + 1,).
    """
    residual = torch.addmv(y, a, theta, beta=-1)
    gradient.addmv_(a.T, residual)
    return torch.dot(residual, residual)
