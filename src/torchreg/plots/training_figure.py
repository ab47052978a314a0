"""The figure of one run: data and fit beside the loss and its forecast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchreg.data.table import Table
from torchreg.plots.quantities import ranks
from torchreg.plots.style import (
    BLACK,
    GREY,
    ORANGE,
    SKY,
    default_style,
    label,
    loss_label,
    new_figure,
    number_axes,
    plain,
    save,
)
from torchreg.runs.config import from_json
from torchreg.runs.record import RECORD_FILE, TRAINING_FIGURE, read_metrics
from torchreg.runs.setup import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@default_style()
def draw_training(run_dir: Path) -> list[Path]:
    """Draw a finished run, as PNG and SVG in its folder."""
    return save(training_figure(run_dir), run_dir, TRAINING_FIGURE)


def training_figure(run_dir: Path) -> Figure:
    """The figure of a finished run."""
    record = json.loads((run_dir / RECORD_FILE).read_text(encoding="utf-8"))
    result = record["result"]
    figure = new_figure(7.5, 3.7)
    left, right = figure.subplots(1, 2)
    _draw_data(left, read(from_json(record["config"])), result)
    _draw_loss(right, read_metrics(run_dir), record)
    steps = f"{result['num_steps']} steps of {result['global_batch_size']} samples"
    figure.suptitle(f"{plain(run_dir.name)}: {steps} on {ranks(result['world_size'])}")
    return figure


def _draw_data(axes: Axes, table: Table, result: dict[str, Any]) -> None:
    """The target over the one feature with both fitted lines, or over its prediction from several features."""
    target, unit = table.target[:, 0], label(table.target_name)
    is_line = table.num_features == 1
    x = table.features[:, 0] if is_line else table.features @ np.array(result["weight"]) + result["bias"]
    axes.scatter(x, target, s=14, color=SKY, edgecolor="white", linewidth=0.3, label=f"{table.num_rows} samples")
    if is_line:
        ends = np.array([x.min(), x.max()])
        trained = result["weight"][0] * ends + result["bias"]
        axes.plot(ends, trained, color=ORANGE, linewidth=2.5, label="trained")
        best, name = result["closed_form_weight"][0] * ends + result["closed_form_bias"], "closed-form solution"
        axes.set(xlabel=label(table.feature_names[0]), ylabel=unit, title="data and fit")
    else:
        ends = best = np.array([target.min(), target.max()])
        name = "exact prediction"
        axes.set(xlabel=f"predicted {unit}", ylabel=unit, title=f"prediction from {table.num_features} features")
        axes.tick_params(axis="x", rotation=20)
    axes.plot(ends, best, color=BLACK, linestyle=":", linewidth=2, label=name)
    number_axes(axes)
    axes.legend(fontsize=8)


def _draw_loss(axes: Axes, metrics: list[dict[str, Any]], record: dict[str, Any]) -> None:
    best, curve = record["result"]["closed_form_loss"], record["forecast"]["curve"]
    steps = np.array([line["step"] for line in metrics])
    axes.plot(steps, [line["loss"] for line in metrics], ".", markersize=5, color=SKY, label="samples of the step")
    if any(line.get("full_loss") for line in metrics):
        full_loss = [line["full_loss"] for line in metrics]
        axes.plot(steps + 1, full_loss, color=ORANGE, linewidth=2.5, label="all samples")
    if curve:
        low, high, mean = (best * (1 + np.array(curve[name])) for name in ("low", "high", "excess"))
        if record["forecast"]["criterion"] == "mean square":
            name = "95 % of runs, all samples"
            axes.fill_between(curve["steps"], low, high, color=GREY, alpha=0.35, linewidth=0, label=name)
        axes.plot(curve["steps"], mean, color=BLACK, linestyle="--", linewidth=1.5, label="predicted mean")
    if best > 0:
        axes.axhline(best, color=BLACK, linestyle=":", linewidth=2, label="closed-form solution, all samples")
    target = loss_label(record["result"]["target_name"])
    axes.set(yscale="log", xlabel="step (optimizer updates)", ylabel=target, title="loss")
    axes.legend(fontsize=8)
