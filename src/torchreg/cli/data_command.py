"""`torchreg data`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from torchreg.cli.options import parse
from torchreg.runs.config import DataConfig

_MAX_FEATURES = 24  # rows of the table of columns


@dataclass(frozen=True, kw_only=True)
class DataOptions(DataConfig):
    """Show the data, fetch the real table, or make the synthetic table into a file."""

    # `show`: columns, six sums, closed form. `fetch`: cache the real table. `make`: write the table to `--output`.
    action: tyro.conf.Positional[Literal["show", "fetch", "make"]]
    output: Path = Path("houses.csv")  # Where `make` writes: .csv or .parquet.
    overwrite: bool = False  # Let `make` replace an existing file.
    standardize: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = True  # of training, not of the table


def run(argv: list[str]) -> int:
    """Show, fetch or make."""
    options = parse(DataOptions, "torchreg data", argv)
    output = options.output
    from torchreg.console import digits, equation, show_lines, show_table
    from torchreg.data.table import fetch_ames, write_table
    from torchreg.runs.setup import read
    from torchreg.theory import Moments

    if options.action == "fetch":
        show_lines([str(fetch_ames())])
        return 0
    table = read(options)
    if options.action == "make":
        if output.is_dir() or not output.parent.is_dir():
            what = "is a folder" if output.is_dir() else "lies in no folder that exists"
            raise ValueError(f"output is {output}, which {what}: give the path of a file")
        if output.exists() and not options.overwrite:
            raise ValueError(f"output is {output}, which exists already: choose another, or --overwrite")
        write_table(table, output)
        show_lines([str(output)])
        return 0
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
    return 0
