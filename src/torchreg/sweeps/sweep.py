"""Running the trials of a sweep that are not finished, on all ranks or one on each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torchreg.console import Reporter
from torchreg.core.checkpoint import read_regular
from torchreg.distributed.communicator import Communicator
from torchreg.distributed.rendezvous import AgreedError
from torchreg.runs import environment, record
from torchreg.runs.config import TrainConfig, from_json
from torchreg.runs.run import train
from torchreg.runs.setup import prepare
from torchreg.runs.stopping import StopRequest
from torchreg.sweeps import sweep_tables
from torchreg.sweeps.trials import Trial

_NOT_COMPARED = (  # no number depends on them
    "name", "runs_dir", "overwrite", "distributed", "timeout_s", "plot",
    "resume", "checkpoint_every", "checkpoint_every_s", "keep_checkpoints", "time_limit_s",
)  # fmt: skip
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)


def run_sweep(
    kind: str,
    config: TrainConfig,
    make_trials: Callable[[], list[Trial]],
    communicator: Communicator,
    reporter: Reporter,
    stop: StopRequest | None = None,
    *,
    farm: bool = False,
) -> Path | None:
    """Run the trials that are not finished, one after the other on all ranks, or with `farm` one on each rank.

    Writes the tables and returns the sweep's folder; None where `stop` was due before all trials were run. Raises
    `ValueError`, on every rank, for bad input, and where the folder holds trials of another configuration or other
    data.
    """
    started = record.utc_now()
    workers = communicator.alone() if farm else communicator
    folder = Path(config.run.runs_dir) / (config.run.name or f"sweep-{kind}")

    def begin() -> tuple[int, list[Trial]]:
        trials = make_trials()
        for some in {trial.config.batch.global_batch_size: trial.config for trial in trials}.values():
            _, table = prepare(some, workers.world_size)  # raises for bad input before the first run
        before = kind
        with contextlib.suppress(*_UNREADABLE):
            before = sweep_tables.read_sweep(folder)["kind"]
        if before != kind and not config.run.overwrite:
            raise ValueError(
                f"name is {folder.name!r}, and {folder} is a {before} sweep, whose tables a {kind} sweep would "
                "replace: choose another --name, or replace them with --overwrite"
            )
        fingerprint = table.fingerprint()
        pending = [trial for trial in trials if config.run.overwrite or not _is_finished(folder, trial, fingerprint)]
        record.create_run_folder(config.run.runs_dir, folder.name, "sweep", overwrite=True)
        content = {
            "schema_version": record.SCHEMA_VERSION,
            "kind": kind,
            "config": asdict(config),
            "trials": [{"name": trial.name, "multiplier": trial.multiplier} for trial in trials],
            "machine_facts": environment.machine_facts(),
            "provenance": environment.provenance(started),
        }
        record.write_json(folder / sweep_tables.SWEEP_FILE, content)
        return len(trials), pending

    num_trials, pending = communicator.from_main(begin)
    reporter.info(f"sweep        {num_trials} runs, {num_trials - len(pending)} of them finished before")
    is_stopped = False
    for done, trial in enumerate(communicator.deal(pending) if farm else pending, start=1):
        own = trial.config.replace(name=trial.name, runs_dir=str(folder / sweep_tables.TRIALS_FOLDER))
        try:
            result = train(own, workers, stop=stop)
        except AgreedError as error:
            if farm and communicator.world_size > 1:  # the other ranks did not take part, so this one ends them
                raise ValueError(str(error)) from error
            raise
        if is_stopped := result.stopped_by == "request":
            break
        reporter.progress(done, len(pending), result.loss)
    is_stopped = any(communicator.gather(is_stopped))
    reporter.close()
    if is_stopped:
        return None
    if communicator.is_main:
        sweep_tables.trials_table(folder).to_csv(folder / sweep_tables.TRIALS_FILE, index=False)
        sweep_tables.curves_table(folder).to_csv(folder / sweep_tables.CURVES_FILE, index=False)
    communicator.barrier()
    return folder


def _is_finished(folder: Path, trial: Trial, fingerprint: str) -> bool:
    """Whether the trial's record and metrics can be read. Raises `ValueError` where they are of another run."""
    run = folder / sweep_tables.TRIALS_FOLDER / trial.name
    try:
        found = json.loads(read_regular(run / record.RECORD_FILE))
        before, data = from_json(found["config"]).options(), found["derived"]["data_fingerprint"]
        record.read_metrics(run)
    except _UNREADABLE:
        return False
    now = trial.config.options()
    compared = [key for key in now if key not in _NOT_COMPARED]
    differs = [f"{key} was {before[key]} and is {now[key]}" for key in compared if before[key] != now[key]]
    differs += ["the data's fingerprint is another"] * (data != fingerprint)
    if differs:
        raise ValueError(
            f"name is {folder.name!r}, and {run} is a finished run of another configuration ({differs[0]}): "
            "choose another --name, or run all trials again with --overwrite"
        )
    return True
