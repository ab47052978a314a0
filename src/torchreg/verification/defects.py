"""Defects that a stack may have, put in on purpose: each must make the right check fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args
from unittest.mock import patch

import torch
from torch import Tensor, nn

from torchreg.core import batches, model, optim
from torchreg.core.batches import BatchPlan
from torchreg.distributed.communicator import Communicator
from torchreg.runs import rows
from torchreg.runs import run as train

Defect = Literal["wrong-average", "duplicate-rows", "skewed-start", "stale-rank"]
DEFECTS: tuple[Defect, ...] = get_args(Defect)


@contextmanager
def injected(defect: Defect | None, communicator: Communicator) -> Iterator[None]:
    """Inside, the stack has the defect, and training, which knows nothing of it, goes wrong."""
    if defect is None:
        yield
        return
    put_in = {
        "wrong-average": _wrong_average,
        "duplicate-rows": _duplicate_rows,
        "skewed-start": _skewed_start,
        "stale-rank": _stale_rank,
    }
    with put_in[defect](communicator):
        yield


@contextmanager
def _wrong_average(_: Communicator) -> Iterator[None]:
    """Every sum over ranks comes out a thousandth too large, whoever makes it."""
    all_reduce, wrap = Communicator.all_reduce, Communicator.wrap

    def wrong_sum(self: Communicator, buffer: Tensor, *rest: Any) -> Callable[[], None]:
        add = all_reduce(self, buffer, *rest)

        def add_wrongly() -> None:
            add()
            if self.world_size > 1 and buffer.is_floating_point():
                buffer.mul_(1.001)

        return add_wrongly

    def wrong_wrap(self: Communicator, model: nn.Module, *rest: Any) -> nn.Module:
        wrapped = wrap(self, model, *rest)
        if self.world_size > 1:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(_enlarge)
        return wrapped

    with patch.object(Communicator, "all_reduce", wrong_sum), patch.object(Communicator, "wrap", wrong_wrap):
        yield


def _enlarge(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(1.001)


@contextmanager
def _duplicate_rows(_: Communicator) -> Iterator[None]:
    """The last rank trains on the first one's rows, and nobody on its own."""
    shard = BatchPlan.shard

    def wrong_shard(self: BatchPlan, num_rows: int, rank: int) -> slice:
        return shard(self, num_rows, 0 if rank == self.world_size - 1 else rank)

    batches._group_shape.cache_clear()
    with patch.object(BatchPlan, "shard", wrong_shard):
        yield
    batches._group_shape.cache_clear()


@contextmanager
def _skewed_start(communicator: Communicator) -> Iterator[None]:
    """The last rank starts from another model."""

    def wrong_model(*arguments: Any, **options: Any) -> nn.Linear:
        made = model.make_model(*arguments, **options)
        if communicator.rank == communicator.world_size - 1:
            with torch.no_grad():
                made.bias.add_(1.0)
        return made

    with patch.object(rows, "make_model", wrong_model):
        yield


@contextmanager
def _stale_rank(communicator: Communicator) -> Iterator[None]:
    """The last rank misses one update."""
    with ExitStack() as stack:
        if communicator.rank == communicator.world_size - 1:
            stack.enter_context(patch.object(train, "descend", _missing_one(optim.descend)))
            stack.enter_context(patch.object(torch.optim.SGD, "step", _missing_one(torch.optim.SGD.step)))
        yield


def _missing_one(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def missing_one(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return None if calls == 3 else function(*arguments, **options)

    return missing_one
