"""End all ranks when one fails or waits too long for the others: report the reason once, and wait for nobody.

MPI waits for ever for a rank that was stopped or cut off, and so does a request to the store of a stopped main rank.
Every such wait is bounded here: the store, MPI's Abort, a full pipe. MPI_Finalize, which would wait too, is skipped.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from torch._C._distributed_c10d import Store

from torchreg.distributed.failure import is_expected, is_lost_contact, one_line
from torchreg.distributed.launcher import FORWARDED_WITHIN_S

T = TypeVar("T")

_ALL_REDUCE = "the other ranks in an all-reduce"
_EXIT_WITHIN_S = 10.0  # all of `end`, or the process ends without it
_STORE_ANSWERS_WITHIN_S = 1.5
_OTHERS_FAIL_WITHIN_S = 1.0  # ranks that wait for the same rank time out together, up to their clocks' resolution
_REPORTED_WITHIN_S = 3.0  # more than the two above
_TURN_S = 1.0  # a launcher ends the other ranks within this time after one has exited
_STDERR = 2  # the descriptor: sys.stderr may be anything
_FAILED, _COUNT, _REPORTED = "torchreg/failed/{}", "torchreg/failed/count", "torchreg/failed/reported"


class Watchdog:
    """Ends all ranks when this one fails, or when one of its calls has waited `timeout_s` seconds for the others.

    Time counts only while this process runs: a job that is suspended as a whole continues when it is resumed.
    """

    def __init__(self, rank: int, host: str, comm: Any, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.call: object | None = None
        """A fresh object for each call, None between calls. All-reduces set it directly: `limit` takes longer."""
        self.store: Store | None = None
        self.hosts: Sequence[str] = ()  # of every rank; set after the store
        self._rank, self._host, self._comm = rank, host, comm
        self._what, self._grace_s = _ALL_REDUCE, 0.0
        self._ending = threading.Lock()
        self._devnull = os.open(os.devnull, os.O_WRONLY)  # later none may be free
        threading.Thread(target=self._watch, name="torchreg watchdog", daemon=True).start()

    @contextmanager
    def limit(self, what: str, grace_s: float = 0.0) -> Iterator[None]:
        """Limit the calls in the body, taken together, to the time-out; `what` completes "waited for".

        `grace_s` is added to the time-out where another rank may report more.
        """
        self._grace_s, self._what, self.call = grace_s, what, object()
        try:
            yield
        finally:
            self.call, self._what, self._grace_s = None, _ALL_REDUCE, 0.0

    def _watch(self) -> None:
        poll_s = min(0.25, self.timeout_s / 10)
        seen: object | None = None  # a reference, so that no later call can be the same object
        num_polls = 0
        while num_polls * poll_s < self.timeout_s + self._grace_s:
            time.sleep(poll_s)
            call = self.call
            num_polls = num_polls + 1 if call is not None and call is seen else 0
            seen = call
        self.end(TimeoutError(f"waited {self.timeout_s:g} s for {self._what}"))

    def end(self, error: BaseException) -> NoReturn:
        """End this process, and with it all ranks, after reporting the reason if no other rank has reported one."""
        faulthandler.dump_traceback_later(_EXIT_WITHIN_S, exit=True, file=self._devnull)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        try:
            if not self._ending.acquire(blocking=False):
                time.sleep(2 * _EXIT_WITHIN_S)  # another thread of this rank is ending it
            self._report_if_first(error)
        finally:
            try:
                if self._comm is not None:
                    self._comm.Abort(code)
            finally:
                os._exit(code)

    def _report_if_first(self, error: BaseException) -> None:
        def register(store: Store) -> int:
            store.set(_FAILED.format(self._rank), "")
            return int(store.add(_COUNT, 1))

        def wait_for_report(store: Store) -> bool:
            store.wait([_REPORTED], timedelta(seconds=_REPORTED_WITHIN_S))
            return True

        order = self._query_store(register)
        if order is None:
            self.store = None
            # Without an order from the store: rank 0, rank 1, one rank of each host, all others.
            is_first_of_host = bool(self.hosts) and self.hosts.index(self._host) == self._rank
            turn = self._rank if self._rank < 2 else 2 if is_first_of_host else 3
            time.sleep(turn * _TURN_S)
            self._report(error, f"the store on {self.hosts[0]}, host of rank 0, does not answer" if self.hosts else "")
        elif order == 1:
            self._report(error, self._silent_ranks() if is_lost_contact(error) else "")
        else:
            reported = self._query_store(wait_for_report, _REPORTED_WITHIN_S)
            if not reported and order == 2:  # the first to fail was killed before it could report
                self._report(error, "")
            time.sleep(_TURN_S)  # the rank that reported ends the others, with less noise than if all aborted

    def _silent_ranks(self) -> str:
        """The ranks that others waited for: those that have not failed by now. Empty if there are none."""
        time.sleep(_OTHERS_FAIL_WITHIN_S)
        silent = self._query_store(
            lambda store: [rank for rank in range(len(self.hosts)) if not store.check([_FAILED.format(rank)])]
        )
        if not silent:
            return ""
        some = ", ".join(f"rank {rank} ({self.hosts[rank]})" for rank in silent[:8])
        return f"no response from {some}" + (f" and {len(silent) - 8} more" if len(silent) > 8 else "")

    def _report(self, error: BaseException, suspects: str) -> None:
        if not is_expected(error):
            traceback.print_exception(error)
        text = "; ".join(filter(None, [one_line(error), suspects]))
        print(f"torchreg: error on rank {self._rank} ({self._host}): {text}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        self._query_store(lambda store: store.set(_REPORTED, ""))
        time.sleep(FORWARDED_WITHIN_S)

    def _query_store(self, request: Callable[[Store], T], within_s: float = _STORE_ANSWERS_WITHIN_S) -> T | None:
        """The store's answer, or None if there is none in time: requests to a stopped main rank never return."""
        store, answers = self.store, list[T]()
        if store is None:
            return None

        def query() -> None:
            with suppress(RuntimeError):
                answers.append(request(store))

        thread = threading.Thread(target=query, daemon=True)
        sys.stderr.flush()
        kept = None
        with suppress(OSError):  # no descriptor is free
            kept = os.dup(_STDERR)
            os.dup2(self._devnull, _STDERR)  # torch reports a lost store from C++, with a page of frames
        try:
            with suppress(RuntimeError):  # short of memory no thread starts
                thread.start()
                thread.join(within_s)
        finally:
            if kept is not None:
                os.dup2(kept, _STDERR)
                os.close(kept)
        return answers[0] if answers else None


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
