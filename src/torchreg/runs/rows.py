"""Rows on their way to the step: from the main rank's table to every device, and into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from torchreg.core.batches import Block
from torchreg.core.model import make_model, with_constant
from torchreg.data.table import Table
from torchreg.distributed.communicator import Communicator
from torchreg.distributed.rendezvous import AgreedError
from torchreg.runs.ordered import MicroBatches
from torchreg.runs.setup import RunState


def place(
    table: Table | None, state: RunState, communicator: Communicator, dtype: torch.dtype
) -> tuple[Tensor, Tensor, nn.Linear]:
    """All rows and the model before the first step, on every rank's device; only the main rank has the table.

    x is (num_rows, num_features) and y (num_rows, 1), as the model sees them.
    """
    num_features = len(state.feature_names)
    rows = torch.empty(state.plan.num_rows, num_features + 1, dtype=torch.float64)
    if table:
        rows[:, :-1] = torch.from_numpy(state.standardizer.apply(table.features))
        rows[:, -1:] = torch.from_numpy(table.target)
    rows = communicator.broadcast(rows).to(dtype)
    x, y = (part.contiguous().to(communicator.device) for part in (rows[:, :-1], rows[:, -1:]))
    weight, bias = state.start
    return x, y, make_model(weight.tolist(), bias, device=communicator.device, dtype=dtype)


def manual_rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The rows as paper has them: a = (x, 1), (rows, num_features + 1), and y as a vector (rows,)."""
    return with_constant(x), y[:, 0].contiguous()


def rows_of_steps(
    block: Block, x: Tensor, y: Tensor, *, copied: bool = False
) -> Iterator[tuple[int, MicroBatches, int]]:
    """Step, this rank's micro-batches and the step's rows on all ranks, for every step of a block.

    The block's rows are gathered at once; the micro-batches are views of them, or `copied`: BLAS may round differently
    where memory is aligned differently.
    """

    def cut(rows: Tensor, sizes: list[int]) -> Sequence[Tensor]:
        return [piece.clone() for piece in rows.split(sizes)] if copied else rows.split(sizes)

    if isinstance(block.rows, slice):
        sizes = block.micro_batch_sizes[0]
        pieces = list(zip(cut(x[block.rows], sizes), cut(y[block.rows], sizes), strict=True))
        for step, num_samples in enumerate(block.num_samples, start=block.first_step):
            yield step, pieces, num_samples
        return
    rows = torch.from_numpy(block.rows)
    if x.is_cuda:
        rows = rows.pin_memory().to(x.device, non_blocking=True)  # from pageable memory the copy waits for the device
    rows = rows.to(x.device)
    flat_sizes = [size for sizes in block.micro_batch_sizes for size in sizes]
    pairs = zip(cut(x.index_select(0, rows), flat_sizes), cut(y.index_select(0, rows), flat_sizes), strict=True)
    steps = zip(block.micro_batch_sizes, block.num_samples, strict=True)
    for step, (sizes, num_samples) in enumerate(steps, start=block.first_step):
        yield step, list(islice(pairs, len(sizes))), num_samples


def torch_dtype(choice: Literal["auto", "float32", "float64"], device: torch.device) -> torch.dtype:
    """The precision that a choice means on a device. Raises `AgreedError` for one that the device does not have."""
    if choice == "auto":
        return torch.float64 if device.type == "cpu" else torch.float32
    if choice == "float64" and device.type == "mps":
        raise AgreedError("dtype is float64, which the mps device does not have: choose --dtype float32")
    return torch.float32 if choice == "float32" else torch.float64
