"""When to stop early and save: a signal of the scheduler or of the user, or the end of the time that a job has."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_MOST_MARGIN_S = 60.0


class StopRequest:
    """Remembers a SIGTERM or SIGUSR1, and knows when the job's time is nearly over.

    A context manager: inside, the signals only set a flag, so that training can end its step, save, and leave. Time is
    nearly over when less than a minute of it is left, or a tenth of it where that is less.
    """

    def __init__(self, time_limit_s: float | None = None, environ: Mapping[str, str] = os.environ) -> None:
        """`time_limit_s` counts from now; without it the scheduler's end of the job counts, where it can be known."""
        self.reason: str | None = None
        self._signals_before: dict[signal.Signals, Any] = {}
        self._end_s, self._what = _end_of_time(time_limit_s, environ)

    def is_due(self) -> bool:
        """Whether this process has a reason to stop; `reason` then tells it."""
        if self.reason is None and self._end_s is not None and time.monotonic() >= self._end_s:
            self.reason = self._what
        return self.reason is not None

    def left_s(self) -> float | None:
        """Seconds until time is nearly over; None where nobody said when that is."""
        return None if self._end_s is None else self._end_s - time.monotonic()

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._signals_before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._signals_before.items():
            if signal.getsignal(number) == self._remember:  # else the process is leaving, and ignores them
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name


def _end_of_time(time_limit_s: float | None, environ: Mapping[str, str]) -> tuple[float | None, str]:
    """When to stop, by the monotonic clock, and what to call it."""
    what = "the time limit is near"
    if time_limit_s is None:
        what = "the end of the job is near"
        end = environ.get("SLURM_JOB_END_TIME", "")  # seconds since 1970; OpenPBS tells a job nothing of the kind
        if not end.isdecimal():
            return None, what
        time_limit_s = int(end) - time.time()
    return time.monotonic() + time_limit_s - min(_MOST_MARGIN_S, 0.1 * time_limit_s), what
