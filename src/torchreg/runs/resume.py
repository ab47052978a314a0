"""How a run begins: anew, from a checkpoint, or not at all because it is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torchreg.core import checkpoint
from torchreg.core.checkpoint import Checkpoint
from torchreg.core.files import read_regular
from torchreg.data.table import Table
from torchreg.runs.config import DEFAULT_EPOCHS, TrainConfig
from torchreg.runs.record import CHECKPOINTS_FOLDER, CONFIG_FILE, RECORD_FILE, RunDirectory
from torchreg.runs.result import Result, result_of_record
from torchreg.runs.setup import RunState, prepare


@dataclass(frozen=True)
class Beginning:
    """What every rank needs to begin. `told` are lines for a person; a `finished` run is not begun."""

    state: RunState
    run_dir: str
    checkpoint: Checkpoint | None
    finished: Result | None
    told: tuple[str, ...]


@dataclass(frozen=True)
class Opened:
    """A beginning, and what stays on the main rank."""

    beginning: Beginning
    table: Table
    directory: RunDirectory


def open_run(config: TrainConfig, world_size: int, device_type: str, dtype: str) -> Opened:
    """Prepare a run and its folder, on the main rank. Raises `ValueError` for what cannot work, and loses nothing.

    `dtype` is the precision that the configuration has on this device, which the run's numbers depend on. A run that
    is resumed with `auto` keeps the one it has.
    """
    state, table = prepare(config, world_size)
    state = replace(state, run_signature=state.run_signature | {"dtype": dtype})
    directory = RunDirectory(config.runs_dir, config.name, overwrite=config.overwrite, resume=config.resume == "auto")
    try:
        return Opened(_begin(config, state, directory, device_type), table, directory)
    except BaseException:
        directory.close()
        raise


def _begin(config: TrainConfig, state: RunState, directory: RunDirectory, device_type: str) -> Beginning:
    told: list[str] = []
    saved = None
    if config.resume == "auto":
        finished = _finished(directory.path, config, state)
        if finished and (finished.stopped_by != "steps" or finished.num_steps == state.num_steps):
            told = [f"finished     {directory.path} is a finished run: nothing to do"]
            return Beginning(state, str(directory.path), None, finished, tuple(told))
        saved, refused = checkpoint.newest(
            directory.path / CHECKPOINTS_FOLDER,
            lambda found: _differences(found.run_signature, config, state) or _lacks_metrics(found, directory),
        )
        told = [f"not used     {reason}" for reason in refused]
        if saved is None and (refused or finished):
            raise ValueError(
                f"resume is auto, and no checkpoint of {directory.path} can be gone on from"
                f"{f' ({refused[0]})' if refused else ''}: choose another --name, or begin anew with --overwrite"
            )
        told.append(_resumed(saved, device_type) if saved else "resumed      no checkpoint yet: from step 0")
    if saved:
        _refuse_fewer_steps(saved.step, directory.path, config, state)
        state = replace(state, run_signature=dict(saved.run_signature))
        directory.go_on(saved.progress["metrics_bytes"])
    else:
        directory.start()
    directory.write_json(CONFIG_FILE, asdict(config))
    return Beginning(state, str(directory.path), saved, None, tuple(told))


def _resumed(saved: Checkpoint, device_type: str) -> str:
    written_on = saved.progress["sessions"][-1]["device"]
    elsewhere = f"; the checkpoint was written on {written_on}, and this run is on {device_type}"
    precision = f", in {saved.run_signature['dtype']} as before"
    return f"resumed      after {saved.step} steps{elsewhere + precision if written_on != device_type else ''}"


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
        raise ValueError(
            f"resume is auto, and {run} is a finished run of another configuration ({differs}): choose another --name"
        )
    _refuse_fewer_steps(result.num_steps, run, config, state)
    return result


def _differences(before: Mapping[str, Any], config: TrainConfig, state: RunState) -> str | None:
    """What differs between the contract of a run so far and now, with the field that the user gave; None if nothing."""
    now, plan = state.run_signature, state.plan
    if config.dtype == "auto" and before.get("dtype") in ("float32", "float64"):
        now = now | {"dtype": before["dtype"]}
    differs = checkpoint.differences(before, now)
    if differs is None or before.get("decay") != config.decay:
        return differs
    length = _length(config, state)
    if "num_steps was" in differs:
        differs += f", because {length}, and {config.decay} decay depends on it: leave it as it was"
    if "decay_every was" in differs and config.decay_every is None:
        differs += f", because {length}, and a third of it is the default: give --decay-every {before['decay_every']}"
    if "global_batch_size was" in differs and config.global_batch_size is None and config.sampling != "full":
        differs += f", because local_batch_size is {plan.local_batch_size} on {plan.world_size} ranks"
    return differs


def _length(config: TrainConfig, state: RunState) -> str:
    """What decides the number of steps."""
    if config.max_steps == state.num_steps:
        return f"max_steps is {config.max_steps}"
    return f"epochs is {config.epochs or DEFAULT_EPOCHS:g}, which is {state.num_steps} steps"


def _refuse_fewer_steps(done: int, run: Path, config: TrainConfig, state: RunState) -> None:
    if done > state.num_steps:
        raise ValueError(
            f"{_length(config, state)}, and {run} has taken {done} already: ask for as many at least, or choose "
            "another --name"
        )


def _lacks_metrics(saved: Checkpoint, directory: RunDirectory) -> str | None:
    num_bytes, sha256 = saved.progress["metrics_bytes"], saved.progress["metrics_sha256"]
    try:
        if directory.has_metrics(num_bytes, sha256):
            return None
    except OSError as error:
        return f"its metrics cannot be read ({error.strerror})"
    return f"the {num_bytes} bytes of metrics that were written before it are not there"
