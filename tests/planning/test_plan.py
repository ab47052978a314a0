"""If these fail, a user asks for node-hours on a plan that cannot work, or gives up one that can."""

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from torchreg.cli import main
from torchreg.planning.plan import plan
from torchreg.runs.config import TrainConfig
from torchreg.runs.setup import prepare

from ..conftest import data_sources

LESSON_RATES = {"standardize": False, "base_learning_rate": (1e-7, 1e-1), "sampling": "random"}
LESSON_OPTIONS = ["--no-standardize", "--base-learning-rate", "1e-7", "1e-1", "--sampling", "random"]
PERFECT = "GrLivArea,SalePrice\n1,2\n2,4\n3,6\n4,8\n"


@pytest.mark.parametrize("source", data_sources())
def test_four_ranks_of_64_rows_diverge_with_the_lessons_rates(source):
    planned = plan(TrainConfig.of(data=source, **LESSON_RATES), [1, 2, 4, 8])
    # theory.md: unstable from k a little above 3, and linear scaling makes k the number of ranks.
    assert [row.forecast.is_stable for row in planned.rows] == [True, True, False, False]
    assert [row.global_batch_size for row in planned.rows] == [64, 128, 256, 512]
    assert [row.scaled_learning_rate for row in planned.rows] == [
        pytest.approx((1e-7 * k, 1e-1 * k), rel=1e-12) for k in (1, 2, 4, 8)
    ]
    assert 1 / planned.rows[2].forecast.stability_limit == pytest.approx(4 / 3.14, rel=0.02)
    assert planned.largest_stable == {"linear": 3, "sqrt": 8, "none": 8}
    assert "stable up to 3 ranks. At 4, one Polaris node, it diverges. " in planned.verdict
    assert "use --lr-scaling sqrt (stable up to 8" in planned.verdict
    assert "standardise and omit base_learning_rate (stable up to 8" in planned.verdict


def test_a_row_is_the_forecast_of_training_at_that_world_size():
    config = TrainConfig.of(target_excess=0.02, warmup_steps=5)
    for row in plan(config, [1, 3, 8]).rows:
        state, _ = prepare(config, row.world_size)
        assert row.forecast == state.forecast
        assert row.global_batch_size == state.plan.global_batch_size == 64 * row.world_size
        assert row.samples_to_target == state.forecast.steps_to_target * row.global_batch_size


def test_the_default_recipe_is_stable_as_far_as_the_data_has_rows():
    planned = plan(TrainConfig(), [1, 8])
    assert planned.verdict == "linear scaling from these learning rates is stable up to 8 ranks, the most for this data"
    assert "doubling saves at least a quarter of the steps" in "\n".join(planned.conclusion())
    planned = plan(TrainConfig.of(num_features=6, target_excess=0.1), [1])
    assert f"from {planned.critical.critical} samples" in "\n".join(planned.conclusion())


def test_the_verdict_looks_further_than_the_world_sizes_that_were_asked_for():
    assert "stable up to 3 ranks" in plan(TrainConfig.of(**LESSON_RATES), [1, 2]).verdict
    assert "diverges at every world size" in plan(TrainConfig.of(base_learning_rate=(9.0, 9.0)), [1]).verdict


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        (
            {"global_batch_size": 128},
            "every step takes 128 samples at any world size, and these learning rates are stable",
        ),
        ({"sampling": "full"}, "every step takes 551 samples at any world size, and these learning rates are stable"),
        (
            # Standardised features: the limit of full batches is a learning rate of 1.
            {"sampling": "full", "base_learning_rate": (3.0, 3.0), "lr_scaling": "none"},
            "these learning rates diverge: they are 3 times the limit",
        ),
    ],
)
def test_where_the_batch_does_not_grow_with_the_ranks(options, verdict):
    planned = plan(TrainConfig.of(**options), [1, 2, 4])
    assert verdict in planned.verdict
    assert planned.largest_stable == {}
    assert len({row.forecast for row in planned.rows}) == 1


def test_a_world_size_with_more_rows_than_the_data_is_named_and_the_others_are_planned(capsys):
    # 9 ranks of 64 rows are 576, more than 551.
    assert main(["plan", "--world-sizes", "8,9,16"]) == 0
    out = capsys.readouterr().out
    assert out.count("impossible") == 2
    assert "note         9 ranks: global_batch_size is 576 (64 samples × 9 ranks), more than the data's 551" in out
    assert main(["plan", "--world-sizes", "9,16"]) == 2
    assert "global_batch_size is 576" in capsys.readouterr().err


def test_the_human_readable_plan(capsys):
    assert main(["plan", *LESSON_OPTIONS, "--target-excess", "0.02"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "plan         synthetic: 551 rows, 1 feature; lr_scaling linear"
    # Twice the trace of G is 2·(1243629245/551 + 1) = 4514082.7, nearly all of it in the steepest direction.
    assert lines[2].startswith("curvature    0.2434 to 4.514e+06")
    assert "to 2 %" in lines[5], "the second line of the headings"
    rows = {line.split()[0]: line.split() for line in lines if line.split() and line.split()[0].isdecimal()}
    assert list(rows) == ["1", "2", "4", "8"]
    assert rows["1"][1:6] == ["64", "1e-07", "0.1", "0.318", "stable"]
    assert rows["4"][1:] == ["256", "4e-07", "0.4", "1.27", "diverges", "never"]
    assert len([line for line in lines if line.startswith("verdict ")]) == 1


def test_json_is_all_there_is_on_stdout_and_a_drawn_plan_is_never_replaced(capsys):
    options = ["plan", "--world-sizes", "4,16,1", *LESSON_OPTIONS, "--plot", "--name", "planned"]
    assert main([*options, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [row["world_size"] for row in planned["rows"]] == [1, 4, 16]
    assert [row["is_stable"] for row in planned["rows"]] == [True, False, None]
    assert planned["rows"][0]["samples_to_target"] == 64 * planned["rows"][0]["forecast"]["steps_to_target"]
    assert planned["rows"][2]["reason"].startswith("global_batch_size is 1024")
    assert planned["largest_stable"]["linear"] == 3
    # The limit is 3.14 times the learning rates of 64 samples (theory.md); 4 ranks have 4 times those, or √4 times.
    fractions = {rule: dict(pairs) for rule, pairs in planned["fraction_of_stability_limit"].items()}
    assert [fractions[rule][4] for rule in ("linear", "sqrt")] == pytest.approx([4 / 3.14, 2 / 3.14], rel=0.02)
    assert json.loads(Path("runs/planned/plan.json").read_text()) == planned
    assert Path("runs/planned/plan.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse("runs/planned/plan.svg").getroot().tag.endswith("svg")
    assert main(options) == 2
    assert "runs/planned exists already" in capsys.readouterr().err
    assert json.loads(Path("runs/planned/plan.json").read_text()) == planned


def test_without_plot_nothing_is_written():
    assert main(["plan", "--world-sizes", "1"]) == 0
    assert not Path("runs").exists()


def test_beyond_sixteen_features_the_noise_is_predicted_but_not_in_the_sequential_order(capsys):
    options = ["plan", "--num-features", "17", "--num-rows", "300", "--world-sizes", "1,2"]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert out.count("stable") == 3  # in both rows and the verdict
    assert "not predicted" not in out
    assert main([*options, "--recipe", "homework"]) == 0
    out = capsys.readouterr().out
    assert out.count("mean converges") == out.count("not predicted") == 2
    assert "stable " not in out
    assert "17 features in the sequential order: only the mean is predicted" in out
    assert "expected to converge in the mean" in out
    assert "batch size " not in out


def test_a_perfect_line_is_planned_without_multiples_of_its_loss(capsys):
    Path("perfect.csv").write_text(PERFECT)
    options = ["--data", "perfect.csv", "--local-batch-size", "1", "--world-sizes", "1,2"]
    assert main(["plan", *options, "--plot", "--name", "perfect"]) == 0
    out = capsys.readouterr().out
    assert "picture      runs/perfect/plan.png" in out
    assert out.count("stable") >= 2
    assert "the closed form's loss is 0" in out
    for word in ("never", "inf", "nan"):
        assert word not in out
    assert main(["plan", *options, "--target-excess", "0.1"]) == 2
    assert "target_excess is 0.1, a fraction of the closed form's loss, which is 0" in capsys.readouterr().err


@pytest.mark.parametrize("offset", [0, 1e12])
@pytest.mark.parametrize("options", [["--sampling", "random"], ["--recipe", "homework"]])
def test_directions_lost_in_float64_rounding_are_planned(offset, options, capsys):
    # Raw features with a large offset, or nearly alike: the flattest direction is lost beside the steepest.
    alike = [(100 + i % 7 + 1e-6 * (i % 5), 100 + i % 7, i % 11) for i in range(120)]
    lines = [f"{offset + a + (i if offset else 0)!r},{b!r},{y}" for i, (a, b, y) in enumerate(alike)]
    Path("alike.csv").write_text("\n".join(["a,b,y", *lines]))
    columns = ["--data", "alike.csv", "--features", "a", "b", "--target", "y", "--no-standardize"]
    learning_rates = ["--base-learning-rate", "1e-30", "1e-10", "--world-sizes", "1"]
    assert main(["plan", *options, *columns, *learning_rates]) == 0
    assert "stable" in capsys.readouterr().out


@pytest.mark.timeout(60)  # W2: it took nine minutes
def test_tiny_learning_rates_are_planned_as_fast_as_others(capsys):
    options = ["--no-standardize", "--base-learning-rate", "1e-7", "1e-7", "--sampling", "random", "--json"]
    assert main(["plan", *options]) == 0
    first, *_, last = json.loads(capsys.readouterr().out)["rows"]
    # The flattest direction has the curvature 0.2434: with learning rates of 1e-7 its error halves in 28 million steps.
    assert 2e7 < first["forecast"]["steps_to_target"] < 1e8
    assert last["forecast"]["steps_to_target"] is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # A target above the noise floor is reached with constant learning rates, however small.
        ({"base_learning_rate": (1e-12, 1e-12)}, "> 1,000,000,000"),
        ({"target_excess": 1e-9}, "never"),  # below the noise floor
        ({"decay": "cosine", "max_steps": 10**7, "target_excess": 1e-9}, "> 20,000"),
        ({"decay": "cosine", "max_steps": 100, "target_excess": 1e-9}, "never"),
        ({"warmup_steps": 10**6, "target_excess": 1e-9}, "> 20,000"),
    ],
)
def test_steps_that_were_not_searched_are_not_called_never(options, expected):
    columns, (row,) = plan(TrainConfig.of(**options), [1]).table()
    (index,) = [number for number, column in enumerate(columns) if column.startswith("steps to")]
    assert row[index] == expected


def test_the_sequential_order_of_too_many_features_is_reported_as_not_predicted(capsys):
    options = ["--recipe", "homework", "--num-features", "130", "--num-rows", "200"]
    warning = "update_order is sequential, which is predicted up to 128 features"
    assert main(["plan", *options, "--world-sizes", "1"]) == 0
    assert f"note         {warning}" in capsys.readouterr().out


def test_an_explicit_batch_size_overrides_that_of_the_recipe(capsys):
    assert main(["plan", "--recipe", "homework", "--local-batch-size", "32", "--world-sizes", "1,2", "--json"]) == 0
    assert [row["global_batch_size"] for row in json.loads(capsys.readouterr().out)["rows"]] == [32, 64]


BAD_OPTIONS = {
    "zero ranks": (["--world-sizes", "0"], "--world-sizes: the list is '0'"),
    "no ranks": (["--world-sizes", ""], "--world-sizes: the list is ''"),
    "a missing number": (["--world-sizes", "1,,2"], "--world-sizes: the list is '1,,2'"),
    "half a rank": (["--world-sizes", "1.5"], "--world-sizes: the list is '1.5'"),
    "negative": (["--world-sizes", "-4"], "world"),
    "batch too large": (["--global-batch-size", "600"], "global_batch_size is 600, more than the data's 551 rows"),
    "no file": (["--data", "nowhere.csv"], "data is nowhere.csv, which does not exist"),
    "unknown recipe": (["--recipe", "lessons"], "error: invalid choice 'lessons' for argument '--recipe'"),
    "target not above 0": (["--target-excess", "0"], "target_excess is 0.0: give a number above 0"),
    "learning rates too far apart": (["--base-learning-rate", "1e-7", "1e300"], "base_learning_rate is 1e-07"),
    "learning rates too small": (
        ["--base-learning-rate", "5e-324", "5e-324"],
        "base_learning_rate is 4.941e-324",
    ),  # W5
    "learning rates too large": (["--base-learning-rate", "1e308", "1e308"], "too large to be computed with"),  # W5
    "unwritable": (["--plot", "--runs-dir", "file"], "runs_dir is 'file'"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_input_is_one_clear_line_and_exit_code_2(case, capsys):
    Path("file").touch()
    options, part = BAD_OPTIONS[case]
    assert main(["plan", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("torchreg: error: ")
    assert part in err


def test_planning_needs_no_torch(run, tmp_path):
    code = "import sys\nfrom torchreg.cli import main\nassert main(['plan']) == 0\nprint('torch' in sys.modules)"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert "verdict " in done.stdout
