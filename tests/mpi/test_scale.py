"""If these fail, a scaling campaign measures a stack that trains wrongly, or its records lack what a report needs."""

import contextlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
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
distributed: torch
base_learning_rate: 0.01
"""


@pytest.fixture(scope="module")
def campaign(run, tmp_path_factory):
    """A whole campaign on one and two ranks, and its completed command."""
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
        (1, {("manual", "none"), ("sgd", "none")}, {32, 64}),
        (2, {("manual", "allreduce"), ("manual", "mpi"), ("sgd", "ddp"), ("sgd", "mpi")}, {64}),
    ):
        launch = record(folder, ranks)
        points = launch["points"]
        found = {(p["optimizer"], p["sync"], p["num_features"], p["global_batch_size"]) for p in points}
        assert found == {(*pair, features, batch) for pair in pairs for features in (1, 40) for batch in batches}
        assert sorted(p["order"] for p in points) == list(range(len(points)))
        for point in points:
            assert point["check_passed"], point
            assert "end at the closed form" in point["check_message"]
            assert point["check_excess"] < 1e-6
            assert point["window_s"] >= 0.03
            assert point["message_bytes"] == 8 * (point["num_features"] + 1)
            assert point["step_time_s"] == pytest.approx(point["window_s"] / point["num_steps"])
            assert point["rank_min_s"] <= point["rank_median_s"] <= point["rank_max_s"] == point["step_time_s"]
            assert (point["local_step_time_s"] is None) == (ranks == 1)
            assert point["throughput"] == pytest.approx(point["global_batch_size"] / point["step_time_s"])
            assert (point["target_excess"] is None) == (point["num_features"] > 16)
        assert launch["distributed"]["world_size"] == ranks
        assert launch["dtype"] == "float64"
        assert launch["wall_s"] > launch["start_up_s"] > 0
    assert {one["backend"] for one in record(folder, 2)["allreduce"]} == {"gloo", "MPI"}
    assert record(folder, 1)["allreduce"] == []


def test_a_record_has_what_decides_its_numbers_and_one_name_for_the_machine(campaign):
    folder, _ = campaign
    for ranks in (1, 2):
        launch = record(folder, ranks)
        assert launch["machine_facts"]["kernel"] == platform.release()
        checks = {f"{check['area']}: {check['name']}": check["status"] for check in launch["verification"]}
        assert "FAIL" not in checks.values()
        assert checks["closed form: full batch"] == "PASS"
        assert launch["campaign"]["machine"] == re.sub(r"\d", "", socket.gethostname().split(".")[0]).strip("-_")


def test_under_mpiexec_it_is_refused_once(on_two_ranks):
    # L9: both ranks made a campaign, on the same cores, and both were recorded as done.
    main, other = on_two_ranks["under mpiexec"]
    assert (main.code, other.code) == (2, 2)
    assert main.err.count("scale run starts ranks itself, and MPICH mpiexec has started this process") == 1
    assert other.err == ""
    assert not (on_two_ranks.folder / "under mpiexec/out").exists()


def test_ranks_end_when_scale_run_is_killed(tmp_path):
    # W3: they went on for the rest of their window, beside those of the next `scale run`.
    command = [sys.executable, "-m", "torchreg", "scale", "run", "--ranks-per-node", "2", "--window-s", "60"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    mark = {"TORCHREG_TEST": str(tmp_path)}
    process = subprocess.Popen([*command, "--dir", "out"], cwd=tmp_path, env={**os.environ, **mark, "PATH": path})
    try:
        wait_until(lambda: len(ranks_of(tmp_path)) == 2)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not ranks_of(tmp_path), within_s=12)


def ranks_of(folder):
    """The ranks that were started below a process whose TORCHREG_TEST is this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables, words = (process / "environ").read_bytes(), (process / "cmdline").read_bytes().split(b"\0")
            if f"TORCHREG_TEST={folder}\0".encode() in variables and words[2:5] == [b"torchreg", b"scale", b"measure"]:
                found.append(process.name)
    return found


def wait_until(condition, within_s=60.0):
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.1)


def test_steps_to_the_target_are_those_of_theory(campaign):
    # The learning rate is a tenth of the stability limit of a batch of 64: single runs differ by percents.
    folder, _ = campaign
    points = [p for ranks in (1, 2) for p in record(folder, ranks)["points"] if p["target_excess"]]
    assert len(points) == 8
    for point in points:
        assert point["measured_steps"] == pytest.approx(point["predicted_steps"], rel=0.15)
        assert point["measured_time_s"] > 0
        assert point["stability_limit"] > 1


ON_TWO_RANKS = {
    "broken points": {"program": "tests.mpi.scale_worker:main", "arguments": ["wrong-average", "stale-rank"]},
    "under mpiexec": {"arguments": ["scale", "run", "--dir", "out"]},
}


def test_a_fast_wrong_run_is_no_result(on_two_ranks):
    average, stale = [
        [point["check_message"] for point in points if not point["check_passed"]]
        for points in map(json.loads, on_two_ranks["broken points"][0].out.splitlines())
    ]
    assert len(average) == 4
    assert "do not end at the closed form" in average[0]
    # A rank that misses one update of the whole launch is wrong in the point that it was in.
    assert stale


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
