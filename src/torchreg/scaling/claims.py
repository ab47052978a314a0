"""Who runs a launch: several jobs may share a campaign's folder, and none runs what another one is running."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CLAIM_FILE = "claim.json"


def claim(folder: Path, lifetime_s: float) -> bool:
    """Claim a launch's folder for this process; False where another one has it.

    The claim appears whole, by a link that fails where there is one already. A claim is void when its lifetime is over
    or its process, on this host, is gone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CLAIM_FILE
    mine = path.with_name(f".claim-{uuid.uuid4().hex}")
    content = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job_id": os.environ.get("PBS_JOBID") or os.environ.get("SLURM_JOB_ID"),
        "until": time.time() + lifetime_s,
    }
    mine.write_text(json.dumps(content), encoding="utf-8")
    try:
        for _ in range(2):
            try:
                os.link(mine, path)
            except FileExistsError:
                if not _clear_void(path):
                    return False
            else:
                return True
        return False
    finally:
        mine.unlink()


def release(folder: Path) -> None:
    """Give a claim back."""
    (folder / CLAIM_FILE).unlink(missing_ok=True)


def claimed_by(folder: Path) -> str | None:
    """Who runs the launch of a folder just now; None if nobody."""
    content = _read(folder / CLAIM_FILE)
    if content is None or _is_void(content):
        return None
    job = f", job {content['job_id']}" if content.get("job_id") else ""
    return f"process {content.get('pid')} on {content.get('host')}{job}"


def _clear_void(path: Path) -> bool:
    content = _read(path)
    if content is not None and not _is_void(content):
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
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _is_void(content: Mapping[str, Any]) -> bool:
    until, pid = content.get("until"), content.get("pid")
    if not isinstance(until, (int, float)) or not isinstance(pid, int) or time.time() > until:
        return True
    if content.get("host") != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
