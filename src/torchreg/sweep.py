"""Many runs that differ in one thing: batch sizes, or the rungs of a learning-rate ladder; what was predicted of them.

A sweep is a folder: `sweep.json` (what it is), `cells/<name>/` (the record of one run each), and `cells.csv` and
`curves.csv`, which are made from the records alone. A finished cell is not run again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from torchreg.config import TrainConfig
from torchreg.prepare import Problem, base_rates, prepare, scale_at
from torchreg.record import RECORD_FILE, SCHEMA_VERSION, claim_folder, provenance, read_metrics, utc_now, write_json
from torchreg.runtime import AgreedError, Runtime
from torchreg.terminal import Reporter
from torchreg.theory import Dynamics
from torchreg.train import train

SWEEP_FILE = "sweep.json"
CELLS_FOLDER = "cells"
CELLS_FILE = "cells.csv"
CURVES_FILE = "curves.csv"

GROUP = ["standardize", "update_order", "global_batch_size", "multiplier", "warmup_steps"]
"""The columns that runs of one configuration have in common; they differ in `seed`."""

_AROUND_LIMIT = (0.97, 1.03)
_LADDER_WARMUP_STEPS = 100
_NOT_COMPARED = ("name", "runs_dir", "overwrite", "runtime", "timeout_s", "plot")  # no number depends on them


@dataclass(frozen=True)
class Cell:
    """One run of a sweep, and what its base rates are multiplied by."""

    config: TrainConfig
    multiplier: float

    @property
    def name(self) -> str:
        """The name of the run's folder in the sweep."""
        assert self.config.name
        return self.config.name


def batch_cells(config: TrainConfig, batch_sizes: Iterable[int], num_seeds: int) -> list[Cell]:
    """A run for each global batch size and seed, all over as many epochs, with rates by the configuration's rule.

    Raises `ValueError` for a configuration that leaves nothing to vary.
    """
    _refuse_batch_size(config, "--batch-sizes")
    return [
        Cell(
            _with(config, global_batch_size=size, seed=config.seed + i, name=f"batch-{size}-seed-{i}"),
            scale_at(config, size),
        )
        for size in sorted(set(batch_sizes))
        for i in range(num_seeds)
    ]


def ladder_cells(config: TrainConfig, multipliers: Sequence[float], num_seeds: int) -> list[Cell]:
    """(reference batch, base rates) × each multiplier, raw and standardised, in both update orders, warmed up and not.

    The batch grows with the rates to the last multiple of the reference batch that the data has rows for; from there on
    only the rates do. Without `multipliers`:
    1, 2, 4, 8, … up to the first that is predicted to diverge, and a rung 3 % below and 3 % above the predicted limit.
    Standardised features have the default rates: the raw ones would hardly move them. Raises `ValueError` for a
    configuration that leaves nothing to vary.
    """
    _refuse_batch_size(config, "--reference-batch-size")
    cells = []
    for standardize in (False, True):
        variant = replace(config, standardize=standardize, lr_scaling="linear", on_unstable="warn")
        problem = Problem.of(variant)
        if standardize:
            variant = replace(variant, base_learning_rate=None)
        variant = replace(variant, base_learning_rate=base_rates(variant, problem))
        for order in ("simultaneous", "sequential"):
            ordered = replace(variant, update_order=order)
            for rung in multipliers or _rungs(ladder_limit(ordered, problem)):
                on_rung, multiplier = _on_rung(ordered, rung, problem)
                for warmup_steps in (0, config.warmup_steps or _LADDER_WARMUP_STEPS):
                    features = "standardised" if standardize else "raw"
                    name = f"{features}-{order}-{multiplier:.5g}-warmup-{warmup_steps}"
                    cells += [
                        Cell(
                            _with(on_rung, warmup_steps=warmup_steps, seed=config.seed + i, name=f"{name}-seed-{i}"),
                            multiplier,
                        )
                        for i in range(num_seeds)
                    ]
    return cells


def _refuse_batch_size(config: TrainConfig, instead: str) -> None:
    for field in ("global_batch_size", "local_batch_size"):
        if getattr(config, field):
            raise ValueError(
                f"{field} is {getattr(config, field)}, and the sweep chooses the batch of each run: give {instead}"
            )
    if config.sampling == "full":
        raise ValueError(
            "sampling is full, which takes all rows in every step, and the sweep varies the rows of a step: choose "
            "--sampling random or shuffle"
        )


def ladder_limit(config: TrainConfig, problem: Problem) -> float:
    """The multiplier from which on a ladder is unstable: the limit of the batch size that the ladder has there."""
    limit, rates = 1.0, base_rates(config, problem)
    for _ in range(8):  # the limit hardly depends on the batch size, so a few rounds settle it
        batch_size = _on_rung(config, limit, problem)[0].global_batch_size
        assert batch_size
        before, limit = limit, Dynamics.of(problem.rows, rates, batch_size, config.update_order).largest_multiplier()
        if abs(limit - before) < 1e-6 * limit:
            break
    return limit


def _rungs(limit: float) -> list[float]:
    doubling = [1.0]
    while doubling[-1] < limit:
        doubling.append(2 * doubling[-1])
    return sorted([*doubling, *(limit * side for side in _AROUND_LIMIT)])


def _on_rung(config: TrainConfig, multiplier: float, problem: Problem) -> tuple[TrainConfig, float]:
    """The configuration of a rung, and its multiplier, which has to make a whole number of rows."""
    reference = config.reference_batch_size
    batch_size = max(1, round(multiplier * reference))
    largest = max(1, problem.table.num_rows // reference) * reference
    if batch_size <= largest:
        return replace(config, global_batch_size=batch_size), batch_size / reference
    batch_size = min(largest, problem.table.num_rows)
    more = multiplier * reference / batch_size
    weight, bias = base_rates(config, problem)
    return replace(config, global_batch_size=batch_size, base_learning_rate=(weight * more, bias * more)), multiplier


def _with(config: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(config, local_batch_size=None, log_full_loss=True, plot=False, overwrite=True, **changes)


def run_sweep(
    kind: Literal["batch", "ladder"],
    config: TrainConfig,
    make_cells: Callable[[], list[Cell]],
    runtime: Runtime,
    reporter: Reporter,
    *,
    farm: bool = False,
) -> Path:
    """Run what is not finished yet, one cell after the other on all ranks, or with `farm` one cell on each rank.

    Leaves the tables and returns the sweep's folder. Raises `ValueError`, on every rank, for what cannot work, and
    where the folder holds cells of another configuration or other data.
    """
    started = utc_now()
    workers = runtime.alone() if farm else runtime
    folder = Path(config.runs_dir) / (config.name or f"sweep-{kind}")

    def begin() -> tuple[int, list[Cell]]:
        cells = make_cells()
        for some in {cell.config.global_batch_size: cell.config for cell in cells}.values():
            _, table = prepare(some, workers.world_size)  # tells bad input before the first run
        _refuse_another_kind(folder, kind, overwrite=config.overwrite)
        states = [_is_finished(folder, cell, table.fingerprint(), overwrite=config.overwrite) for cell in cells]
        claim_folder(config.runs_dir, folder.name, "sweep", overwrite=True)
        content = {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "config": asdict(config),
            "cells": [{"name": cell.name, "multiplier": cell.multiplier} for cell in cells],
            "provenance": provenance(started),
        }
        write_json(folder / SWEEP_FILE, content)
        return len(cells), [cell for cell, finished in zip(cells, states, strict=True) if not finished]

    num_cells, pending = runtime.from_main(begin)
    reporter.say(f"sweep        {num_cells} runs, {num_cells - len(pending)} of them finished before")
    for done, cell in enumerate(runtime.deal(pending) if farm else pending, start=1):
        try:
            result = train(replace(cell.config, runs_dir=str(folder / CELLS_FOLDER)), workers)
        except AgreedError as error:
            if farm and runtime.world_size > 1:  # the other ranks know nothing of it, so it has to end them
                raise ValueError(str(error)) from error
            raise
        reporter.progress(done, len(pending), result.loss)
    runtime.barrier()
    reporter.close()
    if runtime.is_main:
        cells_table(folder).to_csv(folder / CELLS_FILE, index=False)
        curves_table(folder).to_csv(folder / CURVES_FILE, index=False)
    runtime.barrier()
    return folder


def _refuse_another_kind(folder: Path, kind: str, *, overwrite: bool) -> None:
    try:
        before = read_sweep(folder)["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if before != kind and not overwrite:
        raise ValueError(
            f"name is {folder.name!r}, and {folder} is a {before} sweep, whose tables a {kind} sweep would replace: "
            "choose another --name, or replace them with --overwrite"
        )


def _is_finished(folder: Path, cell: Cell, fingerprint: str, *, overwrite: bool) -> bool:
    """Whether the cell's record and metrics are there; unreadable ones are as good as none."""
    path = folder / CELLS_FOLDER / cell.name / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before, data = record["config"], record["derived"]["data_fingerprint"]
        read_metrics(path.parent)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    now = json.loads(json.dumps(asdict(cell.config)))
    before = {**asdict(TrainConfig()), **before}  # fields that are newer than the record
    differs = [f"{key} was {before.get(key)} and is {now[key]}" for key in now if key not in _NOT_COMPARED
               and before.get(key) != now[key]]  # fmt: skip
    if data != fingerprint:
        differs.append("the data's fingerprint is another")
    if differs and not overwrite:
        raise ValueError(
            f"name is {folder.name!r}, and {path.parent} is a finished run of another configuration ({differs[0]}): "
            "choose another --name, or run all cells again with --overwrite"
        )
    return not differs and not overwrite


def read_sweep(folder: Path) -> dict[str, Any]:
    """What a sweep is: its kind, configuration, cells and provenance."""
    content: dict[str, Any] = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
    return content


def cells_table(folder: Path) -> pd.DataFrame:
    """One row a run: what it was, where it ended, and what was predicted; excess losses are fractions of the best."""
    rows = []
    for cell in read_sweep(folder)["cells"]:
        record = json.loads((folder / CELLS_FOLDER / cell["name"] / RECORD_FILE).read_text(encoding="utf-8"))
        config, result, forecast = record["config"], record["result"], record["forecast"]
        curve = forecast["curve"] or {}
        rows.append(
            {
                "name": cell["name"],
                **{key: config[key] for key in ("standardize", "update_order", "warmup_steps", "seed")},
                "global_batch_size": result["global_batch_size"],
                "multiplier": cell["multiplier"],
                "num_steps": result["num_steps"],
                **{
                    f"weight_{name}": weight
                    for name, weight in zip(result["feature_names"], result["weight"], strict=True)
                },
                **{key: result[key] for key in ("bias", "loss", "excess", "closed_form_loss", "diverged_at_step")},
                "diverged": result["stopped_by"] == "divergence",
                "of_limit": 1 / forecast["stability_limit"],
                "noise_floor": forecast["noise_floor"],
                **{f"predicted_{name}": curve[name][-1] if curve else None for name in ("excess", "low", "high")},
            }
        )
    table = pd.DataFrame(rows)
    measured = [column for column in table.columns if column.startswith(("weight_", "predicted_"))]
    return table.astype(dict.fromkeys([*measured, "bias", "loss", "excess", "noise_floor"], float))  # null is NaN


def curves_table(folder: Path) -> pd.DataFrame:
    """One row a logged step of every run: steps and epochs done, excess loss on all rows as a fraction of the best."""
    frames = []
    for name, best in cells_table(folder)[["name", "closed_form_loss"]].itertuples(index=False):
        metrics = pd.DataFrame(read_metrics(folder / CELLS_FOLDER / name))
        if "full_loss" not in metrics:  # diverged before the first line
            continue
        frames.append(
            pd.DataFrame(
                {
                    "name": name,
                    "steps": metrics["step"] + 1,
                    "epoch": metrics["epoch"],
                    "excess": metrics["full_loss"] / best - 1,
                }
            ).dropna()
        )
    return (
        pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["name", "steps", "epoch", "excess"])
    )


def summary(cells: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration: means over its seeds, with the standard error of the mean excess, and the prediction."""
    weights = [column for column in cells.columns if column.startswith("weight_")]
    first = ["num_steps", "of_limit", "noise_floor", "predicted_excess", "predicted_low", "predicted_high"]
    groups = cells.groupby(GROUP, sort=True)
    table = groups[[*weights, "bias", "loss", "excess"]].mean()
    table = table.join(groups["excess"].sem().rename("excess_error")).join(groups[first].first())
    table["num_runs"] = groups.size()
    table["num_diverged"] = groups["diverged"].sum()
    return table.reset_index()


def summary_lines(summary: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a summary for a person; rows with diverged runs begin with `!`."""
    weights = [column for column in summary.columns if column.startswith("weight_")]
    lines = []
    for row in summary.to_dict("records"):
        line = {"batch": f"{row['global_batch_size']}", "rates": f"× {row['multiplier']:.4g}"}
        line |= {"steps": f"{row['num_steps']}", "of limit": f"{row['of_limit']:.2f}"}
        stable, converged = row["of_limit"] < 1, row["num_diverged"] == 0
        if len(weights) == 1:
            line["weight"] = f"{row[weights[0]]:.3f}" if converged else ""
            line["bias"] = f"{row['bias']:.0f}" if converged else ""
        line["loss"] = f"{row['loss']:.5g}" if converged else ""
        line["above best, %"] = _outcome(row)
        line["predicted"] = _in_percent(row["predicted_excess"]) if stable else "diverges"
        low, high = (_in_percent(row[f"predicted_{end}"]) for end in ("low", "high"))
        line["95 % of runs"] = f"{low} to {high}" if stable and low else ""
        lines.append((converged, line))
    return list(lines[0][1]), [_marked(list(line.values()), converged) for converged, line in lines]


def ladder_lines(summary: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The same for a ladder: a row a rung, without and with warm-up."""
    columns = ["features", "order", "rates", "batch", "of limit", "predicted, % above best", "measured", "with warm-up"]
    rows = []
    for (standardize, order, batch, multiplier), rungs in summary.groupby(GROUP[:-1], sort=False):
        cold, warm = rungs.sort_values("warmup_steps").to_dict("records")
        rows.append(
            _marked(
                [
                    "standardised" if standardize else "raw",
                    str(order),
                    f"× {multiplier:.4g}",
                    f"{batch}",
                    f"{cold['of_limit']:.2f}",
                    _in_percent(cold["predicted_excess"]) if cold["of_limit"] < 1 else "diverges",
                    _outcome(cold),
                    _outcome(warm),
                ],
                converged=cold["num_diverged"] == warm["num_diverged"] == 0,
            )
        )
    return columns, rows


def _marked(cells: list[str], converged: bool) -> list[str]:
    return cells if converged else [f"!{cells[0]}", *cells[1:]]


def _outcome(row: Mapping[Any, Any]) -> str:
    """Where the runs of a configuration ended, in percent, or how many of them diverged."""
    if row["num_diverged"]:
        return f"{row['num_diverged']} of {row['num_runs']} diverged"
    error = "" if math.isnan(row["excess_error"]) else f" ± {_in_percent(row['excess_error'])}"
    return _in_percent(row["excess"]) + error


def _in_percent(fraction: float) -> str:
    return "" if math.isnan(fraction) else f"{100 * fraction:.3g}"
