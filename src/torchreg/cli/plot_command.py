"""`torchreg plot`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tyro

from torchreg.cli.options import parse
from torchreg.cli.runs_command import folder_of
from torchreg.console import show_files
from torchreg.plots.style import require_libraries
from torchreg.runs.record import PLAN_FILE, RECORD_FILE


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draw a finished run, sweep or plan from its records, as PNG and SVG in its folder."""

    run: tyro.conf.Positional[str] = ""  # What to draw: its name in `runs`, or its folder.


def run(argv: list[str]) -> int:
    """Draw, and print the paths of the pictures."""
    options = parse(PlotOptions, "torchreg plot", argv)
    require_libraries("plot", "matplotlib")

    from torchreg.plots import figures
    from torchreg.sweeps.sweep_tables import SWEEP_FILE

    files: Any = {RECORD_FILE: figures.draw_training, SWEEP_FILE: figures.draw_sweep, PLAN_FILE: figures.draw_plan}
    for file, draw in files.items():
        if folder := folder_of(options.run, file):
            try:
                show_files(folder, draw(folder))
                return 0
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{folder} cannot be drawn, because its records are damaged: {error!r}") from error
    raise ValueError(f"run is {options.run!r}, which has no {', '.join(files)}: name a finished run, sweep or plan")
