"""Many runs that differ in one thing: batch sizes, or the rungs of a learning-rate ladder; what was predicted of them.

A sweep is a folder: `sweep.json` (what it is), `cells/<name>/` (the record of one run each), and `cells.csv` and
`curves.csv`, which are made from the records alone. A finished cell is not run again.

- `cells`: which runs a sweep is made of;
- `run`: running those that are not finished;
- `tables`: records in, tables out.
"""

from torchreg.sweeps.sweep import run_sweep
from torchreg.sweeps.sweep_tables import (
    CELLS_FOLDER,
    GROUP,
    cells_table,
    curves_table,
    ladder_lines,
    read_sweep,
    summary,
    summary_lines,
)
from torchreg.sweeps.trials import Cell, batch_cells, ladder_cells, ladder_limit

__all__ = [
    "CELLS_FOLDER",
    "GROUP",
    "Cell",
    "batch_cells",
    "cells_table",
    "curves_table",
    "ladder_cells",
    "ladder_limit",
    "ladder_lines",
    "read_sweep",
    "run_sweep",
    "summary",
    "summary_lines",
]
