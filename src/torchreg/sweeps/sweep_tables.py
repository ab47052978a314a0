"""The tables of a sweep, from its records alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from torchreg.core.checkpoint import read_regular
from torchreg.runs.record import RECORD_FILE, read_metrics

SWEEP_FILE = "sweep.json"
TRIALS_FOLDER = "trials"
TRIALS_FILE = "trials.csv"
CURVES_FILE = "curves.csv"

GROUP = ["standardize", "update_order", "global_batch_size", "multiplier", "warmup_steps"]
"""The columns that runs of one configuration have in common; they differ in `seed`."""


def read_sweep(folder: Path) -> dict[str, Any]:
    """What a sweep is: its kind, configuration, cells and provenance."""
    content: dict[str, Any] = json.loads(read_regular(folder / SWEEP_FILE))
    return content


def trials_table(folder: Path) -> pd.DataFrame:
    """One row a run: what it was, where it ended, and what was predicted; excess losses are fractions of the best."""
    rows = []
    for cell in read_sweep(folder)["trials"]:
        record = json.loads(read_regular(folder / TRIALS_FOLDER / cell["name"] / RECORD_FILE))
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
    for name, best in trials_table(folder)[["name", "closed_form_loss"]].itertuples(index=False):
        metrics = pd.DataFrame(read_metrics(folder / TRIALS_FOLDER / name))
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
        line = {"batch": f"{row['global_batch_size']}", "learning_rates": f"× {row['multiplier']:.4g}"}
        line |= {"steps": f"{row['num_steps']}", "of limit": f"{row['of_limit']:.3g}"}
        stable, converged = row["of_limit"] < 1, row["num_diverged"] == 0
        if len(weights) == 1:
            line["weight"] = f"{row[weights[0]]:.5g}" if converged else ""
            line["bias"] = f"{row['bias']:.5g}" if converged else ""
        line["loss"] = f"{row['loss']:.5g}" if converged else ""
        line["above best, %"] = _outcome(row)
        line["predicted"] = _in_percent(row["predicted_excess"]) if stable else "diverges"
        low, high = (_in_percent(row[f"predicted_{end}"]) for end in ("low", "high"))
        line["95 % of runs"] = f"{low} to {high}" if stable and low else ""
        lines.append((converged, line))
    return list(lines[0][1]), [_marked(list(line.values()), converged) for converged, line in lines]


def lr_scaling_lines(summary: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The same for a ladder: a row a rung, without and with warm-up."""
    columns = [
        "features",
        "order",
        "learning_rates",
        "batch",
        "of limit",
        "predicted, % above best",
        "measured",
        "with warm-up",
    ]
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
                    f"{cold['of_limit']:.3g}",
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
