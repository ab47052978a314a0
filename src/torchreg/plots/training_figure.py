"""The figure of one run: data and fit beside the loss and its forecast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.cells import cell_len, set_cell_size

from torchreg.console import printable
from torchreg.data.table import Table
from torchreg.plots.quantities import ranks
from torchreg.plots.style import BLACK, GREY, ORANGE, SKY, default_style, save
from torchreg.runs.config import from_json
from torchreg.runs.record import RECORD_FILE, TRAINING_FIGURE, read_metrics
from torchreg.runs.setup import read

_LONGEST_NAME = 32  # cells (a wide letter takes two) that have room beside an axis
_UNITS = {"GrLivArea": "living area (square feet)", "SalePrice": "sale price (US dollars)"}


@default_style()
def draw_training(run_dir: Path) -> list[Path]:
    """Draw a finished run, as PNG and SVG in its folder."""
    return save(training_figure(run_dir), run_dir, TRAINING_FIGURE)


def training_figure(run_dir: Path) -> Figure:
    """The figure of a finished run."""
    record = json.loads((run_dir / RECORD_FILE).read_text(encoding="utf-8"))
    result = record["result"]
    figure = Figure(figsize=(7.5, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_data(left, read(from_json(record["config"]).data), result)
    _draw_loss(right, read_metrics(run_dir), record)
    steps = f"{result['num_steps']} steps of {result['global_batch_size']} samples"
    figure.suptitle(f"{_plain(run_dir.name)}: {steps} on {ranks(result['world_size'])}")
    return figure


def _draw_data(axes: Axes, table: Table, result: dict[str, Any]) -> None:
    """The target over the one feature with both fitted lines, or over its prediction from several features."""
    target, unit = table.target[:, 0], _label(table.target_name)
    is_line = table.num_features == 1
    x = table.features[:, 0] if is_line else table.features @ np.array(result["weight"]) + result["bias"]
    axes.scatter(x, target, s=14, color=SKY, edgecolor="white", linewidth=0.3, label=f"{table.num_rows} samples")
    if is_line:
        ends = np.array([x.min(), x.max()])
        trained = result["weight"][0] * ends + result["bias"]
        axes.plot(ends, trained, color=ORANGE, linewidth=2.5, label="trained")
        best, name = result["closed_form_weight"][0] * ends + result["closed_form_bias"], "closed-form solution"
        axes.set(xlabel=_label(table.feature_names[0]), ylabel=unit, title="data and fit")
    else:
        ends = best = np.array([target.min(), target.max()])
        name = "exact prediction"
        axes.set(xlabel=f"predicted {unit}", ylabel=unit, title=f"prediction from {table.num_features} features")
        axes.tick_params(axis="x", rotation=20)
    axes.plot(ends, best, color=BLACK, linestyle=":", linewidth=2, label=name)
    axes.locator_params(axis="x", nbins=4)  # labels stand side by side
    for axis, longest in ((axes.xaxis, 1e6), (axes.yaxis, 1e8)):
        low, high = axis.get_view_interval()
        if 1e3 <= max(abs(low), abs(high)) < longest and high - low >= 100:  # else an offset or exponent
            axis.set_major_formatter("{x:,.0f}")
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
    target = record["result"]["target_name"]
    unit = "US dollars" if target in _UNITS else _plain(target)
    loss = f"mean squared error{' ' if len(unit) <= 16 else chr(10)}({unit}²)"
    axes.set(yscale="log", xlabel="step (optimizer updates)", ylabel=loss, title="loss")
    axes.legend(fontsize=8)


def _label(column: str) -> str:
    return _UNITS.get(column) or _plain(column)


def _plain(name: str) -> str:
    """Someone else's name as text for a figure: without formulas between dollars and control characters, shortened."""
    text = printable(name).replace("$", r"\$")
    return text if cell_len(text) <= _LONGEST_NAME else set_cell_size(text, _LONGEST_NAME - 1) + "…"
