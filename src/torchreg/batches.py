"""Which rows, on which rank, in which step: a pure function of (seed, step), the same at every world size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

DEFAULT_LOCAL_BATCH_SIZE = 64

_BLOCK_ROWS = 65_536  # rows gathered at once on one rank
_BLOCK_STEPS = 1_024
_DRAWS = 64  # steps that share one generator in random sampling


@dataclass(frozen=True)
class Block:
    """Some consecutive steps of one rank.

    `rows` are the table's rows of all its steps, one after another; in `full` sampling a slice, the same rows in
    every step. `micro_batch_sizes[i]` are the sizes of the pieces of step `first_step + i`
    on this rank, at least one piece (of no rows where the share is empty, so that every rank takes part in
    every step). `step_rows[i]` counts the rows of that step over all ranks.
    """

    first_step: int
    rows: Rows | slice
    micro_batch_sizes: list[list[int]]
    step_rows: list[int]


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
    ) -> BatchPlan:
        """The plan for one of `global_batch_size` and `local_batch_size` (by default 64 rows a rank).

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
        return cls(num_rows, world_size, batch_size, micro_batch_size, sampling, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass: the short last batch counts in `shuffle`; `random` makes only whole ones."""
        if self.sampling == "random":
            return self.num_rows // self.global_batch_size
        return math.ceil(self.num_rows / self.global_batch_size)

    @property
    def local_batch_size(self) -> int:
        """The most rows that any rank has in one step."""
        return math.ceil(self.global_batch_size / self.world_size)

    @property
    def accumulation_steps(self) -> int:
        """The most micro-batches that any rank has in one step."""
        return math.ceil(self.local_batch_size / (self.micro_batch_size or self.local_batch_size))

    def share(self, num_rows: int, rank: int) -> slice:
        """A rank's part of `num_rows` rows: contiguous, the first ranks one row more where it does not divide."""
        each, more = divmod(num_rows, self.world_size)
        start = rank * each + min(rank, more)
        return slice(start, start + each + (rank < more))

    def rows_of_step(self, step: int) -> Rows:
        """The table's rows that make a step, over all ranks."""
        if self.sampling == "full":
            return np.arange(self.num_rows)
        if self.sampling == "shuffle":
            epoch, place = divmod(step, self.steps_per_epoch)
            start = place * self.global_batch_size
            return self._permutation(epoch)[start : start + self.global_batch_size]
        return self._draws(step // _DRAWS)[step % _DRAWS]

    def blocks(self, rank: int, start: int, stop: int) -> Iterator[Block]:
        """The steps start..stop−1 of one rank, in blocks whose rows are gathered at once."""
        if self.sampling == "full":
            steps_per_block, source = _BLOCK_STEPS, stop
        else:
            steps_per_block = min(_BLOCK_STEPS, max(1, _BLOCK_ROWS // self.local_batch_size))
            source = self.steps_per_epoch if self.sampling == "shuffle" else _DRAWS
        while start < stop:
            end = min(stop, start + steps_per_block, (start // source + 1) * source)
            step_rows = [self._step_rows(step) for step in range(start, end)]
            pieces = {count: self._pieces(self.share(count, rank)) for count in set(step_rows)}
            yield Block(start, self._rows(start, end, rank), [pieces[count] for count in step_rows], step_rows)
            start = end

    def _rows(self, start: int, stop: int, rank: int) -> Rows | slice:
        """One rank's rows of consecutive steps that share an epoch or a generator."""
        if self.sampling == "full":
            return self.share(self.num_rows, rank)
        if self.sampling == "shuffle":
            epoch, place = divmod(start, self.steps_per_epoch)
            order, size = self._permutation(epoch), self.global_batch_size
            steps = [order[i * size : (i + 1) * size] for i in range(place, place + stop - start)]
        else:
            draws, place = self._draws(start // _DRAWS), start % _DRAWS
            steps = list(draws[place : place + stop - start])
        return np.concatenate([rows[self.share(len(rows), rank)] for rows in steps])

    def _step_rows(self, step: int) -> int:
        if self.sampling == "shuffle" and (step + 1) % self.steps_per_epoch == 0:
            return self.num_rows - (self.steps_per_epoch - 1) * self.global_batch_size
        return self.global_batch_size

    def _pieces(self, share: slice) -> list[int]:
        size = share.stop - share.start
        piece = self.micro_batch_size or max(size, 1)
        return [min(piece, size - start) for start in range(0, size, piece)] or [0]

    def _permutation(self, epoch: int) -> Rows:
        return _permutation(self.num_rows, self.seed, epoch)

    def _draws(self, block: int) -> Rows:
        return _draws(self.num_rows, self.global_batch_size, self.seed, block)


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> Rows:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


@lru_cache(maxsize=2)
def _draws(num_rows: int, batch_size: int, seed: int, block: int) -> Rows:
    generator = np.random.default_rng([seed, block])
    return np.stack([generator.choice(num_rows, batch_size, replace=False, shuffle=False) for _ in range(_DRAWS)])
