"""`torchreg sweep`."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from functools import partial

from torchreg.cli import EXIT_STOPPED
from torchreg.cli.options import ConfigOptions, parse_config
from torchreg.runs.recipes import SWEEP_DEFAULTS


@dataclass(frozen=True, kw_only=True)
class _SweepOptions(ConfigOptions):
    num_seeds: int = 5  # Runs of each configuration, with seeds that count up from --seed.
    farm: bool = False  # Run one configuration on each rank, instead of each configuration on all ranks.


@dataclass(frozen=True, kw_only=True)
class BatchOptions(_SweepOptions):
    """Train with several global batch sizes over as many epochs, and compare the learning curves with the prediction.

    The defaults are those of the lesson's homework: its learning rates are constant unless --lr-scaling is given. The
    same sweep, started again, resumes where it ended.
    """

    batch_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)  # Global batch sizes, separated by commas.


@dataclass(frozen=True, kw_only=True)
class LRScalingOptions(_SweepOptions):
    """Multiply batch and learning rates by 1, 2, 4, 8, … until training diverges, and compare with the stability limit.

    Raw and standardised, in both update orders, with and without warm-up. The defaults are those of the lesson's
    homework, with 1000 steps a run. The same sweep, started again, resumes where it ended.
    """

    # Multipliers, separated by commas. Default: 1,2,4,… up to the first that is predicted to diverge, and 3 % below and
    # above the predicted limit.
    multipliers: tuple[int, ...] = ()


def run(argv: list[str]) -> int:
    """Run the trials that are not finished, print the summary, draw it."""
    kind, *argv = argv or ["missing"]
    if kind in ("-h", "--help"):
        print("usage: torchreg sweep {batch,lr-scaling} ...\n\n`torchreg sweep batch --help` shows the options.")
        return 0
    if kind not in SWEEP_DEFAULTS:
        raise ValueError(f"sweep is {kind}: give batch or lr-scaling, as in `torchreg sweep batch`")
    options_of_kind, field = (BatchOptions, "batch_sizes") if kind == "batch" else (LRScalingOptions, "multipliers")
    options = parse_config(options_of_kind, f"torchreg sweep {kind}", argv, SWEEP_DEFAULTS[kind])
    values, config, num_seeds = getattr(options, field), options.config, options.num_seeds
    if num_seeds < 1:
        raise ValueError(f"num_seeds is {num_seeds}: give a whole number of at least 1")

    from torchreg.cli.ranks import on_all_ranks, open_ranks
    from torchreg.console import Reporter, show_files, show_table
    from torchreg.distributed.stopping import StopRequest
    from torchreg.runs.record import to_json
    from torchreg.sweeps import sweep_tables
    from torchreg.sweeps.sweep import run_sweep

    communicator = open_ranks(config)
    stream = sys.stderr if options.json else sys.stdout
    reporter = Reporter(stream if communicator.is_main else None, counts="run")
    with StopRequest(config.run.time_limit_s, nothing_to_save=True) as stop:
        sweep = partial(run_sweep, kind, config, values, num_seeds)
        folder = on_all_ranks(communicator, lambda: sweep(communicator, reporter, stop, farm=options.farm))
    if folder is None:
        reporter.info(f"stopped by {stop.reason or 'another rank'}; finished runs are kept: run the same sweep again")
        return EXIT_STOPPED
    if not communicator.is_main:
        return 0
    pictures = []
    if importlib.util.find_spec("matplotlib") is not None:
        from torchreg.plots.figures import draw_sweep

        pictures = draw_sweep(folder)
    summary = sweep_tables.summary(sweep_tables.trials_table(folder))
    if options.json:
        print(to_json(summary.to_dict("records")))
    else:
        show_table(*sweep_tables.table(kind, summary))
        show_files(folder, pictures)
    return 0
