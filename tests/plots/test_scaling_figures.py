"""If these fail, a picture of a scaling report does not show its numbers, or spoils the page around it."""

import copy
import itertools
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from torchreg.console import number
from torchreg.plots import rendering
from torchreg.plots.pictures import best_model, draw_estimates, styled
from torchreg.plots.quantities import count, in_unit
from torchreg.plots.scaling_figures import draw_allreduce, draw_breakdown, draw_models, draw_scaling
from torchreg.plots.target_figures import draw_steps, draw_targets, unstable_from

from ..reporting.synthetic import Campaign, report_of

WITHIN = "within a node"
COMBINATIONS = ["manual/allreduce", "manual/mpi", "sgd/ddp", "sgd/mpi"]
CAMPAIGN = Campaign(
    nodes=(1, 2), combinations=[tuple(name.split("/")) for name in COMBINATIONS], num_features=(1, 64), num_blocks=6
)


def change(record):
    """60 + 90 000 / batch steps to the target, unstable above 400 samples; MPI's all-reduce, four times as fast."""
    for point in record["points"]:
        batch = point["global_batch_size"]
        if point["target_excess"]:
            steps = round(60 + 90_000 / batch) if batch <= 400 else None
            time_s = steps and steps * point["step_time_s"]
            point |= {"predicted_steps": steps, "measured_steps": steps, "measured_time_s": time_s}
            point["stability_limit"] = 400 / batch
    record["allreduce"] += [
        {**one, "backend": "MPI", "sync": "mpi", "time_s": one["time_s"] / 4} for one in record["allreduce"]
    ]
    return record


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """Two sizes of the model, four combinations, 1, 2 and 4 ranks a node on one and two nodes."""
    return report_of(CAMPAIGN, change=change, folder=tmp_path_factory.mktemp("campaign"))["groups"][0]


def allreduce_on_two_ranks(group):
    """On one node: MPI's, then gloo's."""
    return [one for one in group["allreduce"] if (one["num_nodes"], one["world_size"]) == (1, 2)]


def axes_of(panel):
    axes = Figure(figsize=(3, 3)).add_subplot()
    panel[1](axes)
    return axes


def lines_of(axes):
    """Named lines; ideal lines and the like have no name."""
    return {line.get_label(): line for line in axes.containers if not line.get_label().startswith("_")}


def titles_of(picture):
    return [title for title, _ in picture.panels]


@pytest.mark.parametrize(
    ("values", "unit", "text"),
    [
        ([9.8123e-4], "s", "981 µs"),
        ([0.99996e-3], "s", "1 ms"),  # and never 1,000 µs
        ([12.34], "s", "12.3 s"),
        ([3.2e-9], "s/byte", "3.2 ns/byte"),
        ([9e-4, 1.1e-3], "s", "0.9 – 1.1 ms"),  # both ends in one unit
        ([4104], "B", "4.01 KiB"),
        ([16], "B", "16 B"),
        ([2.5e9], "B/s", "2.5 GB/s"),
        ([0.8312], "%", "83.1 %"),
        ([261_224.0], "samples/s", "261 k samples/s"),
        ([261_224.0], "k", "261 k"),
        ([-2.2e-5], "s", "-22 µs"),
        ([0.0], "s", "0 ps"),
        ([12_345.0], "samples", "12,300 samples"),
        ([4.1e-6], "", "4.10e-06"),
    ],
)
def test_a_quantity_has_three_digits_in_the_unit_that_suits_it(values, unit, text):
    assert in_unit(values, unit) == text


def test_counts_keep_every_digit():
    assert [count(value) for value in (551, 12_345.0, 400.5)] == ["551", "12,345", "400"]
    assert in_unit([1 << 20], "B") == "1 MiB"


@given(st.floats(min_value=1e-12, max_value=1e6))
def test_a_time_read_back_is_the_time(seconds):
    value, unit = in_unit([seconds], "s").split()
    scale = {"s": 1, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9, "ps": 1e-12}[unit]
    assert float(value.replace(",", "")) * scale == pytest.approx(seconds, rel=0.00501)


@given(st.floats(min_value=-1e12, max_value=1e12))
def test_a_number_read_back_is_the_number(value):
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=0.00501)


def test_scopes_are_apart_and_within_a_node_comes_first(group):
    assert list(dict.fromkeys(one["scope"] for one in group["series"])) == [
        WITHIN, "across nodes, 1 rank a node", "across nodes, 2 ranks a node", "across nodes, 4 ranks a node",
    ]  # fmt: skip


def test_strong_scaling_has_a_panel_for_each_measure_and_size_and_a_line_for_each_combination(group):
    picture = draw_scaling(group, 1, "strong", WITHIN)
    sizes = ["1 feature (16 B), 256 samples", "64 features (520 B), 256 samples"]
    assert titles_of(picture) == 3 * sizes
    assert [look.label for look in picture.legend] == [*COMBINATIONS, "ideal, from the baseline", "80 %"]
    measures = itertools.product(("throughput", "efficiency", "Karp–Flatt"), sizes)
    for panel, (measure, title) in zip(picture.panels, measures, strict=True):
        axes = axes_of(panel)
        assert axes.get_xlabel() == "ranks"
        assert axes.get_ylabel().startswith(measure)
        assert set(lines_of(axes)) == set(COMBINATIONS)
        for name, drawn in lines_of(axes).items():
            (one,) = [
                one
                for one in group["series"]
                if (one["kind"], one["scope"]) == ("strong", WITHIN)
                and f"{one['optimizer']}/{one['sync']}" == name
                and title.startswith(f"{one['num_features']} feature")
            ]
            key = "karp_flatt" if measure == "Karp–Flatt" else measure
            expected = [point[key]["value"] for point in one["points"] if point[key]]
            np.testing.assert_allclose(drawn.lines[0].get_ydata(orig=False), expected)
            np.testing.assert_allclose(drawn.lines[0].get_xdata(orig=False), [1, 2, 4][-len(expected) :], rtol=0.08)


def test_panels_of_a_measure_share_their_scale(group):
    picture = draw_scaling(group, 1, "strong", WITHIN)
    for one, other in zip(picture.panels[::2], picture.panels[1::2], strict=True):
        assert axes_of(one).get_ylim() == axes_of(other).get_ylim()


def test_the_ideal_line_goes_through_the_baseline(group):
    picture = draw_scaling(group, 1, "weak", "across nodes, 4 ranks a node")
    axes = axes_of(picture.panels[0])
    drawn = lines_of(axes)["sgd/ddp"].lines[0]
    ideal = [line for line in axes.lines if line.get_label().startswith("_child") and line.get_linestyle() == "--"]
    # Baseline 4 ranks, so at 8 ranks ideal is twice the throughput of 4.
    ends = [tuple(line.get_ydata()) for line in ideal if len(line.get_xdata()) == 2]
    assert any(np.allclose(end, [drawn.get_ydata(orig=False)[0], 2 * drawn.get_ydata(orig=False)[0]]) for end in ends)


def test_intervals_are_drawn_from_low_to_high_and_only_where_they_are():
    full = {"value": 3.0, "low": 2.5, "high": 4.0, "num_launches": 6}
    none = {"value": 3.0, "low": None, "high": None, "num_launches": 3}
    half = {"value": 3.0, "low": 2.0, "high": None, "num_launches": 6}  # too many launches missed the target
    axes = Figure(figsize=(3, 3)).add_subplot()
    style = styled([{"optimizer": "sgd", "sync": "ddp"}])[0]["style"]
    rows = [
        {"ranks": 1, "time": full},
        {"ranks": 2, "time": none},
        {"ranks": 4, "time": half},
        {"ranks": 8, "time": None},
    ]
    draw_estimates(axes, rows, "ranks", "time", style, offset=1)
    draw_estimates(axes, rows[1:2], "ranks", "time", style, offset=1)
    with_ends, without = axes.containers
    segments = [segment[:, 1].tolist() for segment in with_ends.lines[2][0].get_segments()]
    assert segments == [[2.5, 4], [3, 3], [2, 3]]
    assert not without.has_yerr
    few = Campaign(num_blocks=3, num_features=(1,), combinations=[("sgd", "ddp")], ranks_per_node=(1, 2))
    group = report_of(few)["groups"][0]
    for container in lines_of(axes_of(draw_scaling(group, 1, "strong", WITHIN).panels[0])).values():
        assert not container.has_yerr


def test_lines_differ_in_more_than_hue(group):
    for picture in (draw_scaling(group, 1, "strong", WITHIN), draw_allreduce(group, 1)):
        shapes = [(look.marker, look.dashes) for look in picture.legend if look.marker]
        assert len(set(shapes)) == len(shapes)
    # What this version does not know gets a style of its own.
    own = [one for one in group["series"] if one["sync"] in ("mpi", "ddp") and one["num_features"] == 1]
    unknown = {**group, "series": [{**one, "optimizer": "new"} for one in own]}
    shapes = [(look.marker, look.dashes) for look in draw_scaling(unknown, 1, "strong", WITHIN).legend[:2]]
    assert len(set(shapes)) == 2


def test_a_bar_is_the_whole_step_and_the_imbalance_a_part_of_it(group):
    picture = draw_breakdown(group, 1, "strong", WITHIN)
    axes = axes_of(picture.panels[0])
    point = next(one for one in group["points"] if one["id"] == "g1-nodes-1-ranks-4-sgd-ddp-features-1-batch-256")
    row = [label.get_text() for label in axes.get_yticklabels()].index("sgd/ddp  4")
    widths = [container[row].get_width() for container in axes.containers]
    step = point["step_time_s"]["value"]
    names = ("data_time_s", "compute_time_s", "exposed_time_s")
    np.testing.assert_allclose(widths[:3], [point[name]["value"] / step for name in names])
    assert sum(widths[:3]) == pytest.approx(1, abs=0.02)  # the medians are taken separately
    assert widths[3:] == [pytest.approx(-0.01)]  # backwards from the end: not one part more
    assert in_unit([step], "s") in [text.get_text() for text in axes.texts]


def test_a_step_that_was_not_timed_without_averaging_is_not_divided(group):
    group = {**group, "points": [{**p, "compute_time_s": None, "exposed_time_s": None} for p in group["points"]]}
    labels = [look.label for look in draw_breakdown(group, 1, "weak", WITHIN).legend]
    assert labels[:2] == ["data loading", "compute and communication"]


def test_noise_below_zero_is_no_part_of_a_bar(group):
    below = {"value": -1e-6, "low": -2e-6, "high": 1e-6, "num_launches": 6}
    group = {**group, "points": [{**point, "exposed_time_s": below} for point in group["points"]]}
    picture = draw_breakdown(group, 1, "strong", WITHIN)
    assert "exposed communication" not in [look.label for look in picture.legend]
    axes_of(picture.panels[0])


def test_a_model_is_dashed_beyond_what_was_measured_and_the_best_one_is_drawn(group):
    one = next(one for one in group["series"] if (one["kind"], one["scope"]) == ("strong", WITHIN))
    assert best_model(one)["model"] == "mechanistic"  # which is how the synthetic machine computes its times
    axes = axes_of(draw_models(group, 1, "strong", WITHIN).panels[0])
    curves = [line for line in axes.lines if line.get_marker() == "None" and line.get_linewidth() == 1.2]
    solid = [line for line in curves if line.get_linestyle() == "-"]
    dashed = [line for line in curves if line.get_linestyle() == "--"]
    assert len(solid) == len(dashed) == 4
    for within, beyond in zip(solid, dashed, strict=True):
        assert within.get_xdata()[-1] == beyond.get_xdata()[0] == pytest.approx(4, rel=0.08)
        assert beyond.get_xdata()[-1] == pytest.approx(32, rel=0.08)
    (shade,) = axes.patches
    assert 4 < shade.get_x() < 8


def test_models_that_the_points_do_not_determine_are_not_drawn(group):
    assert not draw_models(group, 1, "strong", "across nodes, 4 ranks a node").panels  # two world sizes


def test_the_allreduce_line_is_alpha_plus_beta_m(group):
    picture = draw_allreduce(group, 1)
    assert titles_of(picture) == [
        "2 ranks on 1 node", "4 ranks on 1 node", "2 ranks on 2 nodes", "4 ranks on 2 nodes", "8 ranks on 2 nodes",
    ]  # fmt: skip
    axes = axes_of(picture.panels[0])
    lines = [line for line in axes.lines if len(line.get_xdata()) == 40]
    for line, one, quarters in zip(lines, allreduce_on_two_ranks(group), (1, 4), strict=True):
        alpha, beta = (parameter["value"] for parameter in one["fit"]["parameters"])
        np.testing.assert_allclose(line.get_ydata(), alpha + beta * line.get_xdata())
        # The synthetic machine on 2 ranks with gloo: α = 100 µs, β = 1 ns per byte.
        assert (alpha, beta) == pytest.approx((quarters / 4 * 100e-6, quarters / 4 * 1e-9), rel=0.1)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_training_turns_unstable_where_the_limit_is_one():
    # limit = 400 / batch falls to 1 at 400 samples; between two points of a power law the interpolation is exact.
    assert unstable_from({batch: 400 / batch for batch in (64, 128, 256, 512)}) == pytest.approx(400)
    assert unstable_from({1: 3.0, 2: 1.5}) is None
    assert unstable_from({1: 0.9, 2: 0.4}) == 0
    assert unstable_from({}) is None


def test_steps_to_the_target_by_batch_with_the_limit_drawn_in(group):
    steps, nearness = map(axes_of, draw_steps(group, 1).panels)
    (predicted,) = [line for line in steps.lines if line.get_color() == "#000000" and line.get_linestyle() == "-"]
    # 60 + 90 000 / batch steps at 64, 128 and 256 samples; 512 samples are unstable and have none.
    np.testing.assert_allclose(predicted.get_xdata(), [64, 128, 256])
    np.testing.assert_allclose(predicted.get_ydata(), [1466, 763, 412])
    for axes in (steps, nearness):
        assert axes.patches[0].get_x() == pytest.approx(400)
    np.testing.assert_allclose(nearness.lines[0].get_ydata(), [64 / 400, 128 / 400, 256 / 400, 512 / 400])


def test_time_and_node_hours_to_the_target_over_ranks(group):
    picture = draw_targets(group, 1, "across nodes, 4 ranks a node")
    titles = titles_of(picture)
    assert titles == 2 * ["strong, 1 feature, 256 samples"] + 2 * ["weak, 1 feature, 64 samples per rank"]
    time, hours = axes_of(picture.panels[2]), axes_of(picture.panels[3])
    # 64 samples per rank: 8 ranks have 512 samples per step, above the limit at 400 samples = 6.25 ranks.
    assert time.patches[0].get_x() == pytest.approx(6.25)
    (target,) = [
        target
        for one in group["series"]
        if one["id"].startswith("g1-weak-across-nodes-4") and "ddp" in one["id"]
        for target in one["targets"]
    ]
    drawn = lines_of(hours)["sgd/ddp"].lines[0]
    np.testing.assert_allclose(drawn.get_ydata(orig=False), [target["rows"][0]["node_hours"]["value"]])


def test_a_target_that_is_never_reached_is_marked(group):
    group = copy.deepcopy(group)
    for target in (target for one in group["series"] for target in one["targets"]):
        for row in target["rows"]:
            row |= {"predicted_steps": None, "measured_steps": None, "predicted_time_s": None, "measured_time_s": None}
            row |= {"node_hours": None, "is_stable": False, "stability_limit": 0.5}
    for picture in (draw_steps(group, 1), draw_targets(group, 1, WITHIN)):
        axes = axes_of(picture.panels[0])
        assert [text.get_text() for text in axes.texts] == ["never reached"]
        assert axes.patches[0].get_width() == pytest.approx(np.diff(axes.get_xlim())[0])


@pytest.fixture(scope="module")
def picture(group):
    return draw_breakdown(group, 1, "strong", WITHIN)


def test_the_same_picture_gives_the_same_bytes(picture):
    first = rendering.picture_files(picture)
    rendering._swatch.cache_clear()
    assert first == rendering.picture_files(picture)
    assert set(first) == {f"{picture.name}.png", f"{picture.name}.svg"}
    assert first[f"{picture.name}.png"].startswith(b"\x89PNG")
    assert b"<dc:date>" not in first[f"{picture.name}.svg"]
    assert rendering.inline_panels(picture) == rendering.inline_panels(picture)


def test_elements_for_a_page_have_unique_ids_titles_and_the_pages_colours(picture):
    elements = rendering.inline_panels(picture) + [element for element, _ in rendering.inline_legend(picture)]
    roots = [ET.fromstring(element) for element in elements]
    ids = [node.get("id") for root in roots for node in root.iter() if node.get("id")]
    assert len(set(ids)) == len(ids)
    for element, root in zip(elements, roots, strict=True):
        used = re.findall(r"url\(#([^)]+)\)", element) + re.findall(r'href="#([^"]+)"', element)
        assert set(used) <= {node.get("id") for node in root.iter()}
        assert "#000000" not in element
        assert "<style" not in element
        assert "metadata" not in element
        assert "http" not in element.replace('xmlns="http://www.w3.org/2000/svg"', "")
    titles = [root.find("{http://www.w3.org/2000/svg}title") for root in roots[: len(picture.panels)]]
    assert all(re.search(r"exposed communication: .*sgd/ddp  4 \d", title.text) for title in titles)
    assert "var(--orange)" in elements[0]
    assert all(root.get("aria-hidden") == "true" for root in roots[len(picture.panels) :])


def test_names_from_elsewhere_are_drawn_as_they_are(group):
    one = {**allreduce_on_two_ranks(group)[0], "backend": "a$_{b}$ <i>\x1b[1m"}
    picture = draw_allreduce({**group, "allreduce": [one]}, 1)
    assert rendering.picture_files(picture)
    (element,) = rendering.inline_panels(picture)
    assert "&lt;i&gt;\\x1b[1m" in element
    assert math.isfinite(float(ET.fromstring(element).get("viewBox").split()[2]))
