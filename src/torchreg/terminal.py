"""What a person sees while a run goes on: a progress bar on a terminal, plain lines in a batch log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_SECONDS_BETWEEN_LINES = 10.0
_LOG_WIDTH = 120  # columns of a table where no terminal says how wide it is


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout, every column right-aligned, rows that begin with `!` marked in colour."""
    is_terminal = sys.stdout.isatty()  # a notebook's kernel asks for colours, and is none
    console = Console(highlight=False, force_terminal=is_terminal, width=None if is_terminal else _LOG_WIDTH)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell.removeprefix("!")) for cell in row), style="red" if row[0][:1] == "!" else None)
    console.print(table)


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
        self._console = Console(file=sys.stderr if stderr else sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._next_line_s = 0.0

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Print a warning, in colour where there is one."""
        self._console.print(f"warning: {text}", style="yellow", markup=False)

    def progress(self, step: int, num_steps: int, loss: float) -> None:
        """Move the bar, or print a line when one is due."""
        if self._console.is_terminal:
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
