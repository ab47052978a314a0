"""The configuration of a training run, nested by owner: the command line, records and README are made from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torchreg.runs.files import check_name

Sampling = Literal["shuffle", "random", "full"]
UpdateOrder = Literal["simultaneous", "sequential"]
LRScaling = Literal["linear", "sqrt", "none"]

DEFAULT_EPOCHS = 30
_LARGEST = 10**12  # of any count or duration: more is a slip, and would overflow somewhere


def _check(config: object, names: str, is_right: Callable[[Any], bool], remedy: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        if not (value is None or is_right(value)):
            raise ValueError(f"{name} is {value}: give {remedy}")


def _check_counts(config: object, names: str) -> None:
    remedy = f"a whole number of at least 1 and at most {_LARGEST:,}"
    _check(config, names, lambda count: 1 <= count <= _LARGEST, remedy)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The table that is trained on."""

    # Where the rows come from: `synthetic` (the real table's moments), `ames` (the real table), a CSV or Parquet file.
    data: str = "synthetic"
    features: tuple[str, ...] = ()  # Feature columns of the file, separated by commas. Default: GrLivArea.
    target: str | None = None  # Target column of the file. Default: SalePrice.
    num_rows: int | None = None  # Rows of the synthetic table. Default: 551.
    num_features: int | None = None  # Features of the synthetic table. Default: 1.
    data_seed: int = 0  # Seed of the synthetic table.
    # Train on features shifted to mean 0 and scaled to variance 1. Results are in the data's own units.
    standardize: bool = True
    drop_missing: bool = False  # Drop rows with missing values instead of refusing the table.

    def __post_init__(self) -> None:
        _check_counts(self, "num_rows num_features")
        _check(self, "data_seed", lambda seed: 0 <= seed < 2**32, "0 or more, and less than 2³²")
        if self.data != "synthetic" and (self.num_rows or self.num_features):
            size = f"num_rows is {self.num_rows}" if self.num_rows else f"num_features is {self.num_features}"
            remedy = "only the synthetic table has a size to choose; omit it or choose --data synthetic"
            raise ValueError(f"{size} and data is {self.data}: {remedy}")
        if self.data == "synthetic" and (self.features or self.target):
            raise ValueError("features or target are given, and data is synthetic: name a file with --data")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The samples of a step, and how their gradients are summed."""

    # `shuffle`: a new permutation each epoch. `random`: each step draws without replacement. `full`: all rows.
    sampling: Sampling = "shuffle"
    # Samples of a step over all ranks (strong scaling). Give this or `local_batch_size`, not both.
    global_batch_size: int | None = None
    # Samples of a step on each rank (weak scaling). Default: 64, unless `global_batch_size` is given.
    local_batch_size: int | None = None
    # Samples of one forward and backward; larger shards accumulate gradients. Default: one pass, or with `--reduction
    # reproducible` an eighth of the global batch.
    micro_batch_size: int | None = None
    # `reproducible` sums gradients in an order that does not depend on the world size: the same `global_batch_size` and
    # `micro_batch_size` then give the same bits on any number of ranks. It takes longer messages and one thread a rank.
    reduction: Literal["fast", "reproducible"] = "fast"
    seed: int = 0  # Seed of the order of samples. A step has the same samples at every world size.

    def __post_init__(self) -> None:
        _check_counts(self, "global_batch_size local_batch_size micro_batch_size")
        _check(self, "seed", lambda seed: 0 <= seed < 2**32, "0 or more, and less than 2³²")
        if self.global_batch_size is not None and self.local_batch_size is not None:
            reason = f"global_batch_size is {self.global_batch_size} and local_batch_size is {self.local_batch_size}"
            raise ValueError(f"{reason}: give one of them; the world size makes the other")
        if self.sampling == "full" and (self.global_batch_size or self.local_batch_size):
            raise ValueError("sampling is full: omit the batch size, or choose --sampling shuffle or random")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update, its learning rates, and the initial parameters."""

    # `sgd`: autograd and torch.optim.SGD. `manual`: gradient and update written out.
    optimizer: Literal["sgd", "manual"] = "sgd"
    # What averages gradients over ranks: `ddp` (with sgd), `allreduce` (with manual), `mpi` (with both, on the CPU).
    # `auto` is `ddp` for sgd and `allreduce` for manual.
    sync: Literal["auto", "ddp", "allreduce", "mpi"] = "auto"
    # `sequential` updates the weight, then the bias with the new weight, as the lesson does (`--optimizer manual`).
    update_order: UpdateOrder = "simultaneous"
    # Learning rates of weight and bias at `reference_batch_size`, as 1e-7,1e-1, or one for both. Default: 0.05 for the
    # bias and 0.05 / (mean square of the features) for the weight, less where the stability limit asks for it.
    base_learning_rate: tuple[float, float] | None = None
    reference_batch_size: int = 64  # The global batch size that `base_learning_rate` is meant for.
    lr_scaling: LRScaling = "linear"  # How the learning rates grow with global_batch_size / reference_batch_size.
    # Learning rates of the short last batch of an epoch in `shuffle` sampling: `scaled` to its number of samples, so
    # that every sample counts the same; or `full`, which adds noise and with few samples may be unstable.
    last_batch_lr: Literal["scaled", "full"] = "scaled"
    warmup_steps: int = 0  # Steps over which the learning rates go linearly from base to scaled.
    # How the learning rates decrease after the warm-up.
    decay: Literal["constant", "linear", "cosine", "step"] = "constant"
    decay_to: float = 0.0  # Where `linear` and `cosine` decay end, as a fraction of the scaled learning rates.
    decay_factor: float = 0.1  # The factor of `step` decay, applied every `decay_every` steps.
    decay_every: int | None = None  # Steps between two drops of `step` decay. Default: a third of the run.
    # What to do with learning rates above the stability limit: `warn`, `refuse` to train, or `cap` at half the limit.
    on_unstable: Literal["warn", "refuse", "cap"] = "warn"
    initial_weight: float = 0.0  # Initial value of every weight, in the data's own units.
    initial_bias: float = 0.0  # Initial value of the bias, in the data's own units.

    def __post_init__(self) -> None:
        _check_counts(self, "reference_batch_size decay_every")
        _check(self, "warmup_steps", lambda n: 0 <= n <= _LARGEST, f"0 or more, and at most {_LARGEST:,}")
        for parameter, learning_rate in zip(("weight", "bias"), self.base_learning_rate or (), strict=False):
            if not (learning_rate > 0 and math.isfinite(learning_rate)):
                raise ValueError(f"base_learning_rate of the {parameter} is {learning_rate}: give a number above 0")
        _check(self, "decay_to decay_factor", lambda fraction: 0 <= fraction <= 1, "a fraction from 0 to 1")
        _check(self, "initial_weight initial_bias", math.isfinite, "a finite number")
        if self.effective_sync not in (("ddp", "mpi") if self.optimizer == "sgd" else ("allreduce", "mpi")):
            names = f"sync is {self.sync} and optimizer is {self.optimizer}"
            raise ValueError(f"{names}: sgd goes with ddp or mpi, manual with allreduce or mpi")
        if self.update_order == "sequential" and self.optimizer == "sgd":
            raise ValueError("update_order is sequential and optimizer is sgd: add --optimizer manual")

    @property
    def effective_sync(self) -> Literal["ddp", "allreduce", "mpi"]:
        """`sync` with `auto` resolved."""
        default: Literal["ddp", "allreduce"] = "ddp" if self.optimizer == "sgd" else "allreduce"
        return default if self.sync == "auto" else self.sync


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, devices, files and checkpoints of a run."""

    max_steps: int | None = None  # Stop after this many steps.
    epochs: float | None = None  # Stop after this many passes over the data. Default: 30, unless `max_steps` is given.
    # Stop when the loss on all rows is within this fraction of the closed form's (0.001: 0.1 %).
    target_excess: float | None = None
    # What initialises several ranks: ezpz where the real one is installed (`auto`), only ezpz, or only torch.
    distributed: Literal["auto", "ezpz", "torch"] = "auto"
    # Where to train. `auto` takes an accelerator where there is one.
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = "auto"
    # Precision of data and parameters. `auto` is float64 on the CPU and float32 elsewhere.
    dtype: Literal["auto", "float32", "float64"] = "auto"
    timeout_s: float = 300.0  # Seconds that a collective operation waits for other ranks.
    name: str | None = None  # Name of the run: its records are in `runs_dir/name`. Default: train-<date>-<time>.
    runs_dir: str = "runs"  # Folder of all runs.
    overwrite: bool = False  # Replace the records of an earlier run of this name.
    # `auto`: resume from the newest valid checkpoint of the run of this name, at any world size; start from scratch
    # where there is none; do nothing if the run is finished. Needs `--name`.
    resume: Literal["never", "auto"] = "never"
    checkpoint_every: int | None = None  # Steps between two checkpoints.
    # Seconds between two checkpoints, about: checked when losses are summed over ranks.
    checkpoint_every_s: float | None = None
    keep_checkpoints: int = 3  # How many of the newest checkpoints are kept.
    # Save and stop (exit code 75) shortly before so many seconds have passed. Default: the end of the Slurm job.
    time_limit_s: float | None = None
    log_every: int | None = None  # Steps between two lines of metrics. Default: about forty lines a run.
    # Log the loss on all rows too, with every line of metrics. The time this takes is not counted.
    log_full_loss: bool = False
    plot: bool = False  # Draw data, fit, closed form and loss as PNG and SVG in the run's folder.

    def __post_init__(self) -> None:
        _check_counts(self, "max_steps log_every checkpoint_every keep_checkpoints")
        durations = "epochs target_excess timeout_s checkpoint_every_s time_limit_s"
        _check(self, durations, lambda n: 0 < n <= _LARGEST, f"a number above 0 and at most {_LARGEST:,}")
        if self.resume == "auto" and self.name is None:
            raise ValueError("resume is auto and name is None: name the run to resume with --name")
        if self.resume == "auto" and self.overwrite:
            raise ValueError("resume is auto and overwrite is on: choose one of the two")
        if self.name is not None:
            check_name("name", self.name)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Its parts raise `ValueError`, with field, value and remedy, for what no data makes right."""

    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @classmethod
    def of(cls, **options: Any) -> TrainConfig:
        """A configuration from options of any part: `TrainConfig.of(optimizer="manual", max_steps=30)`."""
        return cls().replace(**options)

    def replace(self, **options: Any) -> TrainConfig:
        """The configuration with some options of any part replaced."""
        parts = {}
        for part in fields(self):
            value = getattr(self, part.name)
            parts[part.name] = replace(value, **{name: options.pop(name) for name in vars(value) if name in options})
        if options:
            raise TypeError(f"no option of a TrainConfig: {', '.join(options)}")
        return TrainConfig(**parts)

    def options(self) -> dict[str, Any]:
        """All options by name, of all parts."""
        return {name: value for part in fields(self) for name, value in vars(getattr(self, part.name)).items()}


def from_json(values: dict[str, dict[str, Any]]) -> TrainConfig:
    """The configuration that a record holds."""
    options = {name: value for part in values.values() for name, value in part.items()}
    return TrainConfig.of(**{name: tuple(v) if isinstance(v, list) else v for name, v in options.items()})
