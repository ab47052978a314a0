"""Tables in, matrices out: the built-in data, the real table, the user's own file.

pandas, pooch and pyarrow are imported by the functions that need them.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from torchreg.core.checkpoint import write_atomically
from torchreg.data.synthetic import REAL_NUM_ROWS, make_houses

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_FEATURE = "GrLivArea"
DEFAULT_TARGET = "SalePrice"

AMES_URL = (
    "https://raw.githubusercontent.com/argonne-lcf/ai-science-training-series/"
    "e7d9e727010650b0b8757d0bcbc3ef41c96681d7/old/2024-Spring/01_intro_AI_on_Supercomputer/"
    "slimmed_realestate_data.csv"
)
AMES_SHA256 = "5e7578a8e9bc0f1e2eac9711621f4d0d129e9fe36e3f4e655947a0652b3b05cc"

_SEPARATORS = ",;\t|"
_ENCODING = "utf-8-sig"  # with or without a byte order mark

Matrix = NDArray[np.float64]

_CHUNK_ROWS = 1_024


@dataclass(frozen=True)
class Table:
    """Rows to train on, in the data's own units.

    `features` is (num_rows, num_features), `target` is (num_rows, 1), both float64 and finite.
    """

    features: Matrix
    target: Matrix
    feature_names: tuple[str, ...]
    target_name: str
    source: str
    num_dropped: int = 0
    definition: str = ""
    """What the rows are computed from, if they are: another machine's linear algebra gives them other last bits."""

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return len(self.features)

    @property
    def num_features(self) -> int:
        """Feature columns of the table."""
        return self.features.shape[1]

    def fingerprint(self) -> str:
        """SHA-256 of the numbers that are trained on, row by row, or of what they are computed from.

        It is the same for a CSV and its Parquet copy, and for the built-in data on every machine.
        """
        digest = hashlib.sha256(self.definition.encode())
        if self.definition:
            return "sha256:" + digest.hexdigest()
        for i in range(0, self.num_rows, _CHUNK_ROWS):
            rows = np.hstack([self.features[i : i + _CHUNK_ROWS], self.target[i : i + _CHUNK_ROWS]])
            digest.update(rows.astype("<f8", order="C").data)
        return "sha256:" + digest.hexdigest()


@dataclass(frozen=True)
class Standardizer:
    """Features shifted to mean 0 and scaled to variance 1: x ↦ (x − mean) / scale, column by column.

    With mean 0 and scale 1 it changes nothing. It maps parameters too: a line is the same line in either units.
    """

    mean: Matrix
    scale: Matrix

    @classmethod
    def of(cls, features: Matrix, *, standardize: bool) -> Standardizer:
        """The standardizer of these features, or the one that changes nothing."""
        if standardize:
            return cls(features.mean(axis=0), features.std(axis=0))
        return cls(np.zeros(features.shape[1]), np.ones(features.shape[1]))

    def apply(self, features: Matrix) -> Matrix:
        """Features (rows, num_features) as the model sees them."""
        return (features - self.mean) / self.scale

    def parameters_in(self, weight: Matrix, bias: float) -> tuple[Matrix, float]:
        """Parameters of the data's units as the model's parameters."""
        return weight * self.scale, float(bias + weight @ self.mean)

    def parameters_out(self, weight: Matrix, bias: float) -> tuple[Matrix, float]:
        """The model's parameters in the data's units."""
        with np.errstate(over="ignore", invalid="ignore"):  # parameters of a run that diverged
            return weight / self.scale, float(bias - (weight / self.scale) @ self.mean)


def load_table(
    source: str,
    *,
    features: Sequence[str] = (),
    target: str | None = None,
    num_rows: int | None = None,
    num_features: int | None = None,
    data_seed: int = 0,
    drop_missing: bool = False,
) -> Table:
    """The table of `synthetic`, `ames`, or a CSV or Parquet file, checked: all finite, two rows or more, no
    constant feature.

    Raises `ValueError` with the column, the row (counted from 1, without the header) and the remedy.
    """
    if source == "synthetic":
        x, y = make_houses(num_rows or REAL_NUM_ROWS, num_features or 1, data_seed)
        names = (DEFAULT_FEATURE, *(f"Feature{i}" for i in range(2, x.shape[1] + 1)))
        definition = f"builtin, {x.shape[0]} rows, {x.shape[1]} features, seed {data_seed}"
        return Table(x, y[:, None], names, DEFAULT_TARGET, source, definition=definition)
    if source == "ames":
        return read_table(fetch_ames(), features, target, drop_missing=drop_missing, source=source)
    return read_table(Path(source), features, target, drop_missing=drop_missing, source=source)


def fetch_ames() -> Path:
    """The path of the real table, fetched once from its pinned address, its checksum verified, then cached.

    The cache folder is the user's (TORCHREG_CACHE overrides it). Raises `ValueError` when it cannot be fetched.
    """
    import pooch
    import requests  # pooch's own transport

    pooch.get_logger().setLevel("WARNING")
    cache = pooch.create(
        pooch.os_cache("torchreg"),
        base_url="",
        registry={"slimmed_realestate_data.csv": AMES_SHA256},
        urls={"slimmed_realestate_data.csv": AMES_URL},
        env="TORCHREG_CACHE",
    )
    try:
        return Path(cache.fetch("slimmed_realestate_data.csv"))
    except (requests.RequestException, OSError) as error:
        raise ValueError(
            f"data is ames: its table cannot be fetched from {AMES_URL} ({type(error).__name__}); run `torchreg data "
            f"fetch` where there is a network (on a compute node set https_proxy), or use --data synthetic"
        ) from error
    except ValueError as error:
        raise ValueError(f"data is ames: what was fetched from {AMES_URL} is not the table: {error}") from error


def read_table(path: Path, features: Sequence[str], target: str | None, *, drop_missing: bool, source: str) -> Table:
    """A file's columns as a `Table`; see `load_table`. Blanks around the names of columns do not count."""
    target = (target or DEFAULT_TARGET).strip()
    features = tuple(name.strip() for name in features) or (DEFAULT_FEATURE,)
    if target in features:
        raise ValueError(f"target is {target!r}, which is also a feature: leave it out of --features")
    if len(set(features)) < len(features):
        raise ValueError(f"features are {_quoted(features)}: name each column once")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise ValueError(f"data is {path}, which {what}: give builtin, ames, or a CSV or Parquet file")
    if path.stat().st_size == 0:
        raise ValueError(f"data is {path}, which is empty: give a table with a header and rows")

    names = [*features, target]
    columns = _read_parquet(path, names) if _is_parquet(path) else _read_csv(path, names)
    infinite = np.argwhere(np.isinf(columns))
    if len(infinite):
        row, column = infinite[0]
        raise ValueError(f"{path}: column {names[column]!r} is infinite in row {row + 1}: correct the file")
    missing = np.flatnonzero(np.isnan(columns).any(axis=1))
    if len(missing) and not drop_missing:
        first = names[int(np.argmax(np.isnan(columns[missing[0]])))]
        raise ValueError(
            f"{path}: {len(missing)} of {len(columns)} rows have a missing value (NaN), the first in row "
            f"{missing[0] + 1}, column {first!r}: correct the file, or leave such rows out with --drop-missing"
        )
    columns = np.delete(columns, missing, axis=0)
    if len(columns) < 2:
        raise ValueError(f"{path} has {len(columns)} usable row{'s' * (len(columns) != 1)}: a line needs two or more")
    for name, values in zip(features, columns.T, strict=False):
        if np.ptp(values) == 0:
            raise ValueError(
                f"{path}: feature {name!r} is {values[0]:g} in every row, and a constant predicts nothing: "
                "choose other --features"
            )
    return Table(columns[:, :-1], columns[:, -1:], tuple(features), target, source, num_dropped=len(missing))


def write_table(table: Table, path: Path) -> None:
    """Write the table as CSV or Parquet, by the file's ending; every number survives to the last bit.

    The file appears whole or not at all.
    """
    import pandas as pd
    from pandas.io.common import infer_compression

    frame = pd.DataFrame(table.features, columns=list(table.feature_names))
    frame.insert(0, table.target_name, table.target[:, 0])
    content = io.BytesIO()
    if _is_parquet(path):
        with _parquet_errors(path):
            frame.to_parquet(content, index=False)
    else:
        frame.to_csv(content, index=False, compression=infer_compression(path, "infer"))
    write_atomically(path, content.getvalue())


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq")


def _read_parquet(path: Path, wanted: Sequence[str]) -> Matrix:
    """The wanted columns, (num_rows, num_columns), of which a missing value is NaN; no other column is read."""
    with _parquet_errors(path):
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(path)
        names = [name.strip() for name in file.schema_arrow.names]
        fields = [file.schema_arrow.field(position) for position in _positions(names, wanted, path)]
        for field in fields:
            kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
                    or pa.types.is_null(kind)):  # fmt: skip
                raise ValueError(
                    f"{path}: column {field.name.strip()!r} has the type {kind}, which is not a number: choose other "
                    "columns with --features and --target, or convert it"
                )
        read = file.read(columns=[field.name for field in fields])
        return np.column_stack([read[field.name].cast(pa.float64(), safe=False).to_numpy() for field in fields])


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{path} is Parquet, and pyarrow is not installed: pip install pyarrow") from None
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read or written as Parquet: {_first_line(error)}") from error


def _read_csv(path: Path, wanted: Sequence[str]) -> Matrix:
    """The wanted columns, (num_rows, num_columns), of which a missing value is NaN."""
    import pandas as pd

    header, num_names, separator = _csv_layout(path)
    positions = [num_names + position for position in _positions(header, wanted, path, separator)]
    # From pandas 3.1 on every number is read to the last bit, and asking for it is deprecated.
    is_older = tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1)
    exactly: dict[str, Any] = {"float_precision": "round_trip"} if is_older else {}
    with _csv_errors(path):
        frame = pd.read_csv(
            path, header=0, names=list(range(num_names + len(header))), usecols=positions, index_col=False,
            low_memory=False, encoding=_ENCODING, **_dialect(separator), **exactly,
        )  # fmt: skip
    return np.column_stack([_numbers(frame[at], name, path) for at, name in zip(positions, wanted, strict=True)])


def _csv_layout(path: Path) -> tuple[list[str], int, str]:
    """The names in the header, how many columns of row names stand before the first of them, and the separator.

    pandas shifts or fills up rows that have not as many fields as the header; here they are refused.
    """
    if path.suffix.lower() == ".zst":
        with _csv_errors(path):
            _refuse_part_of_zstd(path)
    # What splits the header into the most names; a comma where several do.
    separator = max(_SEPARATORS, key=lambda letter: len(next(_csv_rows(path, letter), (0, []))[1]))
    rows = _csv_rows(path, separator)
    header = [name.strip() for name in next(rows, (0, []))[1]]
    if not header:
        raise ValueError(f"data is {path}, which is empty: give a table with a header and rows")
    widths = {len(row) for _, row in rows}
    if widths <= {len(header)}:
        return header, 0, separator
    rows = itertools.islice(_csv_rows(path, separator), 1, None)
    if widths == {len(header) + 1} and _have_names([row for _, row in rows]):
        return header, 1, separator
    rows = itertools.islice(_csv_rows(path, separator), 1, None)
    line, width = next((line, len(row)) for line, row in rows if len(row) != len(header))
    raise ValueError(
        f"{path}: line {line} has {width} field{'s' * (width != 1)}, and the header has {len(header)}, separated by "
        f"{separator!r}: give each line as many as the header (no thousands separators, and a name for each column)"
    )


def _csv_rows(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of the header and of each row, without blank lines, which pandas leaves out too."""
    from pandas.io.common import get_handle

    with _csv_errors(path), get_handle(path, "r", encoding=_ENCODING, compression="infer") as file:
        reader = csv.reader(file.handle, **_dialect(separator))
        for row in reader:
            if len(row) > 1 or any(field.strip() for field in row):
                yield reader.line_num, row


def _dialect(separator: str) -> dict[str, Any]:
    return {"delimiter": separator, "skipinitialspace": separator != "\t"}


def _have_names(rows: Sequence[Sequence[str]]) -> bool:
    """Whether rows of one field more than the header begin with their names, as R writes them.

    Numbers that a thousands separator cuts in two, and a separator at the end of each line, look much the same.
    """
    names = {row[0].strip() for row in rows}
    is_cut = any(
        all(
            re.fullmatch(r"\W*\d{1,3}", left) and re.match(r"\d{3}(?!\d)", right)
            for left, right in zip(*pair, strict=True)
        )
        for pair in itertools.pairwise(zip(*rows, strict=True))
    )
    has_last = any(row[-1].strip() for row in rows)
    return len(names) == len(rows) and all(name[:1].isalpha() for name in names) and has_last and not is_cut


@contextmanager
def _csv_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data is {path}, which is not text in UTF-8 ({_first_line(error)}): save it as such"
        ) from error
    except Exception as error:  # each kind of compression has errors of its own
        raise ValueError(f"data is {path}, which cannot be read as CSV: {_first_line(error)}") from error


def _refuse_part_of_zstd(path: Path) -> None:
    """Raise `EOFError` for a cut file, and for one of several frames: zstandard ends silently where the first does."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    with path.open("rb") as file:
        while not frame.eof and (block := file.read(1 << 20)):
            frame.decompress(block)
        if not frame.eof or frame.unused_data or file.read(1):
            raise EOFError("it is not one whole zstd frame; give the CSV itself or another compression")


def _positions(names: Sequence[str], wanted: Sequence[str], path: Path, separator: str = "") -> list[int]:
    """Where the wanted columns, of which the last is the target, stand among the names of a file."""
    counts, placements = Counter(names), {name: place for place, name in enumerate(names)}
    for index, name in enumerate(wanted):
        field = "target" if index == len(wanted) - 1 else "features"
        if counts[name] > 1:
            raise ValueError(f"{field} is {name!r}: {path} has {counts[name]} columns of this name: rename them")
        if name not in placements:
            raise ValueError(f"{field} is {name!r}: {path} has no such column; {_nearest(name, names, separator)}")
    return [placements[name] for name in wanted]


def _numbers(column: pd.Series[Any], name: str, path: Path) -> Matrix:
    import pandas as pd

    if column.dtype.kind in "iuf":
        return column.to_numpy(dtype=np.float64)
    numbers = pd.to_numeric(column.astype(str), errors="coerce")  # as text: True is no number
    text = np.flatnonzero(numbers.isna() & column.notna())
    if len(text):
        raise ValueError(
            f"{path}: column {name!r} is {str(column.iloc[text[0]])!r} in row {text[0] + 1}, which is not a "
            "number: correct the file (a decimal point, no thousands separators), or choose other columns with "
            "--features and --target"
        )
    return numbers.to_numpy(dtype=np.float64, na_value=np.nan)


def _nearest(name: str, names: Sequence[str], separator: str) -> str:
    by_folded = {column.casefold(): column for column in names}
    close = [by_folded[match] for match in difflib.get_close_matches(name.casefold(), by_folded)]
    more = "" if close or len(names) <= 12 else ", …"
    separated = f", separated by {separator!r}" if separator else ""
    return f"{'the nearest names' if close else 'its columns'} are {_quoted(close or names[:12])}{more}{separated}"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
