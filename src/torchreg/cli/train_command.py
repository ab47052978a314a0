"""`torchreg train`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from torchreg.cli.options import EXIT_DIVERGED, EXIT_STOPPED, Recipe, parse, recipe_config
from torchreg.runs.config import TrainConfig

if TYPE_CHECKING:
    from torchreg.runs.result import Result


@dataclass(frozen=True)
class TrainArguments:
    """Train nn.Linear on house prices; end with the fitted line, the closed form, and how far apart they are.

    Runs as one process, or as many ranks under mpiexec, torchrun, srun or ezpz launch.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]

    recipe: Recipe = "default"
    """Where the defaults below come from: `default` is safe at any world size that the data allows, `lesson` is
    the original lesson to the digit, `homework` its exercise with batches of 64 rows. Any flag overrides a recipe's
    value."""

    json: bool = False
    """Print the result as one JSON object on stdout, and nothing else there."""


def run(argv: list[str]) -> int:
    """Train, and print the result."""
    defaults = TrainArguments(recipe_config(argv))  # --recipe itself is parsed with the other options
    arguments = parse(TrainArguments, "torchreg train", argv, defaults)
    config = arguments.config
    if config.plot:
        from torchreg.plots.style import require_matplotlib

        require_matplotlib()

    from torchreg.cli.ranks import on_all_ranks, open_ranks
    from torchreg.console import Terminal
    from torchreg.runs.run import train
    from torchreg.runs.stopping import StopRequest

    communicator = open_ranks(config)
    terminal = Terminal(stderr=arguments.json) if communicator.is_main else None
    with StopRequest(config.time_limit_s, nothing_to_save=True) as stop:
        result = on_all_ranks(communicator, lambda: train(config, communicator, terminal, stop))
    if communicator.is_main:
        pictures: list[Path] = []
        if config.plot and result.stopped_by in ("steps", "target"):
            from torchreg.plots.training_figure import draw_training

            pictures = draw_training(Path(result.run_dir))
        _print_result(result, pictures, json=arguments.json)
        if result.stopped_by == "request":
            print(f"reason       {stop.reason}", file=sys.stderr if arguments.json else sys.stdout)
    if result.stopped_by == "request":
        return EXIT_STOPPED
    return EXIT_DIVERGED if result.diverged else 0


def _print_result(result: Result, pictures: list[Path], *, json: bool) -> None:
    from torchreg.console import show_lines
    from torchreg.runs.record import to_json

    if json:
        print(to_json(asdict(result)))
        return
    lines = [*result.lines(), f"records      {result.run_dir}", *(f"picture      {picture}" for picture in pictures)]
    show_lines(lines)
