"""When a run stops: at its last step or target, when it diverges, or early, on a signal or near the end of its job."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the command line imports this module, and starts without NumPy
    import numpy as np
    from numpy.typing import NDArray

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_LIMIT_IS_NEAR, _JOB_END_IS_NEAR = "the time limit is near", "the end of the job is near"
REASONS = (*(number.name for number in SIGNALS), _LIMIT_IS_NEAR, _JOB_END_IS_NEAR)
"""All values of `StopRequest.reason`."""

_MOST_MARGIN_S = 60.0


class StopRule:
    """Why a run stops, decided from numbers that are equal on all ranks.

    `divergence_threshold` bounds the loss of a step and on all rows; `target_loss` is the loss on all rows at which
    training may stop.
    """

    num_signals = len(REASONS)

    def __init__(self, divergence_threshold: float, target_loss: float | None, request: StopRequest | None) -> None:
        self.stopped_by: Literal["steps", "target", "divergence", "request"] = "steps"
        self.diverged_at_step: int | None = None
        self._divergence_threshold = divergence_threshold
        self._target_loss = target_loss
        self._request = request

    def start(self) -> None:
        """Training starts: from now on an interrupted run has something to save."""
        if self._request:
            self._request.nothing_to_save = False

    def requests(self) -> list[bool]:
        """For each of the `REASONS`, whether it is this rank's reason to stop."""
        reason = self._request.reason if self._request and self._request.is_due() else None
        return [reason == each for each in REASONS]

    def agree(self, num_ranks: Sequence[float]) -> None:
        """Stop if any rank requests it; `num_ranks` counts them by reason."""
        if any(num_ranks) and self.stopped_by == "steps":
            self.stopped_by = "request"
            if self._request:
                self._request.reason = next(each for each, num in zip(REASONS, num_ranks, strict=True) if num)

    def first_diverged(self, losses: NDArray[np.float64], first_step: int) -> int | None:
        """The index of the first loss that is not finite or beyond the threshold; the run then stops."""
        fine = losses <= self._divergence_threshold
        if fine.all():
            return None
        index = int(fine.argmin())
        self.stopped_by, self.diverged_at_step = "divergence", first_step + index
        return index

    def check_full_loss(self, loss: float, step: int) -> None:
        """Stop if the loss on all rows after `step` is at the target or beyond the threshold."""
        if self._target_loss is not None and loss <= self._target_loss:
            self.stopped_by = "target"
        elif not loss <= self._divergence_threshold:
            self.stopped_by, self.diverged_at_step = "divergence", step

    def check_last_loss(self, loss: float, step: int) -> None:
        """Check the loss after the last update, which no step has seen."""
        if self.stopped_by in ("steps", "target") and not loss <= self._divergence_threshold:
            self.stopped_by, self.diverged_at_step = "divergence", step


class StopRequest:
    """Records a signal, and knows when the job's time is nearly over.

    A context manager: inside, the signals only set a flag, so that training can end its step, save, and leave. Time is
    nearly over when less than a minute of it is left, or a tenth of it where that is less.

    After the first request further signals change nothing, also after the context: the first rank that leaves with a
    code other than 0 makes srun send SIGTERM to the others, whose code would then be that of the signal.
    """

    def __init__(
        self,
        time_limit_s: float | None = None,
        environ: Mapping[str, str] = os.environ,
        *,
        nothing_to_save: bool = False,
    ) -> None:
        """`time_limit_s` counts from now; without it the scheduler's end of the job counts, where it can be known.

        While there is `nothing_to_save` Ctrl-C interrupts as usual.
        """
        self.reason: str | None = None
        self.nothing_to_save = nothing_to_save
        self._signals_before: dict[signal.Signals, Any] = {}
        self._end_s, self._what = _end_of_time(time_limit_s, environ)

    def is_due(self) -> bool:
        """Whether this process has a `reason` to stop."""
        if self.reason is None and self._end_s is not None and time.monotonic() >= self._end_s:
            self.reason = self._what
        return self.reason is not None

    def left_s(self) -> float | None:
        """Seconds until time is nearly over; None where that is not known."""
        return None if self._end_s is None else self._end_s - time.monotonic()

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            before = signal.getsignal(number)
            # nohup ignores SIGHUP on purpose. A shell ignores SIGINT for background processes, such as an mpiexec that
            # a job script starts: that one is handled.
            if number is not signal.SIGHUP or before != signal.SIG_IGN:
                self._signals_before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.reason is None:
            for number, handler in self._signals_before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        before = self._signals_before[signal.Signals(number)]
        if number == signal.SIGINT and self.nothing_to_save and self.reason is None and callable(before):
            before(number, frame)
            return
        self.reason = self.reason or signal.Signals(number).name


def ignore_signals() -> None:
    """Ignore the signals that request an end, in a process that is ending: Python removes its handlers at exit."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_of_time(time_limit_s: float | None, environ: Mapping[str, str]) -> tuple[float | None, str]:
    """When to stop, on the monotonic clock, and the reason."""
    what = _LIMIT_IS_NEAR
    if time_limit_s is None:
        what = _JOB_END_IS_NEAR
        end = environ.get("SLURM_JOB_END_TIME", "")  # seconds since 1970; OpenPBS sets no such variable
        if not end.isdecimal():
            return None, what
        time_limit_s = int(end) - time.time()
    return time.monotonic() + time_limit_s - min(_MOST_MARGIN_S, 0.1 * time_limit_s), what
