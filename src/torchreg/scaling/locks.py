"""Locks of a campaign: several jobs may share its folder, and one of them at a time runs a launch.

On one host a job runs one `scale run` at a time, by a `flock` that its ranks inherit and so hold until the last of them
has ended. Between hosts, where `flock` may be missing, each launch has a lock file that its owner renews.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torchreg.runs.files import create

LOCK_FILE = "lock.json"

_LIFETIME_S = 300.0  # of a lock file that is not renewed; clocks of two hosts differ by less
RENEW_EVERY_S = 30.0
_RANKS_END_WITHIN_S = 15.0  # after `scale run` was killed
_POLL_S = 0.2
_MIN_DESCRIPTOR = 100  # shells use descriptors from 0 and from 10 on

# Extends a lock that was extended so many seconds ago; False if another process took it over from this suspended one.
Renew = Callable[[float], bool]


@contextlib.contextmanager
def host_lock(folder: Path, give_up: Callable[[], bool]) -> Iterator[int | None]:
    """Lock a campaign's launches for this job on this host; gives the descriptor that its ranks must inherit.

    Waits for the ranks of an earlier process that are about to end, until `give_up`; gives None if the lock is held
    longer. A file system without locks never refuses.
    """
    path, end_s = _host_lock_file(folder, _identity()), time.monotonic() + _RANKS_END_WITHIN_S
    while True:
        low = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        descriptor = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _MIN_DESCRIPTOR)
        os.close(low)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(descriptor).st_ino:  # else its last owner has just removed it
                for lock in folder.glob(f"*/{LOCK_FILE}"):  # of an earlier process of this job, which has ended
                    if _identity().items() <= _read(lock).items():
                        lock.unlink(missing_ok=True)
                break
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:  # no locks
            break
        os.close(descriptor)
        if give_up() or time.monotonic() >= end_s:
            yield None
            return
        time.sleep(_POLL_S)
    try:
        yield descriptor
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def lock_launch(folder: Path) -> Iterator[Renew | None]:
    """Lock a launch's folder for this process; gives None if another one has it.

    A lock is stale if its owner, on this host, has ended; if it is of this job on another host, where the job ran
    before a restart; and if it was not renewed in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, content = folder / LOCK_FILE, {**_identity(), "id": uuid.uuid4().hex, "pid": os.getpid()}
    text, renewed_s = json.dumps(content).encode(), time.time()

    def renew(every_s: float) -> bool:
        nonlocal renewed_s
        now_s = time.time()  # not the monotonic clock, which may stand still while the computer sleeps
        if now_s > renewed_s + every_s:
            if _read(path) != content:
                return False
            with contextlib.suppress(FileNotFoundError):  # taken over just now
                os.utime(path, (now_s, now_s))
            renewed_s = now_s
        return True

    if not create(path, text) and not (_remove_stale(path) and create(path, text)):
        yield None
        return
    try:
        yield renew
    finally:
        if _read(path) == content:
            path.unlink(missing_ok=True)


def locked_by(folder: Path) -> str | None:
    """A description of the process that runs the launch of a folder; None if there is none."""
    if _is_stale(folder / LOCK_FILE):
        return None
    content = _read(folder / LOCK_FILE)
    job = f", job {content['job_id']}" if content.get("job_id") else ""
    return f"process {content.get('pid')} on {content.get('host')}{job}"


def _remove_stale(path: Path) -> bool:
    content = _read(path)
    if not _is_stale(path):
        return False
    aside = path.with_name(f".stale-{uuid.uuid4().hex}")
    try:
        path.rename(aside)  # of several processes that try, one succeeds
    except FileNotFoundError:
        return True
    if _read(aside) != content:  # another process has removed and locked it in between: restore
        aside.rename(path)
        return False
    aside.unlink()
    return True


def _is_stale(path: Path) -> bool:
    content, own = _read(path), _identity()  # empty while the file is being written
    try:
        if time.time() > path.stat().st_mtime + _LIFETIME_S:
            return True
        if content.get("host") != own["host"] or content.get("boot", own["boot"]) != own["boot"]:
            return own["job_id"] is not None and content.get("job_id") == own["job_id"]
        with _host_lock_file(path.parents[1], content).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:  # the lock, or that of its host
        return True
    except OSError:  # that of its host is held, or may be because the file system has no locks
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    """The content of a lock file; empty if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def _identity() -> dict[str, str | None]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    job_id = os.environ.get("PBS_JOBID") or os.environ.get("SLURM_JOB_ID")
    return {"host": socket.gethostname(), "boot": boot.read_text().strip() if boot.exists() else None, "job_id": job_id}


def _host_lock_file(launches: Path, identity: Mapping[str, Any]) -> Path:
    name = "-".join(str(identity.get(name) or "") for name in ("host", "job_id"))
    return launches / f".lock-{name.replace('/', '_')}"
