"""Do all ranks start alike, train like one, and end at the right answer?"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from torchreg.data.table import Table
from torchreg.distributed.communicator import Communicator
from torchreg.runs.config import TrainConfig
from torchreg.runs.environment import versions
from torchreg.runs.forecast import percent
from torchreg.runs.result import Result
from torchreg.runs.rows import place
from torchreg.runs.run import train
from torchreg.runs.setup import RunState, prepare
from torchreg.verification.checks import Check, agree

_START, _INVARIANCE, _ANSWER = "same start", "invariance", "right answer"
_LEARNING_RATES = (0.02, 0.03)


def training_checks(communicator: Communicator, *, quick: bool) -> Iterator[Check]:
    """Short trainings on the built-in data; their records go to a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="torchreg-verify-") as runs_dir:
        base = TrainConfig(
            num_rows=max(551, 4 * communicator.world_size + 1),  # odd: two equal batches leave one row
            base_learning_rate=_LEARNING_RATES,
            lr_scaling="none",
            dtype="float64" if communicator.device.type == "cpu" else "float32",
            runs_dir=runs_dir,
            name="verify",
            overwrite=True,
        )
        yield from _same_start(communicator, base)
        yield from _invariance(communicator, base)
        yield from _right_answer(
            communicator, replace(base, optimizer="manual", sync=communicator.quick_sync) if quick else base
        )


def _same_start(communicator: Communicator, config: TrainConfig) -> Iterator[Check]:
    kept: list[Table] = []

    def prepare_on_main() -> RunState:
        state, table = prepare(config, communicator.world_size)
        kept.append(table)
        return state

    state = communicator.from_main(prepare_on_main)
    x, y, model = place(kept[0] if kept else None, state, communicator, _dtype(config))
    mine = {
        "rows": _digest(x.cpu().numpy().tobytes() + y.cpu().numpy().tobytes()),
        "parameters": _digest(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())),
        "configuration": _digest(json.dumps([asdict(replace(config, runs_dir="")), state.run_signature]).encode()),
        "versions": json.dumps(versions()),
    }
    main = communicator.gather(mine)[0]
    for what, digest in mine.items():
        problem = None if digest == main[what] else f"{digest} here and {main[what]} on rank 0"
        yield agree(communicator, _START, what, problem, f"equal on {communicator.world_size}", "equal on all ranks")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _dtype(config: TrainConfig) -> torch.dtype:
    return torch.float64 if config.dtype == "float64" else torch.float32


def _invariance(communicator: Communicator, base: TrainConfig) -> Iterator[Check]:
    """Each way to train, against one process, over an epoch and more of two large batches and one of a single row.

    So shares are uneven, all but one are empty in the last batch, which is short, and gradients accumulate.
    """
    ways: list[dict[str, Any]] = [{"optimizer": "sgd", "sync": "ddp"}, {"optimizer": "manual", "sync": "allreduce"}]
    if communicator.mpi_comm is not None and communicator.device.type == "cpu":
        ways += [{"optimizer": "sgd", "sync": "mpi"}, {"optimizer": "manual", "sync": "mpi"}]
    assert base.num_rows
    hard = replace(base, global_batch_size=(base.num_rows - 1) // 2, micro_batch_size=20, max_steps=4)
    for reduction in ("fast", "reproducible"):
        alone: dict[str, Result] = {}
        for way in ways:
            config = replace(hard, reduction=reduction, **way)
            together = train(config, communicator)
            if config.optimizer not in alone:
                own_folder = replace(config, name="verify-alone", sync="auto")
                alone[config.optimizer] = train(own_folder, communicator.alone())
            name = f"{way['optimizer']} × {way['sync']}, {reduction}"
            yield _compare(
                communicator, name, together, alone[config.optimizer], base, exactly=reduction == "reproducible"
            )


def _compare(
    communicator: Communicator, name: str, together: Result, alone: Result, base: TrainConfig, *, exactly: bool
) -> Check:
    largest = _difference(together, alone)
    tolerance = 0.0 if exactly else 1e-10 if base.dtype == "float64" else 1e-4
    problem = None if largest <= tolerance else f"differs from one process by {largest:.2g}"
    expected = "the bits of one process" if exactly else f"one process, to {tolerance:.0e}"
    measured = "the same bits" if largest == 0 else f"off by {largest:.1e}"
    return agree(communicator, _INVARIANCE, name, problem, measured, expected)


def _difference(together: Result, alone: Result) -> float:
    """The largest relative difference of parameters and loss."""
    pairs = zip((*together.weight, together.bias, together.loss), (*alone.weight, alone.bias, alone.loss), strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def _right_answer(communicator: Communicator, base: TrainConfig) -> Iterator[Check]:
    """Training on all rows contracts to the closed form; on batches it ends where 95 % of runs are predicted to."""
    rounding = 1e-12 if base.dtype == "float64" else 1e-5
    full = replace(base, sampling="full", base_learning_rate=(0.3, 0.3), max_steps=60)
    batches = replace(base, sampling="random", global_batch_size=64, base_learning_rate=(0.1, 0.1), max_steps=200)
    for name, config in (("all rows", full), ("batches", batches)):
        low, high = communicator.from_main(partial(_expected_end, config))
        low, high = low - rounding, high + rounding
        excess = train(config, communicator).excess
        told = "diverged" if excess is None else f"{percent(excess)} above the closed form"
        problem = None if excess is not None and low <= excess <= high else told
        expected = f"at most {percent(high)}" if low <= 0 else f"{percent(low)} to {percent(high)}"
        yield agree(communicator, _ANSWER, name, problem, told, expected)


def _expected_end(config: TrainConfig) -> tuple[float, float]:
    """Between which excess losses 95 % of runs are predicted to end; one number for a full batch."""
    curve = prepare(config, 1)[0].forecast.curve
    assert curve
    return curve.low[-1], curve.high[-1]
