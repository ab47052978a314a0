"""Do all ranks start from the same state, train like one process, and end at the closed-form solution?"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch import Tensor

from torchreg.core.model import make_model
from torchreg.data.table import Table
from torchreg.distributed.communicator import Communicator
from torchreg.runs.config import TrainConfig
from torchreg.runs.environment import versions
from torchreg.runs.forecast import percent
from torchreg.runs.result import Result
from torchreg.runs.run import Seams, to_device, train
from torchreg.runs.setup import RunState, prepare
from torchreg.verification.checks import Check, agree


def training_checks(communicator: Communicator, seams: Seams, *, quick: bool) -> Iterator[Check]:
    """Short trainings on the synthetic data; their records are written to a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="torchreg-verify-") as runs_dir:
        base = TrainConfig(
            num_rows=max(551, 4 * communicator.world_size + 1),  # odd: two equal batches leave one sample
            base_learning_rate=(0.02, 0.03),
            lr_scaling="none",
            dtype="float64" if communicator.device.type == "cpu" else "float32",
            runs_dir=runs_dir,
            name="verify",
            overwrite=True,
        )
        yield from _initial_state(communicator, seams, base)
        yield from _invariance(communicator, seams, base)
        if quick:
            base = replace(base, optimizer="manual", sync="mpi" if communicator.over_mpi else "allreduce")
        yield from _closed_form(communicator, seams, base)


def _initial_state(communicator: Communicator, seams: Seams, config: TrainConfig) -> Iterator[Check]:
    table: Table | None = None

    def prepare_on_main() -> RunState:
        nonlocal table
        state, table = prepare(config, communicator.world_size)
        return state

    state = communicator.from_main(prepare_on_main)
    x, y = to_device(table, state, communicator)
    model = seams.model(make_model(*state.start, device=communicator.device, dtype=x.dtype))
    own = {
        "data": _digest(_bytes(x) + _bytes(y)),
        "parameters": _digest(b"".join(map(_bytes, model.parameters()))),
        "configuration": _digest(json.dumps([asdict(replace(config, runs_dir="")), state.run_signature]).encode()),
        "versions": json.dumps(versions()),
    }
    main = communicator.gather(own)[0]
    for name, value in own.items():
        error = None if value == main[name] else f"{value} here and {main[name]} on rank 0"
        measured = f"equal on {communicator.world_size}"
        yield agree(communicator, "initial state", name, error, measured, "equal on all ranks")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().numpy().tobytes()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _invariance(communicator: Communicator, seams: Seams, base: TrainConfig) -> Iterator[Check]:
    """Each combination against one process, over an epoch and more of two large batches and one of a single sample.

    So shards are uneven, all but one are empty in the last batch, which is short, and gradients accumulate.
    """
    combinations: list[dict[str, Any]] = [
        {"optimizer": "sgd", "sync": "ddp"},
        {"optimizer": "manual", "sync": "allreduce"},
    ]
    if communicator.over_mpi:
        combinations += [{"optimizer": "sgd", "sync": "mpi"}, {"optimizer": "manual", "sync": "mpi"}]
    assert base.num_rows
    hard = replace(base, global_batch_size=(base.num_rows - 1) // 2, micro_batch_size=20, max_steps=4)
    for reduction in ("fast", "reproducible"):
        tolerance = 0.0 if reduction == "reproducible" else 1e-10 if base.dtype == "float64" else 1e-4
        expected = f"one process, to {tolerance:.0e}" if tolerance else "the bits of one process"
        alone: dict[str, Result] = {}
        for combination in combinations:
            config = replace(hard, reduction=reduction, **combination)
            together = train(config, communicator, seams=seams)
            if config.optimizer not in alone:
                own = replace(config, name="verify-alone", sync="auto")
                alone[config.optimizer] = train(own, communicator.alone())
            difference = _difference(together, alone[config.optimizer])
            yield agree(
                communicator,
                "invariance",
                f"{config.optimizer} × {config.sync}, {reduction}",
                None if difference <= tolerance else f"differs from one process by {difference:.2g}",
                f"off by {difference:.1e}" if difference else "the same bits",
                expected,
            )


def _difference(together: Result, alone: Result) -> float:
    """The largest relative difference of parameters and loss."""
    pairs = zip((*together.weight, together.bias, together.loss), (*alone.weight, alone.bias, alone.loss), strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def _closed_form(communicator: Communicator, seams: Seams, base: TrainConfig) -> Iterator[Check]:
    """Full-batch training converges to the closed form; on mini-batches it ends in the predicted 95 % interval."""
    rounding = 1e-12 if base.dtype == "float64" else 1e-5
    full = replace(base, sampling="full", base_learning_rate=(0.3, 0.3), max_steps=60)
    mini = replace(base, sampling="random", global_batch_size=64, base_learning_rate=(0.1, 0.1), max_steps=200)
    for name, config in (("full batch", full), ("mini-batches", mini)):
        curve = communicator.from_main(partial(prepare, config, 1))[0].forecast.curve
        assert curve
        low, high = curve.low[-1] - rounding, curve.high[-1] + rounding  # one number for a full batch
        excess = train(config, communicator, seams=seams).excess
        measured = "diverged" if excess is None else f"{percent(excess)} above the optimum"
        error = None if excess is not None and low <= excess <= high else measured
        expected = f"at most {percent(high)}" if low <= 0 else f"{percent(low)} to {percent(high)}"
        yield agree(communicator, "closed form", name, error, measured, expected)
