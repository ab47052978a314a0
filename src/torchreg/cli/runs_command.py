"""`torchreg runs`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from torchreg.cli.options import parse
from torchreg.console import percent, show_files, show_lines, show_table
from torchreg.core.checkpoint import read_regular
from torchreg.runs.record import CHECKPOINTS_FOLDER, CONFIG_FILE, RECORD_FILE, TRAINING_FIGURE, is_written
from torchreg.runs.result import Result, result_of_record

_FILES = (RECORD_FILE, CONFIG_FILE)


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """List training runs, the newest last, or show how one ended: finished, diverged, saved (and to be resumed),
    running, failed, or with a damaged record.
    """

    run: tyro.conf.Positional[str] = "runs"  # A folder of runs, or one run: its name in `runs`, or its folder.


def folder_of(name: str, *files: str) -> Path | None:
    """The folder, in `runs` or by its path, that has one of these files; None where there is none."""
    folders = (Path("runs", name), Path(name))
    return next((folder for folder in folders if any((folder / file).is_file() for file in files)), None)


def run(argv: list[str]) -> int:
    """List the runs, or show one."""
    options = parse(RunsOptions, "torchreg runs", argv)
    one, folder = folder_of(options.run, *_FILES), Path(options.run)
    if one:
        _, (_, state, num_steps, *_), result = _look_at(one)
        show_lines(result.lines() if result else [f"{state:13}{num_steps or 0} steps are saved"])
        show_files(one, sorted(one.glob(f"{TRAINING_FIGURE}.*")))
    elif folder.is_dir():
        runs = {path.parent for file in _FILES for path in folder.glob(f"*/{file}")}
        found = sorted(_look_at(run)[:2] for run in runs)
        show_table(["run", "state", "steps", "ranks", "loss", "above optimum", "written"], [row for _, row in found])
    else:
        raise ValueError(f"run is {options.run!r}, which is no run and no folder of runs: name one")
    return 0


def _look_at(run: Path) -> tuple[float, list[str], Result | None]:
    """When a run was last written, in seconds since 1970; its row of the table; and its result if it has one."""
    checkpoints, result = sorted((run / CHECKPOINTS_FOLDER).glob("step-*.pt")), None
    state = "running" if is_written(run) else "saved" if checkpoints else "failed"
    if state != "running" and (run / RECORD_FILE).exists():
        try:
            result = result_of_record(json.loads(read_regular(run / RECORD_FILE)))
            state = "diverged" if result.diverged else "finished"
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            state = "damaged"
    entries = [str(int(checkpoints[-1].stem[5:])) if checkpoints else "", "", "", ""]  # of step-0000000020.pt
    if result:
        excess = "" if result.excess is None else percent(result.excess)
        entries = [str(result.num_steps), str(result.world_size), f"{result.loss:.5g}", excess]
    written_s = max(path.stat().st_mtime for path in (run, *checkpoints, *map(run.joinpath, _FILES)) if path.exists())
    name, when = "!" * (state in ("failed", "diverged", "damaged")) + run.name, time.localtime(written_s)
    return written_s, [name, state, *entries, time.strftime("%m-%d %H:%M", when)], result
