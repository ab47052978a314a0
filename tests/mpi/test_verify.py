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
    "broken training": {"program": "tests.mpi.broken_training:main"},
}
ON_THREE_RANKS = RIGHT
ON_TORCHRUN = {
    "right stack": {"arguments": ["verify", "--distributed", "torch", "--json"], "world_size": 2},
}


def status_of(checks):
    return {(check["area"], check["name"]): check["status"] for check in checks}


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_a_right_stack_passes(launcher, request):
    launched = request.getfixturevalue("on_three_ranks" if launcher == "mpiexec" else "on_torchrun")
    ends = launched["right stack"]
    assert [end.code for end in ends] == [0] * (3 if launcher == "mpiexec" else 2), ends[0].out
    content = json.loads(ends[0].out)
    assert content["passed"] is True
    status = status_of(content["checks"])
    assert set(status.values()) == {"PASS", "SKIP"}
    assert status["topology", "world size"] == "PASS"
    assert status["bit for bit", "sgd × ddp"] == "PASS"
    assert status["closed form", "full batch"] == "PASS"
    assert status["files", "shared checkpoint"] == "PASS"
    by_mpi, sharded = ("exact path", "manual × mpi, float64"), ("exact path", "sgd × fsdp, float32")
    assert (by_mpi in status, sharded in status) == ((True, False) if launcher == "mpiexec" else (False, True))
    (record,) = (launched.folder / "right stack/runs").iterdir()  # the checks leave nothing else behind
    assert content == {**json.loads(record.read_text()), "record": f"runs/{record.name}"}
    timed = {timing["operation"] for check in content["checks"] for timing in check["timings"]}
    others = {"broadcast", "all-gather", "reduce-scatter", "all-to-all", "send and receive"}
    assert timed == {"all-reduce", *(["all-reduce by MPI"] if launcher == "mpiexec" else others)}


@pytest.fixture(scope="module")
def status_with(on_two_ranks):
    """The status of each check with each defect, on two ranks."""
    return {defect: status_of(checks) for defect, checks in json.loads(on_two_ranks["defects"][0].out).items()}


SUMMED = {("collectives", f"{name}{by}") for name in ("all-reduce", "repeated all-reduce") for by in ("", " by MPI")}
IN_DDP = {"sgd × ddp", "sgd × mpi"}
IN_STEPS = {"manual × allreduce", "manual × mpi"}


def exact_paths(combinations, *dtypes):
    return {("exact path", f"{name}, {dtype}") for name in combinations for dtype in dtypes or ("float32", "float64")}


def bits(combinations):
    return {("bit for bit", name) for name in combinations}


LARGE = {("large gradient", f"{name}, 3 MiB") for name in IN_DDP}
TRAINED = exact_paths(IN_DDP | IN_STEPS) | bits(IN_DDP | IN_STEPS)
END = {("closed form", "full batch")}


@pytest.mark.parametrize(
    ("defect", "failing"),
    [
        ("wrong-average", {*SUMMED, *TRAINED, *LARGE}),
        ("duplicate-shard", TRAINED | END),
        # DistributedDataParallel broadcasts the main rank's parameters when it is made.
        ("skewed-start", {("initial state", "parameters"), *(TRAINED - exact_paths(IN_DDP)), *END}),
        ("stale-rank", TRAINED | END),
    ],
)
def test_an_injected_defect_fails_the_right_checks_and_no_others(defect, failing, status_with):
    status = status_with[defect]
    assert {check for check, outcome in status.items() if outcome == "FAIL"} == failing
    assert status["initial state", "data"] == "PASS"


@pytest.mark.parametrize(
    ("defect", "failing"),
    [
        ("averages 2 elements", exact_paths(["sgd × ddp"]) | {("large gradient", "sgd × ddp, 3 MiB")}),
        ("every 50th average × 1.5", exact_paths(["sgd × ddp"], "float64")),
        ("averages × 1.01 in float32", exact_paths(IN_DDP, "float32") | LARGE),
        ("averages the first bucket", {("large gradient", "sgd × ddp, 3 MiB")}),
        ("averages through bfloat16", exact_paths(IN_DDP) | LARGE),
        ("a rank without gradient after 300 steps", exact_paths(IN_STEPS, "float64")),
        # Within the tolerance of the exact path, and other bits.
        ("ranks that differ by 2e-13", exact_paths(IN_STEPS, "float64") | bits(IN_STEPS)),
        ("mean of rank means", exact_paths(IN_STEPS) | bits(IN_STEPS) | END),
        ("weight decay of 1e-7", exact_paths(IN_STEPS, "float64") | bits(IN_STEPS)),
        ("last micro-batch only", exact_paths(IN_STEPS) | bits(IN_STEPS)),
    ],
)
def test_broken_training_fails_the_right_rows_and_no_others(defect, failing, on_two_ranks):
    """All of these ended close to the closed form, and were called a stack that trains correctly."""
    failed = json.loads(on_two_ranks["broken training"][0].out)
    assert {tuple(row) for row in failed[defect]} == failing


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
