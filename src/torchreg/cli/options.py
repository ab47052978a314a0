"""The options that commands share, and their errors in one line."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro

from torchreg.runs.config import TrainConfig
from torchreg.runs.recipes import with_recipe


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """The options of a training run, and of a command that prints a result."""

    json: bool = False  # Print the result as one JSON object on stdout, and nothing else there.
    config: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(ConfigOptions):
    """The options of a training run, and where their defaults come from."""

    # Where the defaults of the other options come from: `default` is safe at any world size that the data allows,
    # `lesson` is the original lesson to the digit, `homework` its exercise with batches of 64 samples.
    recipe: Literal["default", "lesson", "homework"] = "default"


T = TypeVar("T")
C = TypeVar("C", bound=ConfigOptions)


def parse(kind: type[T], program: str, argv: list[str], default: T | None = None) -> T:
    """Parse a command's options. Raises `ValueError` with tyro's error message, which is a box, in one line."""
    box = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, prog=program, args=argv, **options)
    except SystemExit as error:
        if error.code in (0, None):
            raise
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box.getvalue()).splitlines()
    lines = [line.strip("│─ \t") for line in lines if line[:1] not in ("╭", "╰")]
    text = " ".join(line for line in lines if line and not line.startswith("For full helptext"))
    text = re.sub(r" (Got errors|Argument helptext): .*", "", text)
    raise ValueError(re.sub(r"^Error parsing ((DataOptions|config(\.\w+)?): )?", "", text))


def parse_config(kind: type[C], program: str, argv: list[str], default: TrainConfig | None = None) -> C:
    """Parse a command's options with these defaults, else with those of the recipe that the options name, whose
    batch size is dropped where the options choose the batch in another way.

    Raises `ValueError` where --plot lacks matplotlib.
    """
    if default is None:
        words = " ".join(argv).replace("=", " ").split()
        recipe = "".join(words[words.index("--recipe") + 1 :][:1]) if "--recipe" in words else "default"
        default = with_recipe(recipe)
        flags = [word.replace("_", "-") for word in words]
        if "--local-batch-size" in flags or "--sampling full" in " ".join(flags):
            default = default.replace(global_batch_size=None)
    options = parse(kind, program, argv, kind(config=default))
    if options.config.run.plot:
        from torchreg.plots.style import require_libraries

        require_libraries("plot", "matplotlib")
    return options


def whole_numbers(field: str, text: str) -> list[int]:
    """The numbers of a list such as 1,2,4. Raises `ValueError` for anything else."""
    parts = [part.strip() for part in text.strip(" ,.…").split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{field} is {text!r}: give whole numbers of at least 1, separated by commas, such as 1,2,4")
    return [int(part) for part in parts]
