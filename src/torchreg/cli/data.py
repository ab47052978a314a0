"""`torchreg data`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from torchreg.cli.options import parse
from torchreg.config import TrainConfig


@dataclass(frozen=True)
class DataArguments:
    """Show the data, fetch the real table, or make built-in data into a file."""

    action: tyro.conf.Positional[Literal["show", "fetch", "make"]]
    """`show`: columns, six sums, closed form. `fetch`: download the real table into the cache. `make`: write the
    table to `--output`."""

    data: str = "builtin"
    """`builtin`, `ames`, or a CSV or Parquet file."""

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
    from torchreg.data import fetch_ames, load_table, write_table

    if arguments.action == "fetch":
        print(fetch_ames())
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
        print(arguments.output)
        return 0
    from torchreg.data import describe
    from torchreg.theory import Moments

    best = Moments.of(table.features, table.target).closed_form()
    terms = " + ".join(f"{w:.6f} {name}" for w, name in zip(best.weight, table.feature_names, strict=True))
    print(*describe(table), sep="\n")
    print(f"closed form  {table.target_name} = {terms} + {best.bias:.6f}, mean squared error {best.loss:.6f}")
    return 0


def _refuse_output(output: Path, *, overwrite: bool) -> None:
    if output.is_dir() or not output.parent.is_dir():
        what = "is a folder" if output.is_dir() else "lies in no folder that exists"
        raise ValueError(f"output is {output}, which {what}: give the path of a file")
    if output.exists() and not overwrite:
        raise ValueError(f"output is {output}, which exists already: choose another, or --overwrite")
