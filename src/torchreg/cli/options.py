"""What all commands share: exit codes, and options with errors of one line. tyro is imported when it is used."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any, TypeVar

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2  # reported in one line on stderr
EXIT_DIVERGED = 3  # the record is written
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal or the time limit, and saved; start it again
EXIT_INTERRUPTED = 130  # Ctrl-C before there was anything to save; 128 + SIGINT, as in a shell

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class JSONOption:
    """The option of all commands that print a result."""

    json: bool = False  # Print the result as one JSON object on stdout, and nothing else there.


def parse(kind: type[T], program: str, argv: list[str], default: T | None = None) -> T:
    """Parse a command's options. Raises `ValueError` with tyro's error message, which is a box, in one line."""
    import tyro

    box = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, prog=program, args=argv, **options)
    except SystemExit as error:
        if error.code in (0, None):
            raise
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", box.getvalue()).splitlines() if line[:1] not in ("╭", "╰")]
    lines = [line.strip("│─ \t") for line in lines]
    text = " ".join(line for line in lines if line and not line.startswith("For full helptext"))
    raise ValueError(re.sub(r" (Got errors|Argument helptext): .*", "", text).removeprefix("Error parsing "))


def whole_numbers(field: str, text: str) -> list[int]:
    """The numbers of a list such as 1,2,4. Raises `ValueError` for anything else."""
    parts = [part.strip() for part in text.strip(" ,.…").split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{field} is {text!r}: give whole numbers of at least 1, separated by commas, such as 1,2,4")
    return [int(part) for part in parts]
