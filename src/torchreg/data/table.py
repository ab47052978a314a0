"""The table of a training run: the synthetic one, the real one, or the user's own file."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchreg.core.checkpoint import write_atomically
from torchreg.data.synthetic import REAL_NUM_ROWS, make_houses
from torchreg.data.table_files import PARQUET_EXTENSIONS, file_errors, read_columns

Matrix = NDArray[np.float64]

DEFAULT_FEATURE = "GrLivArea"
DEFAULT_TARGET = "SalePrice"
AMES_URL = (
    "https://raw.githubusercontent.com/argonne-lcf/ai-science-training-series/"
    "e7d9e727010650b0b8757d0bcbc3ef41c96681d7/old/2024-Spring/01_intro_AI_on_Supercomputer/slimmed_realestate_data.csv"
)
AMES_SHA256 = "5e7578a8e9bc0f1e2eac9711621f4d0d129e9fe36e3f4e655947a0652b3b05cc"


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
    definition: str = ""  # of synthetic rows, whose last bits depend on the machine's linear algebra

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return len(self.features)

    @property
    def num_features(self) -> int:
        """Feature columns of the table."""
        return self.features.shape[1]

    def fingerprint(self) -> str:
        """SHA-256 of the rows' numbers, the same for a CSV and its Parquet copy, or of the synthetic `definition`."""
        content = self.definition.encode() or np.hstack([self.features, self.target]).astype("<f8", order="C").data
        return "sha256:" + hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Standardizer:
    """Features shifted to mean 0 and scaled to variance 1: x ↦ (x − mean) / scale, both (num_features,).

    With mean 0 and scale 1 it is the identity. Parameters are mapped so that they describe the same line.
    """

    mean: Matrix
    scale: Matrix

    @classmethod
    def of(cls, features: Matrix, *, standardize: bool) -> Standardizer:
        """The standardizer of features (num_rows, num_features), or the identity."""
        if standardize:
            return cls(features.mean(axis=0), features.std(axis=0))
        return cls(np.zeros(features.shape[1]), np.ones(features.shape[1]))

    def apply(self, features: Matrix) -> Matrix:
        """Features (rows, num_features) in the model's units."""
        return (features - self.mean) / self.scale

    def parameters_in(self, weight: Matrix, bias: float) -> tuple[Matrix, float]:
        """Parameters in the model's units, from those in the data's units."""
        return weight * self.scale, float(bias + weight @ self.mean)

    def parameters_out(self, weight: Matrix, bias: float) -> tuple[Matrix, float]:
        """Parameters in the data's units, from those in the model's units."""
        with np.errstate(over="ignore", invalid="ignore"):  # after divergence
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
    """The table of `synthetic`, `ames`, or a CSV or Parquet file, checked: all numbers finite, two rows or more, no
    constant feature. Blanks around column names are ignored. Raises `ValueError` with the column, the row (counted from
    1, without the header) and the remedy.
    """
    if source == "synthetic":
        x, y = make_houses(num_rows or REAL_NUM_ROWS, num_features or 1, data_seed)
        names = (DEFAULT_FEATURE, *(f"Feature{i}" for i in range(2, x.shape[1] + 1)))
        definition = f"synthetic, {x.shape[0]} rows, {x.shape[1]} features, seed {data_seed}"
        return Table(x, y[:, None], names, DEFAULT_TARGET, source, definition=definition)

    path = fetch_ames() if source == "ames" else Path(source)
    target = (target or DEFAULT_TARGET).strip()
    features = tuple(name.strip() for name in features) or (DEFAULT_FEATURE,)
    if target in features:
        raise ValueError(f"target is {target!r}, which is also a feature: remove it from --features")
    if len(set(features)) < len(features):
        raise ValueError(f"features are {', '.join(map(repr, features))}: name each column once")
    names = (*features, target)
    columns = read_columns(path, names)
    if len(infinite := np.argwhere(np.isinf(columns))):
        row, column = infinite[0]
        raise ValueError(f"{path}: column {names[column]!r} is infinite in row {row + 1}: correct the file")
    missing = np.flatnonzero(np.isnan(columns).any(axis=1))
    if len(missing) and not drop_missing:
        first = names[int(np.argmax(np.isnan(columns[missing[0]])))]
        reason = f"{path}: {len(missing)} of {len(columns)} rows have a missing value (NaN)"
        where = f"the first in row {missing[0] + 1}, column {first!r}"
        raise ValueError(f"{reason}, {where}: correct the file, or exclude such rows with --drop-missing")
    columns = np.delete(columns, missing, axis=0)
    if len(columns) < 2:
        raise ValueError(f"{path} has {len(columns)} usable row{'s' * (len(columns) != 1)}: a line needs two or more")
    for name, values in zip(features, columns.T, strict=False):
        if np.ptp(values) == 0:
            raise ValueError(f"{path}: feature {name!r} is {values[0]:g} in every row: choose other --features")
    return Table(columns[:, :-1], columns[:, -1:], features, target, source, num_dropped=len(missing))


def fetch_ames(url: str = AMES_URL, sha256: str = AMES_SHA256) -> Path:
    """The path of the real table: downloaded once, its checksum verified, then cached in the user's folder for caches
    (TORCHREG_CACHE overrides it). Raises `ValueError` when it cannot be fetched.
    """
    import pooch
    import requests  # pooch's own transport

    pooch.get_logger().setLevel("WARNING")
    folder, file = pooch.os_cache("torchreg"), url.rpartition("/")[2]
    cache = pooch.create(folder, base_url="", registry={file: sha256}, urls={file: url}, env="TORCHREG_CACHE")
    try:
        return Path(cache.fetch(file))
    except (requests.RequestException, OSError) as error:
        reason = f"data is ames: its table cannot be fetched from {url} ({type(error).__name__})"
        remedy = "run `torchreg data fetch` where there is a network (on a compute node set https_proxy)"
        raise ValueError(f"{reason}: {remedy}, or use --data synthetic") from error
    except ValueError as error:
        raise ValueError(f"data is ames: the file at {url} is not the table: {error}") from error


def write_table(table: Table, path: Path) -> None:
    """Write CSV or Parquet, by the file's extension, whole or not at all; every number is kept to the last bit."""
    import pandas as pd
    from pandas.io.common import infer_compression

    frame = pd.DataFrame(table.features, columns=list(table.feature_names))
    frame.insert(0, table.target_name, table.target[:, 0])
    content = io.BytesIO()
    if path.suffix.lower() in PARQUET_EXTENSIONS:
        with file_errors(path, "Parquet"):
            frame.to_parquet(content, index=False)
    else:
        frame.to_csv(content, index=False, compression=infer_compression(path, "infer"))
    write_atomically(path, content.getvalue())
