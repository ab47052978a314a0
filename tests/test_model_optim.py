"""If the hand-written gradient or update is wrong, `manual` and `sgd` teach two different things."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchreg.core.optim import descend, make_sgd

from torchreg.core.model import WeightAndBias, add_gradient, make_model, squared_error, with_constant
from torchreg.core.schedule import Schedule, lr_scale

DTYPES = (torch.float32, torch.float64)


@st.composite
def problems(draw):
    rows, features = draw(st.integers(0, 40)), draw(st.integers(1, 6))
    values = hnp.arrays(np.float64, (rows + 1, features + 1), elements=st.floats(-10, 10, width=32))
    table = torch.from_numpy(draw(values)).to(draw(st.sampled_from(DTYPES)))
    model = make_model(table[0, :-1], float(table[0, -1]), dtype=table.dtype)
    return model, table[1:, :-1], table[1:, -1:]


def close(a, b, dtype, scale):
    tolerance = (1e-4 if dtype == torch.float32 else 1e-12) * max(1.0, scale)
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@given(problem=problems())
def test_hand_written_gradient_is_autograds(problem):
    model, x, y = problem
    theta = torch.cat([model.weight.detach()[0], model.bias.detach()])
    gradient = WeightAndBias(torch.zeros_like(theta))
    error = add_gradient(theta, with_constant(x), y[:, 0], gradient.flat)
    loss = squared_error(model(x), y)
    loss.backward()
    scale = loss.item() + 1000 * len(x)
    close(error, loss.detach(), x.dtype, scale)
    close(2 * gradient.weight, model.weight.grad[0], x.dtype, scale)
    close(2 * gradient.bias, model.bias.grad, x.dtype, scale)


@given(problem=problems(), learning_rates=st.tuples(st.floats(1e-8, 1.0), st.floats(1e-8, 1.0)))
def test_hand_written_update_is_torchs_sgd(problem, learning_rates):
    model, x, y = problem
    theta = WeightAndBias(torch.cat([model.weight.detach()[0], model.bias.detach()]))
    gradient = WeightAndBias(torch.zeros_like(theta.flat))
    add_gradient(theta.flat, with_constant(x), y[:, 0], gradient.flat)
    descend(theta.weight, gradient.weight, 2 * learning_rates[0])
    descend(theta.bias, gradient.bias, 2 * learning_rates[1])
    optimizer = make_sgd(model, learning_rates)
    loss = squared_error(model(x), y)
    loss.backward()
    optimizer.step()
    scale = loss.item() + 1000 * len(x)
    close(theta.weight, model.weight.detach()[0], x.dtype, scale)
    close(theta.bias, model.bias.detach(), x.dtype, scale)


def test_gradient_of_two_rows_by_hand():
    # w = 2, b = 1; rows (1, 5) and (3, 4). Residuals 2·1+1−5 = −2 and 2·3+1−4 = 3.
    # Squared error 4 + 9 = 13; ½ ∂/∂w = 1·(−2) + 3·3 = 7; ½ ∂/∂b = −2 + 3 = 1.
    theta = torch.tensor([2.0, 1.0], dtype=torch.float64)
    a = torch.tensor([[1.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    gradient = torch.zeros(2, dtype=torch.float64)
    assert add_gradient(theta, a, torch.tensor([5.0, 4.0], dtype=torch.float64), gradient).item() == 13
    assert gradient.tolist() == [7, 1]


def test_parameters_and_their_flat_buffer_are_the_same_memory():
    model = make_model([2.0, 3.0], 1.0)
    theta = WeightAndBias.of(model)
    theta.flat += 1
    assert [*model.weight[0].tolist(), model.bias.item()] == [3, 4, 2]


def test_lr_scale_at_four_times_the_reference():
    assert [lr_scale(rule, 256, 64) for rule in ("linear", "sqrt", "none")] == [4, 2, 1]


def test_warm_up_goes_from_base_to_scaled():
    schedule = Schedule((0.1, 0.2), 4.0, num_steps=10, warmup_steps=2)
    # factor 1, then (1 + 4) / 2 = 2.5, then 4.
    assert [schedule(step) for step in (0, 1, 2, 9)] == [
        pytest.approx(pair) for pair in ((0.1, 0.2), (0.25, 0.5), (0.4, 0.8), (0.4, 0.8))
    ]


@pytest.mark.parametrize(
    ("decay", "middle", "last"),
    [
        ("constant", 1.0, 1.0),
        ("linear", 0.55, 0.1),  # halfway from 1 to the floor 0.1
        ("cosine", 0.55, 0.1),  # cos(π/2) = 0: halfway too
        ("step", 0.5, 0.25),  # a half every five steps: steps 0–4, 5–9, 10
    ],
)
def test_decay(decay, middle, last):
    schedule = Schedule((1.0, 1.0), 1.0, 11, decay=decay, decay_to=0.1, decay_factor=0.5, decay_every=5)
    assert schedule(0) == (1.0, 1.0)
    assert schedule(5) == pytest.approx((middle, middle))
    assert schedule(10) == pytest.approx((last, last))


@given(
    decay=st.sampled_from(["constant", "linear", "cosine", "step"]),
    num_steps=st.integers(1, 50),
    warmup=st.integers(0, 60),
    scale=st.floats(0.1, 50),
)
def test_rates_stay_between_zero_and_the_larger_of_base_and_scaled(decay, num_steps, warmup, scale):
    schedule = Schedule((1.0, 1.0), scale, num_steps, warmup_steps=warmup, decay=decay)
    for step in range(num_steps):
        learning_rate, _ = schedule(step)
        assert math.isfinite(learning_rate)
        assert -1e-12 <= learning_rate <= max(1.0, scale) * (1 + 1e-12)
