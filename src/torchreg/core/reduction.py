"""Sums over the micro-batches and ranks of a step: fast, or with bits that no world size changes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from itertools import repeat
from typing import Protocol

import torch
from torch import Tensor

from torchreg.core.batches import Batch


class Communicator(Protocol):
    """What the program needs to know of the other ranks."""

    @property
    def rank(self) -> int: ...  # noqa: D102

    def all_reduce(self, tensor: Tensor) -> object:
        """Replace the tensor on every rank by its sum over ranks."""


class Reduction:
    """Sums the gradient and the squared error of a step's micro-batches, on all ranks.

    There is one algorithm for both reductions: all-reduce a matrix of partial sums, then sum its rows. In `fast` the
    matrix has one row, to which a rank adds its micro-batches. In `reproducible` it has a row for each micro-batch of
    the step, which is 0 on all ranks but one: the all-reduce is exact, because x + 0 = x, and the rows are summed in
    the same order at every world size. The price is a longer message.

    `like` (num_parameters,) gives the gradient's size, dtype and device; `num_micro_batches` those of a step on all
    ranks, or None for `fast`.
    """

    def __init__(self, communicator: Communicator, like: Tensor, num_micro_batches: int | None) -> None:
        self.reproducible = num_micro_batches is not None
        self._communicator = communicator
        self._rows = like.new_zeros(num_micro_batches or 1, len(like) + self.reproducible)
        self._parts = [row[: len(like)] for row in self._rows]
        self._total = like.new_zeros(len(like) + 1) if self.reproducible else self._rows[0]
        self.gradient = self._total[: len(like)]
        """After `all_reduce` the sum over the step's samples, (num_parameters,)."""

    def parts(self, batch: Batch) -> Iterable[Tensor]:
        """Zeroed buffers (num_parameters,), one for the gradient of each of this rank's micro-batches.

        With `fast` they are all the same one: add to it. An empty micro-batch may have none.
        """
        self._rows.zero_()
        if not self.reproducible:
            return repeat(self._parts[0])
        return self._parts[batch.first_micro_batch : batch.first_micro_batch + len(batch.micro_batches)]

    def all_reduce(self, batch: Batch, squared_errors: list[Tensor]) -> Tensor:
        """Complete `gradient`; return this rank's part of the squared error, given that of its micro-batches.

        In `reproducible` the main rank's part is the whole.
        """
        if not self.reproducible:
            self._communicator.all_reduce(self._rows)
            return reduce(torch.add, squared_errors)
        if squared_errors:
            first = batch.first_micro_batch
            self._rows[first : first + len(squared_errors), -1] = torch.stack(squared_errors)
        self._communicator.all_reduce(self._rows)
        torch.sum(self._rows, dim=0, out=self._total)
        squared_error = self._total[-1]
        return squared_error.clone() if self._communicator.rank == 0 else torch.zeros_like(squared_error)
