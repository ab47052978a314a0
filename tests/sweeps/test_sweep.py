"""If these fail, hours of runs are lost or run twice, or a table sets runs beside predictions that are not theirs."""

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from torchreg.cli import main
from torchreg.runs.config import from_json
from torchreg.runs.logger import Logger
from torchreg.runs.recipes import SWEEP_DEFAULTS
from torchreg.runs.run import train
from torchreg.runs.setup import LeastSquares, prepare, scale_at
from torchreg.sweeps.sweep import lr_scaling_limit, lr_scaling_trials
from torchreg.sweeps.sweep_tables import curves_table, summary, trials_table
from torchreg.theory import Dynamics

SWEEP = ["sweep", "batch", "--update-order", "simultaneous"]  # which is predicted at less cost than the default
BATCH = [*SWEEP, "--batch-sizes", "256,64", "--num-seeds", "2", "--epochs", "2", "--name", "swept"]
TRIALS = ["batch-256-seed-0", "batch-256-seed-1", "batch-64-seed-0", "batch-64-seed-1"]
PERFECT = "GrLivArea,SalePrice\n1,2\n2,4\n3,6\n4,8\n"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    """Pictures take longer than the runs."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def pictures():
    """For a test of the pictures."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished sweep; tests work on copies."""
    runs_dir = tmp_path_factory.mktemp("sweeps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert main([*BATCH, "--runs-dir", str(runs_dir)]) == 0
    return runs_dir / "swept"


@pytest.fixture
def swept(finished):
    return Path(shutil.copytree(finished, Path("runs/swept")))


def snapshot(folder):
    """Content and time of every file but the sweep's own, which each call writes again."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    return {str(path): (path.read_bytes(), os.stat(path).st_mtime_ns) for path in files}


def record_of(trial):
    return json.loads((trial / "record.json").read_text())


def test_a_trial_is_an_ordinary_run(swept):
    record = record_of(swept / "trials/batch-64-seed-1")
    config = from_json(record["config"]).replace(name="alone", runs_dir="runs")
    assert (config.batch.global_batch_size, config.batch.seed, config.run.log_full_loss) == (64, 1, True)
    alone = train(config)
    assert record["result"]["weight"] == list(alone.weight)
    assert record["result"]["loss"] == alone.loss


def test_trials_csv_has_a_row_per_trial_with_its_prediction(swept):
    table = pd.read_csv(swept / "trials.csv").set_index("name")
    assert sorted(table.index) == TRIALS
    for name, row in table.iterrows():
        record = record_of(swept / "trials" / name)
        assert row["weight_GrLivArea"] == record["result"]["weight"][0]
        assert row["excess"] == record["result"]["excess"]
        forecast = prepare(from_json(record["config"]), 1)[0].forecast
        assert row["predicted_excess"] == pytest.approx(forecast.curve.excess[-1], rel=1e-12)
        assert row["noise_floor"] == pytest.approx(forecast.noise_floor, rel=1e-12)
        assert row["fraction_of_stability_limit"] == pytest.approx(1 / forecast.stability_limit, rel=1e-12)
        # 551 rows in two epochs of `random` sampling: 2·⌊551 / 64⌋ = 16 and 2·⌊551 / 256⌋ = 4 steps.
        assert row["num_steps"] == {64: 16, 256: 4}[row["global_batch_size"]]
        assert row["multiplier"] == 1  # the homework's rates do not grow with the batch


def test_curves_csv_has_the_excess_on_all_rows_of_every_logged_step(swept):
    table = pd.read_csv(swept / "curves.csv")
    assert sorted(table["name"].unique()) == TRIALS
    ends = table.groupby("name").last()
    trials = pd.read_csv(swept / "trials.csv").set_index("name")
    np.testing.assert_array_equal(ends["steps"], trials.loc[ends.index, "num_steps"])
    np.testing.assert_allclose(ends["excess"], trials.loc[ends.index, "excess"], rtol=1e-6)
    assert (ends["epoch"] == 2).all()


def test_the_summary_is_means_and_standard_errors_over_seeds():
    trials = pd.DataFrame(
        {
            "standardize": False, "update_order": "sequential", "global_batch_size": 64, "multiplier": 1.0,
            "warmup_steps": 0, "seed": [0, 1, 2], "weight_x": [1.0, 2.0, 6.0], "bias": [0.0, 0.0, 3.0],
            "loss": [1.0, 1.0, 4.0], "excess": [0.1, 0.2, 0.6], "diverged": [False, False, True], "num_steps": 5,
            "fraction_of_stability_limit": 0.5, "noise_floor": 0.3, "predicted_excess": 0.3, "predicted_low": 0.1,
            "predicted_high": 0.9,
        }
    )  # fmt: skip
    (row,) = summary(trials).to_dict("records")
    assert (row["weight_x"], row["bias"], row["loss"], row["excess"]) == pytest.approx((3, 1, 2, 0.3))
    # Deviations −0.2, −0.1, 0.3: variance 0.14 / 2 = 0.07, over 3 runs.
    assert row["excess_error"] == pytest.approx((0.07 / 3) ** 0.5)
    assert (row["num_runs"], row["num_diverged"], row["predicted_excess"]) == (3, 1, 0.3)


def test_a_finished_sweep_runs_nothing_and_has_the_same_tables(swept, capsys):
    before, table = snapshot(swept), (swept / "trials.csv").read_text()
    assert main(BATCH) == 0
    assert "4 runs, 4 of them finished before" in capsys.readouterr().out
    assert snapshot(swept) == before
    assert (swept / "trials.csv").read_text() == table


def truncate(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_a_trial_whose_record_or_metrics_are_lost_or_truncated_is_run_again_and_no_other(damage, swept, capsys):
    before, table = snapshot(swept), (swept / "trials.csv").read_text()
    damage(swept / "trials/batch-64-seed-1/record.json")
    damage(swept / "trials/batch-256-seed-0/metrics.jsonl")
    assert main(BATCH) == 0
    assert "4 runs, 2 of them finished before" in capsys.readouterr().out
    after = snapshot(swept)
    assert after.keys() == before.keys()
    changed = {Path(path).relative_to("runs/swept/trials").parts[0] for path in before if after[path] != before[path]}
    assert changed == {"batch-64-seed-1", "batch-256-seed-0"}
    assert (swept / "trials.csv").read_text() == table, "the same seed gives the same run"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_keeps_what_is_finished_and_runs_the_rest_the_next_time(
    number, finished, capsys, monkeypatch
):
    # T3 for sweeps: a signal in the last step of the third run.
    before = {each: signal.getsignal(each) for each in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    log, num_runs = Logger.__call__, itertools.count(1)

    def log_and_signal(self, batch, squared_error):
        if batch.step == 3 and next(num_runs) == 3:
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)
        return log(self, batch, squared_error)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Logger, "__call__", log_and_signal)
            assert main(BATCH) == 75
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    out = capsys.readouterr().out
    assert f"stopped by {number.name}; finished runs are kept: run the same sweep again" in out
    assert main(BATCH) == 0
    assert "4 runs, 2 of them finished before" in capsys.readouterr().out
    assert Path("runs/swept/trials.csv").read_text() == (finished / "trials.csv").read_text()


def test_resume_auto_is_what_a_sweep_does_anyway(swept, capsys):
    assert main([*BATCH, "--resume", "auto"]) == 0
    assert "4 of them finished before" in capsys.readouterr().out


def test_more_seeds_and_batch_sizes_are_added_to_what_is_there(swept, capsys):
    before = snapshot(swept)
    more = [*SWEEP, "--batch-sizes", "64,128,256", "--num-seeds", "3", "--epochs", "2", "--name", "swept"]
    assert main(more) == 0
    assert "9 runs, 4 of them finished before" in capsys.readouterr().out
    assert snapshot(swept).items() >= before.items()
    assert len(pd.read_csv(swept / "trials.csv")) == 9


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([*BATCH, "--epochs", "3"], "epochs was 2.0 and is 3.0"),
        ([*BATCH, "--seed", "1"], "seed was 0 and is 1"),
        ([*BATCH, "--lr-scaling", "sqrt"], "lr_scaling was none and is sqrt"),
        (["sweep", "lr-scaling", "--num-seeds", "1", "--max-steps", "2", "--name", "swept"], "is a batch sweep"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_and_nothing_is_lost(options, part, swept, capsys):
    before, tables = snapshot(swept), [(swept / name).read_bytes() for name in ("sweep.json", "trials.csv")]
    assert main(options) == 2
    err = capsys.readouterr().err
    assert err.count("torchreg: error: ") == 1
    assert part in err
    assert "--overwrite" in err
    assert snapshot(swept) == before
    assert [(swept / name).read_bytes() for name in ("sweep.json", "trials.csv")] == tables


def test_overwrite_runs_all_trials_again(swept, capsys):
    assert main([*BATCH, "--epochs", "3", "--overwrite"]) == 0
    assert "4 runs, 0 of them finished before" in capsys.readouterr().out
    assert set(pd.read_csv(swept / "trials.csv")["num_steps"]) == {24, 6}


def test_an_option_that_is_newer_than_the_record_does_not_make_it_another_run(swept, capsys):
    path = swept / "trials/batch-64-seed-0/record.json"
    record = json.loads(path.read_text())
    del record["config"]["optimizer"]["decay_to"]
    path.write_text(json.dumps(record))
    assert main(BATCH) == 0
    assert "4 of them finished before" in capsys.readouterr().out


def test_other_data_under_the_same_path_are_refused(capsys):
    assert main(["data", "make", "--num-rows", "100", "--output", "houses.csv"]) == 0
    options = [*SWEEP, "--data", "houses.csv", "--batch-sizes", "32", "--num-seeds", "1", "--epochs", "1"]
    assert main(options) == 0
    before = snapshot(Path("runs/sweep-batch"))
    assert main(["data", "make", "--num-rows", "100", "--data-seed", "1", "--output", "houses.csv", "--overwrite"]) == 0
    assert main(options) == 2
    assert "the data's fingerprint is another" in capsys.readouterr().err
    assert snapshot(Path("runs/sweep-batch")) == before


def test_json_is_all_there_is_on_stdout(swept, capsys):
    assert main([*BATCH, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["global_batch_size"], row["num_runs"], row["num_diverged"]) for row in rows] == [
        (64, 2, 0),
        (256, 2, 0),
    ]


def test_the_printed_table_has_prediction_beside_measurement(swept, pictures, capsys):
    assert main(BATCH) == 0
    lines = capsys.readouterr().out.splitlines()
    (rule,) = [number for number, line in enumerate(lines) if "──" in line]
    head = lines[rule - 1]  # its last line, where the headings need several
    assert head.index("%") < head.index("predicted") < head.index("runs")
    (row,) = [line.split() for line in lines if line.split()[:1] == ["64"]]
    mean = pd.read_csv(swept / "trials.csv").query("global_batch_size == 64")["excess"].mean()
    assert f"{100 * mean:.3g}" in row
    for picture in ("batch.png", "batch.svg"):
        assert f"picture      runs/swept/{picture}" in lines


def test_diverged_runs_are_counted_not_averaged(capsys):
    options = ["--base-learning-rate", "1e-3", "1e3", "--batch-sizes", "64,128", "--num-seeds", "2", "--epochs", "3"]
    assert main([*SWEEP, *options]) == 0
    out = capsys.readouterr().out
    assert out.count("2 of 2 diverged") == 2
    assert out.count("diverges") == 2
    table = pd.read_csv("runs/sweep-batch/trials.csv")
    assert table["diverged"].all()
    assert table["excess"].isna().all()


def test_a_perfect_line_has_a_table_without_multiples_of_its_loss(capsys):
    Path("perfect.csv").write_text(PERFECT)
    options = [*SWEEP, "--data", "perfect.csv", "--batch-sizes", "2", "--num-seeds", "2", "--epochs", "3"]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert "records      runs/sweep-batch" in out
    assert "nan" not in out
    assert main([*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["excess"] is None


def test_beyond_sixteen_features_in_the_sequential_order_only_the_mean_is_set_beside_the_runs(capsys):
    options = ["--num-features", "17", "--num-rows", "200", "--standardize", "--base-learning-rate", "0.01", "0.01"]
    options += ["--optimizer", "manual", "--update-order", "sequential"]
    assert main([*SWEEP, *options, "--batch-sizes", "64", "--num-seeds", "1", "--epochs", "2"]) == 0
    (row,) = pd.read_csv("runs/sweep-batch/trials.csv").to_dict("records")
    assert row["predicted_excess"] > 0
    assert np.isnan([row["predicted_low"], row["predicted_high"], row["noise_floor"]]).all()
    assert "nan" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def all_trials():
    """The trials of the default lr-scaling sweep."""
    return lr_scaling_trials(SWEEP_DEFAULTS["lr-scaling"], [], 1)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_the_multipliers_double_up_to_divergence_and_lie_close_around_the_limit(standardize, order, all_trials):
    trials = [
        trial
        for trial in all_trials
        if (trial.config.data.standardize, trial.config.optimizer.update_order) == (standardize, order)
    ]
    config = trials[0].config
    data = LeastSquares.of(config)
    limit = lr_scaling_limit(config, data)
    multipliers = sorted({trial.multiplier for trial in trials})
    doubling = [m for m in multipliers if m == round(m) and np.log2(m) % 1 == 0]
    assert doubling == [2.0**i for i in range(len(doubling))]
    assert doubling[-2] < limit <= doubling[-1]
    around = [m / limit for m in multipliers if m not in doubling]
    assert around == pytest.approx([0.97, 1.03], abs=0.005)  # a batch has a whole number of samples
    # The limit is that of the batch which the sweep has there: 64 samples times it, up to whole multiples of 64.
    batch_size = min(round(64 * limit), 512)
    learning_rates = config.optimizer.base_learning_rate
    per_batch = Dynamics.of(data.rows, learning_rates, batch_size, order).largest_multiplier()
    assert limit == pytest.approx(per_batch, rel=1e-3)
    for trial in trials:
        # Learning rates and batch grow together to 512 samples; then only the learning rates do.
        assert trial.config.batch.global_batch_size == min(round(64 * trial.multiplier), 512)
        scale = scale_at(trial.config, trial.config.batch.global_batch_size)
        scaled = [learning_rate * scale for learning_rate in trial.config.optimizer.base_learning_rate]
        assert scaled == pytest.approx([learning_rate * trial.multiplier for learning_rate in learning_rates], rel=1e-9)
    assert {trial.config.optimizer.warmup_steps for trial in trials} == {0, 100}


def test_an_lr_scaling_sweep_diverges_above_the_limit_and_not_below(pictures, capsys):
    assert main(["sweep", "lr-scaling", "--num-seeds", "1", "--max-steps", "300"]) == 0
    table = trials_table(Path("runs/sweep-lr-scaling"))
    cold = table[table["warmup_steps"] == 0]
    assert set(cold["update_order"]) == {"simultaneous", "sequential"}
    distance = (
        (cold["fraction_of_stability_limit"] - 1).abs().groupby([cold["standardize"], cold["update_order"]]).min()
    )
    assert (distance < 0.04).all()
    np.testing.assert_array_equal(cold["diverged"], cold["fraction_of_stability_limit"] > 1)
    assert not table[table["fraction_of_stability_limit"] < 1]["diverged"].any()
    # Warm-up does not help: well beyond the limit it diverges all the same.
    assert table[(table["fraction_of_stability_limit"] > 1.05) & (table["warmup_steps"] > 0)]["diverged"].all()
    assert "runs/sweep-lr-scaling/lr-scaling.svg" in capsys.readouterr().out
    assert not curves_table(Path("runs/sweep-lr-scaling")).empty


BAD_OPTIONS = {
    "no kind": ([], "sweep is missing: give batch or lr-scaling"),
    "unknown kind": (["bach"], "sweep is bach: give batch or lr-scaling"),
    "no seeds": (["batch", "--num-seeds", "0"], "num_seeds is 0"),
    "negative seeds": (["lr-scaling", "--num-seeds", "-1"], "num_seeds is -1"),
    "no rows": (["batch", "--batch-sizes", "0"], "--batch-sizes: the list is '0'"),
    "no number": (["batch", "--batch-sizes", "64,many"], "--batch-sizes: the list is '64,many'"),
    "no multiplier": (["lr-scaling", "--multipliers", "0"], "--multipliers: the list is '0'"),
    "batch too large": (
        ["batch", "--batch-sizes", "64,600"],
        "global_batch_size is 600, more than the data's 551 rows",
    ),
    "a batch of its own": (["batch", "--global-batch-size", "8"], "global_batch_size is 8, and the sweep chooses"),
    "a rank's batch": (["lr-scaling", "--local-batch-size", "8"], "give --reference-batch-size"),
    "all rows": (["batch", "--sampling", "full"], "choose --sampling random or shuffle"),
    "too few rows": (["lr-scaling", "--data", "perfect.csv"], "more than the data's 4 rows"),
    "no file": (["batch", "--data", "nowhere.csv"], "nowhere.csv, which does not exist"),
    "refused": (
        ["batch", "--base-learning-rate", "1", "1", "--on-unstable", "refuse"],
        "times the stability limit (mean square)",
    ),
    "a name elsewhere": (["batch", "--name", "../swept"], "not a plain file name"),
    "unwritable": (["batch", "--runs-dir", "file"], "cannot be written"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_input_is_one_clear_line_and_exit_code_2_before_any_run(case, capsys):
    Path("file").touch()
    Path("perfect.csv").write_text(PERFECT)
    options, part = BAD_OPTIONS[case]
    assert main(["sweep", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("torchreg: error: ")
    assert part in err
    assert not Path("runs").exists()


def test_a_batch_that_is_refused_is_reported_before_the_others_are_run():
    # Of these, only 1 row a step is beyond its limit: noise lowers the limits of small batches.
    options = ["--batch-sizes", "1,512", "--base-learning-rate", "6e-7", "6e-1", "--on-unstable", "refuse"]
    config = SWEEP_DEFAULTS["batch"]
    rows = LeastSquares.of(config).rows
    limits = [Dynamics.of(rows, (6e-7, 6e-1), size, "sequential").largest_multiplier() for size in (1, 512)]
    assert limits[0] < 1 < limits[1]
    assert main(["sweep", "batch", *options]) == 2
    assert not Path("runs").exists()
