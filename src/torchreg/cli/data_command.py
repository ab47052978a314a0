"""`torchreg data`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from torchreg.cli.options import parse
from torchreg.runs.config import TrainConfig

if TYPE_CHECKING:
    from torchreg.data.table import Table

_MOST_FEATURES = 24  # that `show` has a row for


@dataclass(frozen=True)
class DataArguments:
    """Show the data, fetch the real table, or make built-in data into a file."""

    action: tyro.conf.Positional[Literal["show", "fetch", "make"]]
    """`show`: columns, six sums, closed form. `fetch`: download the real table into the cache. `make`: write the
    table to `--output`."""

    data: str = "synthetic"
    """`synthetic`, `ames`, or a CSV or Parquet file."""

    features: tuple[str, ...] = ()
    """Feature columns of the file. Default: GrLivArea."""

    target: str | None = None
    """Target column of the file. Default: SalePrice."""

    num_rows: int | None = None
    """Rows of the built-in data. Default: 551."""

    num_features: int | None = None
    """Features of the built-in data. Default: 1."""

    data_seed: int = 0
    """Seed of the built-in data."""

    drop_missing: bool = False
    """Leave out rows with missing values instead of refusing the table."""

    output: Path = field(default=Path("houses.csv"))
    """Where `make` writes: .csv or .parquet."""

    overwrite: bool = False
    """Let `make` replace an existing file."""


def run(argv: list[str]) -> int:
    """Show, fetch or make."""
    arguments = parse(DataArguments, "torchreg data", argv)
    from torchreg.console import show_lines
    from torchreg.data.table import fetch_ames, load_table, write_table

    if arguments.action == "fetch":
        show_lines([str(fetch_ames())])
        return 0
    config = TrainConfig(  # checks them as it does for training
        data=arguments.data,
        features=arguments.features,
        target=arguments.target,
        num_rows=arguments.num_rows,
        num_features=arguments.num_features,
        data_seed=arguments.data_seed,
        drop_missing=arguments.drop_missing,
    )
    table = load_table(config.data, **config.data_options())
    if arguments.action == "make":
        _refuse_output(arguments.output, overwrite=arguments.overwrite)
        write_table(table, arguments.output)
        show_lines([str(arguments.output)])
        return 0
    _show(table)
    return 0


def _show(table: Table) -> None:
    """Where the table is from, its columns, and for one feature the six sums that decide all."""
    from torchreg.console import digits, equation, show_lines, show_table
    from torchreg.theory import Moments

    dropped = f", {table.num_dropped} with missing values left out" * bool(table.num_dropped)
    show_lines([f"source       {table.source}: {table.num_rows} rows{dropped}", f"fingerprint  {table.fingerprint()}"])
    x, y = table.features, table.target[:, 0]
    columns = [*zip(table.feature_names[:_MOST_FEATURES], x.T, strict=False), (table.target_name, y)]
    show_table(
        ["column", "min", "mean", "max", "standard deviation"],
        [[name, f"{v.min():,.6g}", f"{v.mean():,.8g}", f"{v.max():,.6g}", f"{v.std():,.6g}"] for name, v in columns],
    )
    best = Moments.of(table.features, table.target).closed_form()
    line = equation(table.target_name, table.feature_names, best.weight.tolist(), best.bias)
    lines = [f"closed form  {line}, mean squared error {digits(best.loss)}"]
    if table.num_features > _MOST_FEATURES:
        lines.insert(0, f"columns      and {table.num_features - _MOST_FEATURES:,} features more")
    if table.num_features == 1:
        x = x[:, 0]
        sums = f"n {table.num_rows}  Σx {x.sum():.15g}  Σy {y.sum():.15g}  Σxy {(x * y).sum():.15g}"
        lines.insert(0, f"sums         {sums}  Σx² {(x * x).sum():.15g}  Σy² {(y * y).sum():.15g}")
    show_lines(lines)


def _refuse_output(output: Path, *, overwrite: bool) -> None:
    if output.is_dir() or not output.parent.is_dir():
        what = "is a folder" if output.is_dir() else "lies in no folder that exists"
        raise ValueError(f"output is {output}, which {what}: give the path of a file")
    if output.exists() and not overwrite:
        raise ValueError(f"output is {output}, which exists already: choose another, or --overwrite")
