"""The configuration of a training run: one documented dataclass, and the recipes that fill it.

The command line, the record of a run and the README's table of options are made from `TrainConfig`; it
imports no torch, so that `torchreg train --help` answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from torchreg.runs.files import check_name

Optimizer = Literal["sgd", "manual"]
Sampling = Literal["shuffle", "random", "full"]
UpdateOrder = Literal["simultaneous", "sequential"]
LRScaling = Literal["linear", "sqrt", "none"]

DEFAULT_EPOCHS = 30

_AT_LEAST_ONE = (
    "num_rows", "num_features", "global_batch_size", "local_batch_size", "micro_batch_size",
    "reference_batch_size", "decay_every", "max_steps", "log_every", "checkpoint_every", "keep_checkpoints",
)  # fmt: skip
_POSITIVE = ("epochs", "target_excess", "timeout_s", "checkpoint_every_s", "time_limit_s")
_LARGEST = 10**12  # of any count or duration: more is a slip, and would overflow somewhere
_NOT_NEGATIVE = ("data_seed", "seed", "warmup_steps")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, from the data to the record.

    Raises `ValueError`, naming the field, its value and the remedy, for values that no data could make right.
    """

    data: str = "synthetic"
    """Where the rows come from: `synthetic` (rows with the real table's moments), `ames` (the real table, fetched
    once), or a CSV or Parquet file."""

    features: tuple[str, ...] = ()
    """Feature columns of the file. Default: GrLivArea."""

    target: str | None = None
    """Target column of the file. Default: SalePrice."""

    num_rows: int | None = None
    """Rows of the synthetic table. Default: 551."""

    num_features: int | None = None
    """Features of the synthetic table. Default: 1."""

    data_seed: int = 0
    """Seed of the synthetic table."""

    standardize: bool = True
    """Train on features shifted to mean 0 and scaled to variance 1. Results are in the data's own units."""

    drop_missing: bool = False
    """Drop rows with missing values instead of refusing the table."""

    optimizer: Optimizer = "sgd"
    """`sgd`: autograd and torch.optim.SGD. `manual`: gradient and update written out."""

    sync: Literal["auto", "ddp", "allreduce", "mpi"] = "auto"
    """What averages gradients over ranks: `ddp` (with sgd), `allreduce` (with manual), `mpi` (with both, on the CPU).
    `auto` is `ddp` for sgd and `allreduce` for manual."""

    reduction: Literal["fast", "reproducible"] = "fast"
    """`reproducible` sums gradients in an order that does not depend on the world size: the same `global_batch_size`
    and `micro_batch_size` then give the same bits on any number of ranks. It takes longer messages and one thread on
    each rank."""

    update_order: UpdateOrder = "simultaneous"
    """`sequential` updates the weight first and the bias with the new weight, as the lesson does; it needs
    `--optimizer manual`."""

    sampling: Sampling = "shuffle"
    """`shuffle`: a new permutation each epoch. `random`: each step draws its samples without replacement. `full`:
    every step takes all rows."""

    global_batch_size: int | None = None
    """Samples of a step over all ranks (strong scaling). Give this or `local_batch_size`, not both."""

    local_batch_size: int | None = None
    """Samples of a step on each rank (weak scaling). Default: 64, unless `global_batch_size` is given."""

    micro_batch_size: int | None = None
    """Samples of one forward and backward; larger shards accumulate gradients. Default: one pass, or with
    `--reduction reproducible` an eighth of the global batch."""

    seed: int = 0
    """Seed of the order of samples. A step has the same samples at every world size."""

    base_learning_rate: tuple[float, float] | None = None
    """Learning rates of the weight and of the bias at `reference_batch_size`. Default: 0.05 for
    the bias and 0.05 / (mean square of the features) for the weight, less where the stability limit asks
    for it."""

    reference_batch_size: int = 64
    """The global batch size that `base_learning_rate` is meant for."""

    lr_scaling: LRScaling = "linear"
    """How the learning rates grow with global_batch_size / reference_batch_size."""

    warmup_steps: int = 0
    """Steps over which the learning rates go linearly from base to scaled."""

    decay: Literal["constant", "linear", "cosine", "step"] = "constant"
    """How the learning rates decrease after the warm-up."""

    decay_to: float = 0.0
    """Where `linear` and `cosine` decay end, as a fraction of the scaled learning rates."""

    decay_factor: float = 0.1
    """The factor of `step` decay, applied every `decay_every` steps."""

    decay_every: int | None = None
    """Steps between two drops of `step` decay. Default: a third of the run."""

    on_unstable: Literal["warn", "refuse", "cap"] = "warn"
    """What to do when the learning rates are above the stability limit: `warn` and train, `refuse` to train, or `cap`
    them at half the limit."""

    initial_weight: float = 0.0
    """Initial value of every weight, in the data's own units."""

    initial_bias: float = 0.0
    """Initial value of the bias, in the data's own units."""

    max_steps: int | None = None
    """Stop after this many steps."""

    epochs: float | None = None
    """Stop after this many passes over the data. Default: 30, unless `max_steps` is given."""

    target_excess: float | None = None
    """Stop when the loss on all rows is within this fraction of the closed form's (0.001: 0.1 %)."""

    distributed: Literal["auto", "ezpz", "torch"] = "auto"
    """What initialises several ranks: ezpz where the real one is installed (`auto`), only ezpz, or only torch."""

    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = "auto"
    """Where to train. `auto` takes an accelerator where there is one."""

    dtype: Literal["auto", "float32", "float64"] = "auto"
    """Precision of data and parameters. `auto` is float64 on the CPU and float32 elsewhere."""

    timeout_s: float = 300.0
    """Seconds that a collective operation waits for other ranks."""

    name: str | None = None
    """Name of the run: its records are in `runs_dir/name`. Default: train-<date>-<time>."""

    runs_dir: str = "runs"
    """Folder of all runs."""

    overwrite: bool = False
    """Replace the records of an earlier run of this name."""

    resume: Literal["never", "auto"] = "never"
    """`auto`: resume from the newest valid checkpoint of the run of this name, at any world size; start from scratch
    where there is none; do nothing if the run is finished. Needs `--name`."""

    checkpoint_every: int | None = None
    """Steps between two checkpoints."""

    checkpoint_every_s: float | None = None
    """Seconds between two checkpoints, about: checked when losses are summed over ranks."""

    keep_checkpoints: int = 3
    """How many of the newest checkpoints are kept."""

    time_limit_s: float | None = None
    """Save and stop (exit code 75) shortly before so many seconds have passed. Default: the end of the Slurm job."""

    log_every: int | None = None
    """Steps between two lines of metrics. Default: about forty lines a run."""

    log_full_loss: bool = False
    """Log the loss on all rows too, with every line of metrics. The time this takes is not counted."""

    plot: bool = False
    """Draw data, fit, closed form and loss as PNG and SVG in the run's folder."""

    def __post_init__(self) -> None:
        for field in _AT_LEAST_ONE:
            value = getattr(self, field)
            if value is not None and not 1 <= value <= _LARGEST:
                raise ValueError(f"{field} is {value}: give a whole number of at least 1 and at most {_LARGEST:,}")
        for field in _POSITIVE:
            value = getattr(self, field)
            if value is not None and not 0 < value <= _LARGEST:
                raise ValueError(f"{field} is {value}: give a number above 0 and at most {_LARGEST:,}")
        for field in _NOT_NEGATIVE:
            if not 0 <= getattr(self, field) < 2**32:
                raise ValueError(f"{field} is {getattr(self, field)}: give 0 or more, and less than 2³²")
        if self.base_learning_rate is not None:
            for parameter, learning_rate in zip(("weight", "bias"), self.base_learning_rate, strict=True):
                if not (learning_rate > 0 and math.isfinite(learning_rate)):
                    raise ValueError(f"base_learning_rate of the {parameter} is {learning_rate}: give a number above 0")
        for field in ("decay_to", "decay_factor"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is {getattr(self, field)}: give a fraction from 0 to 1")
        for field in ("initial_weight", "initial_bias"):
            if not math.isfinite(getattr(self, field)):
                raise ValueError(f"{field} is {getattr(self, field)}: give a finite number")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.global_batch_size is not None and self.local_batch_size is not None:
            raise ValueError(
                f"global_batch_size is {self.global_batch_size} and local_batch_size is {self.local_batch_size}: "
                "give one of them; the world size makes the other"
            )
        if self.sampling == "full" and (self.global_batch_size or self.local_batch_size):
            raise ValueError(
                "sampling is full, which takes all rows in every step, and a batch size is given: "
                "omit the batch size, or choose --sampling shuffle or random"
            )
        if self.effective_sync not in (("ddp", "mpi") if self.optimizer == "sgd" else ("allreduce", "mpi")):
            raise ValueError(
                f"sync is {self.sync} and optimizer is {self.optimizer}: sgd goes with ddp or mpi, "
                "manual with allreduce or mpi"
            )
        if self.update_order == "sequential" and self.optimizer == "sgd":
            raise ValueError(
                "update_order is sequential and optimizer is sgd, which updates all parameters at once: "
                "add --optimizer manual"
            )
        if self.data != "synthetic" and (self.num_rows or self.num_features):
            field = "num_rows" if self.num_rows else "num_features"
            raise ValueError(
                f"{field} is {getattr(self, field)} and data is {self.data}: only the synthetic table has a "
                "size to choose; omit it or choose --data synthetic"
            )
        if self.data == "synthetic" and (self.features or self.target):
            raise ValueError(
                "features or target are given for the synthetic table, whose columns are fixed: name a file with --data"
            )
        if self.resume == "auto" and self.name is None:
            raise ValueError("resume is auto and name is None: name the run to resume with --name")
        if self.resume == "auto" and self.overwrite:
            raise ValueError("resume is auto and overwrite is on: choose one of the two")
        if self.name is not None:
            check_name("name", self.name)

    def data_options(self) -> dict[str, Any]:
        """What `load_table` needs besides the source."""
        names = ("features", "target", "num_rows", "num_features", "data_seed", "drop_missing")
        return {name: getattr(self, name) for name in names}

    @property
    def effective_sync(self) -> Literal["ddp", "allreduce", "mpi"]:
        """`sync` with `auto` resolved."""
        if self.sync == "auto":
            return "ddp" if self.optimizer == "sgd" else "allreduce"
        return self.sync


RECIPES: dict[str, TrainConfig] = {
    "default": TrainConfig(),
    "lesson": TrainConfig(
        standardize=False,
        optimizer="manual",
        update_order="sequential",
        sampling="full",
        base_learning_rate=(1e-7, 1e-1),
        lr_scaling="none",
        initial_weight=5.0,
        initial_bias=1000.0,
        epochs=30,
        dtype="float64",
    ),
}
RECIPES["homework"] = replace(RECIPES["lesson"], sampling="random", global_batch_size=64)
"""`default` is safe at any world size that the data allows; `lesson` is the original lesson to the digit, and
`homework` its exercise: batches of 64 rows that each step draws afresh."""


SWEEP_DEFAULTS: dict[Literal["batch", "lr-scaling"], TrainConfig] = {
    "batch": replace(RECIPES["homework"], name="sweep-batch", global_batch_size=None),
    "lr-scaling": replace(
        RECIPES["homework"], name="sweep-lr-scaling", global_batch_size=None, epochs=None, max_steps=1_000
    ),
}
"""The defaults of the runs of a sweep: the lesson's homework."""


def with_recipe(recipe: str, **overrides: object) -> TrainConfig:
    """A recipe with some of its values replaced."""
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe}: the recipes are {', '.join(RECIPES)}")
    return replace(RECIPES[recipe], **overrides)  # type: ignore[arg-type]


def from_json(values: dict[str, object]) -> TrainConfig:
    """The configuration that a record holds."""
    return TrainConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})  # type: ignore[arg-type]
