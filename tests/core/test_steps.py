"""If the manual gradient or update is wrong, `manual` and `sgd` teach two different things."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from types import SimpleNamespace

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchreg.core.batches import BatchLoader, BatchPlan
from torchreg.core.model import FlatParameters, add_half_gradient, make_model, squared_error
from torchreg.core.reduction import Reduction
from torchreg.core.schedule import Schedule, lr_scale
from torchreg.core.train import (
    ddp_gradient,
    evaluate,
    fit,
    make_sgd,
    manual_samples,
    manual_step,
    reproducible_gradient,
    sgd_step,
)

DTYPES = (torch.float32, torch.float64)


@st.composite
def tables(draw):
    rows, features = draw(st.integers(0, 40)), draw(st.integers(1, 6))
    values = hnp.arrays(np.float64, (rows + 1, features + 1), elements=st.floats(-10, 10, width=32))
    table = torch.from_numpy(draw(values)).to(draw(st.sampled_from(DTYPES)))
    model = make_model(table[0, :-1].tolist(), float(table[0, -1]), dtype=table.dtype)
    return model, table[1:, :-1], table[1:, -1:]


def close(a, b, dtype, scale):
    tolerance = (1e-4 if dtype == torch.float32 else 1e-12) * max(1.0, scale)
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@given(table=tables())
def test_manual_gradient_is_autograds(table):
    model, x, y = table
    theta = torch.cat([model.weight.detach()[0], model.bias.detach()])
    gradient = FlatParameters(torch.zeros_like(theta))
    error = add_half_gradient(theta, *manual_samples(x, y), gradient.flat)
    loss = squared_error(model(x), y)
    loss.backward()
    scale = loss.item() + 1000 * len(x)
    close(error, loss.detach(), x.dtype, scale)
    close(2 * gradient.weight, model.weight.grad[0], x.dtype, scale)
    close(2 * gradient.bias, model.bias.grad, x.dtype, scale)


class Alone:
    """The communicator of one rank."""

    rank, world_size = 0, 1

    def all_reduce(self, tensor):
        pass


class Threads:
    """Ranks that are threads of this process: sums are made in the order of ranks."""

    def __init__(self, world_size):
        self.world_size, self.barrier, self.tensors = world_size, Barrier(world_size, timeout=30), {}

    def communicator(self, rank):
        return SimpleNamespace(rank=rank, world_size=self.world_size, all_reduce=partial(self.all_reduce, rank))

    def all_reduce(self, rank, tensor):
        self.tensors[rank] = tensor.clone()
        self.barrier.wait()
        total = sum(self.tensors[other] for other in range(self.world_size))
        self.barrier.wait()
        tensor.copy_(total)


def trained(plan, x, y, kind, communicator, *, sequential=False):
    """The parameters and the squared errors after three epochs, and the loss on all rows."""
    model = make_model([0.0] * x.shape[1], 1.0, dtype=x.dtype)
    like = x.new_zeros(x.shape[1] + 1)
    reduction = Reduction(communicator, like, plan.num_micro_batches, reproducible=plan.reproducible)
    if kind == "manual":
        gradient = FlatParameters(reduction.gradient)
        parameters = FlatParameters.of(model)
        step = partial(manual_step, parameters, gradient, reduction, sequential)
    elif plan.reproducible:
        step = partial(sgd_step, make_sgd(model, (0.0, 0.0)), partial(reproducible_gradient, model, reduction))
    else:
        step = partial(sgd_step, make_sgd(model, (0.0, 0.0)), partial(ddp_gradient, model, communicator.world_size))
    errors = []
    tensors = manual_samples(x, y) if kind == "manual" else (x, y)
    loader = BatchLoader(plan, communicator.rank, *tensors)
    fit(loader.iterate(0, 3 * plan.steps_per_epoch), step, lambda _: (0.02, 0.03), lambda _, e: errors.append(e.item()))
    loss = evaluate(model, x, y, plan, communicator)
    return [*model.weight[0].tolist(), model.bias.item()], errors, loss


def on_threads(world_size, *arguments, **options):
    ranks = Threads(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        runs = [pool.submit(trained, *arguments, ranks.communicator(rank), **options) for rank in range(world_size)]
        return [run.result() for run in runs]


def samples(num_rows=53, num_features=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, num_features, dtype=torch.float64, generator=generator)
    return x, x.sum(1, keepdim=True) + torch.randn(num_rows, 1, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("world_size", [2, 5, 16])
@pytest.mark.parametrize(("kind", "sequential"), [("sgd", False), ("manual", False), ("manual", True)])
def test_reproducible_training_has_the_same_bits_on_any_number_of_ranks(kind, sequential, world_size):
    x, y = samples()
    plan = BatchPlan.derive(len(x), 1, global_batch_size=20, reproducible=True)
    alone = trained(plan, x, y, kind, Alone(), sequential=sequential)
    plan = BatchPlan.derive(len(x), world_size, global_batch_size=20, reproducible=True)
    ranks = on_threads(world_size, plan, x, y, kind, sequential=sequential)
    assert all(parameters == alone[0] and loss == alone[2] for parameters, _, loss in ranks)
    assert [sum(parts) for parts in zip(*(errors for _, errors, _ in ranks), strict=True)] == alone[1]


@pytest.mark.parametrize("world_size", [3, 30])
def test_fast_training_is_that_of_one_rank_to_rounding_with_ranks_that_have_no_samples_too(world_size):
    x, y = samples()
    alone = trained(BatchPlan.derive(len(x), 1, global_batch_size=20), x, y, "manual", Alone())
    plan = BatchPlan.derive(len(x), world_size, global_batch_size=20, micro_batch_size=3)
    for parameters, _, loss in on_threads(world_size, plan, x, y, "manual"):
        np.testing.assert_allclose([*parameters, loss], [*alone[0], alone[2]], rtol=1e-12)


def test_both_steps_follow_one_trajectory():
    x, y = samples()
    plan = BatchPlan.derive(len(x), 1, global_batch_size=20, micro_batch_size=7)
    manual, sgd = (trained(plan, x, y, kind, Alone()) for kind in ("manual", "sgd"))
    np.testing.assert_allclose(manual[0], sgd[0], rtol=1e-12)
    np.testing.assert_allclose(manual[1], sgd[1], rtol=1e-12)


def test_the_loop_stops_when_the_log_says_so_and_saves_when_a_checkpoint_is_due():
    x, y = samples()
    loader = BatchLoader(BatchPlan.derive(len(x), 1, global_batch_size=20), 0, x, y)
    taken, saved = [], []
    checkpoints = SimpleNamespace(due=lambda num_steps: num_steps % 2 == 0, save=saved.append)

    def step(batch, learning_rates):
        taken.append((batch.step, learning_rates))
        return torch.zeros(())

    fit(loader.iterate(3, 100), step, lambda number: (number, -number), lambda batch, _: batch.step == 8, checkpoints)
    assert taken == [(number, (number, -number)) for number in range(3, 9)]
    assert saved == [4, 6, 8]


def test_gradient_of_two_samples():
    # w = 2, b = 1; rows (1, 5) and (3, 4). Residuals 2·1+1−5 = −2 and 2·3+1−4 = 3.
    # Squared error 4 + 9 = 13; ½ ∂/∂w = 1·(−2) + 3·3 = 7; ½ ∂/∂b = −2 + 3 = 1.
    theta = torch.tensor([2.0, 1.0], dtype=torch.float64)
    a = torch.tensor([[1.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    gradient = torch.zeros(2, dtype=torch.float64)
    assert add_half_gradient(theta, a, torch.tensor([5.0, 4.0], dtype=torch.float64), gradient).item() == 13
    assert gradient.tolist() == [7, 1]


def test_parameters_and_their_flat_buffer_are_the_same_memory():
    model = make_model([2.0, 3.0], 1.0)
    theta = FlatParameters.of(model)
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
        ("linear", 0.55, 0.1),  # halfway from 1 to 0.1
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
def test_learning_rates_stay_between_zero_and_the_larger_of_base_and_scaled(decay, num_steps, warmup, scale):
    schedule = Schedule((1.0, 1.0), scale, num_steps, warmup_steps=warmup, decay=decay)
    for step in range(num_steps):
        learning_rate, _ = schedule(step)
        assert math.isfinite(learning_rate)
        assert -1e-12 <= learning_rate <= max(1.0, scale) * (1 + 1e-12)
