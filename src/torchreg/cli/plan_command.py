"""`torchreg plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from torchreg.cli.options import Recipe, parse, recipe_config, whole_numbers
from torchreg.runs.config import TrainConfig


@dataclass(frozen=True)
class PlanArguments:
    """Predict, without training, what each of several world sizes would do: stable or not, steps and samples to the
    target, noise floor.

    Takes the options of `train`; the target is `--target-excess` (default 0.01).
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]

    world_sizes: str = "1,2,4,8"
    """Numbers of ranks, separated by commas."""

    recipe: Recipe = "default"
    """Where the defaults come from, as for `train`."""

    json: bool = False
    """Print the plan as one JSON object on stdout, and nothing else there."""


def run(argv: list[str]) -> int:
    """Print the plan, and draw it if asked."""
    defaults = PlanArguments(recipe_config(argv))
    arguments = parse(PlanArguments, "torchreg plan", argv, defaults)
    config = arguments.config
    if config.plot:
        from torchreg.plots.style import require_matplotlib

        require_matplotlib()
    world_sizes = whole_numbers("world_sizes", arguments.world_sizes)

    from torchreg.planning.plan import make_plan
    from torchreg.runs.record import PLAN_FILE, create_run_folder, to_json, write_json

    plan = make_plan(config, world_sizes)
    pictures: list[Path] = []
    if config.plot:
        from torchreg.plots.plan_figure import draw_plan

        folder = create_run_folder(config.runs_dir, config.name, "plan", overwrite=config.overwrite)
        write_json(folder / PLAN_FILE, plan.as_json())
        pictures = draw_plan(folder)
    if arguments.json:
        print(to_json(plan.as_json()))
        return 0
    from torchreg.console import show_lines, show_table

    show_lines(plan.heading())
    show_table(*plan.table())
    show_lines([*plan.conclusion(), *(f"picture      {picture}" for picture in pictures)])
    return 0
