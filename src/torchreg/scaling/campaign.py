"""What a campaign measures: its settings, its launches, and what they will cost. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchreg.data.synthetic import REAL_NUM_ROWS
from torchreg.machines.launch_commands import LauncherName, MachineName, words
from torchreg.runs.files import check_name

CAMPAIGN_FILE = "campaign.yaml"

MOST_SOLVED_FEATURES = 1_024
"""Up to so many features, with four times as many rows, a launch checks its steps against the closed form; beyond,
against the trajectory of gradient descent."""

Combination = Literal["manual/allreduce", "manual/mpi", "sgd/ddp", "sgd/mpi"]
COMBINATIONS: tuple[Combination, ...] = ("manual/allreduce", "manual/mpi", "sgd/ddp", "sgd/mpi")

_START_UP_S = 15.0  # of a launch: imports, bring-up; an estimate
_BESIDE_WINDOW_S = 0.5  # of a point: warm-up, check, run to the target; an estimate
_ALL_REDUCE_S = 3.0
_LARGEST = 10**9
_LONGEST_FILE = 65_536  # bytes; one of a hundred numbers a key has two thousand
_MEASURED_WITH = (  # what the numbers of a launch depend on: one campaign folder has one choice of these
    "global_batch_sizes", "local_batch_sizes", "num_features", "combinations", "window_s", "num_rows",
    "base_learning_rate", "target_excess", "dtype", "device", "distributed", "machine", "without", "seed",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """A scaling campaign: which world sizes, batches, message sizes and ways to average, how often, for how long.

    Raises `ValueError`, naming the field, its value and the remedy, for what cannot be measured.
    """

    name: str = "scaling"
    """Name of the campaign, in its records and its report."""

    machine: MachineName = "generic"
    """Whose launcher options, CPU binding and network settings to use."""

    machine_name: str | None = None
    """What the machine is called in records and reports: numbers are compared only within one machine. It is settled
    when the campaign begins. Default: the known machine, or the host's name without its numbers."""

    without: tuple[str, ...] = ()
    """Names of the machine's variables to leave out, as where NCCL hangs with them."""

    nodes: tuple[int, ...] = (1,)
    """Numbers of nodes."""

    ranks_per_node: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks on each node; world sizes are the products with `nodes`."""

    global_batch_sizes: tuple[int, ...] = (256,)
    """Strong scaling: rows of a step over all ranks, kept over world sizes."""

    local_batch_sizes: tuple[int, ...] = (64,)
    """Weak scaling: rows of a step on each rank, kept over world sizes."""

    num_features: tuple[int, ...] = (1, 64, 512)
    """Features of the model, which decide the message size: num_features + 1 numbers are averaged in a step."""

    combinations: tuple[Combination | Literal["all"], ...] = ("all",)
    """Optimizer/sync pairs to measure, or `all` that run on the machine."""

    repeats: int = 6
    """Launches of each world size. A launch is the unit of repetition: six are the fewest that give a 95 % interval."""

    window_s: float = 1.0
    """Seconds of steps that one measurement lasts, at least."""

    num_rows: int | None = None
    """Rows of the made data. Default: 551, or the largest global batch, or four times the features (up to 1024) so that
    the closed form is near, where that is more."""

    base_learning_rate: float = 0.0005
    """Rate of weight and bias at 64 rows in runs to the target, scaled linearly with the global batch. Small, so that
    a run to the target is long enough to be timed."""

    target_excess: float = 0.01
    """Runs to the target train until the loss is within this fraction of the closed form's."""

    dtype: Literal["auto", "float32", "float64"] = "auto"
    """Precision. `auto` is float64 on the CPU and float32 elsewhere."""

    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = "auto"
    """Where to train. A launch whose ranks have another device is a failure, and no result."""

    distributed: Literal["auto", "ezpz", "torch"] = "auto"
    """Who sets up several ranks."""

    seed: int = 0
    """Seed of the order of launches and of points in a launch."""

    launcher: LauncherName | Literal["auto"] = "auto"
    """Who starts ranks. `auto` asks the machine; `none` starts one rank by itself."""

    launcher_args: str = ""
    """Further options of the launcher, as one would type them: --launcher-args="--map-by core" on the command line."""

    timeout_s: float = 120.0
    """How long a collective operation waits for other ranks."""

    launch_timeout_s: float = 900.0
    """After how many seconds a launch is ended and counts as failed."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        if self.machine_name is not None:
            check_name("machine_name", self.machine_name)
        for field in ("nodes", "ranks_per_node", "global_batch_sizes", "local_batch_sizes", "num_features"):
            values = getattr(self, field)
            if not values and field not in ("global_batch_sizes", "local_batch_sizes"):
                raise ValueError(f"{field} is empty: give at least one number")
            for value in values:
                if not 1 <= value <= _LARGEST:
                    raise ValueError(f"{field} has {value}: give whole numbers from 1 to {_LARGEST:,}")
            if len(set(values)) < len(values):
                raise ValueError(f"{field} is {', '.join(map(str, values))}: give each number once")
        if not self.global_batch_sizes and not self.local_batch_sizes:
            raise ValueError("global_batch_sizes and local_batch_sizes are both empty: give one of them a number")
        for field in ("window_s", "base_learning_rate", "target_excess", "timeout_s", "launch_timeout_s"):
            if not 0 < getattr(self, field) <= _LARGEST:
                raise ValueError(f"{field} is {getattr(self, field)}: give a number above 0")
        if not 1 <= self.repeats <= 10_000:
            raise ValueError(f"repeats is {self.repeats}: give a whole number from 1 to 10,000")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: give 0 or more, and less than 2³²")
        words("launcher_args", self.launcher_args)
        for combination in self.combinations:
            if combination != "all" and combination not in COMBINATIONS:
                raise ValueError(f"combinations has {combination}: choose of all, {', '.join(COMBINATIONS)}")
        self._check_sizes()

    def _check_sizes(self) -> None:
        largest_world = max(self.nodes) * max(self.ranks_per_node)
        for size in self.global_batch_sizes:
            if size < largest_world:
                raise ValueError(
                    f"global_batch_sizes has {size}, and the largest world size is {largest_world}: some ranks would "
                    "have no rows; give larger batches or fewer ranks"
                )
        largest = self.largest_batch
        if self.num_rows is not None and self.num_rows < largest:
            raise ValueError(f"num_rows is {self.num_rows}, and the largest global batch is {largest}: give more rows")

    @property
    def largest_batch(self) -> int:
        """The most rows that any step takes."""
        largest_world = max(self.nodes) * max(self.ranks_per_node)
        return max((*self.global_batch_sizes, *(size * largest_world for size in self.local_batch_sizes)))

    @property
    def effective_num_rows(self) -> int:
        """Rows of the made data."""
        solved = [4 * count for count in self.num_features if count <= MOST_SOLVED_FEATURES]
        return self.num_rows or max(REAL_NUM_ROWS, self.largest_batch, *solved)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that a launch's numbers depend on: launches of different campaigns can be compared by it."""
        chosen = {name: getattr(self, name) for name in _MEASURED_WITH}
        return "sha256:" + hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Setting:
    """What one point measures, at whatever world size; `sync` is none for a single rank."""

    optimizer: Literal["manual", "sgd"]
    sync: Literal["allreduce", "ddp", "mpi", "none"]
    num_features: int
    global_batch_size: int

    @property
    def name(self) -> str:
        """A name for folders."""
        return f"{self.optimizer}-{self.sync}-features-{self.num_features}-batch-{self.global_batch_size}"


@dataclass(frozen=True)
class Launch:
    """One start of ranks in one block: it measures every setting, one after the other, in an order of its own."""

    block: int
    num_nodes: int
    ranks_per_node: int
    seed: int

    @property
    def world_size(self) -> int:
        """Its ranks."""
        return self.num_nodes * self.ranks_per_node

    @property
    def id(self) -> str:
        """The name of its folder."""
        return f"block-{self.block:02}-nodes-{self.num_nodes}-ranks-{self.world_size}"


def launches(campaign: Campaign) -> list[Launch]:
    """Every launch, block after block, in a random order within each: what drifts over hours then meets all alike."""
    shapes = [(nodes, ranks) for nodes in campaign.nodes for ranks in campaign.ranks_per_node]
    ordered = []
    for block in range(campaign.repeats):
        stream = np.random.default_rng([campaign.seed, block])
        for place in stream.permutation(len(shapes)).tolist():
            nodes, ranks = shapes[place]
            seed = int(np.random.default_rng([campaign.seed, block, nodes, ranks]).integers(2**31))
            ordered.append(Launch(block, nodes, ranks, seed))
    return ordered


def settings(campaign: Campaign, world_size: int, *, by_mpi: bool = True) -> list[Setting]:
    """What a launch of this world size measures; strong and weak settings that coincide are measured once.

    `by_mpi` says whether MPI can average gradients there: `all` combinations are then all four.
    """
    batches = sorted({*campaign.global_batch_sizes, *(size * world_size for size in campaign.local_batch_sizes)})
    chosen = [c for c in COMBINATIONS if by_mpi or not c.endswith("mpi")] if "all" in campaign.combinations else [
        c for c in COMBINATIONS if c in campaign.combinations]  # fmt: skip
    pairs = dict.fromkeys(tuple(c.split("/")) if world_size > 1 else (c.split("/")[0], "none") for c in chosen)
    return [
        Setting(optimizer, sync, num_features, batch)  # type: ignore[arg-type]
        for num_features in campaign.num_features
        for batch in batches
        for optimizer, sync in pairs
    ]


def estimated_s(campaign: Campaign, launch: Launch) -> float:
    """About how long a launch takes: start-up, then for each point a window with averaging and half of one without."""
    windows = 1.0 if launch.world_size == 1 else 1.5
    point_s = windows * campaign.window_s + _BESIDE_WINDOW_S
    return _START_UP_S + _ALL_REDUCE_S + point_s * len(settings(campaign, launch.world_size))


def node_hours(campaign: Campaign, chosen: Sequence[Launch]) -> float:
    """About what launches cost: whole nodes, as they are charged."""
    return sum(estimated_s(campaign, launch) * launch.num_nodes for launch in chosen) / 3600


def read_campaign(path: Path) -> dict[str, Any]:
    """The keys and values of a campaign file. Raises `ValueError` for a file that is none."""
    import yaml

    if not path.is_file():
        what = "is no regular file" if path.exists() else "does not exist"
        raise ValueError(f"campaign is {path}, which {what}: give a YAML file, such as jobs/campaigns/local.yaml")
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST_FILE + 1)
        if len(text) > _LONGEST_FILE:
            raise ValueError(f"more than {_LONGEST_FILE:,} bytes")
        _refuse_nesting(yaml.compose(text, Loader=yaml.SafeLoader), yaml)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"campaign is {path}, which is no YAML of a campaign: {why}") from error
    known = [field.name for field in fields(Campaign)]
    for key in content:
        if key not in known:
            raise ValueError(f"campaign is {path}, which has {key!r}: its keys are {', '.join(known)}")
    return content


def _refuse_nesting(root: Any, yaml: Any) -> None:
    """Raise `ValueError` for what is deeper than lists of values: an alias within an alias has a size without bounds,
    which is why nodes are looked at before anything is made of them."""
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("it has no `key: value` lines, see jobs/campaigns/local.yaml")
    seen = set()
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
            raise ValueError(f"line {key.start_mark.line + 1} has no plain key")
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(item, yaml.ScalarNode) for item in items):
            raise ValueError(f"{key.value} holds more than a value or a list of values")
        if key.value in seen:
            raise ValueError(f"{key.value} is there twice")
        seen.add(key.value)


def to_yaml(campaign: Campaign) -> str:
    """The campaign file of a campaign."""
    import yaml

    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(campaign).items()}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text
