"""`torchreg plan`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torchreg.cli.options import RecipeOptions, parse_config


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RecipeOptions):
    """Predict, without training, what each of several world sizes would do: stable or not, steps and samples to the
    target, noise floor.

    Takes the options of `train`. Without --target-excess the target is 1 % above the optimum.
    """

    world_sizes: tuple[int, ...] = (1, 2, 4, 8)  # Numbers of ranks, separated by commas.


def run(argv: list[str]) -> int:
    """Print the plan, and draw it if asked."""
    options = parse_config(PlanOptions, "torchreg plan", argv)
    config = options.config.run

    from torchreg.console import show_lines, show_table
    from torchreg.planning.plan import plan
    from torchreg.runs.record import PLAN_FILE, create_run_folder, to_json, write_json

    planned, pictures = plan(options.config, options.world_sizes), []
    if config.plot:
        from torchreg.plots.figures import draw_plan

        folder = create_run_folder(config.runs_dir, config.name, "plan", overwrite=config.overwrite)
        write_json(folder / PLAN_FILE, asdict(planned))
        pictures = draw_plan(folder)
    if options.json:
        print(to_json(asdict(planned)))
    else:
        show_lines(planned.heading())
        show_table(*planned.table())
        show_lines([*planned.conclusion(), *(f"picture      {picture}" for picture in pictures)])
    return 0
