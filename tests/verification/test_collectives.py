"""If these fail, `torchreg verify` passes a stack whose collectives are wrong: models train on wrong gradients.

The ranks are threads of this process. Each defect is put around a function of torch.distributed, as a broken library
would have it.
"""

import threading
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from torchreg.verification import collectives
from torchreg.verification.checks import verdict

from .thread_ranks import on_threads

really_reduce, really_gather = dist.all_reduce, dist.all_gather
calls = threading.local()


def reduced(before=lambda tensor: None, after=lambda tensor: None, ops=(ReduceOp.SUM,)):
    """An all-reduce that changes what goes in, and what comes out, for these operations."""

    def all_reduce(tensor, op=ReduceOp.SUM, **options):
        if op not in ops:
            return really_reduce(tensor, op, **options)
        own = tensor.clone()
        replaced = before(tensor)
        if replaced is not None:
            tensor.copy_(replaced)
        really_reduce(tensor, op, **options)
        replaced = after(tensor) if after.__code__.co_argcount == 1 else after(tensor, own)
        if replaced is not None:
            tensor.copy_(replaced)
        return None

    return {"all_reduce": all_reduce}


def through_bfloat16(tensor, at_least=0):
    return tensor.bfloat16() if tensor.dtype == torch.float32 and tensor.numel() >= at_least else None


def every(number):
    def enlarge(tensor):
        calls.count = getattr(calls, "count", 0) + 1
        return None if calls.count % number or not tensor.is_floating_point() else 1.01 * tensor

    return enlarge


def repeat_the_result(tensor):
    """Every 20th sum is that of the call before."""
    calls.count = getattr(calls, "count", 0) + 1
    last, calls.last = getattr(calls, "last", None), tensor.clone()
    return last if calls.count % 20 == 0 and last is not None and last.shape == tensor.shape else None


def through(dtype, other):
    return lambda tensor: tensor.to(other) if tensor.dtype == dtype else None


def without_remainder(tensor, own):
    """What remains when the elements are divided among the ranks is not summed."""
    remainder = tensor.numel() % dist.get_world_size()
    if remainder and tensor.isfinite().all():
        tensor[-remainder:] = own[-remainder:]


def from_bytes(num_bytes):
    """The last element of longer messages is wrong."""

    def spoil(tensor):
        if tensor.nbytes > num_bytes:
            tensor[-1] += 0.001 if tensor.is_floating_point() else 1

    return spoil


def of_type(dtype):
    return lambda tensor: tensor + 1 if tensor.dtype == dtype else None


def on_last_rank(tensor):
    if tensor.dtype == torch.float64 and dist.get_rank() == dist.get_world_size() - 1:
        tensor += 1e-12


def own(tensor, before):
    return before


def replaced_by(name, change):
    """A function of torch.distributed that changes its output afterwards."""
    really = getattr(dist, name)

    def function(out, *others, **options):
        result = really(out, *others, **options)
        change(out)
        return result

    return {name: function}


def swap_first_and_last(tensors):
    first = tensors[0].clone()
    tensors[0].copy_(tensors[-1])
    tensors[-1].copy_(first)


def turn(out):
    out.copy_(out.roll(1))


def exchange(operations):
    """Send and receive, which torch's backend of threads has not, by all that is sent."""
    send, receive = operations
    sent = [torch.empty_like(send.tensor) for _ in range(dist.get_world_size())]
    really_gather(sent, send.tensor)
    receive.tensor.copy_(sent[receive.peer])
    return []


def receive_own(operations):
    send, receive = operations
    receive.tensor.copy_(send.tensor)
    return []


def not_supported(*_):
    raise RuntimeError("Backend threaded does not support alltoall")


SUM = "all-reduce"
GATHER_NAME = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SCATTER_NAME = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
DEFECTS = {
    "float32 through bfloat16": (reduced(through_bfloat16), {SUM, "repeated all-reduce"}),
    "the same from 1,000 elements on": (reduced(partial(through_bfloat16, at_least=1_000)), {SUM}),
    "every 50th sum × 1.01": (reduced(after=every(50)), {"repeated all-reduce"}),
    "every 500th sum × 1.01": (reduced(after=every(500)), {"repeated all-reduce"}),
    "a result twice": (reduced(after=repeat_the_result), {"repeated all-reduce"}),
    "float64 through float32": (reduced(through(torch.float64, torch.float32)), {SUM}),
    "int64 through float64": (reduced(through(torch.int64, torch.float64)), {SUM}),
    "without the remainder": (reduced(after=without_remainder), {SUM}),
    "above 512 KiB": (reduced(after=from_bytes(1 << 19)), {SUM}),
    "float16": (reduced(after=of_type(torch.float16)), {SUM}),
    "bfloat16": (reduced(after=of_type(torch.bfloat16)), {SUM}),
    "int32": (reduced(after=of_type(torch.int32)), {SUM}),
    "MAX of one's own": (reduced(after=own, ops=(ReduceOp.MAX,)), {"all-reduce MAX"}),
    "MIN of one's own": (reduced(after=own, ops=(ReduceOp.MIN,)), {"all-reduce MIN"}),
    "NaN dropped": (reduced(lambda tensor: tensor.nan_to_num(0.0, torch.inf, -torch.inf)), {"NaN and infinity"}),
    "infinity cut": (reduced(lambda tensor: tensor.nan_to_num(torch.nan)), {"NaN and infinity"}),
    "no barrier": ({"barrier": lambda: None}, {"barrier"}),
    "ranks differ by 1e-12": (reduced(after=on_last_rank), {SUM, "equal bits"}),
    "broadcast of another": (replaced_by("broadcast", turn), {"broadcast"}),
    "gather in another order": (replaced_by("all_gather", swap_first_and_last), {"gather"}),
    "all-gather": (replaced_by(GATHER_NAME, turn), {"all-gather"}),
    "reduce-scatter": (replaced_by(SCATTER_NAME, turn), {"reduce-scatter"}),
    "send and receive": ({"batch_isend_irecv": receive_own}, {"send and receive"}),
    "all-to-all": (replaced_by("all_to_all_single", turn), {"all-to-all"}),
}


@pytest.fixture
def checks_on(monkeypatch):
    """The checks of so many ranks, with functions of torch.distributed replaced; the times themselves are skipped."""
    monkeypatch.setattr(collectives, "time_repeats", lambda *_: [1e-6, 1e-6])
    monkeypatch.setattr(collectives, "_LONG_WITHIN_S", 0)
    monkeypatch.setattr(collectives, "_LATE_S", 0.03)

    def check(world_size, defect=(), *, quick=True, num_calls=100):
        monkeypatch.setattr(collectives, "_NUM_CALLS", num_calls)
        monkeypatch.setattr(collectives, "_QUICK_CALLS_WITHIN_S", 60)
        for name, function in ({"batch_isend_irecv": exchange} | dict(defect)).items():
            monkeypatch.setattr(dist, name, function)
        results = on_threads(
            world_size, lambda communicator: list(collectives.collective_checks(communicator, quick=quick))
        )
        assert all(one == results[0] for one in results), "the ranks agree"
        return results[0]

    return check


def failing(checks):
    return {check.name for check in checks if check.status == "FAIL"}


@pytest.mark.parametrize("world_size", [2, 3, 100, 2_240, 4_096])
def test_sums_are_exact_at_any_world_size_and_need_more_bits_than_a_smaller_type_has(world_size):
    for dtype, bits in collectives._BITS.items():
        values = collectives.summands(world_size, dtype)
        magnitudes = values.abs()
        assert magnitudes.sum(0).max() <= 2**bits, "in any order no partial sum has more bits"
        assert magnitudes.amax(1).min() > 0, "each rank adds something"
        # bfloat16 has 8 bits: a value of float32 has at least 11, also with the most ranks.
        assert magnitudes.max() >= 2 ** (bits // 2 - 1)
    collectives.summands.cache_clear()


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_right_collectives_pass(checks_on, world_size):
    checks = checks_on(world_size)
    assert {check.status for check in checks} == {"PASS"}
    assert "with messages to 1 MiB" in verdict(checks)


def test_a_collective_that_the_backend_lacks_is_skipped(checks_on):
    checks = checks_on(2, {"all_to_all_single": not_supported})
    (skipped,) = [check for check in checks if check.status != "PASS"]
    assert (skipped.status, skipped.name) == ("SKIP", "all-to-all")
    assert "does not support alltoall" in skipped.measured


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_fails_by_name(checks_on, defect, world_size):
    functions, rows = DEFECTS[defect]
    assert failing(checks_on(world_size, functions, num_calls=500 if "500th" in defect else 100)) == rows


def test_a_long_message_that_is_wrong_fails_by_name(checks_on, monkeypatch):
    all_of_them = collectives._operations
    monkeypatch.setattr(collectives, "_operations", lambda communicator: {SUM: all_of_them(communicator)[SUM]})
    assert failing(checks_on(2, reduced(after=from_bytes(1 << 25)), quick=False)) == {SUM}
