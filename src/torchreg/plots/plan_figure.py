"""The figure of a plan: the stability of each scaling rule, and the steps that larger batches save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchreg.plots.quantities import in_unit
from torchreg.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, default_style, save
from torchreg.runs.record import PLAN_FILE

_RULES = {"linear": (ORANGE, "-", "o"), "sqrt": (BLUE, "--", "s"), "none": (GREEN, ":", "^")}


@default_style()
def draw_plan(folder: Path) -> list[Path]:
    """Draw the `plan.json` of a folder, as PNG and SVG beside it."""
    return save(plan_figure(json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))), folder, "plan")


def plan_figure(plan: dict[str, Any]) -> Figure:
    """The figure of a `plan.json`."""
    figure = Figure(figsize=(7.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_limit(left, plan)
    _draw_steps(right, plan)
    return figure


def _draw_limit(axes: Axes, plan: dict[str, Any]) -> None:
    for rule, multiples in plan["fraction_of_stability_limit"].items():
        colour, dashes, marker = _RULES[rule]
        points = [(size, multiple) for size, multiple in multiples if multiple is not None]
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, linestyle=dashes, label=f"lr_scaling {rule}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    bottom, top = min(low, 0.5), max(high, 2)  # so that the limit is visible
    axes.axhspan(1, top, color=GREY, alpha=0.25, linewidth=0)
    axes.axhline(1, color=BLACK, linewidth=1)
    axes.text(0.03, 1.07, "diverges", transform=axes.get_yaxis_transform(), va="bottom")
    axes.set(xlabel="ranks", ylabel="fraction of the stability limit", title="stability", ylim=(bottom, top))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.legend(fontsize=9)


def _draw_steps(axes: Axes, plan: dict[str, Any]) -> None:
    if critical := plan["critical"]:
        best = [(b, s) for b, s in zip(critical["batch_sizes"], critical["steps"], strict=True) if s]
        sizes, steps = zip(*best, strict=True) if best else ((), ())
        axes.plot(sizes, steps, "s--", color=BLUE, label="best learning rate")
        if best:
            halving = [steps[0] * sizes[0] / size for size in sizes]
            axes.plot(sizes, halving, color=GREY, linestyle=":", linewidth=2, label="ideal: half per doubling")
        if critical["critical"]:
            axes.axvline(critical["critical"], color=BLACK, linewidth=1)
            axes.text(critical["critical"], 0.02, " critical batch", transform=axes.get_xaxis_transform(), va="bottom")
    forecasts = [(row["global_batch_size"], row["forecast"]) for row in plan["rows"] if row["forecast"]]
    if planned := [(size, steps) for size, forecast in forecasts if (steps := forecast["steps_to_target"])]:
        axes.plot(*zip(*planned, strict=True), "o-", color=ORANGE, label="planned learning rate")
    axes.set(xlabel="global batch (samples)", title="steps to the target")
    axes.set_ylabel(f"steps to {in_unit([plan['target_excess']], '%')} above the optimum")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    if axes.lines:
        axes.legend(fontsize=9)
    else:
        axes.text(0.5, 0.5, "never", transform=axes.transAxes, ha="center")
