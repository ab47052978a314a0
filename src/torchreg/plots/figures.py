"""The figures of a run, a plan and a sweep: what was measured beside what theory predicts."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.scale import LogScale
from rich.cells import cell_len, set_cell_size

from torchreg.console import printable
from torchreg.data.table import Table
from torchreg.plots.quantities import in_unit, ranks
from torchreg.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, SKY, save
from torchreg.runs.config import from_json
from torchreg.runs.record import PLAN_FILE, RECORD_FILE, TRAINING_FIGURE, read_metrics
from torchreg.runs.setup import read
from torchreg.sweeps.sweep_tables import GROUP, TRIALS_FOLDER, curves_table, read_sweep, summary, trials_table

_LONGEST_NAME = 32  # cells (a wide letter takes two) that have room beside an axis
_RULES = {"linear": (ORANGE, "-", "o"), "sqrt": (BLUE, "--", "s"), "none": (GREEN, ":", "^")}
_ORDERS = {"simultaneous": (ORANGE, "o", "--", 0.78), "sequential": (BLUE, "s", ":", 0.64)}
_UNITS = {"GrLivArea": "living area (square feet)", "SalePrice": "sale price (US dollars)"}


def training_figure(run_dir: Path) -> Figure:
    """The figure of a finished run."""
    record = json.loads((run_dir / RECORD_FILE).read_text(encoding="utf-8"))
    figure, result = Figure(figsize=(7.5, 3.7), layout="constrained"), record["result"]
    left, right = figure.subplots(1, 2)
    _draw_data(left, read(from_json(record["config"]).data), result)
    _draw_loss(right, read_metrics(run_dir), record)
    steps = f"{result['num_steps']} steps of {result['global_batch_size']} samples"
    figure.suptitle(f"{_plain(run_dir.name)}: {steps} on {ranks(result['world_size'])}")
    return figure


draw_training = partial(save, training_figure, name=TRAINING_FIGURE)


def _draw_data(axes: Axes, table: Table, result: dict[str, Any]) -> None:
    """The target over the one feature with both fitted lines, or over its prediction from several features."""
    target, is_line = table.target[:, 0], table.num_features == 1
    unit, feature = (_UNITS.get(name) or _plain(name) for name in (table.target_name, table.feature_names[0]))
    x = table.features[:, 0] if is_line else table.features @ np.array(result["weight"]) + result["bias"]
    axes.scatter(x, target, s=14, color=SKY, edgecolor="white", linewidth=0.3, label=f"{table.num_rows} samples")
    if is_line:
        ends, label, title = np.array([x.min(), x.max()]), feature, "data and fit"
        axes.plot(ends, result["weight"][0] * ends + result["bias"], color=ORANGE, linewidth=2.5, label="trained")
        best, name = result["closed_form_weight"][0] * ends + result["closed_form_bias"], "closed-form solution"
    else:
        ends = best = np.array([target.min(), target.max()])
        label, name, title = f"predicted {unit}", "exact prediction", f"prediction from {table.num_features} features"
        axes.tick_params(axis="x", rotation=20)
    axes.plot(ends, best, color=BLACK, linestyle=":", linewidth=2, label=name)
    axes.set(xlabel=label, ylabel=unit, title=title)
    axes.locator_params(axis="x", nbins=4)  # labels stand side by side
    for axis, longest in ((axes.xaxis, 1e6), (axes.yaxis, 1e8)):
        low, high = axis.get_view_interval()
        if 1e3 <= max(abs(low), abs(high)) < longest and high - low >= 100:  # else an offset or exponent
            axis.set_major_formatter("{x:,.0f}")
    axes.legend(fontsize=8)


def _draw_loss(axes: Axes, metrics: list[dict[str, Any]], record: dict[str, Any]) -> None:
    best, curve = record["result"]["closed_form_loss"], record["forecast"]["curve"]
    lines = pd.DataFrame(metrics, columns=["step", "loss", "full_loss"], dtype=float)
    axes.plot(lines["step"], lines["loss"], ".", markersize=5, color=SKY, label="samples of the step")
    if lines["full_loss"].any():
        axes.plot(lines["step"] + 1, lines["full_loss"], color=ORANGE, linewidth=2.5, label="all samples")
    if curve:
        low, high, mean = (best * (1 + np.array(curve[name])) for name in ("low", "high", "excess"))
        if record["forecast"]["criterion"] == "mean square":
            name = f"{_percent_of_runs(record)}, all samples"
            axes.fill_between(curve["steps"], low, high, color=GREY, alpha=0.35, linewidth=0, label=name)
        axes.plot(curve["steps"], mean, color=BLACK, linestyle="--", linewidth=1.5, label="predicted mean")
    if best > 0:
        axes.axhline(best, color=BLACK, linestyle=":", linewidth=2, label="closed-form solution, all samples")
    target = record["result"]["target_name"]
    unit = "US dollars" if target in _UNITS else _plain(target)
    loss = f"mean squared error{' ' if len(unit) <= 16 else chr(10)}({unit}²)"
    axes.set(yscale="log", xlabel="step (optimizer updates)", ylabel=loss, title="loss")
    axes.legend(fontsize=8)


def _plain(name: str) -> str:
    """Someone else's name as text for a figure: without formulas between dollars and control characters, shortened."""
    text = printable(name).replace("$", r"\$")
    return text if cell_len(text) <= _LONGEST_NAME else set_cell_size(text, _LONGEST_NAME - 1) + "…"


def plan_figure(folder: Path) -> Figure:
    """The figure of the `plan.json` of a folder."""
    plan = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    figure = Figure(figsize=(7.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_limit(left, plan)
    _draw_steps(right, plan)
    return figure


draw_plan = partial(save, plan_figure, name="plan")


def _draw_limit(axes: Axes, plan: dict[str, Any]) -> None:
    for rule, multiples in plan["fraction_of_stability_limit"].items():
        colour, dashes, marker = _RULES[rule]
        points = [(size, multiple) for size, multiple in multiples if multiple is not None]
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, linestyle=dashes, label=f"lr_scaling {rule}")
    axes.set(xscale=LogScale(axes.xaxis, base=2), yscale=LogScale(axes.yaxis, base=2))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:.4g}")
    low, high = axes.get_ylim()
    bottom, top = min(low, 0.5), max(high, 2)  # so that the limit is visible
    axes.axhspan(1, top, color=GREY, alpha=0.25, linewidth=0)
    axes.axhline(1, color=BLACK, linewidth=1)
    axes.text(0.03, 1.07, "diverges", transform=axes.get_yaxis_transform(), va="bottom")
    axes.set(xlabel="ranks", ylabel="fraction of the stability limit", title="stability", ylim=(bottom, top))
    axes.legend(fontsize=9)


def _draw_steps(axes: Axes, plan: dict[str, Any]) -> None:
    if critical := plan["critical"]:
        best = pd.DataFrame(critical, columns=["batch_sizes", "steps"], dtype=float)
        best = best[best["steps"] > 0]
        sizes, steps = best["batch_sizes"], best["steps"]
        axes.plot(sizes, steps, "s--", color=BLUE, label="best learning rate")
        if len(sizes):
            halving = steps.iloc[0] * sizes.iloc[0] / sizes
            axes.plot(sizes, halving, color=GREY, linestyle=":", linewidth=2, label="ideal: half per doubling")
        if critical["critical"]:
            axes.axvline(critical["critical"], color=BLACK, linewidth=1)
            axes.text(critical["critical"], 0.02, " critical batch", transform=axes.get_xaxis_transform(), va="bottom")
    rows = [(row["global_batch_size"], (row["forecast"] or {}).get("steps_to_target")) for row in plan["rows"]]
    if planned := [(size, steps) for size, steps in rows if steps]:
        axes.plot(*zip(*planned, strict=True), "o-", color=ORANGE, label="planned learning rate")
    label = f"steps to {in_unit([plan['target_excess']], '%')} above the optimum"
    axes.set(xlabel="global batch (samples)", ylabel=label, title="steps to the target")
    axes.set(xscale=LogScale(axes.xaxis, base=2), yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    if axes.lines:
        axes.legend(fontsize=9)
    else:
        axes.text(0.5, 0.5, "never", transform=axes.transAxes, ha="center")


def draw_sweep(folder: Path) -> list[Path]:
    """Draw a finished sweep, as PNG and SVG in its folder; nothing where the optimum's loss is 0."""
    return save(sweep_figure, folder, read_sweep(folder)["kind"])


def sweep_figure(folder: Path) -> Figure | None:
    """The figure of a finished sweep; None where the optimum's loss is 0, of which there are no multiples."""
    trials = trials_table(folder)
    if not (trials["closed_form_loss"] > 0).all():
        return None
    return _batch_figure(folder, trials) if read_sweep(folder)["kind"] == "batch" else _lr_scaling_figure(trials)


def _batch_figure(folder: Path, trials: pd.DataFrame) -> Figure:
    curves = curves_table(folder)
    groups = [(key[2], group) for key, group in trials.groupby(GROUP, sort=True)]  # by batch size
    num_columns = 3 if len(groups) > 1 else 2
    num_rows = math.ceil((len(groups) + 1) / num_columns)
    figure = Figure(figsize=(7.5, 0.6 + 2.5 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    panels, (end, *unused) = panels[: len(groups)], panels[len(groups) :]
    for axes, (batch_size, group) in zip(panels, groups, strict=True):
        _draw_curves(axes, folder, group, curves[curves["name"].isin(group["name"])])
        axes.set(xlabel="epoch", yscale="log")
        axes.set_title(f"{batch_size} samples", fontsize=10)
    for axes in panels[::num_columns]:
        axes.set_ylabel("above the optimum (%)")
    # The same y limits for all; the band of single runs, which may reach down to 0, may exceed them.
    bottoms, tops = zip(*(axes.get_ylim() for axes in panels), strict=True)
    lines = [line for axes in panels for line in axes.lines if line.get_label().startswith("mean")]
    smallest = min((y for line in lines for y in line.get_ydata() if y > 0), default=0)
    for axes in panels:
        axes.set_ylim(max(min(bottoms), smallest / 10), max(tops))
    _draw_ends(end, summary(trials))
    for axes in unused:
        axes.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
    return figure


def _percent_of_runs(record: dict[str, Any]) -> str:
    """What a predicted band holds, which is approximate without simulated runs."""
    return "95 % of runs" if record["forecast"]["simulated_ratio"] else "about 95 % of runs"


def _draw_curves(axes: Axes, folder: Path, group: pd.DataFrame, curves: pd.DataFrame) -> None:
    for name, run in curves.groupby("name"):
        label = "one run" if name == curves["name"].min() else None
        axes.plot(run["epoch"], 100 * run["excess"], color=SKY, linewidth=0.7, alpha=0.7, label=label)
    by_epoch = curves.groupby("epoch")["excess"].mean()
    axes.plot(by_epoch.index, 100 * by_epoch, color=BLUE, linewidth=2, label=f"mean of {len(group)}")
    record = json.loads((folder / TRIALS_FOLDER / group["name"].iloc[0] / RECORD_FILE).read_text(encoding="utf-8"))
    if curve := record["forecast"]["curve"]:
        epochs = np.array(curve["steps"]) / record["derived"]["steps_per_epoch"]
        mean, low, high = (100 * np.array(curve[name], dtype=float) for name in ("excess", "low", "high"))
        axes.fill_between(
            epochs, low, high, color=GREY, alpha=0.3, linewidth=0, label=f"{_percent_of_runs(record)}, predicted"
        )
        axes.plot(epochs, mean, color=BLACK, linestyle="--", label="mean, predicted")


def _draw_ends(axes: Axes, table: pd.DataFrame) -> None:
    axes.set_title("at the end, ± std. error", fontsize=10)
    if table["excess"].isna().all():
        axes.text(0.5, 0.5, "all diverged", transform=axes.transAxes, ha="center")
        return
    sizes, error = table["global_batch_size"], 100 * table["excess_error"]
    axes.errorbar(sizes, 100 * table["excess"], error, fmt="o", color=BLUE, capsize=3, markersize=4, label="measured")
    axes.plot(sizes, 100 * table["predicted_excess"], "--", color=BLACK, label="predicted")
    axes.set(xscale=LogScale(axes.xaxis, base=2), yscale="log", xlabel="global batch (samples)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=8)


def _lr_scaling_figure(trials: pd.DataFrame) -> Figure:
    table = summary(trials)
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    highest = float(table["excess"].max())  # of what converged
    top = 1_000 * highest if highest > 0 else 1.0  # in percent, with room
    for axes, standardize in zip(panels, (False, True), strict=True):
        part = table[table["standardize"] == standardize]
        axes.axhspan(top, 100 * top, color=GREY, alpha=0.25, linewidth=0)
        for order, (colour, marker, dashes, label_at) in _ORDERS.items():
            own = part[part["update_order"] == order]  # without (filled) and with warm-up (hollow)
            for warmup_steps, some in own.groupby("warmup_steps"):
                height = np.where(some["num_diverged"] > 0, 5 * top, 100 * some["excess"])
                size, face, name = (10, "none", "warmed up") if warmup_steps else (5, colour, "measured")
                looks: Any = {"color": colour, "markersize": size, "markerfacecolor": face}
                axes.plot(some["multiplier"], height, marker, **looks, label=f"{order}, {name}")
            stable = own[(own["fraction_of_stability_limit"] < 1) & (own["warmup_steps"] == 0)]
            mean, low, high = (100 * stable[f"predicted_{name}"].astype(float) for name in ("excess", "low", "high"))
            axes.fill_between(stable["multiplier"], low, high, color=colour, alpha=0.12, linewidth=0)
            name = f"{order}, predicted mean and 95 % of runs"
            axes.plot(stable["multiplier"], mean, dashes, color=colour, linewidth=1.2, label=name)
            nearest = own.iloc[(own["fraction_of_stability_limit"] - 1).abs().argmin()]
            limit = nearest["multiplier"] / nearest["fraction_of_stability_limit"]
            axes.axvline(limit, color=colour, linestyle=dashes, linewidth=2)
            axes.annotate(
                f"limit\n× {limit:.3g}", (limit, label_at), xycoords=axes.get_xaxis_transform(), xytext=(-4, 0),
                textcoords="offset points", ha="right", va="top", fontsize=9, color=colour,
            )  # fmt: skip
        axes.set(xscale=LogScale(axes.xaxis, base=2), yscale="log", xlabel="learning rate and batch × (1: reference)")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title("standardised features" if standardize else "raw units", fontsize=10)
        axes.text(0.02, 4 * top, "diverged", transform=axes.get_yaxis_transform())
    panels[0].set_ylim(top=50 * top)  # after everything that determines the other end
    panels[0].set_ylabel("end of training, above the optimum (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9)
    return figure
