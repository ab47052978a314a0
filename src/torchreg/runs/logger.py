"""The losses of the steps: kept on the device, summed over ranks every `log_every` steps, written, and judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchreg.console import Reporter
from torchreg.core.batches import Batch
from torchreg.core.train import in_float64
from torchreg.distributed.communicator import Communicator
from torchreg.runs.clock import Clock
from torchreg.runs.config import TrainConfig
from torchreg.runs.record import RunDirectory
from torchreg.runs.setup import RunState
from torchreg.runs.stopping import StopRequest, StopRule

MOST_WAITING = 100
"""The most steps between two sums over ranks: how soon all ranks learn of a divergence or a signal."""


class LossBuffer:
    """This rank's squared errors of the steps since the last sum over ranks, and the steps' numbers of samples.

    Appending neither synchronises nor communicates. `reduced` are errors of earlier steps that were summed over ranks
    when a checkpoint was saved; they are 0 on all ranks but the main one.
    """

    def __init__(self, communicator: Communicator, num_signals: int = 0) -> None:
        self.errors: list[Tensor] = []
        self.reduced: list[float] = []
        self.num_samples: list[int] = []
        self._communicator = communicator
        self._sums = in_float64(torch.zeros(MOST_WAITING + num_signals, device=communicator.device))

    def append(self, batch: Batch, squared_error: Tensor) -> None:
        """Add this rank's part of a batch's squared error."""
        self.errors.append(squared_error)
        self.num_samples.append(batch.num_samples)

    def all_reduce(self, signals: Sequence[float] = ()) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Summed over ranks: the squared error of each waiting step, and `signals`. All ranks call it together."""
        num_reduced, count = len(self.reduced), len(self.num_samples)
        self._sums.zero_()
        if num_reduced:
            self._sums[:num_reduced] = torch.tensor(self.reduced, dtype=self._sums.dtype)
        if self.errors:
            self._sums[num_reduced:count] = torch.stack(self.errors)
        for index, signal in enumerate(signals, start=MOST_WAITING):
            if signal:
                self._sums[index] = signal
        self._communicator.all_reduce(self._sums)
        sums: NDArray[np.float64] = self._sums.cpu().double().numpy()
        return sums[:count], sums[MOST_WAITING:]

    def restore(self, reduced: Sequence[float], num_samples: Sequence[int]) -> None:
        """Hold squared errors that are summed over ranks already."""
        self.errors.clear()
        self.reduced = list(reduced) if self._communicator.is_main else [0.0] * len(reduced)
        self.num_samples = list(num_samples)

    def clear(self) -> None:
        """Forget all steps."""
        for waiting in (self.errors, self.reduced, self.num_samples):
            waiting.clear()


class Logger:
    """Takes the squared error of each step, and returns whether to stop: the `log` of `torchreg.core.train.fit`.

    Between two flushes nothing synchronises or communicates. All decisions come from sums over ranks, so that every
    rank stops after the same step.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: RunState,
        communicator: Communicator,
        directory: RunDirectory | None,
        reporter: Reporter,
        stop: StopRequest | None,
        loss_on_all_rows: Callable[[], float],
    ) -> None:
        self.rule = StopRule(state.divergence_threshold, state.target_loss, stop)
        self.clock = Clock(communicator.synchronize)
        self._state = state
        self._communicator = communicator
        self._directory = directory
        self._reporter = reporter
        self._loss_on_all_rows = loss_on_all_rows
        self._log_full_loss = config.run.log_full_loss or config.run.target_excess is not None
        self._buffer = LossBuffer(communicator, num_signals=1 + self.rule.num_signals)
        self._flush_step = 0
        self.wants_checkpoint: Callable[[], bool] = bool
        """Whether this rank asks for a checkpoint now."""
        self.checkpoint_is_due = False
        self.num_steps = 0
        self.num_samples = 0
        self.loss = math.nan
        self.train_time_s = 0.0

    def start(self, num_steps: int, progress: Mapping[str, Any] | None) -> None:
        """Start the clock on all ranks together, after `num_steps` steps and with the `progress` of a checkpoint."""
        self.num_steps = num_steps
        if progress:
            errors = [float.fromhex(error) for error in progress["waiting_errors"]]
            self._buffer.restore(errors, progress["waiting_samples"])
            self.num_samples = progress["num_samples"]
        self._plan_flush()
        self.rule.start()
        self._communicator.synchronize()
        self._communicator.barrier()
        self.clock.start(progress["elapsed_s"] if progress else 0.0)

    def finish(self) -> None:
        """Stop the clock, on the slowest rank, and evaluate the last update, which no step has seen."""
        self._communicator.synchronize()
        self.train_time_s = self._communicator.largest(self.clock.elapsed_s())
        self.loss = self._loss_on_all_rows()
        self.rule.check_last_loss(self.loss, self.num_steps - 1)

    def progress(self) -> dict[str, Any]:
        """What a checkpoint needs for `resume`. Sums the waiting errors over ranks."""
        errors = self._all_reduce().tolist()
        self._buffer.restore(errors, self._buffer.num_samples)
        return {
            "waiting_errors": [error.hex() for error in errors],  # may be infinite, which JSON cannot express
            "waiting_samples": list(self._buffer.num_samples),
            "num_samples": self.num_samples,
            "elapsed_s": self.clock.elapsed_s(),
        }

    def __call__(self, batch: Batch, squared_error: Tensor) -> bool:
        """Take this rank's part of a batch's squared error; True when training is to stop after it."""
        self._buffer.append(batch, squared_error)
        return batch.step >= self._flush_step and self._flush(batch.step)

    def _plan_flush(self) -> None:
        """Flush at the next line of metrics, or when enough steps wait."""
        log_every, first = self._state.log_every, self.num_steps
        next_line = first // log_every * log_every + log_every - 1
        full = first - len(self._buffer.num_samples) + MOST_WAITING - 1
        self._flush_step = min(next_line, self._state.num_steps - 1, full)

    def _all_reduce(self) -> NDArray[np.float64]:
        """The squared errors of the waiting steps over all ranks; what the ranks ask for is agreed on."""
        errors, (save, *requests) = self._buffer.all_reduce((self.wants_checkpoint(), *self.rule.requests()))
        self.checkpoint_is_due = bool(save)
        self.rule.agree(requests)
        return errors

    def _flush(self, step: int) -> bool:
        is_logged = (step + 1) % self._state.log_every == 0 or step == self._state.num_steps - 1
        counts = self._buffer.num_samples
        losses = self._all_reduce() / counts
        first, index = step + 1 - len(counts), len(counts) - 1
        self.num_steps = step + 1
        self.num_samples += sum(counts)
        self._buffer.clear()
        self._plan_flush()
        diverged = self.rule.first_diverged(losses, first)
        if diverged is not None:
            index, is_logged = diverged, True
        if is_logged:
            full_loss = None
            if self._log_full_loss and diverged is None:
                with self.clock.paused():
                    full_loss = self._loss_on_all_rows()
                self.rule.check_full_loss(full_loss, step)
            if self._directory:
                self._directory.append_metrics(self._line(first + index, float(losses[index]), full_loss))
                self._reporter.progress(step + 1, self._state.num_steps, float(losses[index]))
        return self.rule.stopped_by != "steps"

    def _line(self, step: int, loss: float, full_loss: float | None) -> dict[str, float | int | None]:
        weight, bias = self._state.schedule(step)
        line: dict[str, float | int | None] = {
            "step": step,
            "epoch": (step + 1) / self._state.plan.steps_per_epoch,
            "num_samples": self.num_samples,
            "loss": loss if math.isfinite(loss) else None,
            "learning_rate_weight": weight,
            "learning_rate_bias": bias,
            "time_s": round(self.clock.elapsed_s(), 6),
        }
        if full_loss is not None:
            line["full_loss"] = full_loss if math.isfinite(full_loss) else None
        return line
