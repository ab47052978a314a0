"""Every picture. Figures read records, never a live run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchreg.config import from_json
from torchreg.data import Table
from torchreg.prepare import read
from torchreg.record import FIGURE_FILES, PARTIAL, RECORD_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_DATA, _FIT, _BEST = "#56B4E9", "#D55E00", "#000000"
_UNITS = {"GrLivArea": "living area (square feet)", "SalePrice": "sale price (US dollars)"}


def require_matplotlib() -> None:
    """Raise `ValueError`, before a run rather than after it, where pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("plot needs matplotlib, which is not installed: pip install 'torchreg[plot]'") from error


def draw_training(run_dir: Path) -> list[Path]:
    """The lesson's picture of a finished run, as PNG and SVG in its folder: the fit beside the loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    record = json.loads((run_dir / RECORD_FILE).read_text(encoding="utf-8"))
    result = record["result"]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    table = read(from_json(record["config"]))
    if table.num_features == 1:
        _draw_line(left, table, result)
    else:
        _draw_predictions(left, table, result)
    _draw_loss(right, read_metrics(run_dir), result)
    ranks = f"{result['world_size']} rank{'s' * (result['world_size'] > 1)}"
    figure.suptitle(f"{run_dir.name}: {result['num_steps']} steps of {result['global_batch_size']} rows on {ranks}")
    paths = [run_dir / file for file in FIGURE_FILES]
    for path in paths:
        partial = path.with_name(path.name + PARTIAL)
        figure.savefig(partial, format=path.suffix[1:], dpi=150)
        partial.replace(path)
    return paths


def draw_plan(folder: Path) -> list[Path]:
    return []


def _draw_line(axes: Axes, table: Table, result: dict[str, Any]) -> None:
    area, price = table.features[:, 0], table.target[:, 0]
    ends = np.array([area.min(), area.max()])
    axes.scatter(area, price, s=14, color=_DATA, edgecolor="white", linewidth=0.3, label=f"{table.num_rows} rows")
    axes.plot(ends, result["weight"][0] * ends + result["bias"], color=_FIT, linewidth=2.5, label="trained")
    best = result["closed_form_weight"][0] * ends + result["closed_form_bias"]
    axes.plot(ends, best, color=_BEST, linestyle=":", linewidth=2, label="closed form")
    axes.set(xlabel=_label(table.feature_names[0]), ylabel=_label(table.target_name), title="data and fit")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend()


def _draw_predictions(axes: Axes, table: Table, result: dict[str, Any]) -> None:
    price = table.target[:, 0]
    predicted = table.features @ np.array(result["weight"]) + result["bias"]
    ends = np.array([price.min(), price.max()])
    axes.scatter(predicted, price, s=14, color=_DATA, edgecolor="white", linewidth=0.3, label=f"{table.num_rows} rows")
    axes.plot(ends, ends, color=_BEST, linestyle=":", linewidth=2, label="a perfect prediction")
    unit = _label(table.target_name)
    axes.set(xlabel=f"predicted {unit}", ylabel=unit, title=f"prediction from {table.num_features} features")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(axis="x", rotation=20)
    axes.legend()


def _draw_loss(axes: Axes, metrics: list[dict[str, Any]], result: dict[str, Any]) -> None:
    steps = [line["step"] for line in metrics]
    losses = [line["loss"] for line in metrics]
    axes.plot(steps, losses, "o-", markersize=3, color=_FIT, label="rows of the step")
    best = result["closed_form_loss"]
    if best > 0:
        axes.axhline(best, color=_BEST, linestyle=":", linewidth=2, label="closed form, all rows")
    axes.set(
        yscale="log",
        xlabel="step (optimizer updates)",
        ylabel="mean squared error (US dollars²)",
        title="loss",
    )
    if result["target_name"] not in _UNITS:
        axes.set_ylabel(f"mean squared error ({result['target_name']}²)")
    axes.legend()


def _label(column: str) -> str:
    return _UNITS.get(column, column)
