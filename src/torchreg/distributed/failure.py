"""How a failed rank ends: its reason told once over all ranks, and nobody waited for.

Whatever could wait for a rank that is gone, stopped or cut off is bounded here: the store, MPI's Abort, a full pipe.
MPI_Finalize, which would wait for ever, is left out.
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
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

T = TypeVar("T")

FORWARDED_WITHIN_S = 0.3
"""A launcher drops what a rank has printed and it has not yet passed on when that rank ends all others."""

_LEAVE_WITHIN_S = 10.0  # all that follows, or the process ends without it
_STORE_ANSWERS_WITHIN_S = 1.5
_OTHERS_FAIL_WITHIN_S = 1.0  # ranks that wait for the same rank give up together, but for their clocks' grain
_TOLD_WITHIN_S = 3.0  # more than the two above
_TURN_S = 1.0  # a launcher ends the other ranks within this time after one has left

_GLOO_SOURCE = re.compile(r"^\[\S*/gloo/\S+] ")  # what gloo's errors begin with; what happened and advice follow
_NCCL_ERROR = "NCCL error in: "
_NCCL_CAUSE = re.compile(r"Last error:\s+(?P<cause>\S.*)|(?P<kind>nccl\w+: .*)")
_DEVICE_ERROR = re.compile(r"(CUDA|HIP) error: (?!.*(illegal|misaligned|assert))")  # these are a program's own
_STDERR = 2  # the descriptor
_COUNT, _TOLD = "torchreg/failed/count", "torchreg/failed/told"


@dataclass
class Failure:
    """What a rank needs to know to end all ranks. `hosts` has the host of every rank, and comes with the store."""

    rank: int
    host: str
    comm: Any = None
    store: Store | None = None
    hosts: Sequence[str] = ()
    _begun: threading.Lock = field(default_factory=threading.Lock)
    _nowhere: int = field(default_factory=lambda: os.open(os.devnull, os.O_WRONLY))  # later there may be none free

    def __enter__(self) -> None:
        """The body brings up the ranks: it ends them all, unless the error is one that the user can mend."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, ValueError):
            self.end(error)

    def end(self, error: BaseException) -> NoReturn:
        """End this process, and with it all ranks, after telling the reason if no other rank has told one."""
        faulthandler.dump_traceback_later(_LEAVE_WITHIN_S, exit=True, file=self._nowhere)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        try:
            if not self._begun.acquire(blocking=False):
                time.sleep(2 * _LEAVE_WITHIN_S)  # another thread of this rank is leaving
            self._tell_if_first(error)
        finally:
            self._leave(code)

    def _leave(self, code: int) -> NoReturn:
        try:
            if self.comm is not None:
                self.comm.Abort(code)
        finally:
            os._exit(code)

    def _tell_if_first(self, error: BaseException) -> None:
        order = self._ask_store(self._register)
        if order is None:
            self.store = None
            time.sleep(self._turn() * _TURN_S)
            self._tell(error, f"the store on {self.hosts[0]}, host of rank 0, does not answer" if self.hosts else "")
        elif order == 1:
            self._tell(error, self._silent_ranks() if is_lost_contact(error) else "")
        else:
            told = self._ask_store(_wait_until_told, _TOLD_WITHIN_S)
            if told is None and order == 2:  # the first to fail was killed before it could tell
                self._tell(error, "")
            time.sleep(_TURN_S)  # the one that told ends the others, with less noise than if all aborted

    def _register(self, store: Store) -> int:
        store.set(_key(self.rank), "")
        return int(store.add(_COUNT, 1))

    def _silent_ranks(self) -> str:
        """The ranks that others waited for: those that have not failed by now. Empty if there are none."""
        time.sleep(_OTHERS_FAIL_WITHIN_S)
        silent = self._ask_store(
            lambda store: [rank for rank in range(len(self.hosts)) if not store.check([_key(rank)])]
        )
        return f"no word from {named(silent, self.hosts)}" if silent else ""

    def _turn(self) -> int:
        """Whose turn it is to tell where the store cannot say who is first: rank 0, rank 1, one of each host, all."""
        if self.rank < 2:
            return self.rank
        return 2 if self.hosts and self.hosts.index(self.host) == self.rank else 3

    def _tell(self, error: BaseException, suspects: str) -> None:
        if not is_expected(error):
            traceback.print_exception(error)
        text = "; ".join(filter(None, [one_line(error), suspects]))
        print(f"torchreg: error on rank {self.rank} ({self.host}): {text}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        self._ask_store(lambda store: store.set(_TOLD, ""))
        time.sleep(FORWARDED_WITHIN_S)

    def _ask_store(self, request: Callable[[Store], T], within_s: float = _STORE_ANSWERS_WITHIN_S) -> T | None:
        """The store's answer, or None if there is none in time: requests to a stopped main rank never return."""
        store, answers = self.store, list[T]()
        if store is None:
            return None

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(request(store))

        thread = threading.Thread(target=ask, daemon=True)
        # torch tells a lost store in C++, with a page of frames; and short of memory there is no thread
        with _silent(self._nowhere), suppress(RuntimeError):
            thread.start()
            thread.join(within_s)
        return answers[0] if answers else None


def is_lost_contact(error: BaseException) -> bool:
    """Whether a rank failed because it does not hear from another: the cause is elsewhere."""
    if str(error).startswith(_NCCL_ERROR):
        return "ncclRemoteError" in str(error)  # other errors of NCCL have a cause of their own
    if isinstance(error, TimeoutError | dist.DistError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # gloo's errors have no class of their own, and mpi4py, which has one, may not be installed.
    return bool(_GLOO_SOURCE.match(str(error))) or type(error).__module__ == "mpi4py.MPI"


def is_expected(error: BaseException) -> bool:
    """Whether one line says it all: the machine or the user is at fault, not the program."""
    if isinstance(error, KeyboardInterrupt | OSError | ValueError | MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error)
    if text.startswith(_NCCL_ERROR) or _DEVICE_ERROR.match(text):
        return True
    return is_lost_contact(error) or "can't allocate memory" in text  # torch's RuntimeError on the CPU


def one_line(error: BaseException) -> str:
    """The error in one line; its class is named where the text alone may not say what is wrong."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if str(error).startswith(_NCCL_ERROR):
        causes = [match["cause"] or match["kind"] for match in _NCCL_CAUSE.finditer(str(error))]
        lost = "lost the other ranks: " if is_lost_contact(error) else ""
        return f"{lost}NCCL: {causes[-1] if causes else str(error).splitlines()[0]}"
    if _DEVICE_ERROR.match(str(error)):
        return str(error).splitlines()[0]  # advice on debugging follows
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    if type(error) is TimeoutError or isinstance(error, ValueError):
        return text
    if is_lost_contact(error):
        return f"lost the other ranks: {_GLOO_SOURCE.sub('', text).partition('. ')[0]}"
    return f"{type(error).__name__}: {text}"


def named(ranks: Sequence[int], hosts: Sequence[str], at_most: int = 8) -> str:
    """Ranks with their hosts: "rank 1 (n1), rank 2 (n2)", cut short when they are many."""
    some = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in ranks[:at_most])
    return some + (f" and {len(ranks) - at_most} more" if len(ranks) > at_most else "")


@contextmanager
def _silent(nowhere: int) -> Iterator[None]:
    """Let this process's stderr, C++'s too, go nowhere. Without a free descriptor it stays as it is."""
    sys.stderr.flush()
    try:
        kept = os.dup(_STDERR)
    except OSError:
        yield
        return
    os.dup2(nowhere, _STDERR)
    try:
        yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(kept)


def _wait_until_told(store: Store) -> bool:
    store.wait([_TOLD], timedelta(seconds=_TOLD_WITHIN_S))
    return True


def _key(rank: int) -> str:
    return f"torchreg/failed/{rank}"
