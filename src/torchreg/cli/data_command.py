"""`torchreg data`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from torchreg.cli.options import parse
from torchreg.runs.config import TrainConfig

if TYPE_CHECKING:
    from torchreg.data.table import Table

_MAX_FEATURES = 24  # rows of the table of columns


@dataclass(frozen=True)
class DataOptions:
    """Show the data, fetch the real table, or make the synthetic table into a file."""

    # `show`: columns, six sums, closed form. `fetch`: download the real table into the cache. `make`: write the table
    # to `--output`.
    action: tyro.conf.Positional[Literal["show", "fetch", "make"]]
    data: str = "synthetic"  # `synthetic`, `ames`, or a CSV or Parquet file.
    features: tuple[str, ...] = ()  # Feature columns of the file. Default: GrLivArea.
    target: str | None = None  # Target column of the file. Default: SalePrice.
    num_rows: int | None = None  # Rows of the synthetic table. Default: 551.
    num_features: int | None = None  # Features of the synthetic table. Default: 1.
    data_seed: int = 0  # Seed of the synthetic table.
    drop_missing: bool = False  # Exclude rows with missing values instead of refusing the table.
    output: Path = Path("houses.csv")  # Where `make` writes: .csv or .parquet.
    overwrite: bool = False  # Let `make` replace an existing file.


def run(argv: list[str]) -> int:
    """Show, fetch or make."""
    values = asdict(parse(DataOptions, "torchreg data", argv))
    action, output, overwrite = (values.pop(name) for name in ("action", "output", "overwrite"))
    from torchreg.console import show_lines
    from torchreg.data.fetching import fetch_ames
    from torchreg.data.table import write_table
    from torchreg.runs.setup import read

    if action == "fetch":
        show_lines([str(fetch_ames())])
        return 0
    config = TrainConfig.of(**values)  # which checks them
    table = read(config.data)
    if action == "show":
        _show(table)
        return 0
    if output.is_dir() or not output.parent.is_dir():
        what = "is a folder" if output.is_dir() else "lies in no folder that exists"
        raise ValueError(f"output is {output}, which {what}: give the path of a file")
    if output.exists() and not overwrite:
        raise ValueError(f"output is {output}, which exists already: choose another, or --overwrite")
    write_table(table, output)
    show_lines([str(output)])
    return 0


def _show(table: Table) -> None:
    """Print the source of the table, its columns, and for one feature the six sums that determine all."""
    from torchreg.console import digits, equation, show_lines, show_table
    from torchreg.theory import Moments

    dropped = f", {table.num_dropped} with missing values excluded" * bool(table.num_dropped)
    show_lines([f"source       {table.source}: {table.num_rows} rows{dropped}", f"fingerprint  {table.fingerprint()}"])
    x, y = table.features, table.target[:, 0]
    columns = [*zip(table.feature_names[:_MAX_FEATURES], x.T, strict=False), (table.target_name, y)]
    show_table(
        ["column", "min", "mean", "max", "standard deviation"],
        [[name, f"{v.min():,.6g}", f"{v.mean():,.8g}", f"{v.max():,.6g}", f"{v.std():,.6g}"] for name, v in columns],
    )
    if table.num_features > _MAX_FEATURES:
        show_lines([f"columns      and {table.num_features - _MAX_FEATURES:,} features more"])
    if table.num_features == 1:
        x = x[:, 0]
        sums = {"Σx": x.sum(), "Σy": y.sum(), "Σxy": (x * y).sum(), "Σx²": (x * x).sum(), "Σy²": (y * y).sum()}
        numbers = [f"n {table.num_rows}", *(f"{name} {value:.15g}" for name, value in sums.items())]
        show_lines([f"sums         {'  '.join(numbers)}"])
    best = Moments.of(table.features, table.target).closed_form()
    line = equation(table.target_name, table.feature_names, best.weight.tolist(), best.bias)
    show_lines([f"closed form  {line}, mean squared error {digits(best.loss)}"])
