"""If these fail, a sweep on many ranks loses or repeats runs, or a plan for many ranks is not what they do."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from torchreg.cli import main

SWEEP = ["sweep", "batch", "--batch-sizes", "32,64,256", "--num-seeds", "2", "--epochs", "2", "--name", "swept"]
SWEEP += ["--update-order", "simultaneous"]  # which is predicted at less cost than the default
TRIALS = [f"batch-{size}-seed-{seed}" for size in (256, 32, 64) for seed in (0, 1)]
ON_RANKS = [*SWEEP, "--distributed", "torch"]
UNFINISHED = "cp -rp '../sweep all ranks/.' . && rm runs/swept/trials/batch-64-seed-1/record.json"
ON_TWO_RANKS = {
    "sweep all ranks": {"arguments": ON_RANKS},
    "sweep farm": {"arguments": [*ON_RANKS, "--farm"]},
    "sweep rest": {"arguments": [*ON_RANKS, "--farm"], "prepared": UNFINISHED},
    "sweep refused": {
        "arguments": [*ON_RANKS, "--epochs", "3", "--farm", "--json"],
        "prepared": "cp -rp '../sweep all ranks/.' .",
    },
    "sweep stopped": {"arguments": ON_RANKS, "accident": ["SIGTERM", "1", "3"]},
}
LESSON_LRS = ["--no-standardize", "--base-learning-rate", "1e-7", "1e-1"]


def mpiexec(num_ranks):
    return ["mpiexec", "-n", str(num_ranks), sys.executable]


def trained(ends):
    return sorted(name for end in ends for name in end.trained)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


@pytest.mark.parametrize(("mode", "world_size"), [("all ranks", 2), ("farm", 1)])
def test_two_ranks_run_each_trial_once_and_find_what_one_process_finds(mode, world_size, one_process, on_two_ranks):
    ends, folder = on_two_ranks[f"sweep {mode}"], on_two_ranks.folder / f"sweep {mode}/runs/swept"
    assert [end.code for end in ends] == [0, 0], ends
    assert trained(ends) == TRIALS
    assert_same_table(folder, one_process)
    assert "".join(end.out for end in ends).count("records      runs/swept") == 1
    records = folder.glob("trials/*/record.json")
    assert {json.loads(path.read_text())["result"]["world_size"] for path in records} == {world_size}


def test_two_ranks_run_the_trials_that_are_not_finished_and_no_others(on_two_ranks):
    ends = on_two_ranks["sweep rest"]
    assert [end.code for end in ends] == [0, 0], ends
    assert "6 runs, 5 of them finished before" in ends[0].out
    assert trained(ends) == ["batch-64-seed-1"]
    before, after = (
        {path.parent.name: path.stat().st_mtime_ns for path in (on_two_ranks.folder / name).rglob("record.json")}
        for name in ("sweep all ranks", "sweep rest")
    )
    assert after.pop("batch-64-seed-1") > before.pop("batch-64-seed-1")
    assert len(after) == 5
    assert after == before


def test_a_signal_ends_a_sweep_on_all_ranks_and_the_next_one_runs_the_rest(one_process, on_two_ranks, monkeypatch):
    # T3 for sweeps: the signal comes in the fourth step of the first run.
    ends = on_two_ranks["sweep stopped"]
    assert [(end.code, end.err) for end in ends] == [(75, "")] * 2
    assert ends[0].out.count("stopped by SIGTERM; finished runs are kept: run the same sweep again") == 1
    monkeypatch.chdir(on_two_ranks.folder / "sweep stopped")
    assert main(SWEEP) == 0
    assert_same_table(Path("runs/swept"), one_process)


def test_a_signal_ends_a_farm_on_all_ranks_and_the_next_one_runs_the_rest(one_process, run, tmp_path):
    # The fourth step of the first run that a rank is in; the codes of ranks that end at different times become one.
    accident = [str(Path(__file__).parent / "accident.py"), "SIGTERM", "0,1", "3"]
    done = run(*mpiexec(2), *accident, *ON_RANKS, "--farm", cwd=tmp_path)
    assert done.returncode == 75, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("stopped by SIGTERM; finished runs are kept: run the same sweep again") == 1
    assert main(SWEEP) == 0
    assert_same_table(tmp_path / "runs/swept", one_process)


def test_what_is_refused_is_reported_once_and_loses_nothing(on_two_ranks):
    main_end, other = on_two_ranks["sweep refused"]
    assert (main_end.code, other.code) == (2, 2)
    assert (main_end.out, other.out, other.err) == ("", "", "")
    assert main_end.err.count("torchreg: error:") == 1
    assert "epochs was 2.0 and is 3.0" in main_end.err
    assert "Traceback" not in main_end.err
    before, after = (contents(on_two_ranks.folder / name) for name in ("sweep all ranks", "sweep refused"))
    assert after == before


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
