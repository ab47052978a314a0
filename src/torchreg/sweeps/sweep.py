"""Running the cells that are not finished, on all ranks or one on each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from torchreg.console import Reporter
from torchreg.core.checkpoint import read_regular
from torchreg.distributed.communicator import Communicator
from torchreg.distributed.rendezvous import AgreedError
from torchreg.runs.config import TrainConfig
from torchreg.runs.environment import machine_facts, provenance
from torchreg.runs.record import RECORD_FILE, SCHEMA_VERSION, create_run_folder, read_metrics, utc_now, write_json
from torchreg.runs.run import train
from torchreg.runs.setup import prepare
from torchreg.runs.stopping import StopRequest
from torchreg.sweeps.sweep_tables import (
    CURVES_FILE,
    SWEEP_FILE,
    TRIALS_FILE,
    TRIALS_FOLDER,
    curves_table,
    read_sweep,
    trials_table,
)
from torchreg.sweeps.trials import Cell

_NOT_COMPARED = (  # no number depends on them
    "name", "runs_dir", "overwrite", "distributed", "timeout_s", "plot",
    "resume", "checkpoint_every", "checkpoint_every_s", "keep_checkpoints", "time_limit_s",
)  # fmt: skip


def run_sweep(
    kind: Literal["batch", "lr-scaling"],
    config: TrainConfig,
    make_cells: Callable[[], list[Cell]],
    communicator: Communicator,
    reporter: Reporter,
    stop: StopRequest | None = None,
    *,
    farm: bool = False,
) -> Path | None:
    """Run what is not finished yet, one cell after the other on all ranks, or with `farm` one cell on each rank.

    Leaves the tables and returns the sweep's folder; None where `stop` was due before all cells were run. Raises
    `ValueError`, on every rank, for what cannot work, and where the folder holds cells of another configuration or
    other data.
    """
    started = utc_now()
    workers = communicator.alone() if farm else communicator
    folder = Path(config.runs_dir) / (config.name or f"sweep-{kind}")

    def begin() -> tuple[int, list[Cell]]:
        cells = make_cells()
        for some in {cell.config.global_batch_size: cell.config for cell in cells}.values():
            _, table = prepare(some, workers.world_size)  # tells bad input before the first run
        _refuse_another_kind(folder, kind, overwrite=config.overwrite)
        states = [_is_finished(folder, cell, table.fingerprint(), overwrite=config.overwrite) for cell in cells]
        create_run_folder(config.runs_dir, folder.name, "sweep", overwrite=True)
        content = {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "config": asdict(config),
            "trials": [{"name": cell.name, "multiplier": cell.multiplier} for cell in cells],
            "machine_facts": machine_facts(),
            "provenance": provenance(started),
        }
        write_json(folder / SWEEP_FILE, content)
        return len(cells), [cell for cell, finished in zip(cells, states, strict=True) if not finished]

    num_trials, pending = communicator.from_main(begin)
    reporter.say(f"sweep        {num_trials} runs, {num_trials - len(pending)} of them finished before")
    is_stopped = False
    for done, cell in enumerate(communicator.deal(pending) if farm else pending, start=1):
        try:
            result = train(replace(cell.config, runs_dir=str(folder / TRIALS_FOLDER)), workers, stop=stop)
        except AgreedError as error:
            if farm and communicator.world_size > 1:  # the other ranks know nothing of it, so it has to end them
                raise ValueError(str(error)) from error
            raise
        is_stopped = result.stopped_by == "request"
        if is_stopped:
            break
        reporter.progress(done, len(pending), result.loss)
    is_stopped = any(communicator.gather(is_stopped))
    reporter.close()
    if is_stopped:
        return None
    if communicator.is_main:
        trials_table(folder).to_csv(folder / TRIALS_FILE, index=False)
        curves_table(folder).to_csv(folder / CURVES_FILE, index=False)
    communicator.barrier()
    return folder


def _refuse_another_kind(folder: Path, kind: str, *, overwrite: bool) -> None:
    try:
        before = read_sweep(folder)["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if before != kind and not overwrite:
        raise ValueError(
            f"name is {folder.name!r}, and {folder} is a {before} sweep, whose tables a {kind} sweep would replace: "
            "choose another --name, or replace them with --overwrite"
        )


def _is_finished(folder: Path, cell: Cell, fingerprint: str, *, overwrite: bool) -> bool:
    """Whether the cell's record and metrics are there; unreadable ones are as good as none."""
    path = folder / TRIALS_FOLDER / cell.name / RECORD_FILE
    try:
        record = json.loads(read_regular(path))
        before, data = record["config"], record["derived"]["data_fingerprint"]
        read_metrics(path.parent)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    now = json.loads(json.dumps(asdict(cell.config)))
    before = {**asdict(TrainConfig()), **before}  # fields that are newer than the record
    differs = [f"{key} was {before.get(key)} and is {now[key]}" for key in now if key not in _NOT_COMPARED
               and before.get(key) != now[key]]  # fmt: skip
    if data != fingerprint:
        differs.append("the data's fingerprint is another")
    if differs and not overwrite:
        raise ValueError(
            f"name is {folder.name!r}, and {path.parent} is a finished run of another configuration ({differs[0]}): "
            "choose another --name, or run all cells again with --overwrite"
        )
    return not differs and not overwrite
