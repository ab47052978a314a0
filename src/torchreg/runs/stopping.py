"""When to stop early and save: a signal of the scheduler or of the user, or the end of the time that a job has."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_LIMIT_IS_NEAR, _JOB_END_IS_NEAR = "the time limit is near", "the end of the job is near"
REASONS = (*(number.name for number in SIGNALS), _LIMIT_IS_NEAR, _JOB_END_IS_NEAR)
"""All that `StopRequest.reason` can be: ranks that agree to stop exchange an index into it."""

_MOST_MARGIN_S = 60.0


class StopRequest:
    """Remembers a signal, and knows when the job's time is nearly over.

    A context manager: inside, the signals only set a flag, so that training can end its step, save, and leave. Time is
    nearly over when less than a minute of it is left, or a tenth of it where that is less.

    From the request on further signals change nothing, also after the context: the first rank that leaves with a code
    other than 0 makes srun send SIGTERM to the others, whose code would then be that of the signal.
    """

    def __init__(
        self,
        time_limit_s: float | None = None,
        environ: Mapping[str, str] = os.environ,
        *,
        nothing_to_save: bool = False,
    ) -> None:
        """`time_limit_s` counts from now; without it the scheduler's end of the job counts, where it can be known.

        While there is `nothing_to_save` Ctrl-C does what it does outside of the context.
        """
        self.reason: str | None = None
        self.nothing_to_save = nothing_to_save
        self._signals_before: dict[signal.Signals, Any] = {}
        self._end_s, self._what = _end_of_time(time_limit_s, environ)

    def is_due(self) -> bool:
        """Whether this process has a reason to stop; `reason` then tells it."""
        if self.reason is None and self._end_s is not None and time.monotonic() >= self._end_s:
            self.reason = self._what
        return self.reason is not None

    def agree(self, reason: str) -> None:
        """All ranks stop, and this is why; this one may have no reason of its own."""
        self.reason = reason

    def left_s(self) -> float | None:
        """Seconds until time is nearly over; None where nobody said when that is."""
        return None if self._end_s is None else self._end_s - time.monotonic()

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            before = signal.getsignal(number)
            # nohup ignores SIGHUP, and means it. A shell ignores SIGINT for what it starts in the background, as job
            # scripts start mpiexec, and does not mean it.
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
    """Ignore the signals that ask for an end, in a process that is ending: Python takes its handlers away at exit."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_of_time(time_limit_s: float | None, environ: Mapping[str, str]) -> tuple[float | None, str]:
    """When to stop, by the monotonic clock, and what to call it."""
    what = _LIMIT_IS_NEAR
    if time_limit_s is None:
        what = _JOB_END_IS_NEAR
        end = environ.get("SLURM_JOB_END_TIME", "")  # seconds since 1970; OpenPBS tells a job nothing of the kind
        if not end.isdecimal():
            return None, what
        time_limit_s = int(end) - time.time()
    return time.monotonic() + time_limit_s - min(_MOST_MARGIN_S, 0.1 * time_limit_s), what
