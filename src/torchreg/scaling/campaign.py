"""What a campaign measures: its settings, its launches, and their estimated cost. No torch."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from torchreg.core.checkpoint import read_regular
from torchreg.data.synthetic import REAL_NUM_ROWS
from torchreg.machines.known_machines import MachineName
from torchreg.machines.launch_commands import LauncherName, split_options
from torchreg.runs.files import check_name

CAMPAIGN_FILE = "campaign.yaml"

MOST_SOLVED_FEATURES = 1_024  # to which, with four times as many rows, a launch compares with the closed form
Combination = Literal["manual/allreduce", "manual/mpi", "sgd/ddp", "sgd/mpi"]
# Fields that may differ between runs into one folder: the numbers of a launch do not depend on them.
MAY_CHANGE = ("repeats", "nodes", "ranks_per_node", "launcher", "launcher_args", "timeout_s", "launch_timeout_s")

_RANGES: dict[tuple[str, ...], tuple[float, float]] = {
    ("nodes", "ranks_per_node", "global_batch_sizes", "local_batch_sizes", "num_features"): (1, 10**9),
    ("window_s", "base_learning_rate", "target_excess", "timeout_s", "launch_timeout_s"): (1e-12, 10**9),
    ("repeats",): (1, 10_000),
    ("seed",): (0, 2**32 - 1),
}
_MAX_FILE_BYTES = 65_536  # a file with a hundred numbers a key has two thousand


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """World sizes, batch sizes, message sizes and optimizer/sync pairs to measure, how often and for how long.

    Raises `ValueError`, naming the field, its value and the remedy, for what cannot be measured.
    """

    name: str = "scaling"  # Name of the campaign, in its records and its report.
    machine: MachineName = "generic"  # Whose launcher options, CPU binding and network settings to use.
    # Name of the machine in records and reports: numbers are compared only within one machine. Default: `machine`, or
    # the name of the host on which the campaign starts, without its numbers.
    machine_name: str | None = None
    # Names of the machine's variables to exclude, for example where NCCL hangs with them.
    without: tuple[str, ...] = ()

    nodes: tuple[int, ...] = (1,)  # Numbers of nodes.
    # Numbers of ranks on each node; world sizes are the products with `nodes`.
    ranks_per_node: tuple[int, ...] = (1, 2, 4)
    global_batch_sizes: tuple[int, ...] = (256,)  # Strong scaling: samples per step on all ranks together.
    local_batch_sizes: tuple[int, ...] = (64,)  # Weak scaling: samples per step on each rank.
    # Features of the model, which decide the message size: num_features + 1 numbers are averaged in a step.
    num_features: tuple[int, ...] = (1, 64, 512)
    # Optimizer/sync pairs to measure, or `all` that run on the machine.
    combinations: tuple[Combination | Literal["all"], ...] = ("all",)

    # Launches of each world size. A launch is the unit of repetition: a 95 % interval needs at least six.
    repeats: int = 6
    window_s: float = 1.0  # Minimum duration of one measurement, in seconds.
    # Rows of the synthetic table. Default: the largest of 551, the largest global batch, and four times the features
    # (up to 1024 of them), with which gradient descent is close to the closed-form solution after few steps.
    num_rows: int | None = None
    # Learning rate of weight and bias in runs to the target, for a global batch of 64 and scaled linearly with it.
    # Small, so that a run to the target is long enough to be timed.
    base_learning_rate: float = 0.0005
    # Runs to the target end when the loss exceeds that of the closed-form solution by at most this fraction.
    target_excess: float = 0.01

    # Precision. `auto` is float64 on the CPU and float32 elsewhere.
    dtype: Literal["auto", "float32", "float64"] = "auto"
    # Device type. A launch whose ranks have another device is recorded as failed.
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = "auto"
    distributed: Literal["auto", "ezpz", "torch"] = "auto"  # What initializes the process group of several ranks.
    seed: int = 0  # Seed of the order of launches, and of points in a launch.
    # What starts ranks. `auto`: srun in a Slurm job, else the mpiexec on the PATH; `none`: one process, directly.
    launcher: LauncherName | Literal["auto"] = "auto"
    launcher_args: str = ""  # Further options of the launcher, in one argument: --launcher-args="--map-by core".
    timeout_s: float = 120.0  # Seconds that a collective operation waits for other ranks.
    launch_timeout_s: float = 900.0  # Seconds after which a launch is killed and recorded as failed.

    def __post_init__(self) -> None:
        check_name("name", self.name)
        if self.machine_name is not None:
            check_name("machine_name", self.machine_name)
        for field in ("nodes", "ranks_per_node", "num_features"):
            if not getattr(self, field):
                raise ValueError(f"{field} is empty: give at least one number")
        if not self.global_batch_sizes and not self.local_batch_sizes:
            raise ValueError("global_batch_sizes and local_batch_sizes are both empty: give one of them a number")
        for field, (low, high) in ((field, bounds) for fields, bounds in _RANGES.items() for field in fields):
            values = getattr(self, field)
            values = values if isinstance(values, tuple) else (values,)
            for value in values:
                if not low <= value <= high:
                    raise ValueError(f"{field} has {value}: give a number from {low} to {high:,}")
            if len(set(values)) < len(values):
                raise ValueError(f"{field} is {', '.join(map(str, values))}: give each number once")
        split_options("launcher_args", self.launcher_args)
        num_ranks = max(self.nodes) * max(self.ranks_per_node)
        if (smallest := min(self.global_batch_sizes, default=num_ranks)) < num_ranks:
            raise ValueError(
                f"global_batch_sizes has {smallest}, and the largest world size is {num_ranks}: some ranks would have "
                "no samples; give larger batches or fewer ranks"
            )
        if self.num_rows is not None and self.num_rows < self._max_batch_size:
            raise ValueError(
                f"num_rows is {self.num_rows}, and the largest global batch is {self._max_batch_size}: give more rows"
            )

    @property
    def _max_batch_size(self) -> int:
        weak = max(self.nodes) * max(self.ranks_per_node) * max(self.local_batch_sizes, default=0)
        return max((*self.global_batch_sizes, weak))

    @property
    def effective_num_rows(self) -> int:
        """Rows of the synthetic table."""
        solved = [4 * count for count in self.num_features if count <= MOST_SOLVED_FEATURES]
        return self.num_rows or max(REAL_NUM_ROWS, self._max_batch_size, *solved)

    def estimated_s(self, world_size: int) -> float:
        """Estimated seconds of a launch: start-up, all-reduce, and the points."""
        windows = 1.0 if world_size == 1 else 1.5  # with averaging, and half of one without
        point_s = windows * self.window_s + 0.5  # warm-up, check, run to the target
        return 15.0 + 3.0 + point_s * len(settings(self, world_size))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that a launch's numbers depend on: only launches with the same one are comparable."""
        names = (*MAY_CHANGE, "name", "machine_name")
        measured = {name: value for name, value in asdict(self).items() if name not in names}
        return "sha256:" + hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Setting:
    """What one point measures, at any world size; `sync` is none for a single rank."""

    optimizer: Literal["manual", "sgd"]
    sync: Literal["allreduce", "ddp", "mpi", "none"]
    num_features: int
    global_batch_size: int


@dataclass(frozen=True)
class Launch:
    """One start of ranks in one block: it measures every setting, in its own order."""

    id: str  # the name of its folder
    block: int
    world_size: int
    num_nodes: int
    ranks_per_node: int
    seed: int


def launches(campaign: Campaign) -> list[Launch]:
    """Every launch, in randomized blocks: a slow drift of the machine affects all world sizes alike."""
    shapes, found = list(itertools.product(campaign.nodes, campaign.ranks_per_node)), []
    for block in range(campaign.repeats):
        for nodes, ranks in np.random.default_rng([campaign.seed, block]).permutation(shapes).tolist():
            seed = int(np.random.default_rng([campaign.seed, block, nodes, ranks]).integers(2**31))
            name = f"block-{block:02}-nodes-{nodes}-ranks-{nodes * ranks}"
            found.append(Launch(name, block, nodes * ranks, nodes, ranks, seed))
    return found


def settings(campaign: Campaign, world_size: int, *, by_mpi: bool = True) -> list[Setting]:
    """What a launch of this world size measures; strong and weak settings that coincide are measured once.

    `by_mpi`: whether MPI can average gradients there, so that `all` combinations are all four.
    """
    batches = sorted({*campaign.global_batch_sizes, *(size * world_size for size in campaign.local_batch_sizes)})
    available = [c for c in get_args(Combination) if by_mpi or not c.endswith("/mpi")]
    chosen = available if "all" in campaign.combinations else sorted(set(campaign.combinations))
    pairs = dict.fromkeys(tuple(c.split("/")) if world_size > 1 else (c.split("/")[0], "none") for c in chosen)
    sizes = itertools.product(campaign.num_features, batches, pairs)
    return [Setting(optimizer, sync, num_features, batch) for num_features, batch, (optimizer, sync) in sizes]


def node_hours(campaign: Campaign) -> float:
    """Estimated cost of all launches: whole nodes, as they are charged."""
    return sum(campaign.estimated_s(one.world_size) * one.num_nodes for one in launches(campaign)) / 3600


def read_campaign(path: Path) -> Campaign:
    """The campaign of a campaign file, such as jobs/campaigns/local.yaml. Raises `ValueError` for any other file."""
    import msgspec
    import yaml

    if not path.is_file():
        error = "is not a regular file" if path.exists() else "does not exist"
        raise ValueError(f"campaign is {path}, which {error}: give a YAML file, such as jobs/campaigns/local.yaml")
    try:
        text = read_regular(path, _MAX_FILE_BYTES + 1)
        if len(text) > _MAX_FILE_BYTES:
            raise ValueError(f"more than {_MAX_FILE_BYTES:,} bytes")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise ValueError("it has no `key: value` lines, see jobs/campaigns/local.yaml")
        if b"<<" in text:  # nested merges have a size without bounds
            raise ValueError("it merges keys by `<<`: write each key")
        for key, count in Counter(str(key.value) for key, _ in root.value).items():
            if count > 1:
                raise ValueError(f"{key} is there twice")
        content: dict[str, Any] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"campaign is {path}, which is not the YAML of a campaign: {reason}") from error
    defaults = asdict(Campaign())
    for key, value in content.items():
        if key not in defaults:
            raise ValueError(f"campaign is {path}, which has {key!r}: its keys are {', '.join(defaults)}")
        if isinstance(defaults[key], tuple) and not isinstance(value, list):
            content[key] = [value]
    try:
        return msgspec.convert(content, Campaign, strict=False)  # YAML reads 1e-4 as a string
    except msgspec.ValidationError as error:
        raise ValueError(f"campaign is {path}: {error}; `torchreg scale plan --help` lists the values") from None


def campaign_of(folder: Path) -> Campaign:
    """The campaign of a folder. Raises `ValueError` if there is none, or a damaged one."""
    if not (folder / CAMPAIGN_FILE).is_file():
        raise ValueError(
            f"dir is {folder}, which has no {CAMPAIGN_FILE}: start one with "
            f"`torchreg scale run CAMPAIGN.yaml --dir {folder}`"
        )
    return read_campaign(folder / CAMPAIGN_FILE)
