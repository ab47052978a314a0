"""What a report's page is made of: sections, tables and cells; numbers with units, and why something is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torchreg.figures.pictures import Picture
from torchreg.figures.quantities import bytes_text, count, in_unit

Json = dict[str, Any]

_LONG = 14  # rows; a longer table waits behind its title
FEW = ("a", "too few launches for a 95 % interval: it needs 6")
NONE = ("b", "not measured, or without meaning at this point")
NEVER = ("c", "never: training diverges or its noise floor lies above the target")
NOT_REACHED = ("d", "the target was not reached, or was not tried")
NOT_TOLD = ("e", "not recorded")


@dataclass(frozen=True)
class Cell:
    """A value with its interval; `note` is the letter of the footnote that says why something is missing."""

    text: str
    interval: str = ""
    note: str = ""
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """Columns, rows, and the footnotes that its cells refer to."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[tuple[str, str], ...]

    @property
    def is_long(self) -> bool:
        """Too long to be shown unasked."""
        return len(self.rows) > _LONG


@dataclass(frozen=True)
class Section:
    """A heading and what is under it; `anchor` is unique in the page."""

    anchor: str
    title: str
    words: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    sections: tuple[Section, ...] = ()


def table(title: str, columns: Sequence[str], rows: Iterable[tuple[Cell, ...]]) -> Table:
    """A table with the footnotes that its cells need."""
    kept = tuple(rows)
    used = {cell.note for row in kept for cell in row if cell.note}
    notes = tuple(note for note in (FEW, NONE, NEVER, NOT_REACHED, NOT_TOLD) if note[0] in used)
    return Table(title, tuple(columns), kept, notes)


def word(text: str | None) -> Cell:
    """A cell of text."""
    return Cell(str(text), is_number=False) if text is not None else Cell("–", note=NOT_TOLD[0], is_number=False)


def counted(value: float | None) -> Cell:
    """A cell of a whole number."""
    return Cell(count(value)) if value is not None else Cell("–", note=NONE[0])


def bytes_cell(value: float) -> Cell:
    """A cell of a message size."""
    return Cell(bytes_text(value))


def plain(value: float | None, unit: str, missing: tuple[str, str] = NONE) -> Cell:
    """A cell of a number without an interval; `missing` is the footnote where there is none."""
    return Cell(in_unit([value], unit)) if value is not None else Cell("–", note=missing[0])


def estimate_cell(estimate: Json | None, unit: str, missing: tuple[str, str] = NONE) -> Cell:
    """A cell of an estimate and its interval."""
    if estimate is None:
        return Cell("–", note=missing[0])
    text = in_unit([estimate["value"]], unit)
    if estimate["low"] is None:
        return Cell(text, "–", FEW[0])
    if estimate["high"] is None:  # so many launches missed the target that the interval has no upper end
        return Cell(text, f"{in_unit([estimate['low']], unit)} or more")
    if estimate["low"] == estimate["high"]:  # a baseline's ratio to itself
        return Cell(text)
    return Cell(text, in_unit([estimate["low"], estimate["high"]], unit))
