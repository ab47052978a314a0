"""`torchreg train`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from torchreg.cli import EXIT_DIVERGED, EXIT_STOPPED
from torchreg.cli.options import RecipeOptions, parse_config


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RecipeOptions):
    """Train nn.Linear on house prices; end with the fitted line, the closed form, and how far apart they are.

    Runs as one process, or as many ranks under mpiexec, torchrun, srun or ezpz launch.
    """


def run(argv: list[str]) -> int:
    """Train, and print the result."""
    options = parse_config(TrainOptions, "torchreg train", argv)
    config = options.config

    from torchreg.cli.ranks import on_all_ranks, open_ranks
    from torchreg.console import Terminal, show_files, show_lines
    from torchreg.runs.record import to_json
    from torchreg.runs.run import train
    from torchreg.runs.stopping import StopRequest

    communicator = open_ranks(config)
    terminal = Terminal(stderr=options.json) if communicator.is_main else None
    with StopRequest(config.run.time_limit_s, nothing_to_save=True) as stop:
        result = on_all_ranks(communicator, lambda: train(config, communicator, terminal, stop))
    is_stopped = result.stopped_by == "request"
    if communicator.is_main:
        pictures = []
        if config.run.plot and not (is_stopped or result.diverged):
            from torchreg.plots.training_figure import draw_training

            pictures = draw_training(Path(result.run_dir))
        if options.json:
            print(to_json(asdict(result)))
        else:
            show_lines(result.lines())
            show_files(result.run_dir, pictures)
        if is_stopped:
            print(f"reason       {stop.reason}", file=sys.stderr if options.json else sys.stdout)
    return EXIT_STOPPED if is_stopped else EXIT_DIVERGED if result.diverged else 0
