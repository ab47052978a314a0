"""`torchreg scale`: plan, run and look at a campaign."""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from torchreg.cli import EXIT_FAILED, EXIT_STOPPED
from torchreg.cli.options import parse
from torchreg.console import show_lines, show_table
from torchreg.distributed.launcher import detect_launcher, sign_of_mpi
from torchreg.distributed.stopping import StopRequest
from torchreg.machines import launch_commands
from torchreg.machines.known_machines import MACHINES, MachineName
from torchreg.machines.launch_commands import LauncherName
from torchreg.runs.config import TrainConfig
from torchreg.runs.record import to_json, write_json
from torchreg.scaling.campaign import Campaign, campaign_of, launches, node_hours, read_campaign, settings
from torchreg.scaling.sources import LAUNCHES_FOLDER, merge

_MAX_FAILURES = 5  # that `scale status` shows


@dataclass(frozen=True)
class _Plan:
    """Print what a campaign will launch and measure, and what it costs. Nothing is run.

    A campaign file, such as jobs/campaigns/local.yaml, may come first. Flags override its values.
    """

    campaign: Annotated[Campaign, tyro.conf.arg(name="")]

    json: bool = False  # Print the plan as one JSON object on stdout, and nothing else there.

    def run(self) -> int:
        from torchreg.scaling.campaign_run import command_of

        campaign = self.campaign
        launcher = launch_commands.available_launcher() if campaign.launcher == "auto" else campaign.launcher
        content = [
            {
                **asdict(launch),
                "settings": [asdict(setting) for setting in settings(campaign, launch.world_size)],
                "command": command_of(campaign, launch, Path("DIR"), launcher),
            }
            for launch in launches(campaign)
        ]
        if self.json:
            print(to_json({"campaign": asdict(campaign), "launches": content, "node_hours": node_hours(campaign)}))
            return 0
        rows, commands = [], []
        first = {(each["num_nodes"], each["world_size"]): each for each in reversed(content)}
        for (nodes, ranks), launch in sorted(first.items()):
            each_s = campaign.estimated_s(ranks)
            batches = ", ".join(map(str, sorted({each["global_batch_size"] for each in launch["settings"]})))
            counts = (nodes, launch["ranks_per_node"], ranks, campaign.repeats, len(launch["settings"]), batches)
            rows.append([*map(str, counts), f"{each_s:.0f}", f"{campaign.repeats * each_s * nodes / 3600:.2f}"])
            commands.append(f"command      {shlex.join(launch['command'])}")
        columns = ["nodes", "ranks a node", "ranks", "launches", "points each", "global batches", "s each"]
        show_table([*columns, "node-hours"], rows)
        features, pairs = ", ".join(map(str, campaign.num_features)), ", ".join(campaign.combinations)
        total_s = sum(campaign.estimated_s(each["world_size"]) for each in content)
        total = f"about {total_s / 60:.0f} min and {node_hours(campaign):.2f} node-hours"
        measured = f"measured     {features} features; {pairs}; windows of {campaign.window_s:g} s"
        show_lines([measured, f"total        {len(content)} launches, {total}", *commands])
        return 0


@dataclass(frozen=True)
class _Run:
    """Run every launch that has no result yet, in randomized blocks.

    A campaign file, such as jobs/campaigns/local.yaml, may come first. Flags override its values. Exit code 0: all
    launches are done. 1: a launch failed and is recorded as failed. 75: launches are left, because of a signal, the
    time limit or another job that runs them; run it again to resume.
    """

    campaign: Annotated[Campaign, tyro.conf.arg(name="")]

    dir: str = ""  # The campaign's folder, which several jobs may share. Default: runs/NAME.
    time_limit_s: float | None = None  # Start no launch that is likely to end later than this many seconds from now.
    retry_failed: bool = False  # Run failed launches again; their records are kept beside the new ones.

    def run(self) -> int:
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
class _Status:
    """Show which launches are done, failed (and why), running and open."""

    dir: Annotated[str, tyro.conf.Positional]  # The campaign's folder.
    json: bool = False  # Print the status as one JSON array on stdout, and nothing else there.

    def run(self) -> int:
        from torchreg.scaling.campaign_run import status_of

        found = []
        for launch in launches(campaign_of(Path(self.dir))):
            state, wall_s, message = status_of(Path(self.dir, LAUNCHES_FOLDER, launch.id))
            found.append({**asdict(launch), "state": state, "wall_s": wall_s, "message": message})
        if self.json:
            print(to_json(found))
            return 0
        columns, rows = ("done", "failed", "running", "open"), []
        counts = Counter((one["num_nodes"], one["world_size"], one["state"]) for one in found)
        for nodes, ranks in sorted({(nodes, ranks) for nodes, ranks, _ in counts}):
            each = [counts[nodes, ranks, state] for state in columns]
            rows.append(["!" * bool(each[1]) + str(nodes), *map(str, (ranks, *each))])
        show_table(("nodes", "ranks", *columns), rows)
        _, failed, running, left = (
            [f"{state:13}{one['id']}: {one['message']}" for one in found if one["state"] == state] for state in columns
        )
        if (more := len(failed) - _MAX_FAILURES) > 0:
            failed[_MAX_FAILURES:] = [f"failed       and {more} more"]
        if left:
            left = [f"open         {len(left)} of {len(found)} launches: run `torchreg scale run` again to resume"]
        show_lines([*failed, *running, *left, f"report       torchreg report {Path(self.dir)}"])
        return 0


@dataclass(frozen=True)
class _Merge:
    """Combine several campaign folders in a new one, for one report."""

    out: Annotated[str, tyro.conf.Positional]  # The new folder.
    dirs: Annotated[tuple[str, ...], tyro.conf.Positional]  # The folders to combine.

    def run(self) -> int:
        show_lines(merge(Path(self.out), [Path(folder) for folder in self.dirs]))
        return 0


@dataclass(frozen=True)
class _Command:
    """Print the launcher's command line, one token a line.

    A job script puts it before the program. In a PBS job the hosts are those of PBS_NODEFILE, each once.
    """

    # Whose options to write. `auto`: srun in a Slurm job, else identified by `mpiexec --version`.
    launcher: LauncherName | Literal["auto"] = "auto"
    machine: MachineName = "generic"  # Whose CPU binding and variables to add.
    num_nodes: int | None = None  # How many of the hosts to use, from the first on. Default: all of them.
    ranks_per_node: int | None = None  # Ranks on each node. Default: as many as a node of the machine has devices.
    num_ranks: int | None = None  # Ranks on all nodes together. Default: nodes times ranks per node.
    hosts: str = ""  # Names of the hosts, separated by commas.
    env: tuple[str, ...] = ()  # Variables for every rank, as A=1,B=2; they take precedence over the machine's.
    without: tuple[str, ...] = ()  # Names of the machine's variables to exclude, separated by commas.
    extra: str = ""  # Further options for the launcher, in one argument, as in --extra="--no-vni".

    def run(self) -> int:
        for assignment in self.env:
            if "=" not in assignment:
                raise ValueError(f"env has {assignment!r}: give NAME=VALUE, in double quotes if it has a comma")
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
class _Measure:
    """Measure one launch, on its ranks; `scale run` starts it."""

    dir: Annotated[str, tyro.conf.Positional]
    launch: Annotated[str, tyro.conf.Positional]
    launched_at: float = 0.0
    verify: bool = False  # Check the stack first, as `torchreg verify --quick` does; if it fails, measure nothing.

    def run(self) -> int:
        from torchreg.cli.ranks import on_all_ranks, open_ranks
        from torchreg.scaling.campaign_run import MEASURED_FILE
        from torchreg.scaling.measure import measure_launch

        campaign = campaign_of(Path(self.dir))
        launch = {launch.id: launch for launch in launches(campaign)}.get(self.launch)
        if launch is None:
            why = f"which is not in {self.dir}: see `torchreg scale status {self.dir}`"
            raise ValueError(f"launch is {self.launch!r}, {why}")
        folder = Path(self.dir, LAUNCHES_FOLDER, launch.id)
        options = {name: getattr(campaign, name) for name in ("dtype", "distributed", "timeout_s")}
        device = MACHINES[campaign.machine].device if campaign.device == "auto" else campaign.device
        communicator = open_ranks(TrainConfig.of(optimizer="manual", device=device, **options))
        start_up_s = time.time() - self.launched_at

        def work() -> dict[str, Any]:
            checks, fields = list[dict[str, str]](), ("area", "name", "status", "measured", "expected")
            if self.verify:
                from torchreg.verification.verify import verify

                rows = verify(communicator, str(folder), quick=True)
                checks = [{field: getattr(row, field) for field in fields} for row in rows]
            if any(one["status"] == "FAIL" for one in checks):
                return {"verification": checks}
            return {"verification": checks or None, **measure_launch(campaign, launch, communicator, folder)}

        measured = on_all_ranks(communicator, work)
        if communicator.is_main:
            write_json(folder / MEASURED_FILE.format(self.launched_at), {"start_up_s": start_up_s, **measured})
        return 0


_COMMANDS: dict[str, Any] = {
    kind.__name__[1:].lower(): kind for kind in (_Plan, _Run, _Status, _Merge, _Command, _Measure)
}


def run(argv: list[str]) -> int:
    """Plan, run or look at a campaign."""
    if argv[:1] in (["-h"], ["--help"]):
        *shown, _ = _COMMANDS  # `scale run` starts the last one
        print(f"usage: torchreg scale {{{','.join(shown)}}} ...\n\nMeasure how training scales, over many launches.\n")
        for name in shown:
            print(f"  {name:8} {str(_COMMANDS[name].__doc__).split('.')[0]}.")
        print("\n`torchreg scale COMMAND --help` shows the options, and an example.")
        print("`torchreg report DIR` makes the report.")
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
    if kind in (_Plan, _Run):
        has_file = options and not options[0].startswith("-")
        default = kind(read_campaign(Path(options.pop(0))) if has_file else Campaign())
    return int(parse(kind, f"torchreg scale {name}", options, default).run())
