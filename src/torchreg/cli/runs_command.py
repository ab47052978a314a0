"""`torchreg runs`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from torchreg.cli.options import parse
from torchreg.console import percent, show_files, show_lines, show_table
from torchreg.core.checkpoint import read_regular
from torchreg.runs.record import CHECKPOINTS_FOLDER, CONFIG_FILE, RECORD_FILE, TRAINING_FIGURE, is_written, to_json
from torchreg.runs.result import result_of_record

_FILES = (RECORD_FILE, CONFIG_FILE)


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """List training runs, the newest last, or show how one ended: finished, diverged, saved (and to be resumed),
    running, failed, or with a damaged record.
    """

    run: tyro.conf.Positional[str] = "runs"  # A folder of runs, or one run: its name in `runs`, or its folder.
    json: bool = False  # Print what is found as one JSON array on stdout, and nothing else there.


def folder_of(name: str, *files: str) -> Path | None:
    """The folder, in `runs` or by its path, that has one of these files; None where there is none."""
    folders = (Path("runs", name), Path(name))
    return next((folder for folder in folders if any((folder / file).is_file() for file in files)), None)


def run(argv: list[str]) -> int:
    """List the runs, or show one."""
    options = parse(RunsOptions, "torchreg runs", argv)
    one, folder = folder_of(options.run, *_FILES), Path(options.run)
    if one is None and not folder.is_dir():
        raise ValueError(f"run is {options.run!r}, which is no run and no folder of runs: `torchreg runs` lists them")
    found = sorted(
        map(_state_of, {one} if one else {path.parent for file in _FILES for path in folder.glob(f"*/{file}")}),
        key=lambda each: (each["written_s"], each["name"]),
    )
    if options.json:
        print(to_json(found))
    elif one:
        result, state, num_steps = found[0]["result"], found[0]["state"], found[0]["num_steps"] or 0
        show_lines(result_of_record(found[0]).lines() if result else [f"{state:13}{num_steps} steps are saved"])
        show_files(one, sorted(one.glob(f"{TRAINING_FIGURE}.*")))
    else:
        columns = ["run", "state", "steps", "ranks", "loss", "above optimum", "written"]
        show_table(columns, list(map(_row, found)))
    return 0


def _state_of(run: Path) -> dict[str, Any]:
    """What the files of a run show; `written_s` is the time of the newest, in seconds since 1970."""
    checkpoints, state, result = sorted((run / CHECKPOINTS_FOLDER).glob("step-*.pt")), "failed", None
    if is_written(run):
        state = "running"
    elif (run / RECORD_FILE).exists():
        try:
            record = json.loads(read_regular(run / RECORD_FILE))
            state = "diverged" if result_of_record(record).diverged else "finished"
            result = record["result"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            state = "damaged"
    elif checkpoints:
        state = "saved"
    num_steps = result["num_steps"] if result else int(checkpoints[-1].stem[5:]) if checkpoints else None
    written_s = max(path.stat().st_mtime for path in (run, *checkpoints, *map(run.joinpath, _FILES)) if path.exists())
    return {"name": run.name, "state": state, "num_steps": num_steps, "written_s": written_s, "result": result}


def _row(found: dict[str, Any]) -> list[str]:
    result, steps = found["result"] or {}, found["num_steps"]
    loss, excess = result.get("loss"), result.get("excess")
    return [
        "!" * (found["state"] in ("failed", "diverged", "damaged")) + found["name"],
        found["state"],
        "" if steps is None else str(steps),
        str(result.get("world_size", "")),
        "" if loss is None else f"{loss:.5g}",
        "" if excess is None else percent(excess),
        time.strftime("%m-%d %H:%M", time.localtime(found["written_s"])),
    ]
