"""What a report's page is made of: sections, tables and cells; numbers with units, and why something is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torchreg.plots.pictures import Picture
from torchreg.plots.quantities import bytes_text, count, in_unit

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


def table(
    title: str, columns: Sequence[str], rows: Iterable[tuple[Cell, ...]], often_alike: Sequence[str] = ()
) -> Table:
    """A table with the footnotes that its cells need.

    Of the columns that are `often_alike`, those in which all rows are, are told in the title: a table that is too wide
    hides its last columns.
    """
    kept = tuple(rows)
    alike = [
        place
        for place, column in enumerate(columns)
        if column in often_alike and len({row[place] for row in kept}) == 1 < len(kept) and not kept[0][place].note
    ]
    told = ", ".join(f"{columns[place]} {kept[0][place].text}" for place in alike)
    kept = tuple(tuple(cell for place, cell in enumerate(row) if place not in alike) for row in kept)
    used = {cell.note for row in kept for cell in row if cell.note}
    return Table(
        f"{title}: {told}" if told else title,
        tuple(column for place, column in enumerate(columns) if place not in alike),
        kept,
        tuple(note for note in (FEW, NONE, NEVER, NOT_REACHED, NOT_TOLD) if note[0] in used),
    )


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
    return _estimated(estimate, lambda values: in_unit(values, unit), missing)


def counted_estimate(estimate: Json | None, missing: tuple[str, str] = NONE) -> Cell:
    """A cell of an estimated number of things and its interval, every digit of them."""
    return _estimated(estimate, lambda values: " – ".join(count(round(value)) for value in values), missing)


def _estimated(estimate: Json | None, tell: Callable[[Sequence[float]], str], missing: tuple[str, str]) -> Cell:
    if estimate is None:
        return Cell("–", note=missing[0])
    text = tell([estimate["value"]])
    if estimate["low"] is None:
        return Cell(text, "–", FEW[0])
    if estimate["high"] is None:  # so many launches missed the target that the interval has no upper end
        return Cell(text, f"{tell([estimate['low']])} or more")
    if estimate["low"] == estimate["high"]:  # a baseline's ratio to itself
        return Cell(text)
    return Cell(text, tell([estimate["low"], estimate["high"]]))
