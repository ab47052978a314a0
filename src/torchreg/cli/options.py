"""Options from the command line, and what is wrong with them in one line."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from typing import Any, Literal, TypeVar

import tyro

from torchreg.runs.config import TrainConfig, with_recipe

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved in time, start it again
EXIT_INTERRUPTED = 130  # Ctrl-C before there was anything to save; 128 + SIGINT, as a shell has it

Recipe = Literal["default", "lesson", "homework"]
T = TypeVar("T")


def recipe_of(argv: list[str]) -> str:
    """The value of --recipe, which decides the other options' defaults and so is read before them."""
    for place, option in enumerate(argv):
        name, equals, value = option.partition("=")
        if name == "--recipe":
            return value if equals else "".join(argv[place + 1 : place + 2])
    return "default"


def recipe_config(argv: list[str]) -> TrainConfig:
    """The recipe that the options name, without its batch size where they choose the batch in another way."""
    config = with_recipe(recipe_of(argv))
    words = " ".join(argv).replace("=", " ").replace("_", "-").split()
    if "--local-batch-size" in words or "--sampling full" in " ".join(words):
        return replace(config, global_batch_size=None)
    return config


def parse(kind: type[T], program: str, argv: list[str], default: T | None = None) -> T:
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
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines() if not line.startswith(("╭", "╰"))]
    lines = [line.strip("│─ \t") for line in lines]
    text = " ".join(line for line in lines if line and not line.startswith("For full helptext"))
    text = re.sub(r" (Got errors|Argument helptext): .*", "", text)
    return text.removeprefix("Error parsing ")


def whole_numbers(field: str, text: str) -> list[int]:
    """The numbers of a list such as 1,2,4. Raises `ValueError` for anything else."""
    parts = [part.strip() for part in text.strip(" ,.…").split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{field} is {text!r}: give whole numbers of at least 1, separated by commas, such as 1,2,4")
    return [int(part) for part in parts]
