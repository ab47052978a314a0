"""When a run is asked to stop early: by a signal, or near the end of its job."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_LIMIT_IS_NEAR, _JOB_END_IS_NEAR = "the time limit is near", "the end of the job is near"
REASONS = (*(number.name for number in SIGNALS), _LIMIT_IS_NEAR, _JOB_END_IS_NEAR)
"""All values of `StopRequest.reason`."""

_MOST_MARGIN_S = 60.0


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
        self._what = _LIMIT_IS_NEAR
        end = environ.get("SLURM_JOB_END_TIME", "")  # seconds since 1970; OpenPBS sets no such variable
        if time_limit_s is None and end.isdecimal():
            time_limit_s, self._what = int(end) - time.time(), _JOB_END_IS_NEAR
        self._end_s: float | None = None  # on the monotonic clock
        if time_limit_s is not None:
            self._end_s = time.monotonic() + time_limit_s - min(_MOST_MARGIN_S, 0.1 * time_limit_s)

    def is_due(self) -> bool:
        """Whether this process has a `reason` to stop."""
        left_s = self.left_s()
        if self.reason is None and left_s is not None and left_s <= 0:
            self.reason = self._what
        return self.reason is not None

    def left_s(self) -> float | None:
        """Seconds until time is nearly over; None where that is not known."""
        return None if self._end_s is None else self._end_s - time.monotonic()

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            before = signal.getsignal(number)
            # nohup ignores SIGHUP on purpose. A shell ignores SIGINT for a job script's `mpiexec … &`: it is handled.
            if number is not signal.SIGHUP or before != signal.SIG_IGN:
                self._signals_before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
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
