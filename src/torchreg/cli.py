"""The commands. Each imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from torchreg.config import TrainConfig, with_recipe
from torchreg.launcher import detect_launcher

if TYPE_CHECKING:
    from torchreg.result import Result
    from torchreg.runtime import Runtime

T = TypeVar("T")

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3

_ECHO_DELAY_S = 2.0

COMMANDS = {
    "train": "train the model, on one process or many ranks",
    "plan": "predict stability, noise floor and steps to a target for many world sizes",
    "data": "show, fetch or make the data",
}
_USAGE = """\
usage: torchreg [-h] [--version] {commands} ...

Train one linear layer across many ranks, with the right answer known beforehand.

commands:
{descriptions}

`torchreg COMMAND --help` shows the options of a command.
"""


@dataclass(frozen=True)
class TrainArguments:
    """Train nn.Linear on house prices; end with the fitted line, the closed form, and how far apart they are.

    Runs as one process, or as many ranks under mpiexec, torchrun, srun or ezpz launch.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]

    recipe: Literal["default", "lesson"] = "default"
    """Where the defaults below come from: `default` is safe at any world size that the data allows, `lesson` is
    the original lesson to the digit. Any flag overrides a recipe's value."""

    json: bool = False
    """Print the result as one JSON object on stdout, and nothing else there."""


@dataclass(frozen=True)
class PlanArguments:
    """Predict, without training, what each of several world sizes would do: stable or not, steps and samples to the
    target, noise floor.

    Takes the options of `train`; the target is `--target-excess` (default 0.01).
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]

    world_sizes: str = "1,2,4,8"
    """Numbers of ranks, separated by commas."""

    recipe: Literal["default", "lesson"] = "default"
    """Where the defaults come from, as for `train`."""

    json: bool = False
    """Print the plan as one JSON object on stdout, and nothing else there."""


@dataclass(frozen=True)
class DataArguments:
    """Show the data, fetch the real table, or make built-in data into a file."""

    action: tyro.conf.Positional[Literal["show", "fetch", "make"]]
    """`show`: columns, six sums, closed form. `fetch`: download the real table into the cache. `make`: write the
    table to `--output`."""

    data: str = "builtin"
    """`builtin`, `ames`, or a CSV or Parquet file."""

    features: tuple[str, ...] = ()
    """Feature columns of the file. Default: GrLivArea."""

    target: str | None = None
    """Target column of the file. Default: SalePrice."""

    num_rows: int | None = None
    """Rows of the built-in data. Default: 551."""

    num_features: int | None = None
    """Features of the built-in data. Default: 1."""

    data_seed: int = 0
    """Seed of the built-in data."""

    drop_missing: bool = False
    """Leave out rows with missing values instead of refusing the table."""

    output: Path = field(default=Path("houses.csv"))
    """Where `make` writes: .csv or .parquet."""

    overwrite: bool = False
    """Let `make` replace an existing file."""


def main(argv: Sequence[str] | None = None) -> int:
    """The `torchreg` command; returns its exit code.

    0: done. 1: a failure. 2: bad input, told in one line on stderr. 3: training diverged; its record is written.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except ValueError as error:
        _tell(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout went away, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    return EXIT_BAD_INPUT


def _dispatch(arguments: list[str]) -> int:
    commands = {"train": _train, "plan": _plan, "data": _data}
    if arguments[:1] == ["--version"]:
        from torchreg import __version__

        print(f"torchreg {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        descriptions = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
        print(_USAGE.format(commands="{" + ",".join(COMMANDS) + "}", descriptions=descriptions), end="")
        return 0 if arguments else EXIT_BAD_INPUT
    if arguments[0] not in commands:
        raise ValueError(f"{arguments[0]!r} is no command: the commands are {', '.join(COMMANDS)}")
    return commands[arguments[0]](arguments[1:])


def _train(argv: list[str]) -> int:
    defaults = TrainArguments(with_recipe(_recipe(argv)))  # --recipe itself is parsed with the other options
    arguments = _parse(TrainArguments, "torchreg train", argv, defaults)
    config = arguments.config
    if config.plot:
        from torchreg.figures import require_matplotlib

        require_matplotlib()
    runtime = _open_runtime(config)

    from torchreg.runtime import AgreedError
    from torchreg.terminal import Terminal
    from torchreg.train import train

    terminal = Terminal(stderr=arguments.json) if runtime.is_main else None
    try:
        with runtime:
            result = train(config, runtime, terminal)
    except AgreedError:
        raise
    except ValueError as error:  # not the user's, who is told by an AgreedError
        raise RuntimeError("a defect of torchreg: please report it with the traceback above") from error
    if runtime.is_main:
        pictures: list[Path] = []
        if config.plot and not result.diverged:
            from torchreg.figures import draw_training

            pictures = draw_training(Path(result.run_dir))
        _print_result(result, pictures, json=arguments.json)
    return EXIT_DIVERGED if result.diverged else 0


def _open_runtime(config: TrainConfig) -> Runtime:
    """Bring up the ranks. What goes wrong here may be seen by all ranks or by one: it is told once, and ends all."""
    from torchreg.runtime import AgreedError, open_runtime

    try:
        return open_runtime(
            runtime=config.runtime,
            device=config.device,
            sync=config.effective_sync,
            timeout_s=config.timeout_s,
        )
    except AgreedError:
        raise
    except (ValueError, RuntimeError) as error:
        with contextlib.suppress(ValueError):
            if detect_launcher(os.environ).rank > 0:
                time.sleep(_ECHO_DELAY_S)  # the main rank most likely tells the same, and the launcher ends this one
        prefix = "" if isinstance(error, ValueError) else "the ranks did not come together: "
        print(f"torchreg: error: {prefix}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
        # Without MPI_Finalize and process group clean-up, which would wait for ranks that are not there.
        os._exit(EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED)


def _print_result(result: Result, pictures: list[Path], *, json: bool) -> None:
    from torchreg.record import to_json

    if json:
        print(to_json(asdict(result)))
        return
    print(*result.lines(), f"records      {result.run_dir}", sep="\n")
    for picture in pictures:
        print(f"picture      {picture}")


def _plan(argv: list[str]) -> int:
    defaults = PlanArguments(with_recipe(_recipe(argv)))
    arguments = _parse(PlanArguments, "torchreg plan", argv, defaults)
    config = arguments.config
    if config.plot:
        from torchreg.figures import require_matplotlib

        require_matplotlib()
    world_sizes = _whole_numbers("world_sizes", arguments.world_sizes)
    if detect_launcher(os.environ).rank > 0:
        return 0  # the main rank tells it

    from torchreg.plan import make_plan
    from torchreg.record import PLAN_FILE, claim_folder, to_json, write_json

    plan = make_plan(config, world_sizes)
    pictures: list[Path] = []
    if config.plot:
        from torchreg.figures import draw_plan

        folder = claim_folder(config.runs_dir, config.name, "plan", overwrite=config.overwrite)
        write_json(folder / PLAN_FILE, plan.as_json())
        pictures = draw_plan(folder)
    if arguments.json:
        print(to_json(plan.as_json()))
        return 0
    from torchreg.terminal import show_table

    print(*plan.heading(), sep="\n")
    show_table(*plan.table())
    print(*plan.conclusion(), *(f"picture      {picture}" for picture in pictures), sep="\n")
    return 0


def _whole_numbers(field: str, text: str) -> list[int]:
    """The numbers of a list such as 1,2,4. Raises `ValueError` for anything else."""
    parts = [part.strip() for part in text.strip(" ,.…").split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{field} is {text!r}: give whole numbers of at least 1, separated by commas, such as 1,2,4")
    return [int(part) for part in parts]


def _data(argv: list[str]) -> int:
    arguments = _parse(DataArguments, "torchreg data", argv)
    from torchreg.data import fetch_ames, load_table, write_table

    if arguments.action == "fetch":
        print(fetch_ames())
        return 0
    config = TrainConfig(  # checks them as it does for training
        data=arguments.data,
        features=arguments.features,
        target=arguments.target,
        num_rows=arguments.num_rows,
        num_features=arguments.num_features,
        data_seed=arguments.data_seed,
        drop_missing=arguments.drop_missing,
    )
    table = load_table(config.data, **config.data_options())
    if arguments.action == "make":
        if arguments.output.exists() and not arguments.overwrite:
            raise ValueError(f"output is {arguments.output}, which exists already: choose another, or --overwrite")
        write_table(table, arguments.output)
        print(arguments.output)
        return 0
    from torchreg.data import describe
    from torchreg.theory import Moments

    best = Moments.of(table.features, table.target).closed_form()
    terms = " + ".join(f"{w:.6f} {name}" for w, name in zip(best.weight, table.feature_names, strict=True))
    print(*describe(table), sep="\n")
    print(f"closed form  {table.target_name} = {terms} + {best.bias:.6f}, mean squared error {best.loss:.6f}")
    return 0


def _recipe(argv: list[str]) -> str:
    """The value of --recipe, which decides the other options' defaults and so is read before them."""
    for place, option in enumerate(argv):
        name, equals, value = option.partition("=")
        if name == "--recipe":
            return value if equals else "".join(argv[place + 1 : place + 2])
    return "default"


def _parse(kind: type[T], program: str, argv: list[str], default: T | None = None) -> T:
    """Parse a command's options. What tyro would say in a box becomes one line of a `ValueError`."""
    told = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(kind, prog=program, args=argv, **options)
    except SystemExit as error:
        if error.code in (0, None):
            raise
        raise ValueError(_in_one_line(told.getvalue())) from None


def _in_one_line(box: str) -> str:
    lines = [line.strip("│╭╮╰╯─ \t") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith("For full helptext"))
    return re.sub(r"^(Parsing error|Error parsing \S+: )\s*", "", text)


def _tell(message: str) -> None:
    """One line on stderr, from the main rank only."""
    with contextlib.suppress(ValueError):
        if detect_launcher(os.environ).rank > 0:
            return
    print(f"torchreg: error: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
