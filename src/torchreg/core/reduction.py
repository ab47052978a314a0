"""Sums over the micro-batches and ranks of a step: fast, or with bits that no world size changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
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

    `like` (num_parameters,) gives the gradient's size, dtype, device; `num_micro_batches` counts a step's on all ranks.
    """

    def __init__(
        self, communicator: Communicator, like: Tensor, num_micro_batches: int, *, reproducible: bool = False
    ) -> None:
        self.reproducible = reproducible
        self._communicator = communicator
        self._rows = like.new_zeros(num_micro_batches if reproducible else 1, len(like) + reproducible)
        self._total = like.new_zeros(len(like) + 1) if reproducible else self._rows[0]
        self.gradient = self._total[: len(like)]
        """After `sum` the gradient over the step's samples, (num_parameters,)."""
        parts = [row[: len(like)] for row in self._rows]
        self._parts = parts if reproducible else parts * num_micro_batches

    def sum(self, batch: Batch, add_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Complete `gradient`; return this rank's part of the squared error.

        `add_gradient(x, y, part)` adds the gradient of a micro-batch to `part` (num_parameters,) and returns its
        squared error. In `reproducible` the main rank's part of the squared error is the whole.
        """
        self._rows.zero_()
        first = batch.first_micro_batch
        squared_errors = []
        parts = self._parts[first : first + len(batch.micro_batches)] if self.reproducible else self._parts
        for (x, y), part in zip(batch.micro_batches, parts):  # noqa: B905 - strict= takes time
            squared_errors.append(add_gradient(x, y, part))
        if not self.reproducible:
            self._communicator.all_reduce(self._rows)
            return reduce(torch.add, squared_errors)
        if squared_errors:
            self._rows[first : first + len(squared_errors), -1] = torch.stack(squared_errors)
        self._communicator.all_reduce(self._rows)
        torch.sum(self._rows, dim=0, out=self._total)
        squared_error = self._total[-1]
        return squared_error.clone() if self._communicator.rank == 0 else torch.zeros_like(squared_error)
