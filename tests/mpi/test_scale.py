"""If these fail, a scaling campaign measures a stack that trains wrongly, or its records lack what a report needs."""

import json
import sys
from pathlib import Path

import pytest

CAMPAIGN = """
name: tiny
ranks_per_node: [1, 2]
global_batch_sizes: [64]
local_batch_sizes: [32]
num_features: [1, 40]
repeats: 1
window_s: 0.03
runtime: torch
base_learning_rate: 0.01
"""


@pytest.fixture(scope="module")
def campaign(run, tmp_path_factory):
    """A whole campaign on one and two ranks, and what its command said."""
    folder = tmp_path_factory.mktemp("scale")
    (folder / "tiny.yaml").write_text(CAMPAIGN)
    done = run("torchreg", "scale", "run", "tiny.yaml", "--dir", "out", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def record(folder, ranks):
    return json.loads((folder / f"out/launches/block-00-nodes-1-ranks-{ranks}/launch.json").read_text())


def test_every_setting_is_measured_checked_and_timed(campaign):
    folder, done = campaign
    assert "2 of 2 done, 0 failed" in done.stdout
    for ranks, pairs, batches in (
        (1, {("hand", "none"), ("sgd", "none")}, {32, 64}),
        (2, {("hand", "allreduce"), ("hand", "mpi"), ("sgd", "ddp"), ("sgd", "mpi")}, {64}),
    ):
        launch = record(folder, ranks)
        points = launch["points"]
        found = {(p["optimizer"], p["sync"], p["num_features"], p["global_batch_size"]) for p in points}
        assert found == {(*pair, features, batch) for pair in pairs for features in (1, 40) for batch in batches}
        assert sorted(p["order"] for p in points) == list(range(len(points)))
        for point in points:
            assert point["check"]["passed"], point["check"]
            assert "end at the closed form" in point["check"]["told"]
            assert point["check"]["excess"] < 1e-6
            assert point["window_s"] >= 0.03
            assert point["message_bytes"] == 8 * (point["num_features"] + 1)
            assert point["step_time_s"] == pytest.approx(point["window_s"] / point["num_steps"])
            times = point["rank_step_time_s"]
            assert times["min"] <= times["median"] <= times["max"] == point["step_time_s"]
            assert (point["local_step_time_s"] is None) == (ranks == 1)
            assert point["throughput"] == pytest.approx(point["global_batch_size"] / point["step_time_s"])
            assert (point["target"] is None) == (point["num_features"] > 16)
        assert launch["runtime"]["world_size"] == ranks
        assert launch["dtype"] == "float64"
        assert launch["wall_s"] > launch["start_up_s"] > 0
    assert {way["way"] for way in record(folder, 2)["allreduce"]} == {"gloo", "MPI"}
    assert record(folder, 1)["allreduce"] == []


def test_steps_to_the_target_are_those_that_theory_says(campaign):
    # The rate is a tenth of what a batch of 64 could bear, so single runs differ from the mean by a few percent.
    folder, _ = campaign
    targets = [p["target"] for ranks in (1, 2) for p in record(folder, ranks)["points"] if p["target"]]
    assert len(targets) == 8
    for target in targets:
        assert target["measured_steps"] == pytest.approx(target["predicted_steps"], rel=0.15)
        assert target["measured_time_s"] > 0
        assert target["stability_limit"] > 1


@pytest.mark.parametrize(("defect", "told"), [("wrong-average", "do not end at the closed form"), ("stale-rank", "")])
def test_a_fast_wrong_run_is_no_result(defect, told, run, tmp_path):
    worker = str(Path(__file__).parent / "scale_worker.py")
    done = run("mpiexec", "-n", "2", sys.executable, worker, defect, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)
    assert len(points) == 4
    wrong = [point["check"]["told"] for point in points if not point["check"]["passed"]]
    # A rank that misses one update of the whole launch is wrong in the point that it was in, a wrong sum in all.
    assert len(wrong) == 4 if defect == "wrong-average" else wrong
    assert told in wrong[0]


def test_a_launcher_that_starts_something_else_is_a_failure(campaign, run, tmp_path):
    folder, _ = campaign
    done = run("torchreg", "scale", "measure", "out", "block-00-nodes-1-ranks-2", cwd=folder)
    assert done.returncode == 2
    assert "what the launcher started are 1 ranks on 1 nodes" in done.stderr

    (tmp_path / "tiny.yaml").write_text(CAMPAIGN)
    done = run("torchreg", "scale", "run", "tiny.yaml", "--dir", "out", "--launcher-args=--no-such", cwd=tmp_path)
    assert done.returncode == 1
    assert "exit code 255" in record(tmp_path, 2)["reason"]
    assert "2 failed" in done.stdout
    done = run("torchreg", "scale", "status", "out", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.count("exit code 255") == 2
