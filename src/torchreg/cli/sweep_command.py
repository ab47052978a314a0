"""`torchreg sweep`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import tyro

from torchreg.cli.options import EXIT_STOPPED, parse, whole_numbers
from torchreg.runs.config import SWEEP_DEFAULTS, TrainConfig


@dataclass(frozen=True)
class _SweepArguments:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]

    num_seeds: int = 5
    """Runs of each configuration, with seeds that count up from --seed."""

    farm: bool = False
    """Run one configuration on each rank, instead of each configuration on all ranks."""

    json: bool = False
    """Print the summary as one JSON object on stdout, and nothing else there."""


@dataclass(frozen=True)
class BatchArguments(_SweepArguments):
    """Train with several global batch sizes over as many epochs, and set the learning curves on the predicted ones.

    The defaults are those of the lesson's homework: its rates stay the same unless --lr-scaling says otherwise. Running
    the same sweep again goes on where it ended.
    """

    batch_sizes: str = "32,64,128,256,512"
    """Global batch sizes, separated by commas."""


@dataclass(frozen=True)
class LRScalingArguments(_SweepArguments):
    """Multiply batch and rates by 1, 2, 4, 8, … until training diverges, and set the rungs on the predicted limits.

    Raw and standardised, in both update orders, with and without warm-up. The defaults are those of the lesson's
    homework, with 1000 steps a run. Running the same sweep again goes on where it ended.
    """

    multipliers: str = ""
    """Rungs, separated by commas. Default: 1,2,4,… up to the first that is predicted to diverge, and 3 % below and
    above the predicted limit."""


def run(argv: list[str]) -> int:
    """Run the cells that are not finished, print the summary, draw it."""
    if argv[:1] in (["-h"], ["--help"]):
        print("usage: torchreg sweep {batch,ladder} ...\n\n`torchreg sweep batch --help` shows the options of a sweep.")
        return 0
    kind = argv[0] if argv else "missing"
    if kind == "batch":
        return _batch(argv[1:])
    if kind == "lr-scaling":
        return _lr_scaling(argv[1:])
    raise ValueError(f"sweep is {kind}: give batch or ladder, as in `torchreg sweep batch`")


def _batch(argv: list[str]) -> int:
    arguments = parse(BatchArguments, "torchreg sweep batch", argv, BatchArguments(SWEEP_DEFAULTS["batch"]))
    batch_sizes = whole_numbers("batch_sizes", arguments.batch_sizes)
    return _run(
        "batch", arguments, lambda sweep: sweep.batch_trials(arguments.config, batch_sizes, arguments.num_seeds)
    )


def _lr_scaling(argv: list[str]) -> int:
    arguments = parse(
        LRScalingArguments, "torchreg sweep lr-scaling", argv, LRScalingArguments(SWEEP_DEFAULTS["lr-scaling"])
    )
    rungs = whole_numbers("multipliers", arguments.multipliers) if arguments.multipliers else []
    return _run(
        "lr-scaling", arguments, lambda sweep: sweep.lr_scaling_trials(arguments.config, rungs, arguments.num_seeds)
    )


def _run(kind: Literal["batch", "lr-scaling"], arguments: _SweepArguments, cells: Callable[[ModuleType], Any]) -> int:
    if arguments.num_seeds < 1:
        raise ValueError(f"num_seeds is {arguments.num_seeds}: give a whole number of at least 1")
    config = arguments.config
    if config.plot:
        from torchreg.plots.style import require_matplotlib

        require_matplotlib()

    from torchreg import sweeps as sweep
    from torchreg.cli.ranks import on_all_ranks, open_ranks
    from torchreg.console import Silent, Terminal, show_lines, show_table
    from torchreg.runs.record import to_json
    from torchreg.runs.stopping import StopRequest

    communicator = open_ranks(config)
    reporter = Terminal(stderr=arguments.json, counts="run") if communicator.is_main else Silent()

    with StopRequest(config.time_limit_s, nothing_to_save=True) as stop:

        def work() -> Path | None:
            return sweep.run_sweep(
                kind, config, lambda: cells(sweep), communicator, reporter, stop, farm=arguments.farm
            )

        folder = on_all_ranks(communicator, work)
    if folder is None:
        reporter.say(f"stopped by {stop.reason or 'another rank'}; finished runs are kept: run the same sweep again")
        return EXIT_STOPPED
    if not communicator.is_main:
        return 0
    summary = sweep.summary(sweep.trials_table(folder))
    pictures = _pictures(folder)
    if arguments.json:
        print(to_json(summary.to_dict("records")))
        return 0
    show_table(*(sweep.summary_lines if kind == "batch" else sweep.lr_scaling_lines)(summary))
    show_lines([f"records      {folder}", *(f"picture      {picture}" for picture in pictures)])
    return 0


def _pictures(folder: Path) -> list[Path]:
    """A sweep is drawn wherever matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from torchreg.plots.sweep_figures import draw_sweep

    return draw_sweep(folder)
