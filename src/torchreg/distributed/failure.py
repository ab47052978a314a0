"""End all ranks when one fails: report its reason once, and wait for nobody.

Every wait for a rank that may be gone, stopped or cut off is bounded here: the store, MPI's Abort, a full pipe.
MPI_Finalize, which would wait for ever, is skipped.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

T = TypeVar("T")

FORWARDED_WITHIN_S = 0.3
"""A launcher drops a rank's output that it has not yet forwarded when that rank ends all others."""

_EXIT_WITHIN_S = 10.0  # all that follows, or the process ends without it
_STORE_ANSWERS_WITHIN_S = 1.5
_OTHERS_FAIL_WITHIN_S = 1.0  # ranks that wait for the same rank time out together, up to their clocks' resolution
_REPORTED_WITHIN_S = 3.0  # more than the two above
_TURN_S = 1.0  # a launcher ends the other ranks within this time after one has exited

_GLOO_SOURCE = re.compile(r"^\[\S*/gloo/\S+] ")  # the start of gloo's errors; the event and advice follow
_NCCL_ERROR = "NCCL error in: "
_NCCL_CAUSE = re.compile(r"Last error:\s+(?P<cause>\S.*)|(?P<kind>nccl\w+: .*)")
_DEVICE_ERROR = re.compile(r"(CUDA|HIP) error: (?!.*(illegal|misaligned|assert))")  # these are a program's own
_STDERR = 2  # the descriptor
_FAILED, _COUNT, _REPORTED = "torchreg/failed/{}", "torchreg/failed/count", "torchreg/failed/reported"


@dataclass
class Failure:
    """What a rank needs in order to end all ranks. `hosts`, the host of every rank, is set after the store."""

    rank: int
    host: str
    comm: Any = None
    store: Store | None = None
    hosts: Sequence[str] = ()
    _ending: threading.Lock = field(default_factory=threading.Lock)
    _devnull: int = field(default_factory=lambda: os.open(os.devnull, os.O_WRONLY))  # later none may be free

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
                if self.comm is not None:
                    self.comm.Abort(code)
            finally:
                os._exit(code)

    def _report_if_first(self, error: BaseException) -> None:
        def register(store: Store) -> int:
            store.set(_FAILED.format(self.rank), "")
            return int(store.add(_COUNT, 1))

        def wait_for_report(store: Store) -> bool:
            store.wait([_REPORTED], timedelta(seconds=_REPORTED_WITHIN_S))
            return True

        order = self._query_store(register)
        if order is None:
            self.store = None
            time.sleep(self._turn() * _TURN_S)
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

    def _turn(self) -> int:
        """The order of reports where the store cannot give one: rank 0, rank 1, one rank of each host, all others."""
        if self.rank < 2:
            return self.rank
        return 2 if self.hosts and self.hosts.index(self.host) == self.rank else 3

    def _report(self, error: BaseException, suspects: str) -> None:
        if not is_expected(error):
            traceback.print_exception(error)
        text = "; ".join(filter(None, [one_line(error), suspects]))
        print(f"torchreg: error on rank {self.rank} ({self.host}): {text}", file=sys.stderr)
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
        # torch reports a lost store from C++, with a page of frames; and short of memory no thread starts.
        with _without_stderr(self._devnull), suppress(RuntimeError):
            thread.start()
            thread.join(within_s)
        return answers[0] if answers else None


def is_lost_contact(error: BaseException) -> bool:
    """Whether a rank failed because another does not respond: the cause is elsewhere."""
    if str(error).startswith(_NCCL_ERROR):
        return "ncclRemoteError" in str(error)  # other errors of NCCL have a cause of their own
    if isinstance(error, TimeoutError | dist.DistError):
        return True
    # gloo's errors have no class of their own, and mpi4py, which has one, may not be installed.
    is_mpi = type(error).__module__ == "mpi4py.MPI"
    return isinstance(error, RuntimeError) and (is_mpi or bool(_GLOO_SOURCE.match(str(error))))


def is_expected(error: BaseException) -> bool:
    """Whether one line is enough: the machine or the user is at fault, not the program."""
    if isinstance(error, KeyboardInterrupt | OSError | ValueError | MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error)
    if text.startswith(_NCCL_ERROR) or _DEVICE_ERROR.match(text):
        return True
    return is_lost_contact(error) or "can't allocate memory" in text  # torch's RuntimeError on the CPU


def one_line(error: BaseException) -> str:
    """The error in one line, with its class where the text alone may not explain it."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    lost = "lost the other ranks: " if is_lost_contact(error) else ""
    if str(error).startswith(_NCCL_ERROR):
        causes = [match["cause"] or match["kind"] for match in _NCCL_CAUSE.finditer(str(error))]
        return f"{lost}NCCL: {causes[-1] if causes else str(error).splitlines()[0]}"
    if _DEVICE_ERROR.match(str(error)):
        return str(error).splitlines()[0]  # advice on debugging follows
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    if type(error) is TimeoutError or isinstance(error, ValueError):
        return text
    if lost:
        return lost + _GLOO_SOURCE.sub("", text).partition(". ")[0]
    return f"{type(error).__name__}: {text}"


@contextmanager
def _without_stderr(devnull: int) -> Iterator[None]:
    """Discard what this process, C++ included, writes to stderr. Without a free descriptor nothing changes."""
    sys.stderr.flush()
    try:
        kept = os.dup(_STDERR)
    except OSError:
        yield
        return
    os.dup2(devnull, _STDERR)
    try:
        yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(kept)
