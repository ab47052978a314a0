"""How a run begins: anew, from a checkpoint, or not at all because it is finished."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torchreg import checkpoint
from torchreg.checkpoint import Checkpoint
from torchreg.config import TrainConfig
from torchreg.data import Table
from torchreg.prepare import Prepared, prepare
from torchreg.record import CHECKPOINTS_FOLDER, CONFIG_FILE, RECORD_FILE, RunDirectory
from torchreg.result import Result, result_of_record


@dataclass(frozen=True)
class Beginning:
    """What every rank needs to begin. `told` are lines for a person; a `finished` run is not begun."""

    prepared: Prepared
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


def open_run(config: TrainConfig, world_size: int, dtype: str) -> Opened:
    """Prepare a run and its folder, on the main rank. Raises `ValueError` for what cannot work, and loses nothing.

    `dtype` is the precision that the configuration has on this device, which the run's numbers depend on.
    """
    prepared, table = prepare(config, world_size)
    prepared = replace(prepared, contract=prepared.contract | {"dtype": dtype})
    directory = RunDirectory(config.runs_dir, config.name, overwrite=config.overwrite, resume=config.resume == "auto")
    try:
        return Opened(_begin(config, prepared, directory), table, directory)
    except BaseException:
        directory.close()
        raise


def _begin(config: TrainConfig, prepared: Prepared, directory: RunDirectory) -> Beginning:
    told: list[str] = []
    saved = None
    if config.resume == "auto":
        if (directory.path / RECORD_FILE).is_file():
            finished = _finished(directory.path, prepared)
            told = [f"finished     {directory.path} is a finished run: nothing to do"]
            return Beginning(prepared, str(directory.path), None, finished, tuple(told))
        saved, refused = checkpoint.newest(
            directory.path / CHECKPOINTS_FOLDER, prepared.contract, lambda found: _lacks_metrics(found, directory)
        )
        told = [f"not used     {reason}" for reason in refused]
        if saved is None and refused:
            raise ValueError(
                f"resume is auto, and no checkpoint of {directory.path} can be gone on from ({refused[0]}): choose "
                "another --name, or begin anew with --overwrite"
            )
        told.append(
            f"resumed      after {saved.step} steps" if saved else "resumed      no checkpoint yet: from step 0"
        )
    if saved:
        directory.go_on(saved.progress["metrics_bytes"])
    else:
        directory.start()
    directory.write_json(CONFIG_FILE, asdict(config))
    return Beginning(prepared, str(directory.path), saved, None, tuple(told))


def _finished(run: Path, prepared: Prepared) -> Result:
    try:
        record = json.loads((run / RECORD_FILE).read_text(encoding="utf-8"))
        differs = checkpoint.differences(record["contract"], prepared.contract)
        result = result_of_record(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"resume is auto, and {run / RECORD_FILE} cannot be read: move the folder away") from error
    if differs:
        raise ValueError(
            f"resume is auto, and {run} is a finished run of another configuration ({differs}): choose another --name"
        )
    return result


def _lacks_metrics(saved: Checkpoint, directory: RunDirectory) -> str | None:
    num_bytes, sha256 = saved.progress["metrics_bytes"], saved.progress["metrics_sha256"]
    if directory.has_metrics(num_bytes, sha256):
        return None
    return f"the {num_bytes} bytes of metrics that were written before it are not there"
