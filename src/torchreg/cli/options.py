"""The options that commands share, how they are written and documented, and their errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro import constructors

from torchreg.runs.config import TrainConfig
from torchreg.runs.recipes import RECIPES


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

EXAMPLES = {
    "train": "--recipe lesson --plot --name lesson", "runs": "lesson", "plot": "lesson", "data": "show",
    "plan": "--lr-scaling sqrt --world-sizes 1,2,4,8", "sweep batch": "--batch-sizes 64,256 --num-seeds 1",
    "sweep lr-scaling": "--multipliers 2,4 --num-seeds 1", "verify": "--device cpu --quick",
    "scale plan": "--ranks-per-node 1,2 --num-features 1", "scale run": "--name quick --device cpu --repeats 1",
    "scale status": "runs/quick", "scale merge": "runs/all runs/quick", "report": "runs/quick",
    "report compare": "runs/quick runs/all", "scale command": "--launcher mpich --num-ranks 4",
}  # fmt: skip
"""Options that work as they stand, one after the other, for each command."""

REGISTRY = constructors.ConstructorRegistry()  # how tyro reads and documents the options of every command


def parse(kind: type[T], program: str, argv: list[str], default: T | None = None) -> T:
    """Parse a command's options. Raises `ValueError` with tyro's error message, which is a box, in one line."""
    box = io.StringIO()
    options: dict[str, Any] = {"config": (tyro.conf.DisallowNone,)} | ({} if default is None else {"default": default})
    texts = [*str(inspect.getdoc(kind)).split("\n\n"), f"Example: {program} {EXAMPLES.get(program[9:])}"]
    about = "\n\n".join(textwrap.fill(" ".join(text.split()), 80, subsequent_indent=" ") for text in texts)
    try:
        with contextlib.redirect_stderr(box), REGISTRY:
            return tyro.cli(kind, prog=program, description=about, args=argv, **options)
    except SystemExit as error:
        if error.code in (0, None):
            raise
    frame = ".*(?:─{3}|-{3}).*"  # a line of the box; its title is in the first one, or above it
    _title, *parts = re.split(frame, re.sub(r"\x1b\[[0-9;]*m", "", box.getvalue()))
    text = " ".join(word for part in parts for word in part.split() if word not in "│|")
    text = re.sub(r" (Got errors|Argument helptext|For full helptext).*", "", text)
    raise ValueError(re.sub(r"^Error parsing ((DataOptions|config(\.\w+)?): )?", "", text))


def parse_config(kind: type[C], program: str, argv: list[str], default: TrainConfig | None = None) -> C:
    """Parse a command's options with these defaults, else with those of the recipe that the options name, whose
    batch size is dropped where the options choose the batch in another way. --plot needs matplotlib.
    """
    if default is None:
        words = " ".join(argv).replace("=", " ").split()
        recipe = "".join(words[words.index("--recipe") + 1 :][:1]) if "--recipe" in words else "default"
        default = RECIPES.get(recipe, RECIPES["default"])  # tyro refuses another name
        flags = [word.replace("_", "-") for word in words]
        if "--local-batch-size" in flags or "--sampling full" in " ".join(flags):
            default = default.replace(global_batch_size=None)
    options = parse(kind, program, argv, kind(config=default))
    if options.config.run.plot:
        from torchreg.plots.style import require_libraries

        require_libraries("plot", "matplotlib")
    return options


def comments(kind: type) -> dict[str, str]:
    """The comment of each field of a dataclass: at the end of its line, or in the lines above it."""
    found, above = {}, ""
    for line in "\n".join(inspect.getsource(base) for base in reversed(kind.__mro__[:-1])).splitlines():
        code, _, comment = line.partition("# ")
        if field := re.match(r"    (\w+): ", code):
            found[field[1]] = comment or above.strip()
        above = f"{above} {comment}" if not code.strip() else ""
    return found


@REGISTRY.struct_rule
def _with_one_default(info: constructors.StructTypeInfo) -> constructors.StructConstructorSpec | None:
    """The fields of a dataclass with their comments; an unset one has the default that its comment ends with."""
    if not dataclasses.is_dataclass(info.type):
        return None
    hints, texts, options = get_type_hints(info.type, include_extras=True), cache(partial(comments, info.type)), []
    for field in dataclasses.fields(info.type):
        default = field.default
        if default is dataclasses.MISSING:
            default = tyro.MISSING_NONPROP if field.default_factory is default else field.default_factory()
        default = getattr(info.default, field.name, default)
        shown = partial(_default_of, texts, field.name, default)
        aliases = ("--lr",) if field.name == "base_learning_rate" else None
        kind: Any = Annotated[hints[field.name], tyro.conf.arg(help_behavior_hint=shown, aliases=aliases)]
        sentence = partial(_sentence_of, texts, field.name)
        options.append(constructors.StructFieldSpec(field.name, kind, default, sentence))
    return constructors.StructConstructorSpec(info.type, tuple(options))


def _sentence_of(texts: Callable[[], dict[str, str]], name: str) -> str | None:
    return texts().get(name, "").partition(" Default: ")[0] or None


def _default_of(texts: Callable[[], dict[str, str]], name: str, default: Any, shown: str) -> str:
    if default is None or default in ((), ""):
        shown = texts().get(name, "").partition(" Default: ")[2].rstrip(".") or "none"
    return f"(default: {('off', 'on')[default] if isinstance(default, bool) else shown})"


@REGISTRY.primitive_rule
def _list(info: constructors.PrimitiveTypeInfo) -> constructors.PrimitiveConstructorSpec[Any] | None:
    """Lists are written 1,2,4; separate words are understood too. An entry with a comma stands in double quotes."""
    kind = next((kind for kind in (info.type, *get_args(info.type)) if get_origin(kind) is tuple), None)
    if kind is None or tyro.conf.Positional in info.markers:
        return None
    one, *others = get_args(kind)
    spec: Any = REGISTRY.get_primitive_spec(constructors.PrimitiveTypeInfo.make(one, info.markers))
    length = None if others == [...] else 1 + len(others)

    def read(words: list[str]) -> tuple[Any, ...]:
        with contextlib.suppress(ValueError):
            parts = re.findall(r'(?:^|,)\s*(?:"([^"]*)"|([^,]*))', ",".join(word.strip(" ,") for word in words))
            entries = [quoted or plain.strip() for quoted, plain in parts]
            entries *= length if length and len(entries) == 1 else 1
            values = tuple(spec.instance_from_str([entry]) for entry in entries)
            if any(entries) and length in (None, len(values)) and not (one is int and min(values) < 1):
                return values
        what = "whole numbers of at least 1" if one is int else f"{length} numbers" if length else spec.metavar
        raise ValueError(f"the list is {' '.join(words)!r}: give {what}, separated by commas")

    return constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=",".join([spec.metavar] * length) if length else f"{spec.metavar},…",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda values: [",".join(map(str, values or ()))],
    )
