"""Which rows, on which rank, in which step: a pure function of (seed, step), the same at every world size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

DEFAULT_LOCAL_BATCH_SIZE = 64
DEFAULT_MICRO_BATCHES = 8  # of a step in ordered reduction: enough to share, few enough to be quick

_BLOCK_ROWS = 8_192  # rows gathered at once on one rank, about
_BLOCK_STEPS = 1_024
_DRAWS = 64  # steps that share one generator in random sampling


@dataclass(frozen=True)
class Block:
    """Some consecutive steps of one rank.

    `rows` are the table's rows of all its steps, one after another; in `full` sampling a slice, the same rows in
    every step. `micro_batch_sizes[i]` are the sizes of the pieces of step `first_step + i`
    on this rank, at least one piece (of no rows where the share is empty, so that every rank takes part in
    every step). `num_samples[i]` counts the rows of that step over all ranks.
    """

    first_step: int
    rows: Rows | slice
    micro_batch_sizes: list[list[int]]
    num_samples: list[int]


@dataclass(frozen=True)
class BatchPlan:
    """The batch contract: which rows make a step, and how ranks share them.

    A step's rows depend on (seed, step) alone. Shares of ranks differ by at most one row; every row counts
    exactly once an epoch in `shuffle` sampling, whose last batch may be short. Resuming needs only the step.
    """

    num_rows: int
    world_size: int
    global_batch_size: int
    micro_batch_size: int | None
    sampling: Literal["shuffle", "random", "full"]
    seed: int
    ordered: bool = False
    """Ranks share whole micro-batches, each of which then has the same rows at every world size."""

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
        ordered: bool = False,
    ) -> BatchPlan:
        """The plan for one of `global_batch_size` and `local_batch_size` (by default 64 rows a rank).

        `reproducible` cuts a step into micro-batches before ranks share them, by default into eight.

        Raises `ValueError` with all the numbers when they cannot fit.
        """
        if global_batch_size is not None and local_batch_size is not None:
            raise ValueError(
                f"global_batch_size is {global_batch_size} and local_batch_size is {local_batch_size}: give one of them"
            )
        if sampling == "full":
            batch_size = num_rows
        elif global_batch_size is not None:
            batch_size = global_batch_size
        else:
            local_batch_size = local_batch_size or DEFAULT_LOCAL_BATCH_SIZE
            batch_size = local_batch_size * world_size
        if batch_size > num_rows:
            made_of = "" if global_batch_size else f" ({local_batch_size} rows a rank × {world_size} ranks)"
            field = "global_batch_size" if global_batch_size else "local_batch_size"
            raise ValueError(
                f"global_batch_size is {batch_size}{made_of}, more than the data's {num_rows} rows: "
                f"lower {field} or the number of ranks, or use more data"
            )
        if ordered and micro_batch_size is None:
            micro_batch_size = math.ceil(batch_size / DEFAULT_MICRO_BATCHES)
        return cls(num_rows, world_size, batch_size, micro_batch_size, sampling, seed, ordered)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass: the short last batch counts in `shuffle`; `random` makes only whole ones."""
        if self.sampling == "random":
            return self.num_rows // self.global_batch_size
        return math.ceil(self.num_rows / self.global_batch_size)

    @property
    def local_batch_size(self) -> int:
        """The most rows that any rank has in one step."""
        shard = self.shard(self.global_batch_size, 0)
        return shard.stop - shard.start

    @property
    def accumulation_steps(self) -> int:
        """The most micro-batches that any rank has in one step."""
        return math.ceil(self.local_batch_size / (self.micro_batch_size or self.local_batch_size))

    def shard(self, num_rows: int, rank: int) -> slice:
        """A rank's part of `num_rows` rows: contiguous, the first ranks one row more where it does not divide.

        With `reproducible` they have one micro-batch more.
        """
        unit = self.micro_batch_size if self.ordered and self.micro_batch_size else 1
        each, more = divmod(math.ceil(num_rows / unit), self.world_size)
        start = rank * each + min(rank, more)
        stop = start + each + (rank < more)
        return slice(min(start * unit, num_rows), min(stop * unit, num_rows))

    def pieces(self, num_samples: int, rank: int) -> tuple[int, int]:
        """With `reproducible`: which micro-batch of a step is the rank's first, from 0, and how many the step has."""
        assert self.micro_batch_size
        return self.shard(num_samples, rank).start // self.micro_batch_size, math.ceil(
            num_samples / self.micro_batch_size
        )

    def samples_of_step(self, step: int) -> Rows:
        """The table's rows that make a step, over all ranks."""
        group, place = divmod(step, self._steps_per_group)
        start = place * self.global_batch_size
        return self._group(group)[start : start + self.global_batch_size]

    def blocks(self, rank: int, start: int, stop: int) -> Iterator[Block]:
        """The steps start..stop−1 of one rank, in blocks whose rows are gathered at once."""
        shape = _group_shape(self, rank)
        while start < stop:
            num_steps, num_rows = 0, 0
            parts: list[Rows] = []
            sizes: list[list[int]] = []
            num_samples: list[int] = []
            while start < stop and num_steps < _BLOCK_STEPS and num_rows < _BLOCK_ROWS:
                group, place = divmod(start, shape.num_steps)
                most = max(1, _BLOCK_ROWS // self.local_batch_size)
                end = min(shape.num_steps, place + stop - start, place + most)
                if self.sampling != "full":
                    positions = shape.positions[shape.bounds[place] : shape.bounds[end]]
                    parts.append(self._group(group)[positions])
                    num_rows += len(positions)
                sizes += shape.micro_batch_sizes[place:end]
                num_samples += shape.num_samples[place:end]
                num_steps += end - place
                start += end - place
            rows = self.shard(self.num_rows, rank) if self.sampling == "full" else np.concatenate(parts)
            yield Block(start - num_steps, rows, sizes, num_samples)

    def _num_samples(self, step: int) -> int:
        if self.sampling == "shuffle" and (step + 1) % self.steps_per_epoch == 0:
            return self.num_rows - (self.steps_per_epoch - 1) * self.global_batch_size
        return self.global_batch_size

    def _pieces(self, shard: slice) -> list[int]:
        size = shard.stop - shard.start
        piece = self.micro_batch_size or max(size, 1)
        return [min(piece, size - start) for start in range(0, size, piece)] or [0]

    @property
    def _steps_per_group(self) -> int:
        """Steps whose rows are drawn together: an epoch, or a number of random draws."""
        return {"full": 1, "shuffle": self.steps_per_epoch, "random": _DRAWS}[self.sampling]

    def _group(self, group: int) -> Rows:
        """The rows of all steps of a group, one step after another, over all ranks."""
        if self.sampling == "full":
            return np.arange(self.num_rows)
        if self.sampling == "shuffle":
            return _permutation(self.num_rows, self.seed, group)
        return _draws(self.num_rows, self.global_batch_size, self.seed, group)


@dataclass(frozen=True)
class _GroupShape:
    """What every group of steps looks like to one rank.

    Step i of a group has the rows `positions[bounds[i]:bounds[i + 1]]` of the group's rows.
    """

    num_steps: int
    positions: Rows
    bounds: list[int]
    micro_batch_sizes: list[list[int]]
    num_samples: list[int]


@lru_cache(maxsize=4)
def _group_shape(plan: BatchPlan, rank: int) -> _GroupShape:
    num_steps = plan._steps_per_group
    num_samples = [plan._num_samples(step) for step in range(num_steps)]
    shards = [plan.shard(count, rank) for count in num_samples]
    starts = [step * plan.global_batch_size for step in range(num_steps)]
    pieces = {(shard.start, shard.stop): plan._pieces(shard) for shard in shards}
    return _GroupShape(
        num_steps,
        np.concatenate([np.arange(s + shard.start, s + shard.stop) for s, shard in zip(starts, shards, strict=True)]),
        [0, *accumulate(shard.stop - shard.start for shard in shards)],
        [pieces[shard.start, shard.stop] for shard in shards],
        num_samples,
    )


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> Rows:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


@lru_cache(maxsize=2)
def _draws(num_rows: int, batch_size: int, seed: int, block: int) -> Rows:
    generator = np.random.default_rng([seed, block])
    draws = [generator.choice(num_rows, batch_size, replace=False, shuffle=False) for _ in range(_DRAWS)]
    return np.concatenate(draws)
