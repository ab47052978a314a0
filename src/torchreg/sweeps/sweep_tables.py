"""The tables of a sweep, from its records alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from torchreg.console import number, percent
from torchreg.core.checkpoint import read_regular
from torchreg.runs.config import from_json
from torchreg.runs.record import RECORD_FILE, read_metrics

SWEEP_FILE, TRIALS_FILE, CURVES_FILE, TRIALS_FOLDER = "sweep.json", "trials.csv", "curves.csv", "trials"

GROUP = ["standardize", "update_order", "global_batch_size", "multiplier", "warmup_steps"]  # equal but for `seed`


def read_sweep(folder: Path) -> dict[str, Any]:
    """The kind, configuration, trials and provenance of a sweep."""
    return json.loads(read_regular(folder / SWEEP_FILE))


def trials_table(folder: Path) -> pd.DataFrame:
    """One row per trial: its configuration, result and prediction; excess losses are fractions of the optimal loss."""
    rows = []
    for trial in read_sweep(folder)["trials"]:
        record = json.loads(read_regular(folder / TRIALS_FOLDER / trial["name"] / RECORD_FILE))
        config, result, forecast = from_json(record["config"]).options(), record["result"], record["forecast"]
        ends = {name: values[-1] for name, values in (forecast["curve"] or {}).items()}
        weights = zip(result["feature_names"], result["weight"], strict=True)
        rows.append(
            {
                "name": trial["name"],
                **{key: config[key] for key in ("standardize", "update_order", "warmup_steps", "seed")},
                "global_batch_size": result["global_batch_size"],
                "multiplier": trial["multiplier"],
                "num_steps": result["num_steps"],
                **{f"weight_{name}": weight for name, weight in weights},
                **{key: result[key] for key in ("bias", "loss", "excess", "closed_form_loss", "diverged_at_step")},
                "diverged": result["stopped_by"] == "divergence",
                "fraction_of_stability_limit": 1 / forecast["stability_limit"],
                "noise_floor": forecast["noise_floor"],
                **{f"predicted_{name}": ends.get(name) for name in ("excess", "low", "high")},
            }
        )
    table = pd.DataFrame(rows)
    measured = [column for column in table.columns if column.startswith(("weight_", "predicted_"))]
    return table.astype(dict.fromkeys([*measured, "bias", "loss", "excess", "noise_floor"], float))  # null is NaN


def curves_table(folder: Path) -> pd.DataFrame:
    """One row per logged step of every trial: steps and epochs done, excess loss on all rows as a fraction."""
    rows = [
        (name, line["step"] + 1, line["epoch"], line.get("full_loss"), best)
        for name, best in trials_table(folder)[["name", "closed_form_loss"]].itertuples(index=False)
        for line in read_metrics(folder / TRIALS_FOLDER / name)
    ]
    table = pd.DataFrame(rows, columns=["name", "steps", "epoch", "excess", "best"])
    table["excess"] = table["excess"].astype(float) / table.pop("best") - 1
    return table.dropna()


def summary(trials: pd.DataFrame) -> pd.DataFrame:
    """One row per configuration: means over its seeds, the standard error of the mean excess, and the prediction."""
    weights = [column for column in trials.columns if column.startswith("weight_")]
    predicted = ["fraction_of_stability_limit", "noise_floor", "predicted_excess", "predicted_low", "predicted_high"]
    groups = trials.groupby(GROUP, sort=True)
    table = groups[[*weights, "bias", "loss", "excess"]].mean().join(groups[["num_steps", *predicted]].first())
    error, sizes, diverged = groups["excess"].sem(), groups.size(), groups["diverged"].sum()
    return table.assign(excess_error=error, num_runs=sizes, num_diverged=diverged).reset_index()


def table(kind: str, summary: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Human-readable columns and rows of a sweep; rows with diverged runs begin with `!`."""
    configurations = summary.to_dict("records")
    if kind == "batch":
        rows = [_batch_row(row) for row in configurations]
    else:  # the summary is sorted, `warmup_steps` last
        rows = [_lr_scaling_row(*pair) for pair in zip(configurations[::2], configurations[1::2], strict=True)]
    return list(rows[0]), [list(row.values()) for row in rows]


def _batch_row(row: Mapping[Any, Any]) -> dict[str, str]:
    diverged = bool(row["num_diverged"])
    weights = [value for name, value in row.items() if name.startswith("weight_")]
    fitted = {"weight": weights[0], "bias": row["bias"]} if len(weights) == 1 else {}
    low, high = _percent(row["predicted_low"]), _percent(row["predicted_high"])
    return {
        "batch": "!" * diverged + str(row["global_batch_size"]),
        "lr": f"× {row['multiplier']:.4g}",
        "steps": f"{row['num_steps']}",
        "lr / limit": number(row["fraction_of_stability_limit"]),
        **{name: "" if diverged else f"{x:.5g}" for name, x in fitted.items()},
        "above best, %": _measured(row),
        "predicted": _predicted(row),
        "95 % of runs": f"{low} to {high}" if low else "",  # of stable configurations
    }


def _lr_scaling_row(cold: Mapping[Any, Any], warm: Mapping[Any, Any]) -> dict[str, str]:
    """Of the configurations without and with warm-up."""
    return {
        "features": "!" * bool(cold["num_diverged"] or warm["num_diverged"])
        + ("standardised" if cold["standardize"] else "raw"),
        "order": cold["update_order"],
        "lr": f"× {cold['multiplier']:.4g}",
        "batch": f"{cold['global_batch_size']}",
        "lr / limit": number(cold["fraction_of_stability_limit"]),
        "predicted, % above best": _predicted(cold),
        "measured": _measured(cold),
        "with warm-up": _measured(warm),
    }


def _predicted(row: Mapping[Any, Any]) -> str:
    return _percent(row["predicted_excess"]) if row["fraction_of_stability_limit"] < 1 else "diverges"


def _measured(row: Mapping[Any, Any]) -> str:
    """Where the runs of a configuration ended, in percent, or how many of them diverged."""
    if row["num_diverged"]:
        return f"{row['num_diverged']} of {row['num_runs']} diverged"
    error = _percent(row["excess_error"])
    return _percent(row["excess"]) + (f" ± {error}" if error else "")


def _percent(fraction: float) -> str:
    return "" if math.isnan(fraction) else percent(fraction).removesuffix(" %")
