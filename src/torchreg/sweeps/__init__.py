"""Many runs that differ in one thing: batch sizes, or the rungs of a learning-rate ladder; what was predicted of them.

A sweep is a folder: `sweep.json` (what it is), `trials/<name>/` (the record of one run each), and `trials.csv` and
`curves.csv`, which are made from the records alone. A finished cell is not run again.

- `trials`: which runs a sweep is made of;
- `run`: running those that are not finished;
- `tables`: records in, tables out.
"""

from torchreg.sweeps.sweep import run_sweep
from torchreg.sweeps.sweep_tables import (
    GROUP,
    TRIALS_FOLDER,
    curves_table,
    lr_scaling_lines,
    read_sweep,
    summary,
    summary_lines,
    trials_table,
)
from torchreg.sweeps.trials import Cell, batch_trials, lr_scaling_limit, lr_scaling_trials

__all__ = [
    "GROUP",
    "TRIALS_FOLDER",
    "Cell",
    "batch_trials",
    "curves_table",
    "lr_scaling_limit",
    "lr_scaling_lines",
    "lr_scaling_trials",
    "read_sweep",
    "run_sweep",
    "summary",
    "summary_lines",
    "trials_table",
]
