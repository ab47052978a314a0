"""The pictures of sweeps: measured runs on the predicted curves and limits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from torchreg.plots.style import BLACK, BLUE, GREY, ORANGE, SKY, new_figure, own_style, save
from torchreg.runs.record import RECORD_FILE
from torchreg.sweeps.sweep_tables import GROUP, TRIALS_FOLDER, curves_table, read_sweep, summary, trials_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ORDERS = {"simultaneous": (ORANGE, "o", "--", 0.78), "sequential": (BLUE, "s", ":", 0.64)}


@own_style()
def draw_sweep(folder: Path) -> list[Path]:
    """Draw a finished sweep, as PNG and SVG in its folder; nothing where the best loss is 0 and so has no multiples."""
    if not (trials_table(folder)["closed_form_loss"] > 0).all():
        return []
    if read_sweep(folder)["kind"] == "batch":
        return _draw_batch(folder)
    return _draw_lr_scaling(folder)


def _draw_batch(folder: Path) -> list[Path]:
    cells, curves = trials_table(folder), curves_table(folder)
    groups = [(key[2], group) for key, group in cells.groupby(GROUP, sort=True)]
    num_columns = 3 if len(groups) > 1 else 2
    num_rows = math.ceil((len(groups) + 1) / num_columns)
    figure = new_figure(7.5, 0.6 + 2.5 * num_rows)
    panels = figure.subplots(num_rows, num_columns, sharex=False, squeeze=False).ravel()
    for axes, (batch_size, group) in zip(panels, groups, strict=False):
        _draw_curves(axes, folder, group, curves[curves["name"].isin(group["name"])])
        axes.set_title(f"{batch_size} rows", fontsize=10)
    _share_limits(panels[: len(groups)])
    _draw_ends(panels[len(groups)], summary(cells))
    for axes in panels[len(groups) + 1 :]:
        axes.set_axis_off()
    for axes in panels[: len(groups)]:
        axes.set_xlabel("epoch")
    for row in range(num_rows):
        if row * num_columns < len(groups):
            panels[row * num_columns].set_ylabel("above the best loss (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
    return save(figure, folder, "batch")


def _draw_curves(axes: Axes, folder: Path, group: pd.DataFrame, curves: pd.DataFrame) -> None:
    """Single runs, their mean, and the prediction with its band, over epochs."""
    for number, (_, run) in enumerate(curves.groupby("name")):
        axes.plot(
            run["epoch"], 100 * run["excess"], color=SKY, linewidth=0.7, alpha=0.7, label=None if number else "one run"
        )
    mean = curves.groupby("epoch")["excess"].mean()
    axes.plot(mean.index, 100 * mean, color=BLUE, linewidth=2, label=f"mean of {len(group)}")
    record = json.loads((folder / TRIALS_FOLDER / group["name"].iloc[0] / RECORD_FILE).read_text(encoding="utf-8"))
    curve = record["forecast"]["curve"]
    if curve:
        epochs = np.array(curve["steps"]) / record["derived"]["steps_per_epoch"]
        low, high = (100 * np.array(curve[name], dtype=float) for name in ("low", "high"))
        axes.fill_between(epochs, low, high, color=GREY, alpha=0.3, linewidth=0, label="95 % of runs, predicted")
        axes.plot(epochs, 100 * np.array(curve["excess"]), color=BLACK, linestyle="--", label="mean, predicted")
    axes.set_yscale("log")


def _share_limits(panels: Any) -> None:
    """One scale for all panels; the band of single runs may leave it, which may reach down to nothing."""
    bottoms, tops = zip(*(axes.get_ylim() for axes in panels), strict=True)
    means = [line.get_ydata() for axes in panels for line in axes.lines if line.get_label().startswith("mean")]
    smallest = min((y for values in means for y in values if y > 0), default=0)
    for axes in panels:
        axes.set_ylim(max(min(bottoms), smallest / 10), max(tops))


def _draw_ends(axes: Axes, table: pd.DataFrame) -> None:
    """Where runs end, by batch size."""
    axes.set_title("at the end, ± std. error", fontsize=10)
    if table["excess"].isna().all():
        axes.text(0.5, 0.5, "all diverged", transform=axes.transAxes, ha="center")
        return
    axes.errorbar(
        table["global_batch_size"],
        100 * table["excess"],
        yerr=100 * table["excess_error"],
        fmt="o",
        color=BLUE,
        capsize=3,
        markersize=4,
        label="measured",
    )
    axes.plot(table["global_batch_size"], 100 * table["predicted_excess"], "--", color=BLACK, label="predicted")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("global batch (rows)")
    axes.legend(fontsize=8)


def _draw_lr_scaling(folder: Path) -> list[Path]:
    table = summary(trials_table(folder))
    figure = new_figure(7.5, 4.4)
    panels = figure.subplots(1, 2, sharey=True)
    top = 1_000 * float(table["excess"].max(skipna=True))  # of what converged, in percent, with room
    top = top if top > 0 else 1.0
    for axes, standardize in zip(panels, (False, True), strict=True):
        part = table[table["standardize"] == standardize]
        axes.axhspan(top, 100 * top, color=GREY, alpha=0.25, linewidth=0)
        for order, style in _ORDERS.items():
            _draw_rungs(axes, part[part["update_order"] == order], top, order, *style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("rates and batch × (1 is the reference batch)")
        axes.set_title("standardised features" if standardize else "raw units", fontsize=10)
        axes.text(0.02, 4 * top, "diverged", transform=axes.get_yaxis_transform())
    panels[0].set_ylim(top=50 * top)  # once all is drawn that decides the other end
    panels[0].set_ylabel("end of training, above the best loss (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9)
    return save(figure, folder, "lr-scaling")


def _draw_rungs(
    axes: Axes, runs: pd.DataFrame, top: float, order: str, colour: str, marker: str, dashes: str, label_at: float
) -> None:
    """The rungs of one update order, without (filled) and with warm-up (hollow), and the predictions."""
    for warmup_steps, rungs in runs.groupby("warmup_steps"):
        height = np.where(rungs["num_diverged"] > 0, 5 * top, 100 * rungs["excess"])
        axes.plot(
            rungs["multiplier"],
            height,
            marker,
            markersize=10 if warmup_steps else 5,
            markerfacecolor="none" if warmup_steps else colour,
            color=colour,
            label=f"{order}, {'warmed up' if warmup_steps else 'measured'}",
        )
    stable = runs[(runs["fraction_of_limit"] < 1) & (runs["warmup_steps"] == 0)]
    mean, low, high = (100 * stable[f"predicted_{name}"].astype(float) for name in ("excess", "low", "high"))
    axes.fill_between(stable["multiplier"], low, high, color=colour, alpha=0.12, linewidth=0)
    axes.plot(
        stable["multiplier"],
        mean,
        dashes,
        color=colour,
        linewidth=1.2,
        label=f"{order}, predicted mean and 95 % of runs",
    )
    nearest = runs.iloc[(runs["fraction_of_limit"] - 1).abs().argmin()]
    limit = nearest["multiplier"] / nearest["fraction_of_limit"]
    axes.axvline(limit, color=colour, linestyle=dashes, linewidth=2)
    axes.annotate(
        f"limit\n× {limit:.3g}",
        (limit, label_at),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
        color=colour,
    )
