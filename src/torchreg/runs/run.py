"""The program in one read: one step, one loop, and what is told at the end.

`sgd_step` and `manual_step` are the algorithm. `train` puts rows, rates and a model around them; everything that
was decided before the first step is in `prepare`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchreg.console import Reporter, Silent
from torchreg.core.batches import BatchPlan
from torchreg.core.model import WeightAndBias, add_gradient, squared_error
from torchreg.core.optim import descend, make_sgd, set_learning_rates
from torchreg.core.schedule import Schedule
from torchreg.data.table import Table
from torchreg.distributed.communicator import AddOverRanks, AnySync, Communicator, init_distributed
from torchreg.distributed.ordered import OrderedGradients, OrderedSum
from torchreg.runs.config import TrainConfig
from torchreg.runs.logger import Metrics
from torchreg.runs.ordered import MicroBatches, ordered_gradient, ordered_sgd_step
from torchreg.runs.record import RunDirectory, utc_now
from torchreg.runs.result import Result, make_record, make_result
from torchreg.runs.resume import Beginning, Opened, open_run
from torchreg.runs.rows import manual_rows, place, rows_of_steps, torch_dtype
from torchreg.runs.saving import Saver
from torchreg.runs.step_errors import accumulable
from torchreg.runs.stopping import StopRequest

STARTS_ON_FIRST_USE = {"cuda", "xpu", "mps"}
"""Devices whose libraries start when they are first used."""

TakeStep = Callable[[tuple[float, float], MicroBatches, int], Tensor]


def sgd_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: MicroBatches,
    num_samples: int,
    communicator: Communicator,
) -> Tensor:
    """One update of `torch.optim.SGD` from this rank's share of the step's rows.

    The loss of a step is the squared error summed over its `num_samples` rows on all ranks, divided by their number.
    Gradients are averaged over ranks, so each rank weighs its own sum by world_size / num_samples, and uneven and
    empty shares count exactly as much as they should. Returns this rank's squared error.
    """
    optimizer.zero_grad()
    total = None
    for number, (x, y) in enumerate(micro_batches, start=1):
        with communicator.averaging(model, now=number == len(micro_batches)):
            error = squared_error(model(x), y)
            (error * (communicator.world_size / num_samples)).backward()
        total = error.detach() if total is None else total + error.detach()
    optimizer.step()
    assert total is not None
    return total


def manual_step(
    theta: WeightAndBias,
    gradient: WeightAndBias,
    learning_rates: tuple[float, float],
    micro_batches: MicroBatches,
    num_samples: int,
    differentiate: Callable[[MicroBatches, int], Tensor],
    *,
    sequential: bool = False,
) -> Tensor:
    """The same update without autograd: the gradient as derived on paper, added up over ranks, applied.

    `differentiate` leaves half the gradient of the step's squared error, over all ranks, in `gradient`, and returns
    this rank's part of that error. `sequential` is the lesson's order: the weight first, then the bias with the
    gradient at the new weight. Returns this rank's squared error before the update.
    """
    error = differentiate(micro_batches, num_samples)
    descend(theta.weight, gradient.weight, 2 * learning_rates[0] / num_samples)
    if sequential:
        differentiate(micro_batches, num_samples)
    descend(theta.bias, gradient.bias, 2 * learning_rates[1] / num_samples)
    return error


def sum_gradient(
    theta: WeightAndBias, gradient: WeightAndBias, micro_batches: MicroBatches, all_reduce: AddOverRanks
) -> Tensor:
    """Half the gradient of the squared error of all ranks' micro-batches, in `gradient`; returns this rank's error."""
    gradient.flat.zero_()
    total = None
    for a, y in micro_batches:
        error = add_gradient(theta.flat, a, y, gradient.flat)
        total = error if total is None else total + error
    all_reduce()
    assert total is not None
    return total


def make_step(
    sgd: torch.optim.SGD | None,
    sync: AnySync,
    model: nn.Linear,
    communicator: Communicator,
    *,
    sequential: bool = False,
    ordered: BatchPlan | None = None,
) -> TakeStep:
    """The step of one of the four combinations: a function of the rates, this rank's micro-batches, the step's rows.

    Without `sgd` it is the manual one, which takes rows as `manual_rows` makes them. With a plan for `ordered` the bits
    do not depend on the world size.
    """
    if ordered:
        return _make_ordered_step(sgd, sync, model, communicator, ordered, sequential=sequential)
    if sgd is not None:
        averaged = communicator.wrap(model, sync)

        def take_sgd_step(learning_rates: tuple[float, float], micro_batches: MicroBatches, num_samples: int) -> Tensor:
            set_learning_rates(sgd, learning_rates)
            return sgd_step(averaged, sgd, micro_batches, num_samples, communicator)

        return take_sgd_step

    theta = WeightAndBias.of(model)
    gradient = WeightAndBias(torch.zeros_like(theta.flat))
    all_reduce = communicator.all_reduce(gradient.flat, sync)

    def differentiate(micro_batches: MicroBatches, num_samples: int) -> Tensor:
        return sum_gradient(theta, gradient, micro_batches, all_reduce)

    def take_manual_step(learning_rates: tuple[float, float], micro_batches: MicroBatches, num_samples: int) -> Tensor:
        return manual_step(
            theta, gradient, learning_rates, micro_batches, num_samples, differentiate, sequential=sequential
        )

    return take_manual_step


def _make_ordered_step(
    sgd: torch.optim.SGD | None,
    sync: AnySync,
    model: nn.Linear,
    communicator: Communicator,
    plan: BatchPlan,
    *,
    sequential: bool,
) -> TakeStep:
    _, most_pieces = plan.pieces(plan.global_batch_size, communicator.rank)

    def adder(buffer: Tensor) -> AddOverRanks:
        return communicator.all_reduce(buffer, "mpi" if sync == "mpi" else "allreduce")

    def part(error: Tensor) -> Tensor:
        """This rank's part of the error that every rank knows: the main rank takes it all."""
        return error if communicator.is_main else torch.zeros_like(error)

    if sgd is not None:
        gradients = OrderedGradients(list(model.parameters()), most_pieces, adder)
        averaged = communicator.wrap(model, sync, gradients)

        def take_sgd_step(learning_rates: tuple[float, float], micro_batches: MicroBatches, num_samples: int) -> Tensor:
            set_learning_rates(sgd, learning_rates)
            gradients.start(*plan.pieces(num_samples, communicator.rank))
            return part(ordered_sgd_step(averaged, sgd, micro_batches, num_samples, gradients, communicator))

        return take_sgd_step

    theta = WeightAndBias.of(model)
    gradient = WeightAndBias(torch.zeros_like(theta.flat))
    ordered = OrderedSum(len(theta.flat) + 1, most_pieces, theta.flat, adder)

    def differentiate(micro_batches: MicroBatches, num_samples: int) -> Tensor:
        ordered.start(*plan.pieces(num_samples, communicator.rank))
        return part(ordered_gradient(theta, gradient, micro_batches, ordered))

    def take_manual_step(learning_rates: tuple[float, float], micro_batches: MicroBatches, num_samples: int) -> Tensor:
        return manual_step(
            theta, gradient, learning_rates, micro_batches, num_samples, differentiate, sequential=sequential
        )

    return take_manual_step


class TakesNote(Protocol):
    """Takes this rank's squared error of each step, and says whether to stop after it: `Metrics`."""

    def note(self, step: int, error: Tensor, num_samples: int) -> bool: ...  # noqa: D102


class Saves(Protocol):
    """Saves after some of the steps: `Saver`."""

    def is_due(self, num_steps: int) -> bool: ...  # noqa: D102

    def save(self, num_steps: int) -> object: ...  # noqa: D102


def run_steps(
    plan: BatchPlan,
    schedule: Schedule,
    steps: range,
    rank: int,
    x: Tensor,
    y: Tensor,
    take_step: TakeStep,
    metrics: TakesNote,
    saver: Saves,
) -> None:
    """The loop: rows and rates of each step in, one update, its loss to the metrics, until they say stop."""
    for block in plan.blocks(rank, steps.start, steps.stop):
        for step, micro_batches, num_samples in rows_of_steps(block, x, y, copied=plan.ordered):
            error = take_step(schedule(step), micro_batches, num_samples)
            if metrics.note(step, error, num_samples):
                return
            if saver.is_due(step + 1):
                saver.save(step + 1)


def evaluate(model: nn.Linear, x: Tensor, y: Tensor, communicator: Communicator, plan: BatchPlan) -> float:
    """The loss on all rows: each rank takes its share of them, all ranks get the same number.

    In ordered reduction each rank takes them all, for the sake of the bits.
    """
    shard = slice(None) if plan.ordered else plan.shard(len(x), communicator.rank)
    with torch.no_grad():
        residual = accumulable(model(x[shard]) - y[shard])
        error = residual.square().sum().reshape(1)
    if not plan.ordered:
        communicator.all_reduce(error, communicator.quick_sync)()
    return error.item() / len(x)


def train(
    config: TrainConfig,
    communicator: Communicator | None = None,
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
) -> Result:
    """Train the model of a configuration, leave the run's records, and return the result.

    Opens a runtime of its own unless one is given. When any rank's `stop` is due, all save and return together, without
    a record: `--resume auto` goes on. Raises `ValueError`, on every rank, for what cannot work.
    """
    if communicator is None:
        with init_distributed(
            distributed=config.distributed,
            device=config.device,
            sync=config.effective_sync,
            dtype=config.dtype,
            timeout_s=config.timeout_s,
            run=asdict(config),
        ) as communicator:
            return train(config, communicator, reporter, stop)
    if reporter is None or not communicator.is_main:
        reporter = Silent()
    session = {
        "started_utc": utc_now(),
        "world_size": communicator.world_size,
        "launcher": communicator.launcher.name,
        "device": communicator.device.type,
    }
    reporter.say(communicator.describe())
    dtype = torch_dtype(config.dtype, communicator.device)

    kept: list[Opened] = []  # what only the main rank has

    def begin() -> Beginning:
        kept.append(
            open_run(config, communicator.world_size, communicator.device.type, str(dtype).removeprefix("torch."))
        )
        return kept[0].beginning

    try:
        beginning = communicator.from_main(begin)
        for told in beginning.told:
            reporter.say(told)
        if beginning.finished:
            return beginning.finished
        table, directory = (kept[0].table, kept[0].directory) if kept else (None, None)
        return _train(config, communicator, reporter, stop, beginning, table, directory, session)
    finally:
        if kept:
            kept[0].directory.close()


def _train(
    config: TrainConfig,
    communicator: Communicator,
    reporter: Reporter,
    stop: StopRequest | None,
    beginning: Beginning,
    table: Table | None,
    directory: RunDirectory | None,
    session: dict[str, Any],
) -> Result:
    """`train` from its beginning to its end; `table` and `directory` are the main rank's."""
    state, saved = beginning.state, beginning.checkpoint
    reporter.say(f"forecast     {state.forecast.message()}")
    for warning in state.warnings:
        reporter.warn(warning)

    sync = config.effective_sync
    dtype = torch_dtype(state.run_signature["dtype"], communicator.device)
    x, y, model = place(table, state, communicator, dtype)
    sgd = make_sgd(model, state.schedule(0)) if config.optimizer == "sgd" else None
    if saved:
        model.load_state_dict(saved.tensors["model"])
        if sgd:
            sgd.load_state_dict(saved.tensors["optimizer"])
    take_step = make_step(
        sgd,
        sync,
        model,
        communicator,
        sequential=config.update_order == "sequential",
        ordered=state.plan if state.plan.ordered else None,
    )
    metrics = Metrics(
        config,
        state,
        communicator,
        directory,
        reporter,
        stop,
        loss_on_all_rows=lambda: evaluate(model, x, y, communicator, state.plan),
    )
    session["first_step"] = saved.step if saved else 0
    sessions = [*(saved.progress["sessions"] if saved else []), session]
    saver = Saver(config, state.run_signature, directory, model, sgd, metrics, sessions)
    is_manual = config.optimizer == "manual"
    rows = manual_rows(x, y) if is_manual else (x, y)
    steps = range(saved.step if saved else 0, state.num_steps)
    _start_device(state.plan, *rows, take_step, communicator)
    metrics.start(saved.step if saved else 0, saved.progress if saved else None)
    with _threads(1 if state.plan.ordered else None):
        with torch.inference_mode() if is_manual else nullcontext():
            run_steps(state.plan, state.schedule, steps, communicator.rank, *rows, take_step, metrics, saver)
        metrics.stop()
    reporter.close()

    weight, bias = state.standardizer.parameters_out(model.weight.detach().cpu().double().numpy()[0], model.bias.item())
    result = make_result(state, weight, bias, metrics, beginning.run_dir)
    if result.stopped_by == "request":
        saver.save(result.num_steps)
    elif result.stopped_by == "steps":
        try:
            saver.save(result.num_steps)
        except OSError as error:
            reporter.warn(f"the run cannot be given more steps: its end cannot be saved ({error.strerror})")
    if result.stopped_by != "request" and directory:
        directory.finish(make_record(config, state, communicator, result, str(dtype), sessions))
    communicator.barrier()
    return result


def _start_device(plan: BatchPlan, x: Tensor, y: Tensor, take_step: TakeStep, communicator: Communicator) -> None:
    """Take two steps at a learning rate of 0: NCCL, cuBLAS and DDP start when first used, which is not training."""
    if communicator.device.type in STARTS_ON_FIRST_USE:
        for block in plan.blocks(communicator.rank, 0, 2):
            for _, micro_batches, num_samples in rows_of_steps(block, x, y, copied=plan.ordered):
                take_step((0.0, 0.0), micro_batches, num_samples)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute on so many threads of the CPU; a sum over rows is cut into as many parts, which changes its bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
