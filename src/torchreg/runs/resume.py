"""Set up a run: start from scratch, resume from a checkpoint, or return the result of a finished run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torchreg.core import checkpoint
from torchreg.core.checkpoint import Checkpoint, read_regular
from torchreg.data.table import Table
from torchreg.runs.config import DEFAULT_EPOCHS, TrainConfig
from torchreg.runs.record import CHECKPOINTS_FOLDER, CONFIG_FILE, RECORD_FILE, RunDirectory, write_json
from torchreg.runs.result import Result, result_of_record
from torchreg.runs.setup import RunState, prepare


def open_run(
    config: TrainConfig, world_size: int, device_type: str, dtype: str
) -> tuple[RunState, Table, RunDirectory]:
    """Set up a run and its directory, on the main rank. Raises `ValueError` for what cannot work, and deletes nothing.

    `dtype` is the precision that the configuration has on this device. A run that is resumed with `auto` keeps its own.
    """
    state, table = prepare(config, world_size)
    directory = RunDirectory(config.run)
    try:
        state = replace(state, run_dir=str(directory.path), run_signature=state.run_signature | {"dtype": dtype})
        if config.run.resume == "auto":
            state = _resume(config, state, directory, device_type)
        if not state.finished:
            if state.checkpoint:
                directory.resume(state.checkpoint.progress["metrics_bytes"])
            else:
                directory.start()
            write_json(directory.path / CONFIG_FILE, asdict(config))
    except BaseException:
        directory.close()
        raise
    return state, table, directory


def _resume(config: TrainConfig, state: RunState, directory: RunDirectory, device_type: str) -> RunState:
    """The state with the result of a finished run, or with the newest checkpoint that can be used, if there is one."""
    run, num_steps = directory.path, state.schedule.num_steps
    finished = _finished(run, config, state)
    if finished and (finished.stopped_by != "steps" or finished.num_steps == num_steps):
        return replace(state, finished=finished, messages=(f"finished     {run} is a finished run: nothing to do",))
    saved, refused = checkpoint.newest(
        run / CHECKPOINTS_FOLDER,
        lambda found: _differences(found.run_signature, config, state) or _lacks_metrics(found, directory),
    )
    if not saved and (refused or finished):
        reason = f"resume is auto, and no checkpoint of {run} can be used{f' ({refused[0]})' if refused else ''}"
        raise ValueError(f"{reason}: choose another --name, or start from scratch with --overwrite")
    message = "resumed      no checkpoint yet: from scratch"
    if saved:
        _refuse_fewer_steps(saved.step, run, config, state)
        state = replace(state, checkpoint=saved, run_signature=dict(saved.run_signature))
        message = f"resumed      after {saved.step} steps"
        written_on = saved.progress["sessions"][-1]["device"]
        if written_on != device_type:
            message += f"; the checkpoint was written on {written_on}, and this run is on {device_type}, in "
            message += f"{saved.run_signature['dtype']} as before"
    return replace(state, messages=(*(f"not used     {reason}" for reason in refused), message))


def _finished(run: Path, config: TrainConfig, state: RunState) -> Result | None:
    path = run / RECORD_FILE
    if not path.exists():
        return None
    try:
        record = json.loads(read_regular(path))
        differs = _differences(record["run_signature"], config, state)
        result = result_of_record(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"resume is auto, and {path} cannot be read: move the folder away") from error
    if differs:
        reason = f"resume is auto, and {run} is a finished run of another configuration ({differs})"
        raise ValueError(f"{reason}: choose another --name")
    _refuse_fewer_steps(result.num_steps, run, config, state)
    return result


def _differences(before: Mapping[str, Any], config: TrainConfig, state: RunState) -> str | None:
    """What differs between the signatures of a run so far and now, and the field that causes it; None if nothing."""
    now, plan = state.run_signature, state.plan
    if config.run.dtype == "auto" and before.get("dtype") in ("float32", "float64"):
        now = now | {"dtype": before["dtype"]}
    differs = differences(before, now)
    if differs is None or before.get("decay") != config.optimizer.decay:
        return differs
    length = _length(config, state)
    if "num_steps was" in differs:
        differs += f", because {length}, and {config.optimizer.decay} decay depends on it: leave it as it was"
    if "decay_every was" in differs and config.optimizer.decay_every is None:
        differs += f", because {length}, and a third of it is the default: give --decay-every {before['decay_every']}"
    if "global_batch_size was" in differs and not config.batch.global_batch_size and plan.sampling != "full":
        differs += f", because local_batch_size is {plan.local_batch_size} on {plan.world_size} ranks"
    return differs


def _length(config: TrainConfig, state: RunState) -> str:
    """What decides the number of steps."""
    if config.run.max_steps == state.schedule.num_steps:
        return f"max_steps is {config.run.max_steps}"
    return f"epochs is {config.run.epochs or DEFAULT_EPOCHS:g}, which is {state.schedule.num_steps} steps"


def _refuse_fewer_steps(done: int, run: Path, config: TrainConfig, state: RunState) -> None:
    if done > state.schedule.num_steps:
        taken = f"{_length(config, state)}, and {run} has taken {done} already"
        raise ValueError(f"{taken}: ask for as many at least, or choose another --name")


def _lacks_metrics(saved: Checkpoint, directory: RunDirectory) -> str | None:
    num_bytes, sha256 = saved.progress["metrics_bytes"], saved.progress["metrics_sha256"]
    try:
        if hashlib.sha256(directory.first_metrics(num_bytes)).hexdigest() == sha256:
            return None
    except OSError as error:
        return f"its metrics cannot be read ({error.strerror})"
    return f"the {num_bytes} bytes of metrics that were written before it are not there"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs between two run signatures, as a message; None if nothing does."""
    plain = json.loads(json.dumps(dict(now)))
    keys = sorted(key for key in before.keys() | plain.keys() if before.get(key) != plain.get(key))
    return "; ".join(f"{key} was {before.get(key)} and is {plain.get(key)}" for key in keys) or None
