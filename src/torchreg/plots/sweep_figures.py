"""The figures of sweeps: measured runs, and the predicted curves and limits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchreg.plots.style import BLACK, BLUE, GREY, ORANGE, SKY, default_style, save
from torchreg.runs.record import RECORD_FILE
from torchreg.sweeps.sweep_tables import GROUP, TRIALS_FOLDER, curves_table, read_sweep, summary, trials_table

_ORDERS = {"simultaneous": (ORANGE, "o", "--", 0.78), "sequential": (BLUE, "s", ":", 0.64)}


@default_style()
def draw_sweep(folder: Path) -> list[Path]:
    """Draw a finished sweep, as PNG and SVG in its folder; nothing where the optimum's loss is 0."""
    figure = sweep_figure(folder)
    return save(figure, folder, read_sweep(folder)["kind"]) if figure else []


def sweep_figure(folder: Path) -> Figure | None:
    """The figure of a finished sweep; None where the optimum's loss is 0, of which there are no multiples."""
    trials = trials_table(folder)
    if not (trials["closed_form_loss"] > 0).all():
        return None
    return _batch_figure(folder, trials) if read_sweep(folder)["kind"] == "batch" else _lr_scaling_figure(trials)


def _batch_figure(folder: Path, trials: pd.DataFrame) -> Figure:
    curves = curves_table(folder)
    groups = [(key[2], group) for key, group in trials.groupby(GROUP, sort=True)]
    num_columns = 3 if len(groups) > 1 else 2
    num_rows = math.ceil((len(groups) + 1) / num_columns)
    figure = Figure(figsize=(7.5, 0.6 + 2.5 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes, (batch_size, group) in zip(panels, groups, strict=False):
        _draw_curves(axes, folder, group, curves[curves["name"].isin(group["name"])])
        axes.set(xlabel="epoch", yscale="log")
        axes.set_title(f"{batch_size} samples", fontsize=10)
    for axes in panels[: len(groups) : num_columns]:
        axes.set_ylabel("above the optimum (%)")
    # The same y limits for all; the band of single runs, which may reach down to 0, may exceed them.
    bottoms, tops = zip(*(axes.get_ylim() for axes in panels[: len(groups)]), strict=True)
    lines = [line for axes in panels for line in axes.lines if line.get_label().startswith("mean")]
    smallest = min((y for line in lines for y in line.get_ydata() if y > 0), default=0)
    for axes in panels[: len(groups)]:
        axes.set_ylim(max(min(bottoms), smallest / 10), max(tops))
    _draw_ends(panels[len(groups)], summary(trials))
    for axes in panels[len(groups) + 1 :]:
        axes.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
    return figure


def _draw_curves(axes: Axes, folder: Path, group: pd.DataFrame, curves: pd.DataFrame) -> None:
    """Single runs, their mean, and the prediction with its band, over epochs."""
    for number, (_, run) in enumerate(curves.groupby("name")):
        name = None if number else "one run"
        axes.plot(run["epoch"], 100 * run["excess"], color=SKY, linewidth=0.7, alpha=0.7, label=name)
    by_epoch = curves.groupby("epoch")["excess"].mean()
    axes.plot(by_epoch.index, 100 * by_epoch, color=BLUE, linewidth=2, label=f"mean of {len(group)}")
    record = json.loads((folder / TRIALS_FOLDER / group["name"].iloc[0] / RECORD_FILE).read_text(encoding="utf-8"))
    if curve := record["forecast"]["curve"]:
        epochs = np.array(curve["steps"]) / record["derived"]["steps_per_epoch"]
        mean, low, high = (100 * np.array(curve[name], dtype=float) for name in ("excess", "low", "high"))
        axes.fill_between(epochs, low, high, color=GREY, alpha=0.3, linewidth=0, label="95 % of runs, predicted")
        axes.plot(epochs, mean, color=BLACK, linestyle="--", label="mean, predicted")


def _draw_ends(axes: Axes, table: pd.DataFrame) -> None:
    """The end of training, by batch size."""
    axes.set_title("at the end, ± std. error", fontsize=10)
    if table["excess"].isna().all():
        axes.text(0.5, 0.5, "all diverged", transform=axes.transAxes, ha="center")
        return
    sizes, error = table["global_batch_size"], 100 * table["excess_error"]
    axes.errorbar(sizes, 100 * table["excess"], error, fmt="o", color=BLUE, capsize=3, markersize=4, label="measured")
    axes.plot(sizes, 100 * table["predicted_excess"], "--", color=BLACK, label="predicted")
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="global batch (samples)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=8)


def _lr_scaling_figure(trials: pd.DataFrame) -> Figure:
    table = summary(trials)
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    top = 1_000 * float(table["excess"].max(skipna=True))  # of what converged, in percent, with room
    top = top if top > 0 else 1.0
    for axes, standardize in zip(panels, (False, True), strict=True):
        part = table[table["standardize"] == standardize]
        axes.axhspan(top, 100 * top, color=GREY, alpha=0.25, linewidth=0)
        for order in _ORDERS:
            _draw_order(axes, part[part["update_order"] == order], top, order)
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="learning rate and batch × (1: reference)")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title("standardised features" if standardize else "raw units", fontsize=10)
        axes.text(0.02, 4 * top, "diverged", transform=axes.get_yaxis_transform())
    panels[0].set_ylim(top=50 * top)  # after everything that determines the other end
    panels[0].set_ylabel("end of training, above the optimum (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9)
    return figure


def _draw_order(axes: Axes, trials: pd.DataFrame, top: float, order: str) -> None:
    """The trials of one update order, without (filled) and with warm-up (hollow), and the predictions."""
    colour, marker, dashes, label_at = _ORDERS[order]
    for warmup_steps, some in trials.groupby("warmup_steps"):
        height = np.where(some["num_diverged"] > 0, 5 * top, 100 * some["excess"])
        size, face, name = (10, "none", "warmed up") if warmup_steps else (5, colour, "measured")
        looks: Any = {"color": colour, "markersize": size, "markerfacecolor": face}
        axes.plot(some["multiplier"], height, marker, **looks, label=f"{order}, {name}")
    stable = trials[(trials["fraction_of_stability_limit"] < 1) & (trials["warmup_steps"] == 0)]
    mean, low, high = (100 * stable[f"predicted_{name}"].astype(float) for name in ("excess", "low", "high"))
    axes.fill_between(stable["multiplier"], low, high, color=colour, alpha=0.12, linewidth=0)
    name = f"{order}, predicted mean and 95 % of runs"
    axes.plot(stable["multiplier"], mean, dashes, color=colour, linewidth=1.2, label=name)
    nearest = trials.iloc[(trials["fraction_of_stability_limit"] - 1).abs().argmin()]
    limit = nearest["multiplier"] / nearest["fraction_of_stability_limit"]
    axes.axvline(limit, color=colour, linestyle=dashes, linewidth=2)
    axes.annotate(
        f"limit\n× {limit:.3g}", (limit, label_at), xycoords=axes.get_xaxis_transform(), xytext=(-4, 0),
        textcoords="offset points", ha="right", va="top", fontsize=9, color=colour,
    )  # fmt: skip
