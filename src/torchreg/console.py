"""What a person sees: numbers, lines and tables; a progress bar on a terminal, plain lines in a batch log."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from typing import Protocol, TextIO

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from torchreg.distributed.launcher import detect_launcher

_SECONDS_BETWEEN_LINES = 10.0
_INDENT = 13  # columns before what a line says of its first word
_SHORT = (14, 9)  # letters; a cell of at most as many is not wrapped, or of at most 9 where there is little room
_MOST_TERMS = 8  # of an equation


def printable(text: str) -> str:
    """Text with escapes such as `\\x1b` or `\\n` for what a terminal would act on and a font cannot draw."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def digits(value: float) -> str:
    """A number at any magnitude: with 6 decimals where these are 7 to 16 significant digits, else with 8 or 16."""
    if 1 <= abs(value) < 1e10:
        return f"{value:.6f}"
    return f"{value:.16g}" if abs(value) >= 1e10 else f"{value:.8g}"


def equation(target: str, names: Sequence[str], weight: Sequence[float], bias: float) -> str:
    """The line target = weight · features + bias; of many features the first terms alone."""
    terms = [f"{_signed(w)} {name}" for w, name in itertools.islice(zip(weight, names, strict=True), _MOST_TERMS)]
    if len(names) > _MOST_TERMS:
        terms.append(f"+ … ({len(names) - _MOST_TERMS:,} more)")
    return f"{target} = {' '.join([*terms, _signed(bias)]).removeprefix('+ ')}"


def _signed(value: float) -> str:
    return f"{'-' if value < 0 else '+'} {digits(abs(value))}"


def show_lines(lines: Iterable[str]) -> None:
    """Print lines on stdout; on a terminal wrapped between words, but for commands, which are there to be copied."""
    for line in lines:
        print(_wrapped(line, _room(sys.stdout)))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout, every column right-aligned, rows that begin with `!` marked in colour.

    On a terminal its cells are wrapped between words to the terminal's width, and where that is too narrow each row
    becomes a list. Elsewhere it is as wide as it needs to be.
    """
    console, room = _console(sys.stdout), _room(sys.stdout)
    styles = ["red" if row[0].startswith("!") else None for row in rows]
    cells = [[printable(cell.removeprefix("!")) for cell in row] for row in rows]
    gap, widths = _layout(columns, cells, room)
    if widths:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, int(gap > 1), 0, int(gap > 2)))
        for column, width in zip(columns, widths, strict=True):
            table.add_column(column, justify="right", width=width)
        for row, style in zip(cells, styles, strict=True):
            table.add_row(*row, style=style)
        console.print(table, crop=False)
        return
    indent = max(map(len, columns)) + 2
    for row, style in zip(cells, styles, strict=True):
        console.print()
        for column, cell in zip(columns, row, strict=True):
            console.print(_wrapped(f"{column:{indent}}{cell}", room, indent), style=style, soft_wrap=True)
    console.print()


def _layout(columns: Sequence[str], rows: Sequence[Sequence[str]], room: float) -> tuple[int, list[int]]:
    """The gap between the columns of a table, 3 if that fits, and their widths; none where no gap is small enough."""
    by_column = list(zip(columns, *rows, strict=True))
    widths = [max(map(cell_len, cells)) for cells in by_column]
    for short, gap in itertools.product(_SHORT, (3, 2, 1)):
        least = [
            max(
                map(
                    cell_len,
                    ["", *name.split(), *(part for c in cells for part in ([c] if len(c) <= short else c.split()))],
                )
            )
            for name, *cells in by_column
        ]
        left = room - 2 - gap * (len(columns) - 1)
        if sum(least) <= left:
            while sum(widths) > left:
                widest = max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))
                widths[widest] -= 1
            return gap, widths
    return 0, []


def _is_watched(stream: TextIO) -> bool:
    """Whether a person sees it as it appears. A launcher's ranks may have a terminal that is none (Open MPI 5)."""
    with contextlib.suppress(ValueError):
        return stream.isatty() and detect_launcher(os.environ).is_none
    return False


def _room(stream: TextIO) -> float:
    """How many columns a line may have."""
    return _console(stream).width if _is_watched(stream) else math.inf


def _console(stream: TextIO) -> Console:
    is_watched = _is_watched(stream)
    return Console(
        file=stream, highlight=False, markup=False, emoji=False, force_terminal=is_watched,
        width=None if is_watched else 100_000,
    )  # fmt: skip


def _wrapped(line: str, room: float, indent: int = _INDENT) -> str:
    line = printable(line)
    if len(line) <= room or " " not in line[indent:] or line.startswith("command "):
        return line
    return textwrap.fill(
        line, int(room), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


class Reporter(Protocol):
    """Something that tells a person how a run goes. Called on the main rank only."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def warn(self, text: str) -> None:
        """A line that must not be missed."""

    def progress(self, step: int, num_steps: int, loss: float) -> None:
        """`step` of `num_steps` steps are done, the last with this loss."""

    def close(self) -> None:
        """Nothing more will come."""


class Silent:
    """Says nothing: other ranks than the main one, and callers who only want the result."""

    def say(self, text: str) -> None: ...  # noqa: D102

    def warn(self, text: str) -> None: ...  # noqa: D102

    def progress(self, step: int, num_steps: int, loss: float) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


class Terminal:
    """A `Reporter` on stdout, or on stderr where stdout belongs to a JSON object.

    `counts` names what `progress` counts. On a terminal a bar that updates in place; elsewhere
    the first and last steps, a tenth of the steps apart at
    most, and at least ten seconds apart, so that a log of a thousand-node job stays readable.
    """

    def __init__(self, *, stderr: bool = False, counts: str = "step") -> None:
        self._counts = counts
        stream = sys.stderr if stderr else sys.stdout
        self._console, self._room = _console(stream), _room(stream)
        self._bar: Progress | None = None
        self._next_line_s = 0.0

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(_wrapped(text, self._room), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning, in colour where there is one."""
        self._console.print(_wrapped(f"warning: {text}", self._room), style="yellow", soft_wrap=True)

    def progress(self, step: int, num_steps: int, loss: float) -> None:
        """Move the bar, or print a line when one is due."""
        console = self._console
        if console.is_terminal and not console.is_dumb_terminal and not console.no_color:
            self._move_bar(step, num_steps, loss)
        elif step == num_steps or time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + _SECONDS_BETWEEN_LINES
            self.say(f"{self._counts} {step}/{num_steps}  loss {loss:.6g}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _move_bar(self, step: int, num_steps: int, loss: float) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self._counts + "s · loss {task.fields[loss]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task("training", total=num_steps, loss="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=step, loss=f"{loss:.6g}")
