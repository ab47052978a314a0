"""Running a campaign: every launch that has no valid result, each as a start of ranks of its own.

A failed launch stays failed until it is asked for again. Nothing is retried silently, nothing measured twice.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchreg.core.checkpoint import write_atomically
from torchreg.machines.launch_commands import LauncherName, allocated_hosts, available_launcher, launch_command, words
from torchreg.runs.environment import provenance
from torchreg.runs.files import create
from torchreg.runs.record import utc_now, write_json
from torchreg.runs.stopping import StopRequest
from torchreg.scaling import locks as locks
from torchreg.scaling.campaign import CAMPAIGN_FILE, Campaign, Launch, estimated_s, launches, read_campaign, to_yaml
from torchreg.scaling.schema import KIND, SCHEMA_VERSION, check, checksummed
from torchreg.scaling.sources import LAUNCH_FILE, LAUNCHES_FOLDER

State = Literal["done", "failed", "running", "open"]

_POLL_S = 0.1
_END_WITHIN_S = 8.0  # a scheduler's kill follows its signal after ten
# Becomes the launcher. Beside it waits a child, which ends the launcher and all that it started here once the other end
# of the standard input is closed: when `scale run` has ended, be it by SIGKILL.
_LAUNCHER_THAT_ENDS_WITH_US = """
exec 3<&0 </dev/null
(
    (
        trap '' TERM INT HUP
        read -r line <&3
        kill -TERM 0
        for second in 1 2 3 4 5 6 7 8; do
            sleep 1
            kill -0 $$ || break
        done
        kill -KILL 0
    ) >/dev/null 2>&1 &
)
exec 3<&-
exec "$@"
"""
_MAY_CHANGE = ("repeats", "nodes", "ranks_per_node", "launcher", "launcher_args", "timeout_s", "launch_timeout_s")
_LONGEST_REASON = 300
_OF_HYDRA = re.compile(r"\[(proxy:\S+|mpiexec)@")


@dataclass(frozen=True)
class Outcome:
    """What became of a campaign's launches in one run of it. `stopped` says why it ended early, or is None."""

    num_launches: int
    num_done: int
    num_failed: int
    num_elsewhere: int
    stopped: str | None

    @property
    def num_left(self) -> int:
        """Launches that have no result: another job runs them, or nobody has yet."""
        return self.num_launches - self.num_done - self.num_failed


def state_of(folder: Path) -> State:
    """What is known of the launch of a folder; a record that no report would take is a failure."""
    try:
        record = check((folder / LAUNCH_FILE).read_bytes())
    except FileNotFoundError:
        return "running" if locks.locked_by(folder) else "open"
    except (OSError, ValueError):
        return "failed"
    return "done" if record["status"] == "ok" else "failed"


def open_campaign(campaign: Campaign, folder: Path) -> Campaign:
    """Make or join a campaign's folder: the campaign as its file then has it, with the name of the machine settled.

    Raises `ValueError` where the folder holds a campaign that measures something else.
    """
    path = folder / CAMPAIGN_FILE
    try:
        (folder / LAUNCHES_FOLDER).mkdir(parents=True, exist_ok=True)
        settled = replace(campaign, machine_name=campaign.machine_name or _name_of_machine(campaign))
        if not path.exists() and create(path, to_yaml(settled).encode()):
            return settled
        before = campaign_of(folder)
        before = replace(before, machine_name=before.machine_name or settled.machine_name)
        settled = replace(campaign, machine_name=campaign.machine_name or before.machine_name)
        for name, now in asdict(settled).items():
            if name not in _MAY_CHANGE and getattr(before, name) != now:
                raise ValueError(
                    f"{name} is {now}, and {path} has {getattr(before, name)}: choose another --dir, and bring both "
                    "together with `torchreg scale merge`"
                )
        own = path.with_name(f"{CAMPAIGN_FILE}-{uuid.uuid4().hex}")  # two jobs may begin at once
        write_atomically(own, to_yaml(settled).encode())
        own.replace(path)
    except OSError as error:
        raise ValueError(
            f"dir is {folder}, which cannot be written ({error.strerror}): choose another --dir"
        ) from error
    return settled


def _name_of_machine(campaign: Campaign) -> str:
    """The known machine, or what the names of its hosts have in common: that of this one without its numbers."""
    if campaign.machine != "generic":
        return campaign.machine
    return re.sub(r"\d+", "", socket.gethostname().split(".")[0]).strip("-_") or "unnamed"


def campaign_of(folder: Path) -> Campaign:
    """The campaign of a folder. Raises `ValueError` where there is none, or a damaged one."""
    path = folder / CAMPAIGN_FILE
    if not path.is_file():
        raise ValueError(
            f"dir is {folder}, which holds no {CAMPAIGN_FILE}: start one with "
            f"`torchreg scale run CAMPAIGN.yaml --dir {folder}`"
        )
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in read_campaign(path).items()}
    try:
        return Campaign(**values)
    except TypeError as error:
        raise ValueError(f"campaign is {path}, which holds values of wrong types ({error}): move it away") from error


def run_campaign(
    campaign: Campaign,
    folder: Path,
    stop: StopRequest,
    say: Callable[[str], None],
    *,
    retry_failed: bool = False,
) -> Outcome:
    """Run what is open, block after block, until all is done or `stop` is due.

    A launch that is likely to take longer than the time that is left is not begun.
    """
    hosts, launcher = allocated_hosts(), launcher_of(campaign)
    most_nodes = max(campaign.nodes)
    if hosts and most_nodes > len(hosts):
        raise ValueError(f"nodes has {most_nodes}, and the job has {len(hosts)}: ask for more nodes, or for fewer here")
    todo = launches(campaign)
    commands = {launch.id: command_of(campaign, launch, folder, launcher, hosts) for launch in todo}
    program = commands[todo[0].id][0]
    if shutil.which(program) is None:
        raise ValueError(
            f"launcher is {launcher}, and there is no {program} on the PATH: pip install mpich, or choose another "
            "--launcher"
        )
    campaign = open_campaign(campaign, folder)
    durations_s: dict[int, float] = {}  # by world size, as measured in this run
    stopped = None
    with locks.only_one_here(folder / LAUNCHES_FOLDER, stop.is_due) as lock:
        if lock is None:
            stopped = stop.reason or f"another `scale run` measures in {folder} on this host, or its ranks still end"
        for number, launch in enumerate(todo, start=1):
            place = folder / LAUNCHES_FOLDER / launch.id
            state = state_of(place)
            if state == "done" or (state == "failed" and not retry_failed):
                continue
            expected_s = durations_s.get(launch.world_size, estimated_s(campaign, launch))
            remaining_s = stop.left_s()
            if stop.is_due():
                stopped = stop.reason
            elif remaining_s is not None and expected_s > remaining_s:
                stopped = f"{remaining_s:.0f} s are left, and the next launch takes about {expected_s:.0f} s"
            if stopped or lock is None:
                break
            claim = locks.claim(place)
            if claim is None:
                say(f"elsewhere    {launch.id}: {locks.locked_by(place)}")
                continue
            try:
                if state_of(place) == "done":  # another job ended it between the look and the claim
                    continue
                record = _run_launch(campaign, launch, folder, commands[launch.id], stop, claim, lock)
            finally:
                claim.release()
            if record is None:
                stopped = stop.reason
                continue
            durations_s[launch.world_size] = record["wall_s"]
            told = f"failed: {record['reason']}" if record["status"] == "failed" else f"{record['wall_s']:.0f} s"
            say(f"{number:4}/{len(todo)}    {launch.id}: {told}")
    states = [state_of(folder / LAUNCHES_FOLDER / launch.id) for launch in todo]
    return Outcome(len(todo), states.count("done"), states.count("failed"), states.count("running"), stopped)


def command_of(
    campaign: Campaign, launch: Launch, folder: Path, launcher: LauncherName, hosts: Sequence[str] = ()
) -> list[str]:
    """What is started for a launch. Of more hosts than it needs it takes some, drawn by its seed."""
    if len(hosts) > launch.num_nodes:
        drawn = np.random.default_rng(launch.seed).permutation(len(hosts))[: launch.num_nodes]
        hosts = [hosts[place] for place in sorted(drawn.tolist())]
    ranks = launch_command(
        launcher,
        campaign.machine,
        num_ranks=launch.world_size,
        ranks_per_node=launch.ranks_per_node,
        hosts=hosts,
        extra=words("launcher_args", campaign.launcher_args),
        without=campaign.without,
        library_path=os.environ.get("LD_LIBRARY_PATH", ""),
    )
    return [*ranks, sys.executable, "-m", "torchreg", "scale", "measure", str(folder), launch.id]


def launcher_of(campaign: Campaign) -> LauncherName:
    """The launcher that a campaign names, or the one at hand."""
    return available_launcher() if campaign.launcher == "auto" else campaign.launcher


def _run_launch(
    campaign: Campaign,
    launch: Launch,
    folder: Path,
    command: Sequence[str],
    stop: StopRequest,
    claim: locks.LaunchLock,
    lock: int,
) -> dict[str, Any] | None:
    """Run one launch to its record; None where `stop` came first or another job took it over: nothing is recorded."""
    place = folder / LAUNCHES_FOLDER / launch.id
    _keep_failed(place)
    for left in place.glob("measured-*.json"):
        left.unlink()
    started, start_s, launched_at = utc_now(), time.monotonic(), f"{time.time():.3f}"
    with (
        (place / "stdout.log").open("wb") as out,
        (place / "stderr.log").open("wb") as err,
        subprocess.Popen(
            ["sh", "-c", _LAUNCHER_THAT_ENDS_WITH_US, "sh", *command, "--launched-at", launched_at],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            start_new_session=True,
            pass_fds=(lock,),
        ) as process,
    ):
        ended = _wait(process, campaign.launch_timeout_s, stop, claim)
    if ended == "stopped" or not claim.is_held():
        return None
    measured = _read_measured(place / measured_file(launched_at))
    reason = None
    if ended == "timeout":
        reason = f"it had not ended after launch_timeout_s, {campaign.launch_timeout_s:g} s"
    elif process.returncode != 0:
        reason = f"exit code {process.returncode}: {_reason(place)}"
    elif measured is None:
        reason = f"exit code 0, and {measured_file(launched_at)} was not written"
    record = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "status": "failed" if reason else "ok",
        "reason": reason,
        "exit_code": process.returncode,
        "campaign": {
            "name": campaign.name,
            "machine": campaign.machine_name,
            "fingerprint": campaign.fingerprint,
            "device": campaign.device,
            "without": list(campaign.without),
        },
        "launch": {"id": launch.id, "world_size": launch.world_size, **asdict(launch)},
        "command": list(command),
        "started_utc": started,
        "wall_s": time.monotonic() - start_s,
        "start_up_s": None,
        "distributed": None,
        "provenance": provenance(started),
        "dtype": None,
        "points": [],
        "allreduce": [],
        **({} if reason or measured is None else measured),
    }
    record = checksummed(record)
    write_json(place / LAUNCH_FILE, record)
    (place / measured_file(launched_at)).unlink(missing_ok=True)
    return record


def measured_file(launched_at: str) -> str:
    """What a launch's ranks write; by its name, those of an earlier try cannot pass for those of this one."""
    return f"measured-{launched_at}.json"


def _wait(
    process: subprocess.Popen[bytes], timeout_s: float, stop: StopRequest, claim: locks.LaunchLock
) -> Literal["ended", "timeout", "stopped"]:
    end_s = time.monotonic() + timeout_s
    try:
        while process.poll() is None:
            if stop.is_due() or not claim.renew():
                return "stopped"
            if time.monotonic() >= end_s:
                return "timeout"
            time.sleep(_POLL_S)
        return "ended"
    finally:
        _end_session(process)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End a launcher and all that it started here, kindly and then not."""
    for number, patience_s in ((signal.SIGTERM, _END_WITHIN_S), (signal.SIGKILL, _END_WITHIN_S)):
        if process.poll() is not None:
            break
        os.killpg(process.pid, number)
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what the launcher left behind


def _keep_failed(place: Path) -> None:
    """An earlier failure stays on record beside the new try."""
    record = place / LAUNCH_FILE
    if record.exists():
        number = 1 + sum(1 for _ in place.glob("launch.failed-*.json"))
        record.rename(place / f"launch.failed-{number}.json")


def _read_measured(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _reason(place: Path) -> str:
    """The line of the logs that tells best why a launch ended: torchreg's own error, or the last one on stderr.

    MPICH's launcher tells the cause first, and then who called whom. Where stderr is empty a rank was killed, and the
    launcher says so on stdout in a banner.
    """
    err, out = (_lines(place / log) for log in ("stderr.log", "stdout.log"))
    causes = [line for line in err if line.startswith("torchreg: error")]
    if err and _OF_HYDRA.match(err[-1]):
        causes += [line for line in err if _OF_HYDRA.match(line)]
    banner = " ".join(line.strip("= ") for line in out if "RUNNING AT" in line or "EXIT CODE" in line)
    return (causes[:1] or err[-1:] or [banner or "nothing on stderr"])[0][:_LONGEST_REASON]


def _lines(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]
