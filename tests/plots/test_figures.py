"""If these fail, a figure does not show its numbers, or shows them where nobody can read them."""

import itertools
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

from torchreg.cli import main
from torchreg.plots.figures import draw_plan, plan_figure, sweep_figure, training_figure
from torchreg.sweeps.sweep_tables import read_sweep, trials_table

COMMANDS = {
    "training": ["train", "--recipe", "homework", "--max-steps", "20", "--plot"],
    "training of many features": ["train", "--num-features", "3", "--num-rows", "100", "--max-steps", "9", "--plot"],
    "plan": [
        "plan",
        "--world-sizes",
        "1,2,8,16",
        "--no-standardize",
        "--base-learning-rate",
        "1e-7",
        "1e-1",
        "--sampling",
        "random",
        "--plot",
    ],
    "batch": ["sweep", "batch", "--batch-sizes", "64,256", "--num-seeds", "2", "--epochs", "3"],
    "lr-scaling": ["sweep", "lr-scaling", "--multipliers", "1,2,4,8,32", "--num-seeds", "1", "--max-steps", "60"],
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Of each command the figure, the folder and the name of its files."""
    figures = {}
    for key, command in COMMANDS.items():
        folder = tmp_path_factory.mktemp("figures") / "drawn"
        assert main([*command, "--runs-dir", str(folder.parent), "--name", "drawn"]) == 0
        if command[0] == "train":
            figures[key] = training_figure(folder), folder, "training"
        elif command[0] == "plan":
            figures[key] = plan_figure(folder), folder, "plan"
        else:
            figures[key] = sweep_figure(folder), folder, key
    return figures


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
                ("ranks", "fraction of the stability limit"),
                ("global batch (samples)", "steps to 1 % above the optimum"),
            ],
        ),
        (
            "batch",
            [("epoch", "above the optimum (%)"), ("epoch", ""), ("global batch (samples)", "")],
        ),
        (
            "lr-scaling",
            [
                ("learning rate and batch × (1: reference)", "end of training, above the optimum (%)"),
                ("learning rate and batch × (1: reference)", ""),
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


def test_legends_distinguish_prediction_and_measurement(drawn):
    assert {"samples of the step", "predicted mean", "95 % of runs, all samples"} <= set(
        legend_of(drawn["training"][0].axes[1])
    )
    assert legend_of(drawn["batch"][0]) == ["one run", "mean of 2", "95 % of runs, predicted", "mean, predicted"]
    assert set(legend_of(drawn["plan"][0].axes[0])) == {f"lr_scaling {rule}" for rule in ("linear", "sqrt", "none")}
    assert set(legend_of(drawn["lr-scaling"][0])) == {
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
    trials = trials_table(folder).set_index("name")
    for axes, size in zip(panels_of(figure), (64, 256), strict=False):
        assert axes.get_title() == f"{size} samples"
        lines = {line.get_label(): line for line in axes.lines}
        rows = trials[trials["global_batch_size"] == size]
        assert lines["mean of 2"].get_ydata()[-1] == pytest.approx(100 * rows["excess"].mean(), rel=1e-6)
        assert lines["mean, predicted"].get_ydata()[-1] == pytest.approx(100 * rows["predicted_excess"].iloc[0])
        assert lines["mean, predicted"].get_xdata()[-1] == 3, "as many epochs as were run"


def test_the_lr_scaling_figure_marks_the_predicted_limits_and_puts_diverged_runs_in_their_band(drawn):
    figure, folder, _ = drawn["lr-scaling"]
    trials = trials_table(folder)
    assert read_sweep(folder)["kind"] == "lr-scaling"
    for axes, standardize in zip(figure.axes, (False, True), strict=True):
        limits = {annotation.get_text() for annotation in axes.texts if "limit" in annotation.get_text()}
        assert len(limits) >= 1
        part = trials[(trials["standardize"] == standardize) & (trials["update_order"] == "simultaneous")]
        near = part.iloc[(part["fraction_of_stability_limit"] - 1).abs().argmin()]
        assert f"limit\n× {near['multiplier'] / near['fraction_of_stability_limit']:.3g}" in limits
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
    # The lesson's learning rates at 64 samples per rank: with k ranks they are k / 3.14 of the limit when scaled
    # linearly, √k / 3.14 by the root. 16 ranks need more samples than the data have, so they have no point.
    for rule, multiples in (("linear", (1, 2, 8)), ("sqrt", (1, 2**0.5, 8**0.5)), ("none", (1, 1, 1))):
        line = lines[f"lr_scaling {rule}"]
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 8])
        np.testing.assert_allclose(line.get_ydata(), np.array(multiples) / 3.14, rtol=0.03)


@pytest.mark.parametrize(
    ("command", "figure"),
    [
        (["sweep", "batch", "--base-learning-rate", "1e200", "1e200", "--batch-sizes", "64", "--epochs", "1"], "batch"),
        (["sweep", "lr-scaling", "--multipliers", "64", "--max-steps", "40"], "lr-scaling"),
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


def drawn_training(features, target, x="x", y="y"):
    """The figure of a training run on a synthetic table, after its layout."""
    pd.DataFrame({x: features, y: target}).to_csv("drawn.csv", index=False)
    name = f'"{x}"' if "," in x else x
    options = ["--data", "drawn.csv", "--features", name, "--target", y, "--sampling", "full", "--name", "drawn"]
    assert main(["train", *options, "--max-steps", "20"]) == 0
    figure = training_figure(Path("runs/drawn"))
    figure.draw_without_rendering()
    return figure


def value_of(label, offset):
    """The number that a tick shows, with the power of ten and the sum that stand aside."""
    formula = re.fullmatch(r"\$\\mathdefault\{(?:(.*)\\times)?10\^\{(.*)\}\}\$", label)
    if formula:
        return float(formula[1] or 1) * 10.0 ** float(formula[2])
    power, _, added = offset.partition("+")
    return float(label.replace(",", "")) * float(power or 1) + float(added or 0)


@pytest.mark.parametrize(
    ("scale", "shift"),
    [(1e-140, 0), (1e-15, 0), (1e-10, 0), (1e-4, 0.1), (-1, 0), (1e4, 0), (1e12, 0), (1e-5, 1e9), (1e140, 0)],
)
def test_tick_labels_are_right_at_any_magnitude(scale, shift):
    """D6: prices of 0.1 to 0.4 had an axis with seven ticks, all of them 0."""
    x = np.linspace(500, 3000, 40)
    figure = drawn_training(scale * x, scale * (x + 100 * np.sin(x)) + shift)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            ticks = [tick for tick in axis.get_major_ticks() + axis.get_minor_ticks() if tick.label1.get_text()]
            inside = [tick for tick in ticks if low <= tick.get_loc() <= high]
            offset = axis.get_offset_text().get_text().replace("−", "-")
            labels = [tick.label1.get_text().replace("−", "-") for tick in inside]
            assert len(labels) >= 2
            for tick, label in zip(inside, labels, strict=True):
                assert value_of(label, offset) == pytest.approx(tick.get_loc(), rel=1e-3, abs=1e-3 * (high - low))
                assert len(label.replace("mathdefault", "")) <= 30


def test_names_are_no_formulas_and_fit_the_figure():
    """W4: a `$` ended a finished run with a ParseSyntaxException."""
    x = np.arange(9.0)
    figure = drawn_training(x, x + np.sin(x), x="cost ($, \x1b[31m_a_)\n", y="$\\frac{$" + 300 * "y")
    left, right = figure.axes
    for text in (left.xaxis.label, left.yaxis.label, right.yaxis.label):
        assert "\\$" in text.get_text()
        assert not is_math_text(text.get_text())
        box, whole = text.get_window_extent(), figure.bbox
        assert box.x0 >= whole.x0 - 5  # pixels
        assert box.x1 <= whole.x1 + 5
        assert box.height <= whole.height
    assert left.get_xlabel() == "cost (\\$, \\x1b[31m_a_)"  # blanks around a name do not count


def test_a_perfect_line_is_drawn_too():
    """D6: its loss has no smallest power of ten."""
    x = np.arange(9.0)
    assert len(drawn_training(x, 2 * x).axes) == 2


def test_neither_backend_nor_settings_of_the_user_reach_a_figure(run, tmp_path):
    """T2: with a notebook kernel's MPLBACKEND `--plot` failed after the run."""
    commands = [
        ["train", "--max-steps", "3", "--plot", "--overwrite", "--name", "train"],
        ["plan", "--world-sizes", "1", "--plot", "--overwrite", "--name", "plan"],
    ]
    assert [main(command) for command in commands] == [0, 0]
    paths = [Path("runs/train/training.png"), Path("runs/plan/plan.png")]
    clean = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    Path("matplotlibrc").write_text(
        "backend: qtagg\ntext.usetex: True\nfigure.facecolor: black\nsavefig.dpi: 9\nfont.size: 40\n"
    )
    code = (
        f"import sys\nfrom torchreg.cli import command\nfor words in {commands}:\n"
        "    sys.argv = ['torchreg', *words]\n    assert command() == 0"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, MPLBACKEND="nowhere")
    assert done.returncode == 0, done.stderr
    assert [path.read_bytes() for path in paths] == clean


def test_drawing_leaves_the_users_matplotlib_as_it_was(drawn):
    """T2: in a notebook."""
    with matplotlib.rc_context({"font.size": 31.0, "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        assert draw_plan(drawn["plan"][1])
        assert dict(matplotlib.rcParams) == before


def test_a_sweep_over_many_powers_of_ten_shows_where_it_ends(monkeypatch):
    """D6: the end of a batch sweep, and the other panel of an lr-scaling sweep, lay outside their axes."""
    x = np.arange(200.0)
    noise = np.random.default_rng(0).normal(0, 1e-6, 200)
    pd.DataFrame({"x": x, "y": x + noise}).to_csv("close.csv", index=False)
    data = ["--data", "close.csv", "--features", "x", "--target", "y", "--num-seeds", "1"]
    batch = ["--batch-sizes", "32", "--epochs", "20", "--standardize", "--base-learning-rate", "0.3", "0.3"]
    figures = []
    monkeypatch.setattr("torchreg.plots.figures.save", lambda draw, folder, _: figures.append(draw(folder)) or [])
    assert main(["sweep", "batch", *data, *batch, "--name", "batch"]) == 0
    assert (
        main(["sweep", "lr-scaling", *data, "--multipliers", "1,8", "--max-steps", "60", "--name", "lr-scaling"]) == 0
    )
    assert len(figures) == 2
    for figure in figures:
        for axes in figure.axes:
            low, high = axes.get_ylim()
            for line in axes.lines:
                if line.get_label().startswith(("mean", "si", "se")):
                    heights = np.asarray(line.get_ydata(), dtype=float)
                    assert (heights[heights > 0] >= low).all()
                    assert (heights <= high).all()
