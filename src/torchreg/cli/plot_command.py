"""`torchreg plot`."""

from __future__ import annotations

from dataclasses import dataclass

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

    draws = {RECORD_FILE: figures.draw_training, SWEEP_FILE: figures.draw_sweep, PLAN_FILE: figures.draw_plan}
    folder = folder_of(options.run, *draws)
    if folder is None:
        raise ValueError(f"run is {options.run!r}, which has no {', '.join(draws)}: name a finished run, sweep or plan")
    try:
        show_files(folder, next(draw for file, draw in draws.items() if (folder / file).is_file())(folder))
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} cannot be drawn, because its records are incomplete: {error!r}") from error
    return 0
