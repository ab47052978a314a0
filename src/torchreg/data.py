"""Tables in, matrices out: the built-in data, the real table, the user's own file.

pandas, pooch and pyarrow are imported by the functions that need them.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from torchreg.builtin import REAL_NUM_ROWS, make_houses

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

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return len(self.features)

    @property
    def num_features(self) -> int:
        """Feature columns of the table."""
        return self.features.shape[1]

    def fingerprint(self) -> str:
        """SHA-256 of the numbers that are trained on, row by row: the same for a CSV and its Parquet copy."""
        digest = hashlib.sha256()
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
    """The table of `builtin`, `ames`, or a CSV or Parquet file, checked: all finite, two rows or more, no
    constant feature.

    Raises `ValueError` with the column, the row (counted from 1, without the header) and the remedy.
    """
    if source == "builtin":
        x, y = make_houses(num_rows or REAL_NUM_ROWS, num_features or 1, data_seed)
        names = (DEFAULT_FEATURE, *(f"Feature{i}" for i in range(2, x.shape[1] + 1)))
        return Table(x, y[:, None], names, DEFAULT_TARGET, source)
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
            f"fetch` where there is a network (on a compute node set https_proxy), or use --data builtin"
        ) from error
    except ValueError as error:
        raise ValueError(f"data is ames: what was fetched from {AMES_URL} is not the table: {error}") from error


def read_table(path: Path, features: Sequence[str], target: str | None, *, drop_missing: bool, source: str) -> Table:
    """A file's columns as a `Table`; see `load_table`."""
    frame = _read_file(path)
    target = target or DEFAULT_TARGET
    features = tuple(features) or (DEFAULT_FEATURE,)
    for field, column in [*(("features", name) for name in features), ("target", target)]:
        if column not in frame.columns:
            raise ValueError(f"{field} is {column!r}: {path} has no such column; {_nearest(column, frame)}")
    if target in features:
        raise ValueError(f"target is {target!r}, which is also a feature: leave it out of --features")
    if len(set(features)) < len(features):
        raise ValueError(f"features are {', '.join(features)}: name each column once")

    names = [*features, target]
    columns = np.column_stack([_numbers(frame[name], path) for name in names])
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


def describe(table: Table) -> list[str]:
    """The table for a person: where it is from, its columns, and for one feature the six sums that decide all."""
    x, y = table.features, table.target
    columns = [*zip(table.feature_names, x.T, strict=True), (table.target_name, y[:, 0])]
    lines = [
        f"source       {table.source}: {table.num_rows} rows"
        + (f", {table.num_dropped} with missing values left out" if table.num_dropped else ""),
        f"fingerprint  {table.fingerprint()}",
        *(
            f"{name:12} min {v.min():,.6g}  mean {v.mean():,.8g}  max {v.max():,.6g}  standard deviation {v.std():,.6g}"
            for name, v in columns
        ),
    ]
    if table.num_features == 1:
        lines.append(
            f"sums         n {table.num_rows}  Σx {x.sum():.15g}  Σy {y.sum():.15g}  Σxy {(x * y).sum():.15g}  "
            f"Σx² {(x * x).sum():.15g}  Σy² {(y * y).sum():.15g}"
        )
    return lines


def write_table(table: Table, path: Path) -> None:
    """Write the table as CSV or Parquet, by the file's ending; every number survives to the last bit."""
    import pandas as pd

    frame = pd.DataFrame(table.features, columns=list(table.feature_names))
    frame.insert(0, table.target_name, table.target[:, 0])
    if path.suffix == ".parquet":
        _with_pyarrow(path, lambda: frame.to_parquet(path, index=False))
    else:
        frame.to_csv(path, index=False)


def _read_file(path: Path) -> pd.DataFrame:
    import pandas as pd

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"data is {path}, which {what}: give builtin, ames, or a CSV or Parquet file")
    if path.stat().st_size == 0:
        raise ValueError(f"data is {path}, which is empty: give a table with a header and rows")
    if path.suffix in (".parquet", ".pq"):
        frame: pd.DataFrame = _with_pyarrow(path, lambda: pd.read_parquet(path))
        return frame
    # From pandas 3.1 on every number is read to the last bit, and asking for it is deprecated.
    is_older = tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1)
    exactly: dict[str, Any] = {"float_precision": "round_trip"} if is_older else {}
    try:
        return pd.read_csv(path, **exactly)
    except (ValueError, OSError) as error:  # pandas' parser errors and Unicode errors are ValueErrors
        raise ValueError(f"data is {path}, which cannot be read as CSV: {_first_line(error)}") from error


def _with_pyarrow(path: Path, work: Any) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{path} is Parquet, and pyarrow is not installed: pip install pyarrow") from None
    try:
        return work()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read or written as Parquet: {_first_line(error)}") from error


def _numbers(column: pd.Series[Any], path: Path) -> Matrix:
    import pandas as pd

    numbers = pd.to_numeric(column, errors="coerce")
    text = np.flatnonzero(numbers.isna().to_numpy() & column.notna().to_numpy())
    if len(text):
        raise ValueError(
            f"{path}: column {str(column.name)!r} is {column.iloc[text[0]]!r} in row {text[0] + 1}, which is not a "
            "number: correct the file or choose other columns with --features and --target"
        )
    return numbers.to_numpy(dtype=np.float64, na_value=np.nan)


def _nearest(name: str, frame: pd.DataFrame) -> str:
    columns = [str(column) for column in frame.columns]
    by_folded = {column.casefold(): column for column in columns}
    close = [by_folded[match] for match in difflib.get_close_matches(name.casefold(), by_folded)]
    if close:
        return f"the nearest names are {', '.join(close)}"
    return f"its columns are {', '.join(columns[:12])}{', …' if len(columns) > 12 else ''}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
