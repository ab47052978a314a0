"""The options of a `TrainConfig`, for the commands that take them all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar

import tyro

from torchreg.cli.options import JSONOption, parse
from torchreg.runs.config import TrainConfig, with_recipe


@dataclass(frozen=True, kw_only=True)
class ConfigOptions(JSONOption):
    """The options of a training run."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(ConfigOptions):
    """The options of a training run, and where their defaults come from."""

    # Where the defaults of the other options come from: `default` is safe at any world size that the data allows,
    # `lesson` is the original lesson to the digit, `homework` its exercise with batches of 64 samples.
    recipe: Literal["default", "lesson", "homework"] = "default"


C = TypeVar("C", bound=ConfigOptions)
R = TypeVar("R", bound=RecipeOptions)


def parse_config(kind: type[C], program: str, argv: list[str], default: TrainConfig) -> C:
    """Parse a command's options with these defaults. Raises `ValueError` where --plot lacks matplotlib."""
    options = parse(kind, program, argv, kind(config=default))
    if options.config.plot:
        from torchreg.plots.style import require_matplotlib

        require_matplotlib()
    return options


def parse_recipe(kind: type[R], program: str, argv: list[str]) -> R:
    """Parse a command's options with the defaults of the recipe that they name.

    A recipe's batch size is dropped where the options choose the batch in another way.
    """
    words = " ".join(argv).replace("=", " ").split()
    recipe = "".join(words[words.index("--recipe") + 1 :][:1]) if "--recipe" in words else "default"
    config = with_recipe(recipe)
    flags = [word.replace("_", "-") for word in words]
    if "--local-batch-size" in flags or "--sampling full" in " ".join(flags):
        config = replace(config, global_batch_size=None)
    return parse_config(kind, program, argv, config)
