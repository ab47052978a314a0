"""Sums whose bits do not depend on the number of ranks."""

# No `from __future__ import annotations`: DistributedDataParallel reads the hook's annotations as types.
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket

DDP_BUCKET_BYTES = 1 << 20
"""What DistributedDataParallel reduces at once, at first; more gradients would come in several pieces."""


class OrderedSum:
    """Adds up what each micro-batch of a step has, in the micro-batches' own order, whichever rank computed it.

    Every rank writes its micro-batches into their rows of a matrix of zeros. Adding the matrices over ranks is exact in
    any order, because x + 0 = x; then each rank adds the rows in the same order. The price is a message as many times
    longer as a step has micro-batches. `num_numbers` are those of one micro-batch; `adder` makes what adds a tensor
    over ranks.
    """

    def __init__(
        self, num_numbers: int, most_pieces: int, like: Tensor, adder: Callable[[Tensor], Callable[[], None]]
    ) -> None:
        self._matrix = torch.zeros(most_pieces, num_numbers, dtype=like.dtype, device=like.device)
        self._all_reduce = adder(self._matrix)
        self._next = self._num_pieces = 0

    def start(self, first: int, num_pieces: int) -> None:
        """Begin a step of `num_pieces` micro-batches, of which this rank's are `first`, `first` + 1, …"""
        self._matrix.zero_()
        self._next, self._num_pieces = first, num_pieces

    def put(self, parts: Sequence[Tensor]) -> None:
        """The numbers of this rank's next micro-batch, as tensors that are laid end to end."""
        torch.cat([part.detach().reshape(-1) for part in parts], out=self._matrix[self._next])
        self._next += 1

    def total(self) -> Tensor:
        """The sum over all micro-batches of all ranks, (num_numbers,)."""
        self._all_reduce()
        return self._matrix[: self._num_pieces].sum(dim=0)


class OrderedGradients:
    """The gradients of a model's parameters and the squared error, added up by an `OrderedSum`.

    After each micro-batch's backward its gradient is taken out of the parameters. In the last backward of a step
    DistributedDataParallel calls `hook`; without it, on one rank, `finish` does the same. No parameter is kept here:
    DistributedDataParallel keeps this object, and would never be freed.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], most_pieces: int, adder: Callable[[Tensor], Callable[[], None]]
    ) -> None:
        self._placements = {id(parameter): place for place, parameter in enumerate(parameters)}
        self._sizes = [parameter.numel() for parameter in parameters]
        self._sum = OrderedSum(sum(self._sizes) + 1, most_pieces, parameters[0].detach(), adder)
        self._error: Tensor | None = None
        self._total: Tensor | None = None

    def start(self, first: int, num_pieces: int) -> None:
        """Begin a step; see `OrderedSum.start`."""
        self._sum.start(first, num_pieces)
        self._total = None

    def expect(self, error: Tensor | None) -> None:
        """Before a backward: the squared error that it differentiates, or None for one of no rows."""
        self._error = None if error is None else error.detach()

    def take(self, parameters: Sequence[nn.Parameter]) -> None:
        """After a backward: take its gradient out of the parameters, unless the hook has done so."""
        if self._total is None:
            self._put([parameter.grad for parameter in parameters])
            for parameter in parameters:
                parameter.grad = None

    def finish(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Leave the step's gradient in the parameters, and return its squared error over all ranks."""
        if self._total is None:
            self._total = self._sum.total()
            for parameter, gradient in zip(parameters, self._split(), strict=True):
                parameter.grad = gradient.view_as(parameter)
        return self._total[-1]

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """A communication hook of DistributedDataParallel: the last micro-batch's gradient in, the step's sum out."""
        placed = zip(bucket.parameters(), bucket.gradients(), strict=True)
        gradients = [gradient for _, gradient in sorted(placed, key=lambda pair: self._placements[id(pair[0])])]
        self._put(gradients)
        self._total = self._sum.total()
        for gradient, summed in zip(gradients, self._split(), strict=True):
            gradient.copy_(summed.view_as(gradient))
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def _put(self, gradients: Sequence[Tensor | None]) -> None:
        if self._error is not None:
            self._sum.put([gradient for gradient in gradients if gradient is not None] + [self._error])

    def _split(self) -> Sequence[Tensor]:
        assert self._total is not None
        return self._total[:-1].split(self._sizes)


def sum_in_order(gradients: OrderedGradients, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """`OrderedGradients.hook` as a function of its state, which is what DistributedDataParallel takes."""
    return gradients.hook(bucket)
