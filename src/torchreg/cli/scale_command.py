"""`torchreg scale`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from torchreg.cli.options import EXIT_FAILED, EXIT_STOPPED, parse
from torchreg.distributed.launcher import detect_launcher, sign_of_mpi
from torchreg.runs.config import TrainConfig
from torchreg.scaling.campaign import Campaign, launches, node_hours, read_campaign, settings

_USAGE = """\
usage: torchreg scale {plan,run,status,merge,command} ...

Measure how training scales, over many launches.

  plan     print the launches, settings, commands and node-hours of a campaign
  run      run every launch that has no result yet
  status   show what is done, failed, running and open
  merge    bring several campaign folders together
  command  print the launcher's command line, one token a line

`torchreg scale COMMAND --help` shows the options. `torchreg report DIR` makes the report.
"""


@dataclass(frozen=True)
class PlanArguments:
    """Print what a campaign will launch and measure, and what it will cost. Nothing is run.

    A campaign file may come first: torchreg scale plan jobs/campaigns/local.yaml. Flags override its values.
    """

    campaign: Annotated[Campaign, tyro.conf.arg(name="")]

    json: bool = False
    """Print the plan as one JSON object on stdout, and nothing else there."""


@dataclass(frozen=True)
class RunArguments:
    """Run every launch of a campaign that has no result yet, in random blocks.

    A campaign file may come first: torchreg scale run jobs/campaigns/local.yaml --dir runs/local. Flags override its
    values. Exit code 0: all is done. 1: a launch failed, on record. 75: launches are left, because it was stopped in
    time or another job runs them; run it again to go on.
    """

    campaign: Annotated[Campaign, tyro.conf.arg(name="")]

    dir: str = ""
    """The campaign's folder, which several jobs may share. Default: runs/NAME."""

    time_limit_s: float | None = None
    """Begin no launch that is likely to end later than this many seconds from now."""

    retry_failed: bool = False
    """Run failed launches again; their records are kept beside the new ones."""


@dataclass(frozen=True)
class StatusArguments:
    """Show what a campaign has done, what failed and why, what runs now, and what is left."""

    dir: Annotated[str, tyro.conf.Positional]
    """The campaign's folder."""

    json: bool = False
    """Print the status as one JSON object on stdout, and nothing else there."""


@dataclass(frozen=True)
class MergeArguments:
    """Bring the launches of several campaign folders together in a new one, for one report."""

    out: Annotated[str, tyro.conf.Positional]
    """The new folder."""

    dirs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The folders to bring together."""


@dataclass(frozen=True)
class MeasureArguments:
    """One launch's own work; `scale run` starts it on all ranks."""

    dir: Annotated[str, tyro.conf.Positional]
    launch: Annotated[str, tyro.conf.Positional]
    launched_at: float = 0.0


def run(argv: list[str]) -> int:
    """Plan, run or look at a campaign."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "plan": _plan,
        "run": _run,
        "status": _status,
        "merge": _merge,
        "command": _command,
        "measure": _measure,
    }
    if argv[:1] in (["-h"], ["--help"]):
        print(_USAGE, end="")
        return 0
    kind = argv[0] if argv else "missing"
    if kind not in commands:
        raise ValueError(f"scale is {kind}: give plan, run, status, merge or command, as in `torchreg scale plan`")
    return commands[kind](argv[1:])


def _campaign(program: str, argv: list[str]) -> tuple[Campaign, list[str]]:
    """The campaign of the file that comes first, if one does, and the flags."""
    if not argv or argv[0].startswith("-"):
        return Campaign(), argv
    path = Path(argv[0])
    flags: list[str] = []
    for key, value in read_campaign(path).items():
        if value is None:
            continue
        flag = f"--{key.replace('_', '-')}"
        flags += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    try:
        return parse(Campaign, program, flags), argv[1:]
    except ValueError as error:
        raise ValueError(f"campaign is {path}: {error}") from None


def _plan(argv: list[str]) -> int:
    campaign, flags = _campaign("torchreg scale plan", argv)
    arguments = parse(PlanArguments, "torchreg scale plan", flags, PlanArguments(campaign))
    campaign = arguments.campaign

    from torchreg.console import show_lines, show_table
    from torchreg.runs.record import to_json
    from torchreg.scaling.campaign_run import command_of, launcher_of
    from torchreg.scaling.campaign_tables import plan_lines, plan_table

    todo, launcher = launches(campaign), launcher_of(campaign)
    commands = {launch.id: command_of(campaign, launch, Path("DIR"), launcher) for launch in todo}
    if arguments.json:
        content = {
            "campaign": asdict(campaign),
            "launches": [
                {
                    **asdict(launch),
                    "id": launch.id,
                    "world_size": launch.world_size,
                    "settings": [asdict(setting) for setting in settings(campaign, launch.world_size)],
                    "command": commands[launch.id],
                }
                for launch in todo
            ],
            "node_hours": node_hours(campaign, todo),
        }
        print(to_json(content))
        return 0
    show_table(*plan_table(campaign))
    show_lines(plan_lines(campaign, commands))
    return 0


def _run(argv: list[str]) -> int:
    launcher, sign = detect_launcher(os.environ), sign_of_mpi(os.environ)
    if not launcher.is_none or sign:  # one rank too: its variables would reach what it starts
        who = f"a launcher ({sign} is set)" if launcher.is_none else launcher.name
        raise ValueError(
            f"scale run starts ranks itself, and {who} has started this process as rank {launcher.rank} of "
            f"{launcher.world_size}: run it once, in the job's own shell, without a launcher"
        )
    campaign, flags = _campaign("torchreg scale run", argv)
    arguments = parse(RunArguments, "torchreg scale run", flags, RunArguments(campaign))
    campaign = arguments.campaign
    if arguments.time_limit_s is not None and arguments.time_limit_s <= 0:
        raise ValueError(f"time_limit_s is {arguments.time_limit_s}: give a number above 0")

    from torchreg.console import show_lines
    from torchreg.runs.stopping import StopRequest
    from torchreg.scaling.campaign_run import run_campaign
    from torchreg.scaling.campaign_tables import outcome_lines

    folder = Path(arguments.dir or f"runs/{campaign.name}")

    def say(line: str) -> None:
        print(line, flush=True)

    say(f"campaign     {folder}")
    with StopRequest(arguments.time_limit_s) as stop:
        outcome = run_campaign(campaign, folder, stop, say, retry_failed=arguments.retry_failed)
    show_lines(outcome_lines(outcome, folder))
    if outcome.num_left:
        return EXIT_STOPPED
    return EXIT_FAILED if outcome.num_failed else 0


def _status(argv: list[str]) -> int:
    arguments = parse(StatusArguments, "torchreg scale status", argv)

    from torchreg.console import show_lines, show_table
    from torchreg.runs.record import to_json
    from torchreg.scaling.campaign_tables import status, status_lines, status_table

    found = status(Path(arguments.dir))
    if arguments.json:
        print(to_json([asdict(each) for each in found]))
        return 0
    show_table(*status_table(found))
    show_lines(status_lines(found, Path(arguments.dir)))
    return 0


def _merge(argv: list[str]) -> int:
    arguments = parse(MergeArguments, "torchreg scale merge", argv)

    from torchreg.console import show_lines
    from torchreg.scaling.records import merge

    show_lines(merge(Path(arguments.out), [Path(folder) for folder in arguments.dirs]))
    return 0


def _command(argv: list[str]) -> int:
    from torchreg.cli.launch_command import run_command

    return run_command(argv)


def _measure(argv: list[str]) -> int:
    arguments = parse(MeasureArguments, "torchreg scale measure", argv)

    from torchreg.cli.ranks import on_all_ranks, open_ranks
    from torchreg.machines.launch_commands import MACHINES
    from torchreg.runs.record import write_json
    from torchreg.scaling.campaign_run import campaign_of, measured_file
    from torchreg.scaling.measure import measure_launch
    from torchreg.scaling.sources import LAUNCHES_FOLDER

    folder = Path(arguments.dir)
    campaign = campaign_of(folder)
    by_id = {launch.id: launch for launch in launches(campaign)}
    if arguments.launch not in by_id:
        raise ValueError(
            f"launch is {arguments.launch!r}, which {folder} has not: see `torchreg scale status {folder}`"
        )
    launch, place = by_id[arguments.launch], folder / LAUNCHES_FOLDER / arguments.launch
    device = MACHINES[campaign.machine].device if campaign.device == "auto" else campaign.device
    communicator = open_ranks(
        TrainConfig(
            optimizer="manual",
            device=device,
            dtype=campaign.dtype,
            distributed=campaign.distributed,
            timeout_s=campaign.timeout_s,
        )
    )
    start_up_s = time.time() - arguments.launched_at
    measured = on_all_ranks(communicator, lambda: measure_launch(campaign, launch, communicator, place))
    if communicator.is_main:
        write_json(place / measured_file(f"{arguments.launched_at:.3f}"), {"start_up_s": start_up_s, **measured})
    return 0
