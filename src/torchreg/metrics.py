"""The losses of the steps: kept on the device, summed over ranks every `log_every` steps, judged, written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from torchreg.prepare import Prepared
from torchreg.record import RunDirectory
from torchreg.runtime import Runtime
from torchreg.terminal import Reporter


def accumulable(values: Tensor) -> Tensor:
    """The values in float64, where the device has it: sums over many rows lose digits otherwise."""
    return values if values.device.type == "mps" else values.double()


class Metrics:
    """Takes the squared error of each step, and says when to stop.

    Between two flushes nothing synchronises or is reduced. All decisions come from sums over all ranks, so every
    rank stops in the same step. The time of a run is that of its steps: set-up and evaluation do not count.
    """

    def __init__(
        self,
        prepared: Prepared,
        runtime: Runtime,
        directory: RunDirectory | None,
        reporter: Reporter,
        *,
        target_excess: float | None,
        log_full_loss: bool,
        loss_on_all_rows: Callable[[], float],
    ) -> None:
        self._prepared = prepared
        self._runtime = runtime
        self._directory = directory
        self._reporter = reporter
        self._target_excess = target_excess
        self._log_full_loss = log_full_loss or target_excess is not None
        self._loss_on_all_rows = loss_on_all_rows
        self._sums = accumulable(torch.zeros(prepared.log_every, device=runtime.device))
        self._add_over_ranks = runtime.add_over_ranks(self._sums, runtime.quick_sync)
        self._errors: list[Tensor] = []
        self._step_rows: list[int] = []
        self._log_every, self._last_step = prepared.log_every, prepared.num_steps - 1
        self._not_timed_s = 0.0
        self._start_s = 0.0
        self.num_steps = 0
        self.num_samples = 0
        self.train_time_s = 0.0
        self.loss = math.nan
        self.stopped_by: Literal["steps", "target", "divergence"] = "steps"
        self.diverged_at_step: int | None = None

    def start(self) -> None:
        """Start the clock on all ranks together."""
        self._synchronize()
        self._runtime.barrier()
        self._start_s = time.perf_counter()

    def note(self, step: int, error: Tensor, step_rows: int) -> bool:
        """Take this rank's squared error of a step; True when training is to stop after it."""
        self._errors.append(error)
        self._step_rows.append(step_rows)
        if len(self._errors) < self._log_every and step < self._last_step:
            return False
        return self._flush(step)

    def stop(self) -> None:
        """Stop the clock, on the slowest rank, and evaluate the last update, which no step has seen."""
        self._synchronize()
        self.train_time_s = self._runtime.largest(self._elapsed_s())
        self.loss = self._loss_on_all_rows()
        if self.stopped_by != "divergence" and not self.loss <= self._prepared.exploding_loss:
            self.stopped_by, self.diverged_at_step = "divergence", self.num_steps - 1

    def _flush(self, step: int) -> bool:
        count = len(self._errors)
        self._sums.zero_()
        self._sums[:count] = torch.stack(self._errors)
        self._add_over_ranks()
        losses = self._sums[:count].cpu().numpy() / self._step_rows
        self.num_steps = step + 1
        self.num_samples += sum(self._step_rows)
        self._errors.clear()
        self._step_rows.clear()
        first, shown = step + 1 - count, count - 1
        fine = losses <= self._prepared.exploding_loss
        if not fine.all():
            shown = int(fine.argmin())
            self.stopped_by, self.diverged_at_step = "divergence", first + shown
        full_loss = self._evaluate() if self._log_full_loss and fine.all() else None
        if self._directory:
            loss = float(losses[shown])
            self._directory.note(self._line(first + shown, loss, full_loss))
            self._reporter.progress(step + 1, self._prepared.num_steps, loss)
        return self.stopped_by != "steps"

    def _line(self, step: int, loss: float, full_loss: float | None) -> dict[str, float | int | None]:
        rate_of_weight, rate_of_bias = self._prepared.schedule(step)
        line: dict[str, float | int | None] = {
            "step": step,
            "epoch": (step + 1) / self._prepared.plan.steps_per_epoch,
            "num_samples": self.num_samples,
            "loss": loss if math.isfinite(loss) else None,
            "learning_rate_weight": rate_of_weight,
            "learning_rate_bias": rate_of_bias,
            "time_s": round(self._elapsed_s(), 6),
        }
        if full_loss is not None:
            line["full_loss"] = full_loss if math.isfinite(full_loss) else None
        return line

    def _evaluate(self) -> float:
        start_s = time.perf_counter()
        loss = self._loss_on_all_rows()
        if self._target_excess is not None and loss <= self._prepared.closed_form.loss * (1 + self._target_excess):
            self.stopped_by = "target"
        elif not loss <= self._prepared.exploding_loss:  # the update after the last step's loss
            self.stopped_by, self.diverged_at_step = "divergence", self.num_steps - 1
        self._not_timed_s += time.perf_counter() - start_s
        return loss

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._start_s - self._not_timed_s

    def _synchronize(self) -> None:
        if self._runtime.device.type != "cpu":
            torch.get_device_module(self._runtime.device).synchronize()
