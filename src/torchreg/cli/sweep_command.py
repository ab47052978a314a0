"""`torchreg sweep`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from torchreg.cli.config_options import ConfigOptions, parse_config
from torchreg.cli.options import EXIT_STOPPED, whole_numbers
from torchreg.runs.config import SWEEP_DEFAULTS


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

    batch_sizes: str = "32,64,128,256,512"  # Global batch sizes, separated by commas.


@dataclass(frozen=True, kw_only=True)
class LRScalingOptions(_SweepOptions):
    """Multiply batch and learning rates by 1, 2, 4, 8, … until training diverges, and compare with the stability limit.

    Raw and standardised, in both update orders, with and without warm-up. The defaults are those of the lesson's
    homework, with 1000 steps a run. The same sweep, started again, resumes where it ended.
    """

    # Multipliers, separated by commas. Default: 1,2,4,… up to the first that is predicted to diverge, and 3 % below and
    # above the predicted limit.
    multipliers: str = ""


def run(argv: list[str]) -> int:
    """Run the trials that are not finished, print the summary, draw it."""
    if argv[:1] in (["-h"], ["--help"]):
        print("usage: torchreg sweep {batch,lr-scaling} ...\n\n`torchreg sweep batch --help` shows the options.")
        return 0
    kind = next((name for name in SWEEP_DEFAULTS if argv[:1] == [name]), None)
    if kind is None:
        raise ValueError(
            f"sweep is {argv[0] if argv else 'missing'}: give batch or lr-scaling, as in `torchreg sweep batch`"
        )
    kinds: dict[str, type[_SweepOptions]] = {"batch": BatchOptions, "lr-scaling": LRScalingOptions}
    options = parse_config(kinds[kind], f"torchreg sweep {kind}", argv[1:], SWEEP_DEFAULTS[kind])
    config, num_seeds = options.config, options.num_seeds
    field = "batch_sizes" if kind == "batch" else "multipliers"
    given = getattr(options, field)
    values = whole_numbers(field, given) if given or kind == "batch" else []
    if num_seeds < 1:
        raise ValueError(f"num_seeds is {num_seeds}: give a whole number of at least 1")

    from torchreg.cli.ranks import on_all_ranks, open_ranks
    from torchreg.console import Reporter, Silent, Terminal, show_files, show_table
    from torchreg.runs.record import to_json
    from torchreg.runs.stopping import StopRequest
    from torchreg.sweeps.sweep import run_sweep
    from torchreg.sweeps.sweep_tables import batch_rows, lr_scaling_rows, summary, trials_table
    from torchreg.sweeps.trials import Trial, batch_trials, lr_scaling_trials

    make_trials, make_rows = (batch_trials, batch_rows) if kind == "batch" else (lr_scaling_trials, lr_scaling_rows)
    communicator = open_ranks(config)
    reporter: Reporter = Terminal(stderr=options.json, counts="run") if communicator.is_main else Silent()

    def trials() -> list[Trial]:
        return make_trials(config, values, num_seeds)

    with StopRequest(config.time_limit_s, nothing_to_save=True) as stop:
        folder = on_all_ranks(
            communicator, lambda: run_sweep(kind, config, trials, communicator, reporter, stop, farm=options.farm)
        )
    if folder is None:
        reporter.info(f"stopped by {stop.reason or 'another rank'}; finished runs are kept: run the same sweep again")
        return EXIT_STOPPED
    if not communicator.is_main:
        return 0
    pictures = []
    if importlib.util.find_spec("matplotlib") is not None:
        from torchreg.plots.sweep_figures import draw_sweep

        pictures = draw_sweep(folder)
    table = summary(trials_table(folder))
    if options.json:
        print(to_json(table.to_dict("records")))
        return 0
    show_table(*make_rows(table))
    show_files(folder, pictures)
    return 0
