"""Running a campaign: each launch without a valid result is one start of ranks, and ends in a record.

A failed launch stays failed until a retry is requested: nothing is retried silently, nothing is measured twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from torchreg.core.checkpoint import write_atomically
from torchreg.distributed.stopping import StopRequest
from torchreg.machines import launch_commands
from torchreg.machines.launch_commands import LauncherName
from torchreg.runs.environment import provenance
from torchreg.runs.files import create
from torchreg.runs.record import utc_now, write_json
from torchreg.scaling import locks
from torchreg.scaling.campaign import CAMPAIGN_FILE, MAY_CHANGE, Campaign, Launch, campaign_of, launches
from torchreg.scaling.launch_record import KIND, SCHEMA_VERSION, check, checksummed
from torchreg.scaling.sources import LAUNCH_FILE, LAUNCHES_FOLDER

MEASURED_FILE = "measured-{}.json"  # of the ranks; with the time of their start, so that no earlier one is taken

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

State = Literal["done", "failed", "running", "open"]


def status_of(folder: Path) -> tuple[State, float | None, str]:
    """State, seconds and message of a launch: its time, why it failed (as with an invalid record), or who runs it."""
    try:
        record = check((folder / LAUNCH_FILE).read_bytes())
    except FileNotFoundError:
        owner = locks.locked_by(folder)
        return "running" if owner else "open", None, owner or ""
    except (OSError, ValueError) as error:
        return "failed", None, f"{LAUNCH_FILE} is not a record: {error}"
    if record["status"] == "failed":
        return "failed", None, record["reason"]
    return "done", record["wall_s"], f"{record['wall_s']:.0f} s"


def open_campaign(campaign: Campaign, folder: Path) -> Campaign:
    """Create or join a campaign's folder: the campaign as its file then has it, with its `machine_name`.

    Raises `ValueError` if the folder has a campaign with other measurements.
    """
    path = folder / CAMPAIGN_FILE
    host = re.sub(r"\d+", "", socket.gethostname().split(".")[0]).strip("-_") or "unnamed"
    name = campaign.machine_name or (host if campaign.machine == "generic" else campaign.machine)
    try:
        (folder / LAUNCHES_FOLDER).mkdir(parents=True, exist_ok=True)
        create(path, msgspec.yaml.encode(replace(campaign, machine_name=name)))
        before = campaign_of(folder)
        before = replace(before, machine_name=before.machine_name or name)
        named = replace(campaign, machine_name=campaign.machine_name or before.machine_name)
        for field, value in asdict(named).items():
            if field not in MAY_CHANGE and (old := getattr(before, field)) != value:
                remedy = "choose another --dir, and combine the two with `torchreg scale merge`"
                raise ValueError(f"{field} is {value}, and {path} has {old}: {remedy}")
        temporary = path.with_name(f"{CAMPAIGN_FILE}-{uuid.uuid4().hex}")  # two jobs may start at once
        write_atomically(temporary, msgspec.yaml.encode(named))
        temporary.replace(path)
    except OSError as error:
        raise ValueError(
            f"dir is {folder}, which cannot be written ({error.strerror}): choose another --dir"
        ) from error
    return named


def run_campaign(
    campaign: Campaign, folder: Path, stop: StopRequest, report: Callable[[str], None], *, retry_failed: bool = False
) -> tuple[Counter[State], str | None]:
    """Run open launches, block after block, until all are done or `stop` is due; `report` gets a line for each.

    Launches verify their stack until one of their world size is done. A launch likely to take longer than the time
    left is not started. Returns the number in each state, and why it stopped early, or None.
    """
    hosts = launch_commands.allocated_hosts()
    launcher = launch_commands.available_launcher() if campaign.launcher == "auto" else campaign.launcher
    if hosts and max(campaign.nodes) > len(hosts):
        raise ValueError(
            f"nodes has {max(campaign.nodes)}, and the job has {len(hosts)}: ask for more nodes, or for fewer here"
        )
    todo = launches(campaign)
    commands = {launch.id: command_of(campaign, launch, folder, launcher, hosts) for launch in todo}
    program = commands[todo[0].id][0]
    if shutil.which(program) is None:
        remedy = "pip install mpich, or choose another --launcher"
        raise ValueError(f"launcher is {launcher}, and there is no {program} on the PATH: {remedy}")
    campaign = open_campaign(campaign, folder)
    durations_s = {one.world_size: campaign.estimated_s(one.world_size) for one in todo}  # later as measured
    finished = ("done",) if retry_failed else ("done", "failed")
    stopped, launches_folder = None, folder / LAUNCHES_FOLDER
    with locks.host_lock(launches_folder, stop.is_due) as fd:
        if fd is None:
            stopped = stop.reason or f"another `scale run` measures in {folder} on this host, or its ranks still end"
        for number, launch in enumerate(todo, start=1):
            where, expected_s, left_s = launches_folder / launch.id, durations_s[launch.world_size], stop.left_s()
            if status_of(where)[0] in finished:
                continue
            if stop.is_due():
                stopped = stop.reason
            elif left_s is not None and expected_s > left_s:
                stopped = f"{left_s:.0f} s are left, and the next launch takes about {expected_s:.0f} s"
            if stopped or fd is None:
                break
            with locks.lock_launch(where) as renew:
                if renew is None:
                    report(f"elsewhere    {launch.id}: {locks.locked_by(where)}")
                    continue
                if status_of(where)[0] == "done":  # by another job, just before the lock was taken
                    continue
                shape = launch.num_nodes, launch.ranks_per_node
                alike = [launches_folder / one.id for one in todo if (one.num_nodes, one.ranks_per_node) == shape]
                is_first = all(status_of(one)[0] != "done" for one in alike)
                command = commands[launch.id] + ["--verify"] * is_first
                record = run_launch(campaign, launch, command, where, stop, renew, fd)
            if record is None:
                stopped = stop.reason
                continue
            durations_s[launch.world_size] = record["wall_s"]
            message = f"failed: {record['reason']}" if record["status"] == "failed" else f"{record['wall_s']:.0f} s"
            report(f"{number:4}/{len(todo)}    {launch.id}: {message}")
    return Counter(status_of(launches_folder / launch.id)[0] for launch in todo), stopped


def command_of(
    campaign: Campaign, launch: Launch, folder: Path, launcher: LauncherName, hosts: Sequence[str] = ()
) -> list[str]:
    """The command of a launch. If there are more hosts than it needs, it uses some drawn by its seed."""
    if len(hosts) > launch.num_nodes:
        drawn = np.random.default_rng(launch.seed).permutation(len(hosts))[: launch.num_nodes]
        hosts = [hosts[index] for index in sorted(drawn.tolist())]
    tokens = launch_commands.launch_command(
        launcher,
        campaign.machine,
        num_nodes=launch.num_nodes,
        ranks_per_node=launch.ranks_per_node,
        hosts=hosts,
        extra=launch_commands.split_options("launcher_args", campaign.launcher_args),
        without=campaign.without,
        library_path=os.environ.get("LD_LIBRARY_PATH", ""),
    )
    return [*tokens, sys.executable, "-m", "torchreg", "scale", "measure", str(folder), launch.id]


def run_launch(
    campaign: Campaign, launch: Launch, command: list[str], folder: Path, stop: StopRequest, renew: locks.Renew, fd: int
) -> dict[str, Any] | None:
    """Run one launch in its folder and write its record; None, without a record, if `stop` is due or the lock is lost.

    The ranks inherit the file descriptor `fd`. The record of an earlier failure is kept beside the new one.
    """
    if (folder / LAUNCH_FILE).exists():
        number = 1 + len(list(folder.glob("launch.failed-*.json")))
        (folder / LAUNCH_FILE).rename(folder / f"launch.failed-{number}.json")
    for left in folder.glob("measured-*.json"):
        left.unlink()
    started_utc, start_s, launched_at = utc_now(), time.monotonic(), round(time.time(), 3)
    arguments = ["sh", "-c", _LAUNCHER_WITH_WATCHDOG, "sh", *command, "--launched-at", str(launched_at)]
    with (
        (folder / "stdout.log").open("wb") as out,
        (folder / "stderr.log").open("wb") as err,
        subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True, pass_fds=(fd,)
        ) as process,
    ):
        try:
            while process.poll() is None and time.monotonic() < start_s + campaign.launch_timeout_s:
                if stop.is_due() or not renew(locks.RENEW_EVERY_S):
                    return None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
            is_timeout = process.poll() is None
        finally:
            _end_session(process)
    if not renew(0):
        return None
    measured_path, measured, reason = folder / MEASURED_FILE.format(launched_at), {}, None
    if is_timeout:
        reason = f"it had not ended after launch_timeout_s, {campaign.launch_timeout_s:g} s"
    elif process.returncode != 0:
        reason = f"exit code {process.returncode}: {_last_error(folder)}"
    else:
        try:
            measured = dict(json.loads(measured_path.read_bytes()))
            wrong = [one for one in measured.get("verification") or () if one["status"] == "FAIL"]
            if wrong:
                named = "; ".join(f"{one['area']}: {one['name']}: {one['measured']}" for one in wrong)
                reason = f"the stack does not train correctly: {named}"[:_MAX_REASON_LENGTH]
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
            "launch": asdict(launch),
            "command": command,
            "started_utc": started_utc,
            "wall_s": time.monotonic() - start_s,
            "provenance": provenance(started_utc),
            **measured,
        }
    )
    write_json(folder / LAUNCH_FILE, record)
    return record


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
