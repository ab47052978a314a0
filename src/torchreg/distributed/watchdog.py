"""Time limits for calls that wait for other ranks and have no time-out of their own.

MPI waits for ever for a rank that was stopped or cut off, and so does a request to the store of a stopped main rank.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_ALL_REDUCE = "in an all-reduce"
_HEARTBEAT_S = 1.0
_STDERR = 2  # the descriptor: sys.stderr may be anything


class Watchdog:
    """Calls `expired` with the reason, from a thread of its own, once a call has waited `timeout_s` seconds.

    Time counts only while this process runs: a job that is suspended as a whole continues when it is resumed.
    """

    __slots__ = ("_expired", "_grace_s", "_poll_s", "_what", "call", "timeout_s")

    def __init__(self, timeout_s: float, expired: Callable[[TimeoutError], object]) -> None:
        self.call: object | None = None
        """A fresh object for each call, None between calls. All-reduces set it directly: `limit` takes longer."""
        self._what = _ALL_REDUCE
        self.timeout_s = timeout_s
        self._grace_s = 0.0
        self._poll_s = min(0.25, timeout_s / 10)
        self._expired = expired
        threading.Thread(target=self._watch, name="torchreg watchdog", daemon=True).start()

    @contextmanager
    def limit(self, what: str, grace_s: float = 0.0) -> Iterator[None]:
        """Limit the calls in the body, taken together, to the time-out; `what` completes "waited for the other ranks".

        `grace_s` is added to the time-out where another rank may report more.
        """
        self._grace_s, self._what, self.call = grace_s, what, object()
        try:
            yield
        finally:
            self.call, self._what, self._grace_s = None, _ALL_REDUCE, 0.0

    def _watch(self) -> None:
        seen: object | None = None  # a reference, so that no later call can be the same object
        num_polls = 0
        while num_polls * self._poll_s < self.timeout_s + self._grace_s:
            time.sleep(self._poll_s)
            call = self.call
            num_polls = num_polls + 1 if call is not None and call is seen else 0
            seen = call
        self._expired(TimeoutError(f"waited {self.timeout_s:g} s for the other ranks {self._what}"))


@contextmanager
def heartbeat(beat: Callable[[], object]) -> Iterator[None]:
    """Call `beat` about every second while the body runs, from a thread."""
    done = threading.Event()

    def run() -> None:
        with suppress(RuntimeError):  # the store is gone: this process is about to end
            while not done.wait(_HEARTBEAT_S):
                beat()

    thread = threading.Thread(target=run, name="torchreg heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def exit_after(seconds: float, rank: int) -> Iterator[None]:
    """End this process if the body takes longer than `seconds`; rank 0 prints a traceback, or rank 1 a second later.

    For MPI_Init and MPI_Finalize, in which mpi4py keeps the interpreter's lock: no Python thread can run.
    """
    turn = min(rank, 2)
    with open(os.devnull, "w") as devnull:
        faulthandler.dump_traceback_later(seconds + turn, exit=True, file=_STDERR if turn < 2 else devnull)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
