"""Everything that is printed: numbers, lines and tables; a progress bar on a terminal, plain lines in a batch log."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from torchreg.distributed.launcher import detect_launcher

_NOT_WRAPPED = (40, 24, 18, 14, 9)  # longest entries of a table kept on one line: the first that there is room for
_MAX_TERMS = 8  # of an equation


def printable(text: str) -> str:
    """Text with escapes such as `\\x1b` or `\\n` for what a terminal would act on and a font cannot draw."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def digits(value: float) -> str:
    """A number of any magnitude: with 6 decimals where these are 7 to 16 significant digits, else with 8 or 16."""
    return format(value, ".16g" if abs(value) >= 1e10 else ".6f" if abs(value) >= 1 else ".8g")


def number(value: float, digits: int = 3) -> str:
    """Significant digits, thousands in groups; an exponent only where nothing else is short."""
    text = f"{value:.{digits}g}"
    if value and not 1e-4 <= abs(float(text)) < 1e9:
        return f"{value:.{digits - 1}e}"
    return f"{Decimal(text):,f}"


def percent(fraction: float, digits: int = 3) -> str:
    """A fraction as percent with `digits` significant digits, unless it is too small to be more than rounding."""
    return "< 1e-10 %" if 0 < abs(fraction) < 1e-12 else f"{number(100 * fraction, digits)} %"


def equation(target: str, names: Sequence[str], weight: Sequence[float], bias: float) -> str:
    """The line target = weight · features + bias; of many features the first terms only."""
    values = [*weight[:_MAX_TERMS], bias]
    *terms, constant = [f"{'-' if value < 0 else '+'} {digits(abs(value))}" for value in values]
    terms = [f"{value} {name}" for value, name in zip(terms, names, strict=False)]
    more = [f"+ … ({len(names) - _MAX_TERMS:,} more)"] if len(names) > _MAX_TERMS else []
    return f"{target} = {' '.join([*terms, *more, constant]).removeprefix('+ ')}"


def show_lines(lines: Iterable[str]) -> None:
    """Print lines on stdout; on a terminal wrapped between words, except commands, which are copied."""
    for line in lines:
        print(_wrapped(line, _console(sys.stdout).width))


def show_files(records: Path | str, pictures: Iterable[Path]) -> None:
    """Print the folder of the records and the paths of pictures."""
    show_lines([f"records      {records}", *(f"picture      {path}" for path in pictures)])


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout, every column right-aligned, rows that begin with `!` in colour.

    Entries are wrapped between words to the width of the terminal, or to 80 columns; if too narrow, rows become lists.
    """
    console, indent = _console(sys.stdout), max(map(len, columns)) + 2
    room = console.width if console.is_terminal else 80
    entries = [[printable(entry.removeprefix("!")) for entry in row] for row in rows]
    gap, widths = _layout(columns, entries, room)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, int(gap > 1), 0, int(gap > 2)))
    for column, width in zip(columns, widths, strict=False):
        table.add_column(column, justify="right", width=width)
    for row, texts in zip(rows, entries, strict=True):
        style = "red" if row[0].startswith("!") else None
        if widths:
            table.add_row(*texts, style=style)
        else:
            lines = [f"{column:{indent}}{text}" for column, text in zip(columns, texts, strict=True)]
            lines = ["", *(_wrapped(line, room, indent) for line in lines)]
            console.print("\n".join(lines), style=style, soft_wrap=True)
    console.print(table if widths else "", crop=False)


def _layout(columns: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> tuple[int, list[int]]:
    """The gap between the columns of a table, 3 if that fits, and their widths; no widths where nothing fits."""
    by_column = list(zip(columns, *rows, strict=True))
    widths = [max(map(cell_len, entries)) for entries in by_column]
    for kept, gap in itertools.product(_NOT_WRAPPED, (3, 2, 1)):
        least = []
        for name, *entries in by_column:
            parts = [name.split(), *([entry] if len(entry) <= kept else entry.split() for entry in entries)]
            least.append(max(map(cell_len, itertools.chain([""], *parts))))
        left = room - 2 - gap * (len(columns) - 1)
        if sum(least) <= left:
            while sum(widths) > left:
                widest = max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))
                widths[widest] -= 1
            return gap, widths
    return 0, []


def _console(stream: TextIO) -> Console:
    """A terminal as wide as it is, or plain text of any width, as for ranks: Open MPI 5 gives them pipes to a log."""
    is_terminal = False
    with contextlib.suppress(ValueError):
        is_terminal = stream.isatty() and detect_launcher(os.environ).is_none
    width = None if is_terminal else 100_000  # columns: unlimited
    return Console(file=stream, width=width, force_terminal=is_terminal, highlight=False, markup=False, emoji=False)


def _wrapped(line: str, room: int, indent: int = 13) -> str:  # a line's label has 13 columns
    line = printable(line)
    if len(line) <= room or " " not in line[indent:] or line.startswith("command "):
        return line
    return textwrap.fill(line, room, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


class Reporter:
    """Prints the messages and the progress of a run on a stream; without one nothing, as on all but the main rank.

    `counts` names what `progress` counts: in a bar on a terminal; elsewhere in lines at least ten seconds apart, and
    for the last step, so that the log of a thousand-node job stays readable.
    """

    def __init__(self, stream: TextIO | None = None, *, counts: str = "step") -> None:
        self._counts, self._next_line_s = counts, 0.0
        self._console = _console(stream) if stream else Console(quiet=True)
        self._bar: Progress | None = None

    def info(self, text: str, style: str | None = None) -> None:
        """Print a line."""
        self._console.print(_wrapped(text, self._console.width), style=style, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning, in colour where there is one."""
        self.info(f"warning: {text}", style="yellow")

    def progress(self, step: int, num_steps: int, loss: float) -> None:
        """Report that `step` of `num_steps` steps are done, the last with this loss."""
        console = self._console
        if console.quiet:
            return
        if console.is_terminal and not console.is_dumb_terminal and not console.no_color:
            if self._bar is None:
                counts = TextColumn(f"{self._counts}s · loss {{task.fields[loss]}}")
                columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), counts, TimeRemainingColumn())
                self._bar = Progress(*columns, console=console, transient=True)
                self._bar.add_task("training", total=num_steps, loss="")
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=step, loss=f"{loss:.6g}")
        elif step == num_steps or time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + 10
            self.info(f"{self._counts} {step}/{num_steps}  loss {loss:.6g}")

    def close(self) -> None:
        """Remove the bar: the run is over."""
        if self._bar:
            self._bar.stop()
            self._bar = None
