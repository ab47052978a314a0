"""The trials of a sweep, and running those that are not finished: on all ranks, or one on each."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from torchreg.console import Reporter
from torchreg.core.checkpoint import read_regular
from torchreg.distributed.communicator import Communicator
from torchreg.distributed.rendezvous import AgreedError
from torchreg.distributed.stopping import StopRequest
from torchreg.runs import environment, record
from torchreg.runs.config import TrainConfig, from_json
from torchreg.runs.run import train
from torchreg.runs.setup import LeastSquares, base_learning_rates, prepare, scale_at
from torchreg.sweeps import sweep_tables
from torchreg.theory import Dynamics

_NOT_COMPARED = (  # no number depends on them
    "name", "runs_dir", "overwrite", "distributed", "timeout_s", "plot",
    "resume", "checkpoint_every", "checkpoint_every_s", "keep_checkpoints", "time_limit_s",
)  # fmt: skip
_AROUND_LIMIT = (0.97, 1.03)
_LR_SCALING_WARMUP_STEPS = 100
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)


class Trial(NamedTuple):
    """One run of a sweep. `multiplier` is what its base learning rates are multiplied by."""

    name: str
    config: TrainConfig
    multiplier: float


def batch_trials(config: TrainConfig, batch_sizes: Sequence[int], num_seeds: int) -> list[Trial]:
    """A trial for each global batch size and seed, all of as many epochs, by the configuration's `lr_scaling`."""
    config, trials = _common(config, "--batch-sizes"), []
    for size, i in itertools.product(sorted(set(batch_sizes)), range(num_seeds)):
        trial = config.replace(global_batch_size=size, seed=config.batch.seed + i)
        trials.append(Trial(f"batch-{size}-seed-{i}", trial, scale_at(config, size)))
    return trials


def lr_scaling_trials(config: TrainConfig, multipliers: Sequence[float], num_seeds: int) -> list[Trial]:
    """The trials of each multiplier: raw and standardised, in both update orders, with and without warm-up.

    The batch grows from the reference batch with the learning rates, up to the last multiple of it that the data has
    rows for; beyond it only the learning rates grow. The default multipliers are 1, 2, 4, 8, … up to the first that is
    predicted to diverge, and 3 % below and above the predicted limit. Standardised features have the default
    learning rates: the raw ones would hardly move them.
    """
    config, trials = _common(config, "--reference-batch-size"), []
    warmups = (0, config.optimizer.warmup_steps or _LR_SCALING_WARMUP_STEPS)
    for standardize in (False, True):
        variant = config.replace(standardize=standardize, lr_scaling="linear", on_unstable="warn")
        data = LeastSquares.of(variant)
        base = base_learning_rates(variant.replace(base_learning_rate=None) if standardize else variant, data)
        for order in ("simultaneous", "sequential"):
            variant = variant.replace(update_order=order, base_learning_rate=base)
            for wanted in multipliers or _default_multipliers(lr_scaling_limit(variant, data)):
                scaled, multiplier = _scaled(variant, wanted, data)
                name = f"{'standardised' if standardize else 'raw'}-{order}-{multiplier:.5g}"
                for warmup_steps, i in itertools.product(warmups, range(num_seeds)):
                    trial = scaled.replace(warmup_steps=warmup_steps, seed=config.batch.seed + i)
                    trials.append(Trial(f"{name}-warmup-{warmup_steps}-seed-{i}", trial, multiplier))
    return trials


def lr_scaling_limit(config: TrainConfig, data: LeastSquares) -> float:
    """The multiplier at the stability limit of the batch size that an lr-scaling sweep has there."""
    limit, learning_rates, order = 1.0, base_learning_rates(config, data), config.optimizer.update_order
    sampling, is_scaled = config.batch.sampling, config.optimizer.last_batch_lr == "scaled"
    for _ in range(8):  # a fixed point: the limit hardly depends on the batch size
        batch_size = _scaled(config, limit, data)[0].batch.global_batch_size
        assert batch_size
        before = limit
        dynamics = Dynamics.of(data.rows, learning_rates, batch_size, order, sampling, scale_last_batch=is_scaled)
        limit = dynamics.largest_multiplier()
        if abs(limit - before) < 1e-6 * limit:
            break
    return limit


def _default_multipliers(limit: float) -> list[float]:
    doubling = [2.0**i for i in range(max(0, math.ceil(math.log2(limit))) + 1)]
    return sorted([*doubling, *(limit * side for side in _AROUND_LIMIT)])


def _scaled(config: TrainConfig, multiplier: float, data: LeastSquares) -> tuple[TrainConfig, float]:
    """The configuration at a multiplier, and the multiplier at which the batch is a whole number of samples."""
    reference = config.optimizer.reference_batch_size
    batch_size = max(1, round(multiplier * reference))
    largest = max(1, data.table.num_rows // reference) * reference
    if batch_size <= largest:
        return config.replace(global_batch_size=batch_size), batch_size / reference
    batch_size = min(largest, data.table.num_rows)
    factor = multiplier * reference / batch_size
    weight, bias = base_learning_rates(config, data)
    return config.replace(global_batch_size=batch_size, base_learning_rate=(weight * factor, bias * factor)), multiplier


def _common(config: TrainConfig, remedy: str) -> TrainConfig:
    """What all trials have in common; their batch sizes are chosen by the option `remedy`."""
    for field in ("global_batch_size", "local_batch_size"):
        if value := getattr(config.batch, field):
            raise ValueError(f"{field} is {value}, and the sweep chooses the batch of each trial: give {remedy}")
    if config.batch.sampling == "full":
        raise ValueError(
            "sampling is full, which takes all rows in every step, and the sweep varies the batch: choose --sampling "
            "random or shuffle"
        )
    return config.replace(name=None, log_full_loss=True, plot=False, overwrite=True, resume="never")


def run_sweep(
    kind: str,
    config: TrainConfig,
    values: Sequence[int],
    num_seeds: int,
    communicator: Communicator,
    reporter: Reporter,
    stop: StopRequest | None = None,
    *,
    farm: bool = False,
) -> Path | None:
    """Run the trials that are not finished, one after the other on all ranks, or with `farm` one on each rank.

    `values` are the batch sizes of a `batch` sweep, and the multipliers of an `lr-scaling` sweep. Writes the tables and
    returns the sweep's folder; None where `stop` was due before all trials were run. Raises `ValueError`, on every
    rank, for bad input, and where the folder holds trials of another configuration or other data.
    """
    started = record.utc_now()
    workers = communicator.alone() if farm else communicator
    folder = Path(config.run.runs_dir) / (config.run.name or f"sweep-{kind}")

    def begin() -> tuple[int, list[Trial]]:
        trials = (batch_trials if kind == "batch" else lr_scaling_trials)(config, values, num_seeds)
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
    reporter.close()
    if any(communicator.gather(is_stopped)):
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
