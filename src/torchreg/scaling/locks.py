"""Who runs a launch: several jobs may share a campaign's folder, and none runs what another one is running.

On one host a job has one `scale run` at a time in a campaign, by a lock that its ranks inherit: it is held until the
last of them has ended, however they end. Between hosts, where locks may be missing, each launch has a claim: a file
that its owner renews while it lives.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchreg.core.checkpoint import write_atomically
from torchreg.runs.files import create

LOCK_FILE = "claim.json"

_LIFETIME_S = 300.0  # of a claim that is not renewed; clocks of two hosts differ by less
_RENEW_EVERY_S = 30.0
_ENDING_S = 15.0  # within which the ranks of a `scale run` that was killed end
_POLL_S = 0.2
_FIRST_DESCRIPTOR = 100  # shells number their own from 0 and from 10 on


@contextlib.contextmanager
def only_one_here(folder: Path, give_up: Callable[[], bool]) -> Iterator[int | None]:
    """Lock a campaign's launches for this job on this host: gives the descriptor that its ranks shall inherit.

    Waits for ranks of an earlier process that are just ending, until `give_up`; gives None where the lock is held
    longer. A file system without locks lets everybody through.
    """
    path = _lock_file(folder, _identity())
    descriptor = _take_lock(path, give_up)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


@dataclass
class LaunchLock:
    """A launch's folder, claimed for this process; see `claim`."""

    path: Path
    content: dict[str, Any]

    def renew(self) -> bool:
        """Extend the claim where that is due; False where another process has taken the launch over."""
        if time.time() < self.content["until"] - _LIFETIME_S + _RENEW_EVERY_S:
            return True
        if not self.is_held():
            return False
        self.content["until"] = time.time() + _LIFETIME_S
        write_atomically(self.path, json.dumps(self.content).encode())
        return True

    def is_held(self) -> bool:
        """Whether no other process has taken the launch over, because this one was stopped for too long."""
        return (_read(self.path) or {}).get("id") == self.content["id"]

    def release(self) -> None:
        """Give the launch back."""
        if self.is_held():
            self.path.unlink(missing_ok=True)


def claim(folder: Path) -> LaunchLock | None:
    """LaunchLock a launch's folder for this process; None where another one has it.

    A claim is void when its owner, on this host, is gone; when it is of this job on another host, where the job ran
    before it was started again; and when it was not renewed in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    content = {**_identity(), "id": uuid.uuid4().hex, "pid": os.getpid(), "until": time.time() + _LIFETIME_S}
    for _ in range(2):
        if create(path, json.dumps(content).encode()):
            return LaunchLock(path, content)
        if not _clear_void(path):
            return None
    return None


def locked_by(folder: Path) -> str | None:
    """Who runs the launch of a folder just now; None if nobody."""
    path = folder / LOCK_FILE
    if _is_void(path):
        return None
    content = _read(path) or {}
    job = f", job {content['job_id']}" if content.get("job_id") else ""
    return f"process {content.get('pid')} on {content.get('host')}{job}"


def _clear_void(path: Path) -> bool:
    content = _read(path)
    if not _is_void(path):
        return False
    aside = path.with_name(f".void-{uuid.uuid4().hex}")
    try:
        path.rename(aside)  # of several that try, one succeeds
    except FileNotFoundError:
        return True
    if _read(aside) != content:  # somebody else had cleared and claimed it in between: it goes back
        aside.rename(path)
        return False
    aside.unlink()
    return True


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _is_void(path: Path) -> bool:
    content, own = _read(path) or {}, _identity()
    until = content.get("until")
    try:  # by two clocks: a damaged claim, or one that is just being written, has the time of its file alone
        ends = path.stat().st_mtime + _LIFETIME_S
    except FileNotFoundError:
        return True
    if time.time() > (min(until, ends) if isinstance(until, (int, float)) else ends):
        return True
    if content.get("host") == own["host"] and content.get("boot", own["boot"]) == own["boot"]:
        return not _is_locked(_lock_file(path.parents[1], content))
    return own["job_id"] is not None and content.get("job_id") == own["job_id"]


def _identity() -> dict[str, str | None]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = None
    job_id = os.environ.get("PBS_JOBID") or os.environ.get("SLURM_JOB_ID")
    return {"host": socket.gethostname(), "boot": boot, "job_id": job_id}


def _lock_file(launches: Path, identity: Mapping[str, Any]) -> Path:
    name = "-".join(str(identity.get(name) or "") for name in ("host", "job_id"))
    return launches / f".lock-{name.replace('/', '_')}"


def _take_lock(path: Path, give_up: Callable[[], bool]) -> int | None:
    end_s = time.monotonic() + _ENDING_S
    while True:
        low = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        descriptor = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _FIRST_DESCRIPTOR)
        os.close(low)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        except OSError:
            return descriptor
        else:
            with contextlib.suppress(FileNotFoundError):  # its last owner has just removed it
                if path.stat().st_ino == os.fstat(descriptor).st_ino:
                    _clear_own_locks(path.parent)
                    return descriptor
        os.close(descriptor)
        if give_up() or time.monotonic() > end_s:
            return None
        time.sleep(_POLL_S)


def _clear_own_locks(launches: Path) -> None:
    """Whoever made claims under this lock is gone."""
    own = _identity()
    for path in launches.glob(f"*/{LOCK_FILE}"):
        content = _read(path) or {}
        if all(content.get(name) == own[name] for name in own):
            path.unlink(missing_ok=True)


def _is_locked(path: Path) -> bool:
    """Whether a process holds a lock, or may do so where the file system has no locks."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
