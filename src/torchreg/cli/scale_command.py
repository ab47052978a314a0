"""`torchreg scale`: plan, run and look at a campaign."""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from torchreg.cli import EXIT_FAILED, EXIT_STOPPED
from torchreg.cli.options import parse
from torchreg.console import show_lines, show_table
from torchreg.distributed.launcher import detect_launcher, sign_of_mpi
from torchreg.machines import launch_commands
from torchreg.machines.known_machines import MACHINES, MachineName
from torchreg.machines.launch_commands import LauncherName
from torchreg.runs.config import TrainConfig
from torchreg.runs.record import to_json, write_json
from torchreg.runs.stopping import StopRequest
from torchreg.scaling.campaign import Campaign, launches, node_hours, read_campaign, settings
from torchreg.scaling.sources import LAUNCHES_FOLDER, merge

_MAX_FAILURES = 5  # that `scale status` shows

_USAGE = """\
usage: torchreg scale {plan,run,status,merge,command} ...

Measure how training scales, over many launches.

  plan     print the launches, settings, commands and node-hours of a campaign
  run      run every launch that has no result yet
  status   show what is done, failed, running and open
  merge    combine several campaign folders
  command  print the launcher's command line, one token a line

`torchreg scale COMMAND --help` shows the options. `torchreg report DIR` makes the report.
"""


@dataclass(frozen=True)
class Plan:
    """Print what a campaign will launch and measure, and its estimated cost. Nothing is run.

    A campaign file may come first: torchreg scale plan jobs/campaigns/local.yaml. Flags override its values.
    """

    campaign: Annotated[Campaign, tyro.conf.arg(name="")]

    json: bool = False  # Print the plan as one JSON object on stdout, and nothing else there.

    def run(self) -> int:
        """Print the plan."""
        from torchreg.scaling.campaign_run import command_of, launcher_of

        campaign, launcher = self.campaign, launcher_of(self.campaign)
        content = [
            {
                **asdict(launch),
                "id": launch.id,
                "world_size": launch.world_size,
                "settings": [asdict(setting) for setting in settings(campaign, launch.world_size)],
                "command": command_of(campaign, launch, Path("DIR"), launcher),
            }
            for launch in launches(campaign)
        ]
        if self.json:
            plan = {"campaign": asdict(campaign), "launches": content, "node_hours": node_hours(campaign)}
            print(to_json(plan))
            return 0
        columns = ["nodes", "ranks a node", "ranks", "launches", "points each", "global batches", "s each"]
        rows, commands, total_s = [], [], 0.0
        first = {(each["num_nodes"], each["world_size"]): each for each in reversed(content)}
        for (nodes, ranks), launch in sorted(first.items()):
            each_s = campaign.estimated_s(ranks)
            total_s += campaign.repeats * each_s
            batches = ", ".join(map(str, sorted({each["global_batch_size"] for each in launch["settings"]})))
            counts = (nodes, launch["ranks_per_node"], ranks, campaign.repeats, len(launch["settings"]))
            cost = [f"{each_s:.0f}", f"{campaign.repeats * each_s * nodes / 3600:.2f}"]
            rows.append([*map(str, counts), batches, *cost])
            commands.append(f"command      {shlex.join(launch['command'])}")
        show_table([*columns, "node-hours"], rows)
        features, pairs = ", ".join(map(str, campaign.num_features)), ", ".join(campaign.combinations)
        total = f"about {total_s / 60:.0f} min and {node_hours(campaign):.2f} node-hours"
        measured = f"measured     {features} features; {pairs}; windows of {campaign.window_s:g} s"
        show_lines([measured, f"total        {len(content)} launches, {total}", *commands])
        return 0


@dataclass(frozen=True)
class Run:
    """Run every launch of a campaign that has no result yet, in randomized blocks.

    A campaign file may come first: torchreg scale run jobs/campaigns/local.yaml --dir runs/local. Flags override its
    values. Exit code 0: all launches are done. 1: a launch failed and is recorded as failed. 75: launches are left,
    because of a signal, the time limit or another job that runs them; run it again to resume.
    """

    campaign: Annotated[Campaign, tyro.conf.arg(name="")]

    dir: str = ""  # The campaign's folder, which several jobs may share. Default: runs/NAME.
    time_limit_s: float | None = None  # Start no launch that is likely to end later than this many seconds from now.
    retry_failed: bool = False  # Run failed launches again; their records are kept beside the new ones.

    def run(self) -> int:
        """Run the campaign."""
        if self.time_limit_s is not None and self.time_limit_s <= 0:
            raise ValueError(f"time_limit_s is {self.time_limit_s}: give a number above 0")

        from torchreg.scaling.campaign_run import run_campaign

        folder = Path(self.dir or f"runs/{self.campaign.name}")
        report = partial(print, flush=True)
        report(f"campaign     {folder}")
        with StopRequest(self.time_limit_s) as stop:
            states, stopped = run_campaign(self.campaign, folder, stop, report, retry_failed=self.retry_failed)
        counts = f"{states['done']} of {states.total()} done, {states['failed']} failed"
        lines = [f"launches     {counts}, {states['running']} running elsewhere"]
        if stopped:
            lines.append(f"stopped      {stopped}; run the same command to resume")
        if states["failed"]:
            lines.append(f"failed       reasons: `torchreg scale status {folder}`; --retry-failed runs them again")
        show_lines([*lines, f"report       torchreg report {folder}"])
        if states["open"] or states["running"]:
            return EXIT_STOPPED
        return EXIT_FAILED if states["failed"] else 0


@dataclass(frozen=True)
class Status:
    """Show which launches of a campaign are done, failed (and why), running and open."""

    dir: Annotated[str, tyro.conf.Positional]  # The campaign's folder.
    json: bool = False  # Print the status as one JSON array on stdout, and nothing else there.

    def run(self) -> int:
        """Print the status."""
        from torchreg.scaling.campaign_run import status

        found = status(Path(self.dir))
        if self.json:
            print(to_json(found))
            return 0
        columns = ("done", "failed", "running", "open")
        messages: dict[str, list[str]] = {state: [] for state in columns}
        counts: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
        for launch in found:
            messages[launch["state"]].append(f"{launch['state']:13}{launch['id']}: {launch['message']}")
            counts[launch["num_nodes"], launch["world_size"]][launch["state"]] += 1
        rows = [
            ["!" * bool(count["failed"]) + str(nodes), str(ranks), *(str(count[state]) for state in columns)]
            for (nodes, ranks), count in sorted(counts.items())
        ]
        show_table(("nodes", "ranks", *columns), rows)
        lines = messages["failed"][:_MAX_FAILURES]
        if (more := len(messages["failed"]) - _MAX_FAILURES) > 0:
            lines.append(f"failed       and {more} more")
        lines += messages["running"]
        if num_open := len(messages["open"]):
            lines.append(f"open         {num_open} of {len(found)} launches: run `torchreg scale run` again to resume")
        show_lines([*lines, f"report       torchreg report {Path(self.dir)}"])
        return 0


@dataclass(frozen=True)
class Merge:
    """Combine the launches of several campaign folders in a new one, for one report."""

    out: Annotated[str, tyro.conf.Positional]  # The new folder.
    dirs: Annotated[tuple[str, ...], tyro.conf.Positional]  # The folders to combine.

    def run(self) -> int:
        """Merge the folders."""
        show_lines(merge(Path(self.out), [Path(folder) for folder in self.dirs]))
        return 0


@dataclass(frozen=True)
class Command:
    """Print the launcher's command line, for a job script to put before the program: one token a line.

    In a PBS job the hosts are those of PBS_NODEFILE, each once.
    """

    # Whose options to write. `auto`: srun in a Slurm job, else identified by `mpiexec --version`.
    launcher: LauncherName | Literal["auto"] = "auto"
    machine: MachineName = "generic"  # Whose CPU binding and variables to add.
    num_nodes: int | None = None  # How many of the hosts to use, from the first on. Default: all of them.
    ranks_per_node: int | None = None  # Ranks on each node. Default: as many as a node of the machine has devices.
    num_ranks: int | None = None  # Ranks on all nodes together. Default: nodes times ranks per node.
    hosts: str = ""  # Names of the hosts, separated by commas.
    env: tuple[str, ...] = ()  # Variables for every rank, as NAME=VALUE; they take precedence over the machine's.
    without: tuple[str, ...] = ()  # Names of the machine's variables to exclude.
    extra: str = ""  # Further options for the launcher, in one argument, as in --extra="--no-vni".

    def run(self) -> int:
        """Print the launcher's tokens."""
        for assignment in self.env:
            if "=" not in assignment:
                raise ValueError(f"env has {assignment!r}: give NAME=VALUE")
        hosts = self.hosts.split(",") if self.hosts else launch_commands.allocated_hosts()
        launcher = launch_commands.available_launcher() if self.launcher == "auto" else self.launcher
        slurm_nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) if launcher == "srun" else 1
        num_nodes, ranks_per_node = launch_commands.place_ranks(
            self.machine, self.num_nodes, self.ranks_per_node, self.num_ranks, len(hosts) or slurm_nodes
        )
        tokens = launch_commands.launch_command(
            launcher,
            self.machine,
            num_nodes=num_nodes,
            ranks_per_node=ranks_per_node,
            hosts=hosts[:num_nodes],
            env=dict(assignment.split("=", 1) for assignment in self.env),
            extra=launch_commands.split_options("extra", self.extra),
            without=self.without,
            library_path=os.environ.get("LD_LIBRARY_PATH", ""),
        )
        print(*tokens, sep="\n", end="\n" if tokens else "")
        return 0


@dataclass(frozen=True)
class Measure:
    """Measure one launch, on its ranks; `scale run` starts it."""

    dir: Annotated[str, tyro.conf.Positional]
    launch: Annotated[str, tyro.conf.Positional]
    launched_at: float = 0.0

    def run(self) -> int:
        """Measure, and write the result for `scale run`."""
        from torchreg.cli.ranks import on_all_ranks, open_ranks
        from torchreg.scaling.campaign_run import campaign_of
        from torchreg.scaling.launch_process import measured_file
        from torchreg.scaling.measure import measure_launch

        campaign = campaign_of(Path(self.dir))
        launch = {launch.id: launch for launch in launches(campaign)}.get(self.launch)
        if launch is None:
            raise ValueError(
                f"launch is {self.launch!r}, which is not in {self.dir}: see `torchreg scale status {self.dir}`"
            )
        folder = Path(self.dir, LAUNCHES_FOLDER, launch.id)
        options = {name: getattr(campaign, name) for name in ("dtype", "distributed", "timeout_s")}
        device = MACHINES[campaign.machine].device if campaign.device == "auto" else campaign.device
        communicator = open_ranks(TrainConfig.of(optimizer="manual", device=device, **options))
        start_up_s = time.time() - self.launched_at
        measured = on_all_ranks(communicator, lambda: measure_launch(campaign, launch, communicator, folder))
        if communicator.is_main:
            write_json(folder / measured_file(f"{self.launched_at:.3f}"), {"start_up_s": start_up_s, **measured})
        return 0


_COMMANDS: dict[str, type[Any]] = {one.__name__.lower(): one for one in (Plan, Run, Status, Merge, Command, Measure)}


def run(argv: list[str]) -> int:
    """Plan, run or look at a campaign."""
    if argv[:1] in (["-h"], ["--help"]):
        print(_USAGE, end="")
        return 0
    name, *options = argv or ["missing"]
    if name not in _COMMANDS:
        raise ValueError(f"scale is {name}: give plan, run, status, merge or command, as in `torchreg scale plan`")
    if name == "run":  # not under a launcher, also for one rank: its variables would reach the ranks started here
        launcher, sign = detect_launcher(os.environ), sign_of_mpi(os.environ)
        if not launcher.is_none or sign:
            who = f"a launcher ({sign} is set)" if launcher.is_none else launcher.name
            raise ValueError(
                f"scale run starts ranks itself, and {who} has started this process as rank {launcher.rank} of "
                f"{launcher.world_size}: run it once, in the job's own shell, without a launcher"
            )
    kind, default = _COMMANDS[name], None
    if kind in (Plan, Run):
        has_file = options and not options[0].startswith("-")
        default = kind(read_campaign(Path(options.pop(0))) if has_file else Campaign())
    code: int = parse(kind, f"torchreg scale {name}", options, default).run()
    return code
