"""If these fail, `torchreg verify` passes a stack that trains wrongly, or condemns one that is right."""

import json
import sys

import pytest

from .test_ranks import launch

QUICK = ("-m", "torchreg", "verify", "--quick", "--json", "--distributed", "torch")


def checks_of(done):
    """The JSON on stdout; MPICH's mpiexec prints lines of its own behind it when a rank's exit code is not 0."""
    content, _ = json.JSONDecoder().raw_decode(done.stdout)
    return content


@pytest.mark.parametrize(("launcher", "num_ranks"), [("mpiexec", 3), ("torchrun", 2)])
def test_a_right_stack_passes(launcher, num_ranks, run, tmp_path):
    done = run(*launch(launcher, num_ranks), *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    content = checks_of(done)
    assert content["passed"] is True
    status = {(check["area"], check["name"]): check["status"] for check in content["checks"]}
    assert set(status.values()) == {"PASS", "SKIP"}
    assert status["topology", "world size"] == "PASS"
    assert status["invariance", "sgd × ddp, reproducible"] == "PASS"
    assert status["right answer", "all rows"] == "PASS"
    assert status["files", "shared checkpoint"] == "PASS"
    assert (("invariance", "manual × mpi, fast") in status) == (launcher == "mpiexec")
    assert not any((tmp_path / "runs").iterdir()), "the checks leave nothing behind"


@pytest.mark.parametrize(
    ("defect", "failing", "passing"),
    [
        ("wrong-average", ("collectives", "all-reduce"), ("same start", "parameters")),
        ("duplicate-rows", ("invariance", "manual × allreduce, fast"), ("collectives", "all-reduce")),
        ("skewed-start", ("same start", "parameters"), ("same start", "rows")),
        ("stale-rank", ("invariance", "sgd × ddp, fast"), ("same start", "parameters")),
    ],
)
def test_an_injected_defect_fails_at_the_right_row(defect, failing, passing, run, tmp_path):
    done = run(*launch("mpiexec", 2), *QUICK, "--inject", defect, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    content = checks_of(done)
    status = {(check["area"], check["name"]): check["status"] for check in content["checks"]}
    assert content["passed"] is False
    assert status[failing] == "FAIL"
    assert status[passing] == "PASS"


def test_the_table_says_what_is_wrong(run, tmp_path):
    command = ("-m", "torchreg", "verify", "--quick", "--distributed", "torch", "--inject", "skewed-start")
    done = run(*launch("mpiexec", 2), *command, cwd=tmp_path)
    assert done.returncode == 1
    assert "does NOT train correctly" in done.stdout
    assert "same start: parameters" in done.stdout
    assert done.stdout.count("verdict") == 1, "the main rank alone speaks"


def test_one_process_needs_no_others(run, tmp_path):
    done = run(sys.executable, *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(sys.executable, *QUICK, "--inject", "stale-rank", cwd=tmp_path)
    assert done.returncode == 2
    assert "inject is stale-rank, which needs other ranks" in done.stderr
