"""If these fail, `torchreg verify` passes a stack that trains wrongly, or fails one that is right."""

import json
from xml.etree import ElementTree

import pytest

from torchreg.cli import main

QUICK = ["verify", "--quick", "--distributed", "torch"]
RIGHT = {"right stack": {"arguments": [*QUICK, "--json"]}}
ON_TWO_RANKS = {
    "defects": {"program": "tests.mpi.verify_worker:main"},
    "table": {"arguments": [*QUICK, "--inject", "skewed-start"]},
}
ON_THREE_RANKS = RIGHT
ON_TORCHRUN = {"right stack": RIGHT["right stack"] | {"world_size": 3}}


def status_of(checks):
    return {(check["area"], check["name"]): check["status"] for check in checks}


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_a_right_stack_passes(launcher, request):
    launched = request.getfixturevalue("on_three_ranks" if launcher == "mpiexec" else "on_torchrun")
    ends = launched["right stack"]
    assert [end.code for end in ends] == [0] * 3, ends[0].out
    content = json.loads(ends[0].out)
    assert content["passed"] is True
    status = status_of(content["checks"])
    assert set(status.values()) == {"PASS", "SKIP"}
    assert status["topology", "world size"] == "PASS"
    assert status["bit for bit", "sgd × ddp"] == "PASS"
    assert status["closed form", "full batch"] == "PASS"
    assert status["files", "shared checkpoint"] == "PASS"
    assert (("invariance", "manual × mpi") in status) == (launcher == "mpiexec")
    (record,) = (launched.folder / "right stack/runs").iterdir()  # the checks leave nothing else behind
    assert content == {**json.loads(record.read_text()), "record": f"runs/{record.name}"}
    timed = {timing["operation"] for check in content["checks"] for timing in check["timings"]}
    assert timed == {"all-reduce", *(["all-reduce by MPI"] if launcher == "mpiexec" else [])}


@pytest.fixture(scope="module")
def status_with(on_two_ranks):
    """The status of each check with each defect, on two ranks."""
    return {defect: status_of(checks) for defect, checks in json.loads(on_two_ranks["defects"][0].out).items()}


TRAINED = {
    (area, combination)
    for combination in ("sgd × ddp", "sgd × mpi", "manual × allreduce", "manual × mpi")
    for area in ("invariance", "bit for bit")
}
SUMMED = {("collectives", f"{name}{by}") for name in ("all-reduce", "repeated all-reduce") for by in ("", " by MPI")}
FAST_DDP = {("invariance", "sgd × ddp"), ("invariance", "sgd × mpi")}


@pytest.mark.parametrize(
    ("defect", "failing"),
    [
        ("wrong-average", {*SUMMED, *TRAINED}),
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


def test_the_table_names_what_fails(on_two_ranks):
    main, other = on_two_ranks["table"]
    assert (main.code, other.code) == (1, 1)
    assert "does NOT train correctly" in main.out
    assert "initial state: parameters" in main.out
    assert main.out.count("verdict") == 1
    assert other.out == "", "the main rank alone prints"


def test_one_process_needs_no_others(capsys):
    assert main(["verify", "--quick", "--json", "--junit", "checks.xml"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["passed"] is True
    suite = ElementTree.parse("checks.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == (str(len(record["checks"])), "0")
    assert main(["verify", "--quick", "--inject", "stale-rank"]) == 2
    assert "inject is stale-rank, which needs other ranks" in capsys.readouterr().err
