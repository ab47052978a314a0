"""Which samples, on which rank, in which step: the samples of a step are the same at every world size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # a plan is made without torch
    from torch import Tensor

Indices = NDArray[np.int64]

DEFAULT_LOCAL_BATCH_SIZE = 64
DEFAULT_MICRO_BATCHES = 8  # of a step in reproducible reduction: enough for many ranks, few enough to be fast

_CHUNK_SAMPLES = 8_192  # gathered at once on one rank, about
_CHUNK_STEPS = 1_024
_MOST_LISTED_ROWS = (
    1 << 16
)  # of a table whose whole permutation each rank makes: it costs less than a step of many ranks
_ROUNDS = 8
_DRAWS = 64  # steps that share one generator in random sampling


class Batch(NamedTuple):
    """What one rank needs for one step.

    `micro_batches` are this rank's, each x (samples, num_features) and y (samples, 1), or those of `manual_samples`. A
    rank without samples has one empty micro-batch, so that every rank takes part in every step. `num_samples` counts
    all ranks' samples. `first_micro_batch` is the position of this rank's first in the step (0 in fast reduction).
    """

    step: int
    micro_batches: Sequence[tuple[Tensor, Tensor]]
    num_samples: int
    first_micro_batch: int


@dataclass(frozen=True)
class BatchPlan:
    """Which samples make a step, and how ranks shard them.

    The samples of a step depend on the table's size, the sampling, the global batch size and (seed, step), and on
    nothing else. Shards differ by at most one sample, or micro-batch. Every row counts exactly once an epoch in
    `shuffle` sampling, whose last batch may be short. Resuming needs only the step.
    """

    num_rows: int
    world_size: int
    global_batch_size: int
    micro_batch_size: int | None
    sampling: Literal["shuffle", "random", "full"]
    seed: int
    reproducible: bool = False
    """Shards are whole micro-batches, each of which then has the same samples at every world size."""

    @classmethod
    def derive(
        cls,
        num_rows: int,
        world_size: int,
        *,
        global_batch_size: int | None = None,
        local_batch_size: int | None = None,
        micro_batch_size: int | None = None,
        sampling: Literal["shuffle", "random", "full"] = "shuffle",
        seed: int = 0,
        reproducible: bool = False,
    ) -> BatchPlan:
        """The plan for one of `global_batch_size` and `local_batch_size` (by default 64 samples on each rank).

        `reproducible` cuts a step into micro-batches before it is sharded, by default into at most eight. Raises
        `ValueError` with all the numbers when they cannot fit.
        """
        for kind, size in {"global": global_batch_size, "local": local_batch_size, "micro": micro_batch_size}.items():
            if size is not None and size < 1:
                raise ValueError(f"{kind}_batch_size is {size}: give a whole number of at least 1")
        if global_batch_size is not None and local_batch_size is not None:
            reason = f"global_batch_size is {global_batch_size} and local_batch_size is {local_batch_size}"
            raise ValueError(f"{reason}: give one of them")
        local_batch_size = local_batch_size or DEFAULT_LOCAL_BATCH_SIZE
        batch_size = num_rows if sampling == "full" else global_batch_size or local_batch_size * world_size
        if batch_size > num_rows:
            product = "" if global_batch_size else f" ({local_batch_size} samples × {world_size} ranks)"
            field = "global_batch_size" if global_batch_size else "local_batch_size"
            reason = f"global_batch_size is {batch_size}{product}, more than the data's {num_rows} rows"
            raise ValueError(f"{reason}: lower {field} or the number of ranks, or use more data")
        if reproducible and micro_batch_size is None:
            micro_batch_size = math.ceil(batch_size / DEFAULT_MICRO_BATCHES)
        return cls(num_rows, world_size, batch_size, micro_batch_size, sampling, seed, reproducible)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass: the short last batch counts in `shuffle`; `random` takes only whole ones."""
        if self.sampling == "random":
            return self.num_rows // self.global_batch_size
        return math.ceil(self.num_rows / self.global_batch_size)

    @property
    def local_batch_size(self) -> int:
        """The most samples that any rank has in one step."""
        return self.shard(self.global_batch_size, 0).stop

    @property
    def accumulation_steps(self) -> int:
        """The most micro-batches that any rank has in one step."""
        return math.ceil(self.local_batch_size / (self.micro_batch_size or self.local_batch_size))

    @property
    def num_micro_batches(self) -> int:
        """The most micro-batches of one step over all ranks, with `reproducible`."""
        return math.ceil(self.global_batch_size / (self.micro_batch_size or self.global_batch_size))

    def shard(self, num_samples: int, rank: int) -> slice:
        """A rank's part of `num_samples` samples: contiguous, the first ranks one more where it does not divide.

        With `reproducible` they have one micro-batch more.
        """
        unit = self.micro_batch_size if self.reproducible and self.micro_batch_size else 1
        each, more = divmod(math.ceil(num_samples / unit), self.world_size)
        start = rank * each + min(rank, more)
        stop = start + each + (rank < more)
        return slice(min(start * unit, num_samples), min(stop * unit, num_samples))

    def samples_of_step(self, step: int) -> Indices:
        """The table's rows that make a step, over all ranks."""
        group, position = divmod(step, self.steps_per_group)
        start = position * self.global_batch_size
        return self.rows_at(group, np.arange(start, start + self.num_samples(step)))

    def num_samples(self, step: int) -> int:
        """How many samples a step has over all ranks."""
        if self.sampling == "shuffle" and (step + 1) % self.steps_per_epoch == 0:
            return self.num_rows - (self.steps_per_epoch - 1) * self.global_batch_size
        return self.global_batch_size

    @property
    def steps_per_group(self) -> int:
        """Steps whose samples are drawn together: an epoch, or a number of random draws."""
        return {"full": 1, "shuffle": self.steps_per_epoch, "random": _DRAWS}[self.sampling]

    def rows_at(self, group: int, positions: Indices) -> Indices:
        """The rows at these positions of a group's samples, whose steps follow one another, over all ranks."""
        if self.sampling == "full":
            return positions
        if self.num_rows > _MOST_LISTED_ROWS:
            if self.sampling == "shuffle":
                return shuffled(positions, self.num_rows, self.seed, np.array([group]))
            steps, positions = np.divmod(positions, self.global_batch_size)
            return shuffled(positions, self.num_rows, self.seed, group * _DRAWS + steps)
        if self.sampling == "shuffle":
            return _permutation(self.num_rows, self.seed, group)[positions]
        return _draws(self.num_rows, self.global_batch_size, self.seed, group)[positions]


class BatchLoader:
    """This rank's batches, as tensors on its device.

    `x` (num_rows, num_features) and `y` (num_rows, …) are the whole table on the device. The samples of many steps are
    gathered at once, and micro-batches are views of them; with `reproducible` they are copies, because BLAS may round
    differently where memory is aligned differently.
    """

    def __init__(self, plan: BatchPlan, rank: int, x: Tensor, y: Tensor) -> None:
        self.plan = plan
        self.tensors = (x, y)
        counts = {plan.global_batch_size, plan.num_samples(plan.steps_per_group - 1)}
        self._shapes = {count: _Shape.of(plan, count, rank) for count in counts}

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start, …, stop − 1."""
        if self.plan.sampling == "full":
            (shape,) = self._shapes.values()
            micro_batches = list(self._cut([tensor[shape.shard] for tensor in self.tensors], shape.sizes))
            for step in range(start, stop):
                yield Batch(step, micro_batches, shape.num_samples, shape.first_micro_batch)
            return
        while start < stop:
            steps, samples = self._chunk(start, stop)
            pairs = self._cut(self._gather(samples), [size for shape in steps for size in shape.sizes])
            for _, sizes, num_samples, first_micro_batch in steps:
                yield Batch(start, list(islice(pairs, len(sizes))), num_samples, first_micro_batch)
                start += 1

    def _chunk(self, start: int, stop: int) -> tuple[list[_Shape], Indices]:
        """As many steps from `start` on as are gathered at once, and this rank's samples of them."""
        plan, steps, samples = self.plan, list[_Shape](), list[Indices]()
        most = min(_CHUNK_STEPS, max(1, _CHUNK_SAMPLES // plan.local_batch_size))
        num_whole = plan.num_rows // plan.global_batch_size if plan.sampling == "shuffle" else plan.steps_per_group
        while start < stop and len(steps) < most:
            group, position = divmod(start, plan.steps_per_group)
            # Steps of one shape in a row: whole batches, or the short last one.
            count = min(num_whole - position, stop - start, most - len(steps)) if position < num_whole else 1
            shape = self._shapes[plan.num_samples(start)]
            starts = np.arange(position, position + count) * plan.global_batch_size
            positions = np.add.outer(starts, np.arange(shape.shard.start, shape.shard.stop)).ravel()
            samples.append(plan.rows_at(group, positions))
            steps += [shape] * count
            start += count
        return steps, np.concatenate(samples)

    def _gather(self, samples: Indices) -> list[Tensor]:
        import torch

        indices, device = torch.from_numpy(samples), self.tensors[0].device
        if device.type == "cuda":
            indices = indices.pin_memory()  # from pageable memory the copy waits for the device
        indices = indices.to(device, non_blocking=True)
        return [tensor.index_select(0, indices) for tensor in self.tensors]

    def _cut(self, tensors: Sequence[Tensor], sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = (tensor.split(sizes) for tensor in tensors)
        pairs = zip(x, y, strict=True)
        return ((a.clone(), b.clone()) for a, b in pairs) if self.plan.reproducible else pairs


class _Shape(NamedTuple):
    """A step as one rank has it: its shard of the step's samples, cut into micro-batches of these sizes."""

    shard: slice
    sizes: list[int]
    num_samples: int
    first_micro_batch: int

    @classmethod
    def of(cls, plan: BatchPlan, num_samples: int, rank: int) -> _Shape:
        shard = plan.shard(num_samples, rank)
        count = shard.stop - shard.start
        size = plan.micro_batch_size or max(count, 1)
        sizes = [min(size, count - start) for start in range(0, count, size)] or [0]
        return cls(shard, sizes, num_samples, shard.start // size if plan.reproducible else 0)


def shuffled(positions: Indices, num_rows: int, seed: int, keys: Indices) -> Indices:
    """The rows at these positions of pseudorandom permutations of range(num_rows), one for each of the `keys`.

    The work is that for the positions, whatever the number of rows, which is 2³² at most. It is a Feistel network over
    two digits, whose rounds add a hash of one digit to the other; what falls beyond the table goes through it again
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    num_low = math.isqrt(num_rows - 1) + 1
    num_high = -(-num_rows // num_low)
    high, low = (digit.astype(np.uint32) for digit in np.divmod(positions, num_low))
    of_key = keys.astype(np.uint32) * np.uint32(0x9E3779B1)
    for number, of_round in enumerate(np.random.SeedSequence(seed).generate_state(_ROUNDS)):
        digit, other, size = (high, low, num_low) if number % 2 else (low, high, num_high)
        hashed = (digit + of_key) * np.uint32(0x85EBCA6B) ^ of_round  # MurmurHash3's finalizer, as far as it needs to
        hashed ^= hashed >> 15
        hashed *= np.uint32(0xC2B2AE35)
        other += (hashed >> 16) * np.uint32(size) >> 16
        np.subtract(other, size, out=other, where=other >= size)
    rows = high.astype(np.int64) * num_low + low
    if len(beyond := np.flatnonzero(rows >= num_rows)):
        rows[beyond] = shuffled(rows[beyond], num_rows, seed, np.broadcast_to(keys, rows.shape)[beyond])
    return rows


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> Indices:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


@lru_cache(maxsize=2)
def _draws(num_rows: int, batch_size: int, seed: int, group: int) -> Indices:
    generator = np.random.default_rng([seed, group])
    draws = [generator.choice(num_rows, batch_size, replace=False, shuffle=False) for _ in range(_DRAWS)]
    return np.concatenate(draws)
