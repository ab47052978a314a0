"""Columns of CSV and Parquet files as float64, and a clear error for every file that would be misread."""

from __future__ import annotations

import csv
import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PARQUET_EXTENSIONS = (".parquet", ".pq")
_ENCODING = "utf-8-sig"  # with or without a byte order mark
_END = "\x1aend of file\x1a"  # a row of its own, unless a quotation is not closed
_MAX_NAMES = 12  # of columns, in an error


@contextmanager
def file_errors(path: Path, kind: str) -> Iterator[None]:
    """Raise `ValueError` for whatever the libraries for this kind of file raise, and where they are missing."""
    try:
        yield
    except MemoryError:
        raise
    except ImportError as error:
        library = error.name or "pyarrow"
        raise ValueError(f"{path} is {kind}, and {library} is not installed: pip install {library}") from None
    except Exception as error:  # each kind of compression has errors of its own
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, UnicodeDecodeError):
            raise ValueError(f"{path} is not text in UTF-8 ({first_line}): save it as such") from error
        raise ValueError(f"{path} cannot be read or written as {kind}: {first_line}") from error


def read_columns(path: Path, wanted: Sequence[str]) -> NDArray[np.float64]:
    """The wanted columns, (num_rows, num_columns), with NaN for missing values. The last is the target."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise ValueError(f"data is {path}, which {what}: give synthetic, ames, or a CSV or Parquet file")
    return (_read_parquet if path.suffix.lower() in PARQUET_EXTENSIONS else _read_csv)(path, wanted)


def _read_parquet(path: Path, wanted: Sequence[str]) -> NDArray[np.float64]:
    with file_errors(path, "Parquet"):
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(path)
    schema = file.schema_arrow
    fields = [schema.field(index) for index in _indices([name.strip() for name in schema.names], wanted, path)]
    for field in fields:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if not re.match("u?int|half|float|double|decimal|null", str(kind)):
            reason = f"{path}: column {field.name.strip()!r} has the type {kind}, which is not a number"
            raise ValueError(f"{reason}: choose other --features or --target, or convert it")
    with file_errors(path, "Parquet"):
        read = file.read(columns=[field.name for field in fields])  # and no other column
        return np.column_stack([read[field.name].cast(pa.float64(), safe=False).to_numpy() for field in fields])


def _read_csv(path: Path, wanted: Sequence[str]) -> NDArray[np.float64]:
    """Refuses rows that are not as wide as the header, which pandas shifts or fills; but R's begin with a name."""
    import pandas as pd

    if path.suffix.lower() == ".zst":
        _refuse_part_of_zstd(path)
    headers = {letter: next(_csv_rows(path, letter), (0, []))[1] for letter in ",;\t|"}
    separator = max(headers, key=lambda letter: len(headers[letter]))
    if not (header := [name.strip() for name in headers[separator]]):
        raise ValueError(f"data is {path}, which is empty: give a table with a header and rows")
    first_line: dict[int, int] = {}  # of each number of fields
    for line, row in itertools.islice(_csv_rows(path, separator), 1, None):
        first_line.setdefault(len(row), line)
    is_wider = first_line.keys() == {len(header) + 1}
    offset = int(is_wider and _have_names([row for _, row in _csv_rows(path, separator)][1:]))
    for width, line in first_line.items():
        if width != len(header) + offset:
            reason = f"{path}: line {line} has {width} field{'s' * (width != 1)}, and the header has {len(header)}"
            remedy = "give each line as many as the header (no thousands separators, and a name for each column)"
            raise ValueError(f"{reason}, separated by {separator!r}: {remedy}")
    indices = [offset + index for index in _indices(header, wanted, path, separator)]
    options: dict[str, Any] = {"header": 0, "index_col": False, "encoding": _ENCODING, "low_memory": False}
    options |= {"delimiter": separator, "skipinitialspace": separator != "\t"}
    if tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1):  # later ones always read numbers to the last bit
        options["float_precision"] = "round_trip"
    with file_errors(path, "CSV"):
        frame = pd.read_csv(path, names=range(offset + len(header)), usecols=indices, **options)
    columns = []
    for index, name in zip(indices, wanted, strict=True):
        column = frame[index]
        if column.dtype.kind not in "iuf":
            numbers = pd.to_numeric(column.astype(str), errors="coerce")  # as text: True is no number
            if len(bad := np.flatnonzero(numbers.isna() & column.notna())):
                where = f"{path}: column {name!r} is {str(column[bad[0]])!r} in row {bad[0] + 1}"
                remedy = "correct it (a decimal point, no thousands separators), or choose other --features or --target"
                raise ValueError(f"{where}, which is not a number: {remedy}")
            column = numbers
        columns.append(column.to_numpy(dtype=np.float64, na_value=np.nan))
    return np.column_stack(columns)


def _csv_rows(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of the header and of each row, without blank lines, which pandas skips too."""
    from pandas.io.common import get_handle

    with file_errors(path, "CSV"), get_handle(path, "r", encoding=_ENCODING, compression="infer") as file:
        lines = itertools.chain(file.handle, [_END])
        reader = csv.reader(lines, delimiter=separator, skipinitialspace=separator != "\t")
        for row in reader:
            if row == [_END]:
                return
            if len(row) > 1 or any(field.strip() for field in row):
                yield reader.line_num, row
        raise EOFError("a quotation is not closed")


def _refuse_part_of_zstd(path: Path) -> None:
    """Refuse a truncated file, and one of several frames: zstandard ends silently after the first."""
    with file_errors(path, "CSV"), path.open("rb") as file:
        import zstandard

        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof and (block := file.read(1 << 20)):
            frame.decompress(block)
        if not frame.eof or frame.unused_data or file.read(1):
            raise EOFError("it is not one whole zstd frame; give the CSV itself or another compression")


def _have_names(rows: Sequence[Sequence[str]]) -> bool:
    """Whether rows of one field more than the header begin with their names.

    Numbers that a thousands separator splits, and a separator at the end of each line, look much the same.
    """
    names = {row[0].strip() for row in rows}
    is_split = any(
        all(re.fullmatch(r"\W*\d{1,3}", row[i]) and re.match(r"\d{3}(?!\d)", row[i + 1]) for row in rows)
        for i in range(len(rows[0]) - 1)
    )
    has_last = any(row[-1].strip() for row in rows)
    return len(names) == len(rows) and all(name[:1].isalpha() for name in names) and has_last and not is_split


def _indices(names: Sequence[str], wanted: Sequence[str], path: Path, separator: str = "") -> list[int]:
    for field, name in zip([*["features"] * (len(wanted) - 1), "target"], wanted, strict=True):
        if (count := names.count(name)) > 1:
            raise ValueError(f"{field} is {name!r}: {path} has {count} columns of this name: rename them")
        if count == 0:
            by_folded = {column.casefold(): column for column in names}
            close = [by_folded[match] for match in difflib.get_close_matches(name.casefold(), by_folded)]
            listed = ", ".join(map(repr, close or names[:_MAX_NAMES])) + ", …" * (not close and len(names) > _MAX_NAMES)
            listed += f", separated by {separator!r}" if separator else ""
            what = "the nearest names" if close else "its columns"
            raise ValueError(f"{field} is {name!r}: {path} has no such column; {what} are {listed}")
    return [names.index(name) for name in wanted]
