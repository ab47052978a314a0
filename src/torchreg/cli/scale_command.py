"""`torchreg scale`: plan, run and look at a campaign."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from torchreg.cli import EXIT_FAILED, EXIT_STOPPED
from torchreg.cli.launch_command import run_command
from torchreg.cli.options import parse
from torchreg.distributed.launcher import detect_launcher, sign_of_mpi
from torchreg.runs.config import TrainConfig
from torchreg.scaling.campaign import Campaign, launches, node_hours, read_campaign, settings

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

    json: bool = False
    """Print the plan as one JSON object on stdout, and nothing else there."""

    def run(self) -> int:
        """Print the plan."""
        from torchreg.console import show_lines, show_table
        from torchreg.runs.record import to_json
        from torchreg.scaling.campaign_run import command_of, launcher_of
        from torchreg.scaling.campaign_tables import plan_lines, plan_table

        todo, launcher = launches(self.campaign), launcher_of(self.campaign)
        commands = {launch.id: command_of(self.campaign, launch, Path("DIR"), launcher) for launch in todo}
        if not self.json:
            show_table(*plan_table(self.campaign))
            show_lines(plan_lines(self.campaign, commands))
            return 0
        content = [
            {
                **asdict(launch),
                "id": launch.id,
                "world_size": launch.world_size,
                "settings": [asdict(setting) for setting in settings(self.campaign, launch.world_size)],
                "command": commands[launch.id],
            }
            for launch in todo
        ]
        cost = node_hours(self.campaign, todo)
        print(to_json({"campaign": asdict(self.campaign), "launches": content, "node_hours": cost}))
        return 0


@dataclass(frozen=True)
class Run:
    """Run every launch of a campaign that has no result yet, in randomized blocks.

    A campaign file may come first: torchreg scale run jobs/campaigns/local.yaml --dir runs/local. Flags override its
    values. Exit code 0: all launches are done. 1: a launch failed and is recorded as failed. 75: launches are left,
    because of a signal, the time limit or another job that runs them; run it again to resume.
    """

    campaign: Annotated[Campaign, tyro.conf.arg(name="")]

    dir: str = ""
    """The campaign's folder, which several jobs may share. Default: runs/NAME."""

    time_limit_s: float | None = None
    """Start no launch that is likely to end later than this many seconds from now."""

    retry_failed: bool = False
    """Run failed launches again; their records are kept beside the new ones."""

    def run(self) -> int:
        """Run the campaign."""
        if self.time_limit_s is not None and self.time_limit_s <= 0:
            raise ValueError(f"time_limit_s is {self.time_limit_s}: give a number above 0")

        from torchreg.console import show_lines
        from torchreg.runs.stopping import StopRequest
        from torchreg.scaling.campaign_run import run_campaign
        from torchreg.scaling.campaign_tables import outcome_lines

        folder = Path(self.dir or f"runs/{self.campaign.name}")
        report = partial(print, flush=True)
        report(f"campaign     {folder}")
        with StopRequest(self.time_limit_s) as stop:
            states, stopped = run_campaign(self.campaign, folder, stop, report, retry_failed=self.retry_failed)
        show_lines(outcome_lines(states, stopped, folder))
        if states["open"] or states["running"]:
            return EXIT_STOPPED
        return EXIT_FAILED if states["failed"] else 0


@dataclass(frozen=True)
class Status:
    """Show which launches of a campaign are done, failed (and why), running and open."""

    dir: Annotated[str, tyro.conf.Positional]
    """The campaign's folder."""

    json: bool = False
    """Print the status as one JSON array on stdout, and nothing else there."""

    def run(self) -> int:
        """Print the status."""
        from torchreg.console import show_lines, show_table
        from torchreg.runs.record import to_json
        from torchreg.scaling.campaign_tables import status, status_lines, status_table

        found = status(Path(self.dir))
        if self.json:
            print(to_json(found))
        else:
            show_table(*status_table(found))
            show_lines(status_lines(found, Path(self.dir)))
        return 0


@dataclass(frozen=True)
class Merge:
    """Combine the launches of several campaign folders in a new one, for one report."""

    out: Annotated[str, tyro.conf.Positional]
    """The new folder."""

    dirs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The folders to combine."""

    def run(self) -> int:
        """Merge the folders."""
        from torchreg.console import show_lines
        from torchreg.scaling.merging import merge

        show_lines(merge(Path(self.out), [Path(folder) for folder in self.dirs]))
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
        from torchreg.machines.known_machines import MACHINES
        from torchreg.runs.record import write_json
        from torchreg.scaling.campaign_run import campaign_of
        from torchreg.scaling.launch_process import measured_file
        from torchreg.scaling.measure import measure_launch
        from torchreg.scaling.sources import LAUNCHES_FOLDER

        campaign = campaign_of(Path(self.dir))
        launch = {launch.id: launch for launch in launches(campaign)}.get(self.launch)
        if launch is None:
            raise ValueError(
                f"launch is {self.launch!r}, which is not in {self.dir}: see `torchreg scale status {self.dir}`"
            )
        folder = Path(self.dir, LAUNCHES_FOLDER, launch.id)
        options = {name: getattr(campaign, name) for name in ("dtype", "distributed", "timeout_s")}
        device = MACHINES[campaign.machine].device if campaign.device == "auto" else campaign.device
        communicator = open_ranks(TrainConfig(optimizer="manual", device=device, **options))
        start_up_s = time.time() - self.launched_at
        measured = on_all_ranks(communicator, lambda: measure_launch(campaign, launch, communicator, folder))
        if communicator.is_main:
            write_json(folder / measured_file(f"{self.launched_at:.3f}"), {"start_up_s": start_up_s, **measured})
        return 0


_COMMANDS: dict[str, type[Any]] = {"plan": Plan, "run": Run, "status": Status, "merge": Merge, "measure": Measure}


def run(argv: list[str]) -> int:
    """Plan, run or look at a campaign."""
    if argv[:1] in (["-h"], ["--help"]):
        print(_USAGE, end="")
        return 0
    name, *options = argv or ["missing"]
    if name == "command":
        return run_command(options)
    if name not in _COMMANDS:
        raise ValueError(f"scale is {name}: give plan, run, status, merge or command, as in `torchreg scale plan`")
    if name == "run":
        _refuse_launcher()
    kind, default = _COMMANDS[name], None
    if kind in (Plan, Run):
        has_file = options and not options[0].startswith("-")
        default = kind(read_campaign(Path(options.pop(0))) if has_file else Campaign())
    code: int = parse(kind, f"torchreg scale {name}", options, default).run()
    return code


def _refuse_launcher() -> None:
    """Raise `ValueError` under a launcher, also for one rank: its variables would reach the ranks started here."""
    launcher, sign = detect_launcher(os.environ), sign_of_mpi(os.environ)
    if not launcher.is_none or sign:
        who = f"a launcher ({sign} is set)" if launcher.is_none else launcher.name
        raise ValueError(
            f"scale run starts ranks itself, and {who} has started this process as rank {launcher.rank} of "
            f"{launcher.world_size}: run it once, in the job's own shell, without a launcher"
        )
