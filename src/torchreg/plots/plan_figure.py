"""The picture of a plan: how near each scaling rule comes to the limit, and what larger batches save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchreg.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, new_figure, own_style, save
from torchreg.runs.forecast import percent
from torchreg.runs.record import PLAN_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RULES = {"linear": (ORANGE, "-", "o"), "sqrt": (BLUE, "--", "s"), "none": (GREEN, ":", "^")}


@own_style()
def draw_plan(folder: Path) -> list[Path]:
    """Draw the `plan.json` of a folder, as PNG and SVG beside it."""
    plan = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    figure = new_figure(7.5, 3.9)
    left, right = figure.subplots(1, 2)
    _draw_limit(left, plan)
    _draw_steps(right, plan)
    return save(figure, folder, "plan")


def _draw_limit(axes: Axes, plan: dict[str, Any]) -> None:
    for rule, multiples in plan["fraction_of_stability_limit"].items():
        colour, dashes, marker = _RULES[rule]
        points = [(size, multiple) for size, multiple in multiples if multiple is not None]
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, linestyle=dashes, label=f"lr_scaling {rule}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    bottom, top = min(low, 0.5), max(high, 2)  # so that the limit is in the picture
    axes.axhspan(1, top, color=GREY, alpha=0.25, linewidth=0)
    axes.axhline(1, color=BLACK, linewidth=1)
    axes.text(0.03, 1.07, "diverges", transform=axes.get_yaxis_transform(), va="bottom")
    axes.set_ylim(bottom, top)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.set(xlabel="ranks", ylabel="rates over the stability limit", title="is it stable?")
    axes.legend(fontsize=9)


def _draw_steps(axes: Axes, plan: dict[str, Any]) -> None:
    critical = plan["critical"]
    if critical:
        best = [(b, s) for b, s in zip(critical["batch_sizes"], critical["steps"], strict=True) if s]
        sizes, steps = zip(*best, strict=True) if best else ((), ())
        axes.plot(sizes, steps, "s--", color=BLUE, label="best rates")
        if best:
            halving = [steps[0] * sizes[0] / size for size in sizes]
            axes.plot(sizes, halving, color=GREY, linestyle=":", linewidth=2, label="half the steps each time")
        if critical["critical"]:
            axes.axvline(critical["critical"], color=BLACK, linewidth=1)
            axes.text(critical["critical"], 0.02, " critical batch", transform=axes.get_xaxis_transform(), va="bottom")
    planned = [
        (row["global_batch_size"], row["forecast"]["steps_to_target"])
        for row in plan["rows"]
        if row["forecast"] and row["forecast"]["steps_to_target"]
    ]
    if planned:
        axes.plot(*zip(*planned, strict=True), "o-", color=ORANGE, label="these rates")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    target = percent(plan["target_excess"])
    axes.set(
        xlabel="global batch (rows)", ylabel=f"steps to {target} above the best loss", title="how soon is it there?"
    )
    if axes.lines:
        axes.legend(fontsize=9)
    else:
        axes.text(0.5, 0.5, "never", transform=axes.transAxes, ha="center")
