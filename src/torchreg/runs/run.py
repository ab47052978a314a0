"""One training run, from its configuration to its record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchreg.console import Reporter
from torchreg.core.batches import BatchLoader, BatchPlan
from torchreg.core.model import FlatParameters, make_model
from torchreg.core.reduction import Reduction
from torchreg.core.train import (
    Step,
    ddp_gradient,
    evaluate,
    fit,
    make_sgd,
    manual_samples,
    manual_step,
    reproducible_gradient,
    sgd_step,
)
from torchreg.data.table import Table
from torchreg.distributed.communicator import Communicator
from torchreg.distributed.init import init_distributed
from torchreg.distributed.rendezvous import AgreedError
from torchreg.distributed.stopping import StopRequest
from torchreg.runs.config import TrainConfig
from torchreg.runs.logger import Logger
from torchreg.runs.record import RunDirectory, utc_now
from torchreg.runs.result import Result, make_record, make_result
from torchreg.runs.resume import open_run
from torchreg.runs.saving import RunCheckpoints
from torchreg.runs.setup import RunState

STARTS_ON_FIRST_USE = {"cuda", "xpu", "mps"}  # devices


@dataclass(frozen=True)
class Seams:
    """What a caller may replace in a run: the instrument injects its defects here."""

    loader: Callable[[BatchPlan, int, Tensor, Tensor], BatchLoader] = BatchLoader
    model: Callable[[nn.Linear], nn.Linear] = lambda model: model
    """Takes the model with its initial parameters."""
    step: Callable[[Step], Step] = lambda step: step


def train(
    config: TrainConfig,
    communicator: Communicator | None = None,
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
    *,
    seams: Seams = Seams(),
) -> Result:
    """Train the model of a configuration, write the run's records, and return the result.

    Initialises the ranks unless a `communicator` is given. When any rank's `stop` is due, all save and return together,
    without a record: `--resume auto` continues. Raises `ValueError`, on every rank, for what cannot work.
    """
    if communicator is None:
        with init_ranks(config) as communicator:
            return train(config, communicator, reporter, stop, seams=seams)
    reporter = reporter if reporter and communicator.is_main else Reporter()
    reporter.info(communicator.describe())
    session = {"started_utc": utc_now(), "world_size": communicator.world_size}
    session |= {"launcher": communicator.launcher.name, "device": communicator.device.type}
    state, table, directory = set_up(config, communicator)
    with closing(directory) if directory else nullcontext():
        for message in state.messages:
            reporter.info(message)
        if state.finished:
            return state.finished
        reporter.info(f"forecast     {state.forecast.message()}")
        for warning in state.warnings:
            reporter.warn(warning)

        x, y = to_device(table, state, communicator)
        model = seams.model(make_model(*state.start, device=communicator.device, dtype=x.dtype))
        optimizer = make_sgd(model, state.schedule(0)) if config.optimizer.optimizer == "sgd" else None
        first_step, progress, sessions = 0, None, [session]
        if saved := state.checkpoint:
            model.load_state_dict(saved.tensors["model"])
            if optimizer:
                optimizer.load_state_dict(saved.tensors["optimizer"])
            first_step, progress, sessions = saved.step, saved.progress, [*saved.progress["sessions"], session]
        session["first_step"] = first_step
        carrier = communicator.using(config.optimizer.effective_sync)
        sequential = config.optimizer.update_order == "sequential"
        step = seams.step(make_step(model, optimizer, state.plan, carrier, sequential=sequential))
        loader = seams.loader(state.plan, communicator.rank, *((x, y) if optimizer else manual_samples(x, y)))
        loss_on_all_rows = partial(evaluate, model, x, y, state.plan, communicator)
        logger = Logger(config.run, state, communicator, directory, reporter, stop, loss_on_all_rows)
        checkpoints = RunCheckpoints(logger, model, optimizer, sessions)

        if communicator.device.type in STARTS_ON_FIRST_USE:
            for batch in loader.iterate(0, 2):  # NCCL, cuBLAS and DDP start when first used, which is not training
                step(batch, (0.0, 0.0))
        logger.start(first_step, progress)
        with single_thread(state.plan.reproducible), nullcontext() if optimizer else torch.inference_mode():
            fit(loader.iterate(first_step, state.schedule.num_steps), step, state.schedule, logger, checkpoints)
            logger.finish()
        reporter.close()

        result = make_result(state, model, logger)
        checkpoints.save_last()
        if directory and table and result.stopped_by != "request":
            directory.finish(make_record(config, state, table.num_dropped, communicator, result, sessions))
        communicator.barrier()
    return result


def init_ranks(config: TrainConfig) -> Communicator:
    """Initialise this rank among the others, which must have the same configuration."""
    run, sync, options = config.run, config.optimizer.effective_sync, config.options()
    return init_distributed(
        distributed=run.distributed, device=run.device, dtype=run.dtype, timeout_s=run.timeout_s, sync=sync, run=options
    )


def set_up(config: TrainConfig, communicator: Communicator) -> tuple[RunState, Table | None, RunDirectory | None]:
    """Set a run up on the main rank, which alone has the table and the directory, and send its state to all ranks."""
    dtype = str(torch_dtype(config.run.dtype, communicator.device)).removeprefix("torch.")
    main: list[Any] = [None, None]

    def on_main() -> RunState:
        state, *main[:] = open_run(config, communicator.world_size, communicator.device.type, dtype)
        return state

    state = communicator.from_main(on_main)
    return state, *main


def torch_dtype(choice: Literal["auto", "float32", "float64"], device: torch.device) -> torch.dtype:
    """The precision that a choice means on a device. Raises `AgreedError` for one that the device does not have."""
    if choice == "float64" and device.type == "mps":
        raise AgreedError("dtype is float64, which the mps device does not have: choose --dtype float32")
    return torch.float64 if choice == "float64" or (choice == "auto" and device.type == "cpu") else torch.float32


def to_device(table: Table | None, state: RunState, communicator: Communicator) -> tuple[Tensor, Tensor]:
    """The main rank's table on every device, as the model sees it: x (num_rows, num_features) and y (num_rows, 1)."""
    dtype = getattr(torch, state.run_signature["dtype"])
    rows = torch.empty(state.plan.num_rows, len(state.feature_names) + 1, dtype=dtype)
    if table:
        rows[:, :-1] = torch.from_numpy(state.standardizer.apply(table.features))
        rows[:, -1:] = torch.from_numpy(table.target)
    rows = communicator.broadcast(rows.to(communicator.device))
    x, y = (part.contiguous() for part in (rows[:, :-1], rows[:, -1:]))
    return x, y


def make_step(
    model: nn.Linear,
    optimizer: torch.optim.SGD | None,
    plan: BatchPlan,
    communicator: Communicator,
    *,
    sequential: bool = False,
) -> Step:
    """The step of an optimizer; without one the manual step, which takes samples as `manual_samples` arranges them."""
    like = torch.cat([parameter.detach().view(-1) for parameter in model.parameters()])
    reduction = Reduction(communicator, like, plan.num_micro_batches, reproducible=plan.reproducible)
    if optimizer is None:
        parameters, gradient = FlatParameters.of(model), FlatParameters(reduction.gradient)
        return partial(manual_step, parameters, gradient, reduction, sequential)
    if plan.reproducible:
        return partial(sgd_step, optimizer, partial(reproducible_gradient, model, reduction))
    return partial(sgd_step, optimizer, partial(ddp_gradient, communicator.wrap(model), communicator.world_size))


@contextmanager
def single_thread(is_wanted: bool) -> Iterator[None]:
    """Limit intra-op threads to one. The thread count changes the order of summation, and so the result's last bits."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1 if is_wanted else num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
