"""The lesson's picture of one run: the fit beside the loss, and what was predicted of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchreg.data.table import Table
from torchreg.plots.style import (
    BLACK,
    GREY,
    ORANGE,
    SKY,
    label,
    loss_label,
    new_figure,
    number_axes,
    own_style,
    plain,
    save,
)
from torchreg.runs.config import from_json
from torchreg.runs.record import RECORD_FILE, TRAINING_FIGURE, read_metrics
from torchreg.runs.setup import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@own_style()
def draw_training(run_dir: Path) -> list[Path]:
    """Draw a finished run, as PNG and SVG in its folder: data and fit, loss and forecast."""
    record = json.loads((run_dir / RECORD_FILE).read_text(encoding="utf-8"))
    result = record["result"]
    figure = new_figure(7.5, 3.7)
    left, right = figure.subplots(1, 2)
    table = read(from_json(record["config"]))
    if table.num_features == 1:
        _draw_line(left, table, result)
    else:
        _draw_predictions(left, table, result)
    _draw_loss(right, read_metrics(run_dir), record)
    ranks = f"{result['world_size']} rank{'s' * (result['world_size'] > 1)}"
    figure.suptitle(
        f"{plain(run_dir.name)}: {result['num_steps']} steps of {result['global_batch_size']} rows on {ranks}"
    )
    return save(figure, run_dir, TRAINING_FIGURE)


def _draw_line(axes: Axes, table: Table, result: dict[str, Any]) -> None:
    area, price = table.features[:, 0], table.target[:, 0]
    ends = np.array([area.min(), area.max()])
    axes.scatter(area, price, s=14, color=SKY, edgecolor="white", linewidth=0.3, label=f"{table.num_rows} rows")
    axes.plot(ends, result["weight"][0] * ends + result["bias"], color=ORANGE, linewidth=2.5, label="trained")
    best = result["closed_form_weight"][0] * ends + result["closed_form_bias"]
    axes.plot(ends, best, color=BLACK, linestyle=":", linewidth=2, label="closed form")
    axes.set(xlabel=label(table.feature_names[0]), ylabel=label(table.target_name), title="data and fit")
    number_axes(axes)
    axes.legend(fontsize=8)


def _draw_predictions(axes: Axes, table: Table, result: dict[str, Any]) -> None:
    price = table.target[:, 0]
    predicted = table.features @ np.array(result["weight"]) + result["bias"]
    ends = np.array([price.min(), price.max()])
    axes.scatter(predicted, price, s=14, color=SKY, edgecolor="white", linewidth=0.3, label=f"{table.num_rows} rows")
    axes.plot(ends, ends, color=BLACK, linestyle=":", linewidth=2, label="a perfect prediction")
    unit = label(table.target_name)
    axes.set(xlabel=f"predicted {unit}", ylabel=unit, title=f"prediction from {table.num_features} features")
    number_axes(axes)
    axes.tick_params(axis="x", rotation=20)
    axes.legend(fontsize=8)


def _draw_loss(axes: Axes, metrics: list[dict[str, Any]], record: dict[str, Any]) -> None:
    result, curve = record["result"], record["forecast"]["curve"]
    best = result["closed_form_loss"]
    steps = [line["step"] for line in metrics]
    axes.plot(steps, [line["loss"] for line in metrics], ".", markersize=5, color=SKY, label="rows of the step")
    if any(line.get("full_loss") for line in metrics):
        done = [step + 1 for step in steps]
        axes.plot(done, [line["full_loss"] for line in metrics], color=ORANGE, linewidth=2.5, label="all rows")
    if curve:
        low, high, expected = (best * (1 + np.array(curve[name])) for name in ("low", "high", "excess"))
        if record["forecast"]["criterion"] == "mean square":
            axes.fill_between(
                curve["steps"], low, high, color=GREY, alpha=0.35, linewidth=0, label="95 % of runs, all rows"
            )
        axes.plot(curve["steps"], expected, color=BLACK, linestyle="--", linewidth=1.5, label="predicted mean")
    if best > 0:
        axes.axhline(best, color=BLACK, linestyle=":", linewidth=2, label="closed form, all rows")
    axes.set(yscale="log", xlabel="step (optimizer updates)", ylabel=loss_label(result["target_name"]), title="loss")
    axes.legend(fontsize=8)
