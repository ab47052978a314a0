"""If these fail, a figure says something else than its numbers, or says it where nobody can read it."""

import importlib
import itertools
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

from torchreg.cli import main
from torchreg.sweep import cells_table, read_sweep

COMMANDS = {
    "training": ["train", "--recipe", "homework", "--max-steps", "20", "--plot"],
    "training of many features": ["train", "--num-features", "3", "--num-rows", "100", "--max-steps", "9", "--plot"],
    "plan": ["plan", "--world-sizes", "1,2,8,16", "--no-standardize", "--base-learning-rate", "1e-7", "1e-1", "--plot"],
    "batch": ["sweep", "batch", "--batch-sizes", "64,256", "--num-seeds", "2", "--epochs", "3"],
    "ladder": ["sweep", "ladder", "--multipliers", "1,2,4,8,32", "--num-seeds", "1", "--max-steps", "60"],
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Of each command the figure as it was saved, its folder and its name."""
    saved = []
    with pytest.MonkeyPatch.context() as patch:
        for module in ("training", "plan", "sweep"):
            module = importlib.import_module(f"torchreg.figures.{module}")

            def save(figure, folder, name, really=module.save):
                saved.append((figure, folder, name))
                return really(figure, folder, name)

            patch.setattr(module, "save", save)
        for command in COMMANDS.values():
            runs_dir = str(tmp_path_factory.mktemp("figures"))
            assert main([*command, "--runs-dir", runs_dir, "--name", "drawn"]) == 0
    return dict(zip(COMMANDS, saved, strict=True))


def panels_of(figure):
    return [axes for axes in figure.axes if axes.axison]


def legend_of(thing):
    legends = [*getattr(thing, "legends", []), *([thing.get_legend()] if hasattr(thing, "get_legend") else [])]
    return [text.get_text() for legend in legends if legend for text in legend.get_texts()]


@pytest.mark.parametrize("key", COMMANDS)
def test_png_and_svg_are_there_and_can_be_read(key, drawn):
    _, folder, name = drawn[key]
    image = imread(folder / f"{name}.png")
    assert image.shape[1] >= 600
    assert image.std() > 0.05, "an empty picture"
    assert ET.parse(folder / f"{name}.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert not list(folder.glob("*.part"))
    assert (folder / f"{name}.png").stat().st_size < 150_000


@pytest.mark.parametrize("key", COMMANDS)
def test_text_can_be_read_at_600_pixels(key, drawn):
    # At 600 pixels for the whole width a point is 600 / (72 · width) pixels: 8 points are 8.9 pixels at 7.5 inches.
    figure = drawn[key][0]
    pixels_per_point = 600 / (72 * figure.get_size_inches()[0])
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert texts
    for text in texts:
        assert text.get_fontsize() * pixels_per_point >= 8.5, text.get_text()


@pytest.mark.parametrize("key", COMMANDS)
def test_every_axis_has_a_label_or_shares_its_neighbours(key, drawn):
    panels = panels_of(drawn[key][0])
    assert all(axes.get_xlabel() for axes in panels)
    assert all(axes.get_title() for axes in panels)
    labelled_rows = {axes.get_subplotspec().rowspan.start for axes in panels if axes.get_ylabel()}
    assert labelled_rows == {axes.get_subplotspec().rowspan.start for axes in panels}


@pytest.mark.parametrize(
    ("key", "labels"),
    [
        (
            "training",
            [
                ("living area (square feet)", "sale price (US dollars)"),
                ("step (optimizer updates)", "mean squared error (US dollars²)"),
            ],
        ),
        (
            "plan",
            [
                ("ranks", "rates over the stability limit"),
                ("global batch (rows)", "steps to 1 % above the best loss"),
            ],
        ),
        (
            "batch",
            [("epoch", "above the best loss (%)"), ("epoch", ""), ("global batch (rows)", "")],
        ),
        (
            "ladder",
            [
                ("rates and batch × (1 is the reference batch)", "end of training, above the best loss (%)"),
                ("rates and batch × (1 is the reference batch)", ""),
            ],
        ),
    ],
)
def test_axis_labels_have_units(key, labels, drawn):
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in panels_of(drawn[key][0])] == labels


@pytest.mark.parametrize("key", COMMANDS)
def test_all_that_is_drawn_with_a_name_is_in_a_legend(key, drawn):
    figure = drawn[key][0]
    for axes in panels_of(figure):
        names = {name for name in axes.get_legend_handles_labels()[1] if not name.startswith("_")}
        assert names
        assert names <= {*legend_of(axes), *legend_of(figure)}


def test_prediction_and_measurement_are_told_apart_in_the_legends(drawn):
    assert {"rows of the step", "predicted mean", "95 % of runs, all rows"} <= set(
        legend_of(drawn["training"][0].axes[1])
    )
    assert legend_of(drawn["batch"][0]) == ["one run", "mean of 2", "95 % of runs, predicted", "mean, predicted"]
    assert set(legend_of(drawn["plan"][0].axes[0])) == {f"lr_scaling {rule}" for rule in ("linear", "sqrt", "none")}
    assert set(legend_of(drawn["ladder"][0])) == {
        f"{order}, {what}"
        for order in ("simultaneous", "sequential")
        for what in ("measured", "warmed up", "predicted mean and 95 % of runs")
    }


def luminance(colour):
    """How grey a colour is printed: 0 is black, 1 is white (ITU-R BT.709)."""
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("key", COMMANDS)
def test_lines_differ_in_more_than_hue(key, drawn):
    for axes in panels_of(drawn[key][0]):
        named = [line for line in axes.lines if not line.get_label().startswith("_")]
        for one, other in itertools.combinations(named, 2):
            shapes = [
                (line.get_linestyle(), line.get_marker(), line.get_markerfacecolor() == "none", line.get_linewidth())
                for line in (one, other)
            ]
            assert shapes[0] != shapes[1] or abs(luminance(one.get_color()) - luminance(other.get_color())) > 0.2


def test_the_batch_figure_has_the_runs_and_their_forecast(drawn):
    figure, folder, _ = drawn["batch"]
    cells = cells_table(folder).set_index("name")
    for axes, size in zip(panels_of(figure), (64, 256), strict=False):
        assert axes.get_title() == f"{size} rows"
        lines = {line.get_label(): line for line in axes.lines}
        rows = cells[cells["global_batch_size"] == size]
        assert lines["mean of 2"].get_ydata()[-1] == pytest.approx(100 * rows["excess"].mean(), rel=1e-6)
        assert lines["mean, predicted"].get_ydata()[-1] == pytest.approx(100 * rows["predicted_excess"].iloc[0])
        assert lines["mean, predicted"].get_xdata()[-1] == 3, "as many epochs as were run"


def test_the_ladder_figure_marks_the_predicted_limits_and_puts_diverged_runs_in_their_band(drawn):
    figure, folder, _ = drawn["ladder"]
    cells = cells_table(folder)
    assert read_sweep(folder)["kind"] == "ladder"
    for axes, standardize in zip(figure.axes, (False, True), strict=True):
        limits = {annotation.get_text() for annotation in axes.texts if "limit" in annotation.get_text()}
        assert len(limits) >= 1
        part = cells[(cells["standardize"] == standardize) & (cells["update_order"] == "simultaneous")]
        near = part.iloc[(part["of_limit"] - 1).abs().argmin()]
        assert f"limit\n× {near['multiplier'] / near['of_limit']:.2f}" in limits
        (measured,) = [line for line in axes.lines if line.get_label() == "simultaneous, measured"]
        heights = dict(zip(measured.get_xdata(), measured.get_ydata(), strict=True))
        cold = part[part["warmup_steps"] == 0].set_index("multiplier")
        band = axes.patches[0].get_y()  # where the grey band of diverged runs begins
        for multiplier, row in cold.iterrows():
            if row["diverged"]:
                assert heights[multiplier] > band
            else:
                assert heights[multiplier] == pytest.approx(100 * row["excess"])
                assert heights[multiplier] < band
        assert cold["diverged"].any()
        assert not cold["diverged"].all()


def test_the_plan_figure_has_each_scaling_rule_over_the_ranks(drawn):
    axes = drawn["plan"][0].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    # The lesson's rates at 64 rows a rank: k ranks are k / 3.14 of the limit when scaled linearly, √k when by root.
    # 16 ranks have more rows than the data and no point.
    for rule, multiples in (("linear", (1, 2, 8)), ("sqrt", (1, 2**0.5, 8**0.5)), ("none", (1, 1, 1))):
        line = lines[f"lr_scaling {rule}"]
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 8])
        np.testing.assert_allclose(line.get_ydata(), np.array(multiples) / 3.14, rtol=0.03)


@pytest.mark.parametrize(
    ("command", "figure"),
    [
        (["sweep", "batch", "--base-learning-rate", "1e200", "1e200", "--batch-sizes", "64", "--epochs", "1"], "batch"),
        (["sweep", "ladder", "--multipliers", "64", "--max-steps", "40"], "ladder"),
        (["plan", "--base-learning-rate", "9", "9", "--world-sizes", "1", "--plot"], "plan"),
    ],
)
def test_what_diverges_everywhere_is_drawn_too(command, figure):
    seeds = ["--num-seeds", "1"] if command[0] == "sweep" else []
    assert main([*command, *seeds, "--name", "gone"]) == 0
    assert Path(f"runs/gone/{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_without_matplotlib_are_refused_before_the_run(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (["plan", "--plot"], ["train", "--plot"], ["sweep", "batch", "--plot"]):
        assert main(command) == 2
        assert "plot needs matplotlib" in capsys.readouterr().err
    assert not Path("runs").exists()
