"""One launch of a campaign: the launcher as a child process, and the record of its result or of its failure."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchreg.runs.environment import provenance
from torchreg.runs.record import utc_now, write_json
from torchreg.runs.stopping import StopRequest
from torchreg.scaling import locks
from torchreg.scaling.campaign import Campaign, Launch
from torchreg.scaling.launch_record import KIND, SCHEMA_VERSION, checksummed
from torchreg.scaling.sources import LAUNCH_FILE

_POLL_S = 0.1
_END_WITHIN_S = 8.0  # a scheduler kills ten seconds after its signal
_MAX_REASON_LENGTH = 300

# Becomes the launcher. A child in the background waits for the end of the standard input, which comes when `scale run`
# ends, also by SIGKILL, and then ends the launcher and all that it started on this host.
_LAUNCHER_WITH_WATCHDOG = """
exec 3<&0 </dev/null
(
    (
        trap '' TERM INT HUP
        read -r line <&3
        kill -TERM 0
        for second in 1 2 3 4 5 6 7 8; do sleep 1; kill -0 $$ || break; done
        kill -KILL 0
    ) >/dev/null 2>&1 &
)
exec 3<&-
exec "$@"
"""


def run_launch(
    campaign: Campaign,
    launch: Launch,
    command: list[str],
    folder: Path,
    stop: StopRequest,
    renew_lock: Callable[[float], bool],
    fd: int,
) -> dict[str, Any] | None:
    """Run one launch in its folder and write its record; None, without a record, if `stop` is due or the lock is lost.

    The ranks inherit the file descriptor `fd`. The record of an earlier failure is kept beside the new one.
    """
    if (folder / LAUNCH_FILE).exists():
        number = 1 + sum(1 for _ in folder.glob("launch.failed-*.json"))
        (folder / LAUNCH_FILE).rename(folder / f"launch.failed-{number}.json")
    for left in folder.glob("measured-*.json"):
        left.unlink()
    started_utc, start_s, launched_at = utc_now(), time.monotonic(), f"{time.time():.3f}"
    arguments = ["sh", "-c", _LAUNCHER_WITH_WATCHDOG, "sh", *command, "--launched-at", launched_at]
    with (
        (folder / "stdout.log").open("wb") as out,
        (folder / "stderr.log").open("wb") as err,
        subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True, pass_fds=(fd,)
        ) as process,
    ):
        try:
            while process.poll() is None and time.monotonic() < start_s + campaign.launch_timeout_s:
                if stop.is_due() or not renew_lock(locks.RENEW_EVERY_S):
                    return None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
            is_timeout = process.poll() is None
        finally:
            _end_session(process)
    if not renew_lock(0):
        return None
    measured_path, measured, reason = folder / measured_file(launched_at), {}, None
    if is_timeout:
        reason = f"it had not ended after launch_timeout_s, {campaign.launch_timeout_s:g} s"
    elif process.returncode != 0:
        reason = f"exit code {process.returncode}: {_last_error(folder)}"
    else:
        try:
            measured = dict(json.loads(measured_path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            reason = f"exit code 0, and {measured_path.name} was not written ({type(error).__name__})"
    measured_path.unlink(missing_ok=True)
    record = checksummed(
        {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "status": "failed" if reason else "ok",
            "reason": reason,
            "exit_code": process.returncode,
            "campaign": {name: getattr(campaign, name) for name in ("name", "fingerprint", "device", "without")}
            | {"machine": campaign.machine_name},
            "launch": {"id": launch.id, "world_size": launch.world_size, **asdict(launch)},
            "command": command,
            "started_utc": started_utc,
            "wall_s": time.monotonic() - start_s,
            "provenance": provenance(started_utc),
            **measured,
        }
    )
    write_json(folder / LAUNCH_FILE, record)
    return record


def measured_file(launched_at: str) -> str:
    """The file that a launch's ranks write; named by the attempt, so that those of an earlier one are not taken."""
    return f"measured-{launched_at}.json"


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End a launcher and all that it started on this host, by SIGTERM and then by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_WITHIN_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # children that the launcher did not end


def _last_error(folder: Path) -> str:
    """The line of the logs with the cause of a failure: torchreg's own error, or the last one on stderr.

    MPICH's launcher prints the cause first and then a call trace. Nothing on stderr means that a rank was killed, which
    its launcher reports in a banner on stdout.
    """
    texts = [(folder / log).read_text(encoding="utf-8", errors="replace") for log in ("stderr.log", "stdout.log")]
    err, out = ([line.strip() for line in text.splitlines() if line.strip()] for text in texts)
    hydra = re.compile(r"\[(proxy:\S+|mpiexec)@")
    causes = [line for line in err if line.startswith("torchreg: error")]
    if err and hydra.match(err[-1]):
        causes += [line for line in err if hydra.match(line)]
    banner = " ".join(line.strip("= ") for line in out if "RUNNING AT" in line or "EXIT CODE" in line)
    return (causes[:1] or err[-1:] or [banner or "nothing on stderr"])[0][:_MAX_REASON_LENGTH]
