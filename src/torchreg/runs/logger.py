"""The losses of the steps: kept on the device, summed over ranks every `log_every` steps, judged, and written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchreg.console import Reporter
from torchreg.core.batches import Batch
from torchreg.core.train import in_float64
from torchreg.distributed.communicator import Communicator
from torchreg.distributed.stopping import REASONS, StopRequest
from torchreg.runs.config import RunConfig
from torchreg.runs.record import RunDirectory
from torchreg.runs.setup import RunState

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

    def all_reduce(self, signals: Sequence[float] = ()) -> tuple[list[float], list[float]]:
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
        sums: list[float] = self._sums.tolist()
        return sums[:count], sums[MOST_WAITING:]

    def restore(self, reduced: Sequence[float], num_samples: Sequence[int]) -> None:
        """Hold squared errors that are summed over ranks already."""
        self.errors.clear()
        self.reduced = list(reduced) if self._communicator.is_main else [0.0] * len(reduced)
        self.num_samples = list(num_samples)

    def clear(self) -> None:
        """Forget all steps."""
        self.restore([], [])


class Clock:
    """Seconds of training on this rank: set-up, evaluation and saving do not count."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._start_s = time.perf_counter()

    def start(self, elapsed_s: float) -> None:
        """Start on all ranks together, at the seconds that earlier processes of the run have taken."""
        self._communicator.synchronize()
        self._communicator.barrier()
        self._start_s = time.perf_counter() - elapsed_s

    def elapsed_s(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The body is not training: the clock stops, once the device is idle."""
        self._communicator.synchronize()
        pause_s = time.perf_counter()
        yield
        self._start_s += time.perf_counter() - pause_s


@dataclass
class StopRule:
    """Why a run stops, decided from numbers that are equal on all ranks.

    `divergence_threshold` bounds the loss of a step and on all rows; at `target_loss` on all rows training may stop.
    """

    divergence_threshold: float
    target_loss: float | None
    request: StopRequest | None
    stopped_by: Literal["steps", "target", "divergence", "request"] = "steps"
    diverged_at_step: int | None = None

    def requests(self) -> list[bool]:
        """For each of the `REASONS`, whether it is this rank's reason to stop."""
        reason = self.request.reason if self.request and self.request.is_due() else None
        return [reason == each for each in REASONS]

    def agree(self, num_ranks: Sequence[float]) -> None:
        """Stop if any rank requests it; `num_ranks` counts them by reason."""
        if any(num_ranks) and self.stopped_by == "steps":
            self.stopped_by = "request"
            if self.request:
                self.request.reason = next(each for each, num in zip(REASONS, num_ranks, strict=True) if num)

    def check(self, losses: Sequence[float], first_step: int) -> int | None:
        """The index of the first loss that is not finite or beyond the threshold; the run then stops."""
        for index, loss in enumerate(losses):
            if not loss <= self.divergence_threshold:
                self.stopped_by, self.diverged_at_step = "divergence", first_step + index
                return index
        return None

    def check_full_loss(self, loss: float, step: int) -> None:
        """Stop if the loss on all rows after `step` is at the target or beyond the threshold."""
        if self.check([loss], step) is None and self.target_loss is not None and loss <= self.target_loss:
            self.stopped_by = "target"


@dataclass
class Logger:
    """Takes the squared error of each step, and returns whether to stop: the `log` of `torchreg.core.train.fit`.

    Between two flushes nothing synchronises or communicates. Sums over ranks decide, so that all stop after one step.
    """

    config: RunConfig
    state: RunState
    communicator: Communicator
    directory: RunDirectory | None
    reporter: Reporter
    stop: StopRequest | None
    loss_on_all_rows: Callable[[], float]
    checkpoint_is_due: bool = False
    num_steps: int = 0
    num_samples: int = 0
    loss: float = math.nan
    train_time_s: float = 0.0

    def __post_init__(self) -> None:
        self.rule = StopRule(self.state.divergence_threshold, self.state.target_loss, self.stop)
        self.clock = Clock(self.communicator)
        self._buffer = LossBuffer(self.communicator, num_signals=1 + len(REASONS))
        self._flush_step = 0
        self._saved_s = time.perf_counter()

    def start(self, num_steps: int, progress: Mapping[str, Any] | None) -> None:
        """Start the clock on all ranks together, after `num_steps` steps and with the `progress` of a checkpoint."""
        self.num_steps = num_steps
        if progress:
            errors = [float.fromhex(error) for error in progress["waiting_errors"]]
            self._buffer.restore(errors, progress["waiting_samples"])
            self.num_samples = progress["num_samples"]
        self._plan_flush()
        if self.stop:
            self.stop.nothing_to_save = False
        self.clock.start(progress["elapsed_s"] if progress else 0.0)

    def finish(self) -> None:
        """Stop the clock, on the slowest rank, and evaluate the last update, which no step has seen."""
        self.communicator.synchronize()
        self.train_time_s = self.communicator.largest(self.clock.elapsed_s())
        self.loss = self.loss_on_all_rows()
        if self.rule.stopped_by in ("steps", "target"):
            self.rule.check([self.loss], self.num_steps - 1)

    @contextmanager
    def saving(self) -> Iterator[dict[str, Any]]:
        """What a checkpoint needs for `start`; the body saves it. Sums the waiting errors over ranks."""
        with self.clock.paused():
            errors = self._all_reduce()
            self._buffer.restore(errors, self._buffer.num_samples)
            yield {
                "waiting_errors": [error.hex() for error in errors],  # may be infinite, which JSON cannot express
                "waiting_samples": list(self._buffer.num_samples),
                "num_samples": self.num_samples,
                "elapsed_s": self.clock.elapsed_s(),
            }
        self.checkpoint_is_due, self._saved_s = False, time.perf_counter()

    def __call__(self, batch: Batch, squared_error: Tensor) -> bool:
        """Take this rank's part of a batch's squared error; True when training is to stop after it."""
        self._buffer.append(batch, squared_error)
        return batch.step >= self._flush_step and self._flush(batch.step)

    def _plan_flush(self) -> None:
        """Flush at the next line of metrics, or when enough steps wait."""
        log_every, first = self.state.log_every, self.num_steps
        next_line = first // log_every * log_every + log_every - 1
        full = first - len(self._buffer.num_samples) + MOST_WAITING - 1
        self._flush_step = min(next_line, self.state.schedule.num_steps - 1, full)

    def _all_reduce(self) -> list[float]:
        """The squared errors of the waiting steps over all ranks; the ranks agree on whether to save and to stop."""
        every_s = self.config.checkpoint_every_s
        save = every_s is not None and self.communicator.is_main and time.perf_counter() - self._saved_s >= every_s
        errors, signals = self._buffer.all_reduce((save, *self.rule.requests()))
        self.checkpoint_is_due = bool(signals[0])
        self.rule.agree(signals[1:])
        return errors

    def _flush(self, step: int) -> bool:
        num_steps, counts = self.state.schedule.num_steps, self._buffer.num_samples
        is_logged = (step + 1) % self.state.log_every == 0 or step == num_steps - 1
        losses = [error / count for error, count in zip(self._all_reduce(), counts, strict=True)]
        first, index = step + 1 - len(counts), len(counts) - 1
        self.num_steps = step + 1
        self.num_samples += sum(counts)
        self._buffer.clear()
        self._plan_flush()
        diverged = self.rule.check(losses, first)
        if diverged is not None:
            index, is_logged = diverged, True
        if is_logged:
            full_loss = None
            if diverged is None and (self.config.log_full_loss or self.state.target_loss is not None):
                with self.clock.paused():
                    full_loss = self.loss_on_all_rows()
                self.rule.check_full_loss(full_loss, step)
            if self.directory:
                self.directory.append_metrics(self._line(first + index, losses[index], full_loss))
                self.reporter.progress(step + 1, num_steps, losses[index])
        return self.rule.stopped_by != "steps"

    def _line(self, step: int, loss: float, full_loss: float | None) -> dict[str, float | int | None]:
        weight, bias = self.state.schedule(step)
        line: dict[str, float | int | None] = {
            "step": step,
            "epoch": (step + 1) / self.state.plan.steps_per_epoch,
            "num_samples": self.num_samples,
            "loss": loss if math.isfinite(loss) else None,
            "learning_rate_weight": weight,
            "learning_rate_bias": bias,
            "time_s": round(self.clock.elapsed_s(), 6),
        }
        if full_loss is not None:
            line["full_loss"] = full_loss if math.isfinite(full_loss) else None
        return line
