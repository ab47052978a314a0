"""Do all ranks start from the same state, train like one process, and end at the closed-form solution?"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

from torchreg.console import percent
from torchreg.core.model import make_model
from torchreg.distributed.communicator import Communicator
from torchreg.runs.config import TrainConfig
from torchreg.runs.environment import versions
from torchreg.runs.result import Result
from torchreg.runs.run import Seams, to_device, train
from torchreg.runs.setup import prepare
from torchreg.verification.checks import Check, agree


def training_checks(communicator: Communicator, seams: Seams, *, quick: bool) -> Iterator[Check]:
    """Short trainings on the synthetic data; their records are written to a temporary folder."""
    num_rows = max(551, 4 * communicator.world_size + 1)  # odd: two equal batches leave one sample
    with tempfile.TemporaryDirectory(prefix="torchreg-verify-") as runs_dir:
        base = TrainConfig.of(
            num_rows=num_rows, base_learning_rate=(0.02, 0.03), lr_scaling="none", runs_dir=runs_dir, name="verify",
            overwrite=True, dtype="float64" if communicator.device.type == "cpu" else "float32",
        )  # fmt: skip
        yield from _initial_state(communicator, seams, base)
        # Two large batches and one of a single sample are an epoch. So shards are uneven, all but one are empty in the
        # last batch, which is short, and gradients accumulate.
        hard = base.replace(global_batch_size=(num_rows - 1) // 2, micro_batch_size=20, max_steps=4)
        yield from _invariance(communicator, seams, hard)
        if quick:
            base = base.replace(optimizer="manual", sync="mpi" if communicator.over_mpi else "allreduce")
        yield from _closed_form(communicator, seams, base)


def _initial_state(communicator: Communicator, seams: Seams, config: TrainConfig) -> Iterator[Check]:
    state, table = communicator.from_main(partial(prepare, config, communicator.world_size))
    x, y = to_device(table if communicator.is_main else None, state, communicator)
    model = seams.model(make_model(*state.start, device=communicator.device, dtype=x.dtype))
    configuration = json.dumps([asdict(config.replace(runs_dir="")), state.run_signature])
    contents = {
        "data": [x.cpu().numpy().tobytes(), y.cpu().numpy().tobytes()],
        "parameters": [parameter.detach().cpu().numpy().tobytes() for parameter in model.parameters()],
        "configuration": [configuration.encode()],
    }
    own = {name: hashlib.sha256(b"".join(parts)).hexdigest()[:12] for name, parts in contents.items()}
    own["versions"] = json.dumps(versions())
    main = communicator.gather(own)[0]
    for name, value in own.items():
        error = None if value == main[name] else f"{value} here and {main[name]} on rank 0"
        measured = f"equal on {communicator.world_size}"
        yield agree(communicator, "initial state", name, error, measured, "equal on all")


def _invariance(communicator: Communicator, seams: Seams, base: TrainConfig) -> Iterator[Check]:
    combinations: list[tuple[Any, Any]] = [("sgd", "ddp"), ("manual", "allreduce")]
    if communicator.over_mpi:
        combinations += [("sgd", "mpi"), ("manual", "mpi")]
    fast = base.replace(reduction="fast"), 1e-10 if base.run.dtype == "float64" else 1e-4
    reproducible = base.replace(reduction="reproducible"), 0.0
    alone: dict[tuple[str, str], Result] = {}
    for (config, tolerance), (optimizer, sync) in product((fast, reproducible), combinations):
        config, reduction = config.replace(optimizer=optimizer, sync=sync), config.batch.reduction
        together = train(config, communicator, seams=seams)
        if (reduction, optimizer) not in alone:
            own = config.replace(name="verify-alone", sync="auto")
            alone[reduction, optimizer] = train(own, communicator.alone())
        one = alone[reduction, optimizer]
        pairs = zip((*together.weight, together.bias, together.loss), (*one.weight, one.bias, one.loss), strict=True)
        difference = max(abs(a - b) / abs(b) for a, b in pairs)
        error = None if difference <= tolerance else f"differs from one process by {difference:.2g}"
        measured = f"off by {difference:.1e}" if difference else "the same bits"
        area, expected = ("invariance", f"within {tolerance:.0e}") if tolerance else ("bit for bit", "the same bits")
        yield agree(communicator, area, f"{optimizer} × {sync}", error, measured, expected)


def _closed_form(communicator: Communicator, seams: Seams, base: TrainConfig) -> Iterator[Check]:
    """Full-batch training converges to the closed form; on mini-batches it ends in the predicted 95 % interval."""
    rounding = 1e-12 if base.run.dtype == "float64" else 1e-5
    full = base.replace(sampling="full", base_learning_rate=(0.3, 0.3), max_steps=60)
    mini = base.replace(sampling="random", global_batch_size=64, base_learning_rate=(0.1, 0.1), max_steps=200)
    for name, config in (("full batch", full), ("mini-batches", mini)):
        curve = communicator.from_main(partial(prepare, config, 1))[0].forecast.curve
        assert curve
        low, high = curve.low[-1] - rounding, curve.high[-1] + rounding
        excess = train(config, communicator, seams=seams).excess
        measured = "diverged" if excess is None else f"{percent(excess)} above"
        error = None if excess is not None and low <= excess <= high else measured
        expected = f"at most {percent(high)}" if low <= 0 else f"{percent(low)} to {percent(high)}"
        yield agree(communicator, "closed form", name, error, measured, expected)
