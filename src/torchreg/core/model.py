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


class WeightAndBias:
    """θ = (weight, bias), or its gradient, as one flat buffer (num_features + 1,), of which both are views.

    One reduction over ranks, and one product with rows a = (x, 1), then serve both.
    """

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.weight = flat[:-1]
        self.bias = flat[-1:]

    @classmethod
    def of(cls, model: nn.Linear) -> WeightAndBias:
        """The model's parameters, which become views of the new buffer: what changes one changes the other."""
        both = cls(torch.cat([model.weight.detach().view(-1), model.bias.detach()]))
        model.weight.data = both.weight.view(1, -1)
        model.bias.data = both.bias
        return both


def with_constant(x: Tensor) -> Tensor:
    """Rows a = (x, 1), (rows, num_features + 1), of x (rows, num_features)."""
    return torch.hstack([x, x.new_ones(len(x), 1)])


def add_gradient(theta: Tensor, a: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """Add half the gradient of the rows' squared error to `gradient`, and return that squared error.

    With the residual r = aθ − y the squared error is rᵀr, and its gradient 2 aᵀr; the factor 2 is left to the caller,
    who scales anyway. `a` is (rows, num_features + 1), `y` is (rows,), `theta` and `gradient` are (num_features + 1,).
    """
    residual = torch.addmv(y, a, theta, beta=-1)
    gradient.addmv_(a.T, residual)
    return torch.dot(residual, residual)
