"""A campaign for a person: what it will do, what it has done."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchreg.scaling import locks as locks
from torchreg.scaling.campaign import Campaign, Launch, estimated_s, launches, node_hours, settings
from torchreg.scaling.campaign_run import Outcome, State, campaign_of, state_of
from torchreg.scaling.schema import check
from torchreg.scaling.sources import LAUNCH_FILE, LAUNCHES_FOLDER

_SHOWN_FAILURES = 5


@dataclass(frozen=True)
class LaunchStatus:
    """What is known of one launch; `told` is the time it took, why it failed, or who runs it."""

    id: str
    world_size: int
    num_nodes: int
    state: State
    wall_s: float | None
    told: str


def plan_table(campaign: Campaign) -> tuple[list[str], list[list[str]]]:
    """A row for each size of launch: what it measures and what it costs."""
    columns = ["nodes", "ranks a node", "ranks", "launches", "points each", "global batches", "s each", "node-hours"]
    by_shape: dict[tuple[int, int], list[Launch]] = {}
    for launch in launches(campaign):
        by_shape.setdefault((launch.num_nodes, launch.ranks_per_node), []).append(launch)
    rows = []
    for (nodes, ranks), same in sorted(by_shape.items()):
        points = settings(campaign, nodes * ranks)
        batches = sorted({point.global_batch_size for point in points})
        rows.append([
            str(nodes), str(ranks), str(nodes * ranks), str(len(same)), str(len(points)),
            ", ".join(map(str, batches)), f"{estimated_s(campaign, same[0]):.0f}", f"{node_hours(campaign, same):.2f}",
        ])  # fmt: skip
    return columns, rows


def plan_lines(campaign: Campaign, commands: Mapping[str, Sequence[str]]) -> list[str]:
    """What is measured, what it costs in all, and the command of each size of launch."""
    todo = launches(campaign)
    features = ", ".join(map(str, campaign.num_features))
    minutes = sum(estimated_s(campaign, each) for each in todo) / 60
    lines = [
        f"measured     {features} features; {', '.join(campaign.combinations)}; windows of {campaign.window_s:g} s",
        f"in all       {len(todo)} launches, about {minutes:.0f} min and {node_hours(campaign, todo):.2f} node-hours",
    ]
    first = {(launch.num_nodes, launch.world_size): launch for launch in reversed(todo)}
    return lines + [f"command      {shlex.join(commands[launch.id])}" for _, launch in sorted(first.items())]


def outcome_lines(outcome: Outcome, folder: Path) -> list[str]:
    """What became of a campaign in one run of it, and what to do next."""
    lines = [
        f"launches     {outcome.num_done} of {outcome.num_launches} done, {outcome.num_failed} failed, "
        f"{outcome.num_elsewhere} running elsewhere"
    ]
    if outcome.stopped:
        lines.append(f"stopped      {outcome.stopped}; the same command goes on")
    if outcome.num_failed:
        lines.append(f"failed       `torchreg scale status {folder}` says why; --retry-failed runs them again")
    return [*lines, f"report       torchreg report {folder}"]


def status(folder: Path) -> list[LaunchStatus]:
    """Every launch of a campaign's folder. Raises `ValueError` where the folder holds no campaign."""
    campaign = campaign_of(folder)
    return [_status(folder / LAUNCHES_FOLDER / launch.id, launch) for launch in launches(campaign)]


def _status(place: Path, launch: Launch) -> LaunchStatus:
    state = state_of(place)
    told, wall_s = "", None
    if state in ("done", "failed"):
        try:
            record = check((place / LAUNCH_FILE).read_bytes())
        except (OSError, ValueError) as error:
            told = f"{LAUNCH_FILE} is no record: {error}"
        else:
            wall_s = record["wall_s"]
            told = f"{wall_s:.0f} s" if state == "done" else str(record["reason"])
    elif state == "running":
        told = locks.locked_by(place) or ""
    return LaunchStatus(launch.id, launch.world_size, launch.num_nodes, state, wall_s, told)


def status_table(found: Sequence[LaunchStatus]) -> tuple[list[str], list[list[str]]]:
    """A row for each size of launch; rows with a failure begin with `!`."""
    counts: dict[tuple[int, int], Counter[State]] = {}
    for each in found:
        counts.setdefault((each.num_nodes, each.world_size), Counter())[each.state] += 1
    rows = []
    for (nodes, world_size), count in sorted(counts.items()):
        mark = "!" if count["failed"] else ""
        cells = [str(count[state]) for state in ("done", "failed", "running", "open")]
        rows.append([f"{mark}{nodes}", str(world_size), *cells])
    return ["nodes", "ranks", "done", "failed", "running", "open"], rows


def status_lines(found: Sequence[LaunchStatus], folder: Path) -> list[str]:
    """Failures with their reasons, what runs, and what to do next."""
    failed = [each for each in found if each.state == "failed"]
    lines = [f"failed       {each.id}: {each.told}" for each in failed[:_SHOWN_FAILURES]]
    if len(failed) > _SHOWN_FAILURES:
        lines.append(f"failed       and {len(failed) - _SHOWN_FAILURES} more")
    lines += [f"running      {each.id}: {each.told}" for each in found if each.state == "running"]
    num_open = sum(each.state == "open" for each in found)
    if num_open:
        lines.append(f"open         {num_open} of {len(found)} launches: `torchreg scale run` again goes on")
    return [*lines, f"report       torchreg report {folder}"]
