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

    Runs as one process, or as many ranks under mpiexec, torchrun, srun or ezpz launch. Ctrl-C or SIGTERM during
    training: save, and end with exit code 75; the same command with --name NAME --resume auto resumes. A second Ctrl-C
    changes nothing in one process, and makes mpiexec abort without saving; Ctrl-\\ always does.
    """


def run(argv: list[str]) -> int:
    """Train, and print the result."""
    options = parse_config(TrainOptions, "torchreg train", argv)
    config = options.config

    from torchreg.cli.ranks import on_all_ranks, open_ranks
    from torchreg.console import Reporter, show_files, show_lines
    from torchreg.distributed.stopping import StopRequest
    from torchreg.runs.record import to_json
    from torchreg.runs.run import train

    communicator = open_ranks(config)
    reporter = Reporter(sys.stderr if options.json else sys.stdout)
    with StopRequest(config.run.time_limit_s, nothing_to_save=True) as stop:
        result = on_all_ranks(communicator, lambda: train(config, communicator, reporter, stop))
    code = {"request": EXIT_STOPPED, "divergence": EXIT_DIVERGED}.get(result.stopped_by, 0)
    if communicator.is_main:
        pictures = []
        if config.run.plot and code == 0:
            from torchreg.plots.figures import draw_training

            pictures = draw_training(Path(result.run_dir))
        if options.json:
            print(to_json(asdict(result)))
        else:
            show_lines(result.lines())
            show_files(result.run_dir, pictures)
        if code == EXIT_STOPPED:
            print(f"reason       {stop.reason}", file=sys.stderr if options.json else sys.stdout)
    return code
