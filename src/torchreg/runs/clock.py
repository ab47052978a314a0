"""The clock of a run: it runs while training does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of training on this rank. Set-up, evaluation and saving do not count.

    `synchronize` waits until the device is idle.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self.start()

    def start(self, elapsed_s: float = 0.0) -> None:
        """Start at the seconds that the run has taken so far."""
        self._start_s = time.perf_counter() - elapsed_s

    def elapsed_s(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The body is not training."""
        self._synchronize()
        pause_s = time.perf_counter()
        yield
        self._start_s += time.perf_counter() - pause_s
