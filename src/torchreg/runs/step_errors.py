"""The squared errors of steps: kept on the device, and added up over ranks many at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchreg.distributed.communicator import Communicator

MOST_WAITING = 100
"""Steps, at most, between two sums over ranks: how soon all ranks know of a divergence or a signal."""


def accumulable(values: Tensor) -> Tensor:
    """The values in float64, where the device has it: sums over many rows lose digits otherwise."""
    return values if values.device.type == "mps" else values.double()


class StepErrors:
    """This rank's squared errors of the steps since the last sum, and the steps' rows over all ranks.

    Every step appends to `errors` and to `num_samples`; until `add_up` nothing synchronises or is reduced. `settled`
    are errors that were added up over ranks already and come before `errors`; they are 0 on all but the main rank.
    Beside the errors `num_signals` numbers can be added up.
    """

    def __init__(self, communicator: Communicator, num_signals: int = 0) -> None:
        self.errors: list[Tensor] = []
        self.settled: list[float] = []
        self.num_samples: list[int] = []
        self._sums = accumulable(torch.zeros(MOST_WAITING + num_signals, device=communicator.device))
        self._all_reduce = communicator.all_reduce(self._sums, communicator.quick_sync)

    def add_up(self, signals: Sequence[float] = ()) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Over all ranks: the squared error of each step that waits, and the signals. All ranks call it together."""
        settled, count = len(self.settled), len(self.num_samples)
        self._sums.zero_()
        if settled:
            self._sums[:settled] = torch.tensor(self.settled, dtype=self._sums.dtype)
        if self.errors:
            self._sums[settled:count] = torch.stack(self.errors)
        for place, signal in enumerate(signals, start=MOST_WAITING):
            if signal:
                self._sums[place] = signal
        self._all_reduce()
        sums: NDArray[np.float64] = self._sums.cpu().double().numpy()
        return sums[:count], sums[MOST_WAITING:]

    def clear(self) -> None:
        """Nothing waits any more."""
        for waiting in (self.errors, self.settled, self.num_samples):
            waiting.clear()
