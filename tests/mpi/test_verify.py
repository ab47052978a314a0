"""If these fail, `torchreg verify` passes a stack that trains wrongly, or fails one that is right."""

import json
from pathlib import Path

import pytest

from torchreg.cli import main

from .test_ranks import launch

QUICK = ("-m", "torchreg", "verify", "--quick", "--distributed", "torch")
WORKER = str(Path(__file__).parent / "verify_worker.py")


def status_of(checks):
    return {(check["area"], check["name"]): check["status"] for check in checks}


@pytest.mark.parametrize(("launcher", "num_ranks"), [("mpiexec", 3), ("torchrun", 2)])
def test_a_right_stack_passes(launcher, num_ranks, run, tmp_path):
    done = run(*launch(launcher, num_ranks), *QUICK, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(done.stdout)
    assert content["passed"] is True
    status = status_of(content["checks"])
    assert set(status.values()) == {"PASS", "SKIP"}
    assert status["topology", "world size"] == "PASS"
    assert status["invariance", "sgd × ddp, reproducible"] == "PASS"
    assert status["closed form", "full batch"] == "PASS"
    assert status["files", "shared checkpoint"] == "PASS"
    assert (("invariance", "manual × mpi, fast") in status) == (launcher == "mpiexec")
    assert not any((tmp_path / "runs").iterdir()), "the checks leave nothing behind"


@pytest.fixture(scope="module")
def status_with(run, tmp_path_factory):
    """The status of each check with each defect, on two ranks."""
    done = run(*launch("mpiexec", 2), WORKER, cwd=tmp_path_factory.mktemp("defects"))
    assert done.returncode == 0, done.stdout + done.stderr
    return {defect: status_of(checks) for defect, checks in json.loads(done.stdout).items()}


TRAINED = {
    ("invariance", f"{combination}, {reduction}")
    for combination in ("sgd × ddp", "sgd × mpi", "manual × allreduce", "manual × mpi")
    for reduction in ("fast", "reproducible")
}
FAST_DDP = {("invariance", "sgd × ddp, fast"), ("invariance", "sgd × mpi, fast")}


@pytest.mark.parametrize(
    ("defect", "failing"),
    [
        ("wrong-average", {("collectives", "all-reduce"), ("collectives", "all-reduce by MPI"), *TRAINED}),
        ("duplicate-shard", {*TRAINED, ("closed form", "full batch")}),
        # DistributedDataParallel broadcasts the main rank's parameters when it is made.
        ("skewed-start", {("initial state", "parameters"), *(TRAINED - FAST_DDP), ("closed form", "full batch")}),
        ("stale-rank", {*TRAINED, ("closed form", "full batch"), ("closed form", "mini-batches")}),
    ],
)
def test_an_injected_defect_fails_the_right_checks_and_no_others(defect, failing, status_with):
    status = status_with[defect]
    assert {check for check, outcome in status.items() if outcome == "FAIL"} == failing
    assert status["initial state", "data"] == "PASS"


def test_the_table_names_what_fails(run, tmp_path):
    done = run(*launch("mpiexec", 2), *QUICK, "--inject", "skewed-start", cwd=tmp_path)
    assert done.returncode == 1
    assert "does NOT train correctly" in done.stdout
    assert "initial state: parameters" in done.stdout
    assert done.stdout.count("verdict") == 1, "the main rank alone prints"


def test_one_process_needs_no_others(capsys):
    assert main(["verify", "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert main(["verify", "--quick", "--inject", "stale-rank"]) == 2
    assert "inject is stale-rank, which needs other ranks" in capsys.readouterr().err
