"""Lines and tables of a campaign: its plan, its status, and the outcome of one `scale run`."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchreg.scaling.campaign import Campaign, Launch, estimated_s, launches, node_hours, settings
from torchreg.scaling.campaign_run import State, campaign_of, status_of
from torchreg.scaling.sources import LAUNCHES_FOLDER

_MAX_FAILURES = 5  # that are shown

Table = tuple[list[str], list[list[str]]]  # columns and rows


def plan_table(campaign: Campaign) -> Table:
    """A row for each shape of launch: what it measures and its estimated cost."""
    by_shape: dict[tuple[int, int], list[Launch]] = defaultdict(list)
    for launch in launches(campaign):
        by_shape[launch.num_nodes, launch.ranks_per_node].append(launch)
    columns = ["nodes", "ranks a node", "ranks", "launches", "points each", "global batches", "s each", "node-hours"]
    rows = []
    for (nodes, ranks), group in sorted(by_shape.items()):
        points = settings(campaign, nodes * ranks)
        batches = ", ".join(map(str, sorted({point.global_batch_size for point in points})))
        cost = [f"{estimated_s(campaign, group[0]):.0f}", f"{node_hours(campaign, group):.2f}"]
        rows.append([*map(str, (nodes, ranks, nodes * ranks, len(group), len(points))), batches, *cost])
    return columns, rows


def plan_lines(campaign: Campaign, commands: Mapping[str, Sequence[str]]) -> list[str]:
    """What is measured, the total cost, and the command of each size of launch."""
    todo = launches(campaign)
    features = ", ".join(map(str, campaign.num_features))
    minutes = sum(estimated_s(campaign, launch) for launch in todo) / 60
    by_size = {(launch.num_nodes, launch.world_size): commands[launch.id] for launch in reversed(todo)}
    return [
        f"measured     {features} features; {', '.join(campaign.combinations)}; windows of {campaign.window_s:g} s",
        f"total        {len(todo)} launches, about {minutes:.0f} min and {node_hours(campaign, todo):.2f} node-hours",
        *(f"command      {shlex.join(command)}" for _, command in sorted(by_size.items())),
    ]


def outcome_lines(states: Counter[State], stopped: str | None, folder: Path) -> list[str]:
    """The result of one `scale run`, and what to do next."""
    lines = [
        f"launches     {states['done']} of {states.total()} done, {states['failed']} failed, "
        f"{states['running']} running elsewhere"
    ]
    if stopped:
        lines.append(f"stopped      {stopped}; run the same command to resume")
    if states["failed"]:
        lines.append(f"failed       reasons: `torchreg scale status {folder}`; --retry-failed runs them again")
    return [*lines, f"report       torchreg report {folder}"]


def status(folder: Path) -> list[dict[str, Any]]:
    """Every launch of a campaign's folder: `id`, `world_size`, `num_nodes`, and its `state`, `wall_s` and `message`.

    Raises `ValueError` if the folder has no campaign.
    """
    found = []
    for launch in launches(campaign_of(folder)):
        fields = {"id": launch.id, "world_size": launch.world_size, "num_nodes": launch.num_nodes}
        state, wall_s, message = status_of(folder / LAUNCHES_FOLDER / launch.id)
        found.append({**fields, "state": state, "wall_s": wall_s, "message": message})
    return found


def status_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each size of launch; rows with a failure begin with `!`."""
    counts: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    for launch in found:
        counts[launch["num_nodes"], launch["world_size"]][launch["state"]] += 1
    states = ["done", "failed", "running", "open"]
    rows = [
        ["!" * bool(count["failed"]) + str(nodes), str(ranks), *(str(count[state]) for state in states)]
        for (nodes, ranks), count in sorted(counts.items())
    ]
    return ["nodes", "ranks", *states], rows


def status_lines(found: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """Failures with their reasons, running launches, and what to do next."""
    failed, running = (
        [f"{state:13}{each['id']}: {each['message']}" for each in found if each["state"] == state]
        for state in ("failed", "running")
    )
    lines = failed[:_MAX_FAILURES]
    if len(failed) > _MAX_FAILURES:
        lines.append(f"failed       and {len(failed) - _MAX_FAILURES} more")
    lines += running
    if num_open := sum(each["state"] == "open" for each in found):
        lines.append(f"open         {num_open} of {len(found)} launches: run `torchreg scale run` again to resume")
    return [*lines, f"report       torchreg report {folder}"]
