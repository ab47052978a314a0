"""The losses of the steps: kept on the device, summed over ranks every `log_every` steps, judged, written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchreg.console import Reporter
from torchreg.distributed.communicator import Communicator
from torchreg.runs.config import TrainConfig
from torchreg.runs.record import RunDirectory
from torchreg.runs.setup import RunState
from torchreg.runs.step_errors import MOST_WAITING, StepErrors
from torchreg.runs.stopping import REASONS, StopRequest


class Metrics:
    """Takes the squared error of each step, and says when to stop.

    Between two flushes nothing synchronises or is reduced. All decisions come from sums over all ranks, so every
    rank stops in the same step. The time of a run is that of its steps: set-up, evaluation and saving do not count.
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
        self._state = state
        self._communicator = communicator
        self._directory = directory
        self._reporter = reporter
        self._stop = stop
        self._target_excess = config.target_excess
        self._log_full_loss = config.log_full_loss or config.target_excess is not None
        self._save_every_s = config.checkpoint_every_s
        self._loss_on_all_rows = loss_on_all_rows
        # Signals: whether the main rank's clock says to save, and how many ranks stop for each of the reasons.
        self._waiting = StepErrors(communicator, num_signals=1 + len(REASONS))
        self._log_every, self._last_step = state.log_every, state.num_steps - 1
        self._flush_step = 0
        self._not_timed_s = 0.0
        self._start_s = self._saved_s = time.perf_counter()
        self.save_is_due = False
        self.num_steps = 0
        self.num_samples = 0
        self.train_time_s = 0.0
        self.loss = math.nan
        self.stopped_by: Literal["steps", "target", "divergence", "request"] = "steps"
        self.diverged_at_step: int | None = None

    def start(self, num_steps: int = 0, progress: Mapping[str, Any] | None = None) -> None:
        """Start the clock on all ranks together; go on from the `progress` that was saved after `num_steps` steps."""
        self.num_steps = num_steps
        if progress:
            pending = [float.fromhex(error) for error in progress["pending_errors"]]
            self._waiting.settled = pending if self._communicator.is_main else [0.0] * len(pending)
            self._waiting.num_samples = list(progress["pending_rows"])
            self.num_samples = progress["num_samples"]
        self._plan_flush(num_steps)
        if self._stop:
            self._stop.nothing_to_save = False
        self._communicator.synchronize()
        self._communicator.barrier()
        self._saved_s = time.perf_counter()
        self._start_s = self._saved_s - (progress["elapsed_s"] if progress else 0.0)

    def note(self, step: int, error: Tensor, num_samples: int) -> bool:
        """Take this rank's squared error of a step; True when training is to stop after it."""
        waiting = self._waiting
        waiting.errors.append(error)
        waiting.num_samples.append(num_samples)
        return step >= self._flush_step and self._flush(step)

    def _plan_flush(self, first_step: int) -> None:
        """When losses are added up next: at the next line of metrics, or when enough steps wait."""
        next_line = first_step // self._log_every * self._log_every + self._log_every - 1
        num_waiting = len(self._waiting.num_samples)
        self._flush_step = min(next_line, self._last_step, first_step - num_waiting + MOST_WAITING - 1)

    def stop(self) -> None:
        """Stop the clock, on the slowest rank, and evaluate the last update, which no step has seen."""
        self._communicator.synchronize()
        self.train_time_s = self._communicator.largest(self._elapsed_s())
        self.loss = self._loss_on_all_rows()
        if self.stopped_by in ("steps", "target") and not self.loss <= self._state.divergence_threshold:
            self.stopped_by, self.diverged_at_step = "divergence", self.num_steps - 1

    def settle(self) -> dict[str, Any]:
        """Add up over ranks what waits for the next flush, and return what a later process needs to go on."""
        settled = self._add_up().tolist()
        if not self._communicator.is_main:
            settled = [0.0] * len(settled)
        self._waiting.errors.clear()
        self._waiting.settled = settled
        return {
            "pending_errors": [error.hex() for error in settled],  # may be infinite, which JSON has no word for
            "pending_rows": list(self._waiting.num_samples),
            "num_samples": self.num_samples,
            "elapsed_s": self._elapsed_s(),
        }

    def saved(self) -> None:
        """A checkpoint has been written."""
        self.save_is_due, self._saved_s = False, time.perf_counter()

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What happens inside is not training."""
        self._communicator.synchronize()
        start_s = time.perf_counter()
        yield
        self._not_timed_s += time.perf_counter() - start_s

    def _add_up(self) -> NDArray[np.float64]:
        """Squared errors over all ranks of the steps since the last flush."""
        reason = self._stop.reason if self._stop and self._stop.is_due() else None
        is_save_due = bool(
            self._save_every_s
            and self._communicator.is_main
            and time.perf_counter() - self._saved_s >= self._save_every_s
        )
        errors, (save_is_due, *asked) = self._waiting.add_up((is_save_due, *(reason == each for each in REASONS)))
        if any(asked) and self.stopped_by == "steps":
            self.stopped_by = "request"
            if self._stop:
                self._stop.agree(next(each for each, num_ranks in zip(REASONS, asked, strict=True) if num_ranks))
        self.save_is_due = bool(save_is_due)
        return errors

    def _flush(self, step: int) -> bool:
        is_logged = (step + 1) % self._log_every == 0 or step == self._last_step
        num_samples = self._waiting.num_samples
        count = len(num_samples)
        losses = self._add_up() / num_samples
        self.num_steps = step + 1
        self.num_samples += sum(num_samples)
        self._waiting.clear()
        self._plan_flush(step + 1)
        first, shown = step + 1 - count, count - 1
        fine = losses <= self._state.divergence_threshold
        if not fine.all():
            shown, is_logged = int(fine.argmin()), True
            self.stopped_by, self.diverged_at_step = "divergence", first + shown
        if not is_logged:
            return self.stopped_by != "steps"
        full_loss = self._evaluate() if self._log_full_loss and fine.all() else None
        if self._directory:
            loss = float(losses[shown])
            self._directory.note(self._line(first + shown, loss, full_loss))
            self._reporter.progress(step + 1, self._state.num_steps, loss)
        return self.stopped_by != "steps"

    def _line(self, step: int, loss: float, full_loss: float | None) -> dict[str, float | int | None]:
        learning_rate_weight, learning_rate_bias = self._state.schedule(step)
        line: dict[str, float | int | None] = {
            "step": step,
            "epoch": (step + 1) / self._state.plan.steps_per_epoch,
            "num_samples": self.num_samples,
            "loss": loss if math.isfinite(loss) else None,
            "learning_rate_weight": learning_rate_weight,
            "learning_rate_bias": learning_rate_bias,
            "time_s": round(self._elapsed_s(), 6),
        }
        if full_loss is not None:
            line["full_loss"] = full_loss if math.isfinite(full_loss) else None
        return line

    def _evaluate(self) -> float:
        with self.clock_stopped():
            loss = self._loss_on_all_rows()
        if self._target_excess is not None and loss <= self._state.closed_form.loss * (1 + self._target_excess):
            self.stopped_by = "target"
        elif not loss <= self._state.divergence_threshold:  # the update after the last step's loss
            self.stopped_by, self.diverged_at_step = "divergence", self.num_steps - 1
        return loss

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._start_s - self._not_timed_s
