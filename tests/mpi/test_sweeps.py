"""If these fail, a sweep on many ranks loses or repeats runs, or a plan for many ranks is not what they do."""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from torchreg.cli import main

WORKER = str(Path(__file__).parent / "sweep_worker.py")
SWEEP = ["sweep", "batch", "--batch-sizes", "32,64,256", "--num-seeds", "2", "--epochs", "2", "--name", "swept"]
SWEEP += ["--update-order", "simultaneous"]  # which is predicted at less cost than the default
TRIALS = [f"batch-{size}-seed-{seed}" for size in (256, 32, 64) for seed in (0, 1)]
LESSON_LRS = ["--no-standardize", "--base-learning-rate", "1e-7", "1e-1"]


def mpiexec(num_ranks):
    return ["mpiexec", "-n", str(num_ranks), sys.executable]


def runs_in(log):
    return sorted(log.read_text().split()) if log.exists() else []


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures take longer than the runs."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The sweep of one process."""
    runs_dir = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert main([*SWEEP, "--runs-dir", str(runs_dir)]) == 0
    return runs_dir / "swept"


def assert_same_table(folder, other):
    tables = [pd.read_csv(path / "trials.csv") for path in (folder, other)]
    pd.testing.assert_frame_equal(*tables, check_exact=False, rtol=1e-9)


@pytest.mark.parametrize("mode", [[], ["--farm"]], ids=["all ranks", "farm"])
def test_two_ranks_run_each_trial_once_and_find_what_one_process_finds(mode, one_process, run, tmp_path):
    log = tmp_path / "log"
    done = run(*mpiexec(2), WORKER, *SWEEP, *mode, "--distributed", "torch", cwd=tmp_path, RUN_LOG=str(log))
    assert done.returncode == 0, done.stderr
    assert runs_in(log) == TRIALS
    assert_same_table(tmp_path / "runs/swept", one_process)
    assert done.stdout.count("records      runs/swept") == 1
    records = (tmp_path / "runs/swept").glob("trials/*/record.json")
    assert {json.loads(path.read_text())["result"]["world_size"] for path in records} == ({1} if mode else {2})


def test_two_ranks_run_the_trials_that_are_not_finished_and_no_others(one_process, run, tmp_path):
    log, folder = tmp_path / "log", Path(shutil.copytree(one_process, tmp_path / "runs/swept"))
    lost = folder / "trials/batch-64-seed-1/record.json"
    others = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/record.json") if path != lost}
    lost.unlink()
    done = run(*mpiexec(2), WORKER, *SWEEP, "--farm", "--distributed", "torch", cwd=tmp_path, RUN_LOG=str(log))
    assert done.returncode == 0, done.stderr
    assert "6 runs, 5 of them finished before" in done.stdout
    assert runs_in(log) == ["batch-64-seed-1"]
    assert {path: path.stat().st_mtime_ns for path in others} == others


@pytest.mark.parametrize(("mode", "hit"), [([], "1"), (["--farm"], "0,1")], ids=["all ranks", "farm"])
def test_a_signal_ends_a_sweep_on_all_ranks_and_the_next_one_runs_the_rest(mode, hit, one_process, run, tmp_path):
    # T3 for sweeps: the signal comes in the fourth step of the first run that a rank is in.
    accident = [str(Path(__file__).parent / "accident.py"), "SIGTERM", hit, "3"]
    done = run(*mpiexec(2), *accident, *SWEEP, *mode, "--distributed", "torch", cwd=tmp_path)
    assert done.returncode == 75, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("stopped by SIGTERM; finished runs are kept: run the same sweep again") == 1
    assert main(SWEEP) == 0
    assert_same_table(tmp_path / "runs/swept", one_process)


def test_what_is_refused_is_reported_once_and_loses_nothing(one_process, run, tmp_path):
    shutil.copytree(one_process, tmp_path / "runs/swept")
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    options = [*SWEEP, "--epochs", "3", "--farm", "--json", "--distributed", "torch"]
    done = run(*mpiexec(2), "-m", "torchreg", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("torchreg: error:") == 1
    assert "epochs was 2.0 and is 3.0" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before


def test_four_ranks_do_with_the_lessons_learning_rates_what_the_plan_predicts(run, tmp_path, capsys):
    assert main(["plan", *LESSON_LRS, "--world-sizes", "3,4", "--json"]) == 0
    three, four = json.loads(capsys.readouterr().out)["rows"]
    assert (three["is_stable"], four["is_stable"]) == (True, False)

    train = [*mpiexec(4), "-m", "torchreg", "train", "--distributed", "torch", *LESSON_LRS]
    done = run(*train, "--name", "warned", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "the largest stable world size is 3; expect divergence" in " ".join(done.stdout.split())
    assert "forecast     unstable" in done.stdout
    # The batches of four ranks with 64 samples each, on one.
    capped = ["train", *LESSON_LRS, "--global-batch-size", "256", "--name", "capped", "--on-unstable", "cap"]
    assert main(capped) == 0
    assert "lowered to half the limit" in " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "runs/capped/record.json").read_text())
    assert record["forecast"]["stability_limit"] == pytest.approx(2, rel=1e-4)
    assert record["result"]["excess"] < record["forecast"]["curve"]["high"][-1] < 1
