"""If these fail, a fault on one rank leaves the others waiting, and an allocation is burnt until its walltime."""

import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from torchreg.distributed.failure import is_expected, is_lost_contact, one_line

from ..fault_matrix import GRACE_S, TIMEOUT_S, matrix


def case(fault, rank, launcher, optimizer, sync):
    return matrix.Case(fault, rank, launcher, sync, optimizer, TIMEOUT_S, resume=True)


@pytest.fixture(scope="module")
def launched(request, tmp_path_factory):
    """The futures of all cases of the selected tests: cases mostly wait, so two of them run at once."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = dict.fromkeys(each["case"] for each in parameters if isinstance(each.get("case"), matrix.Case))
    with ThreadPoolExecutor(2) as pool:
        yield {each: pool.submit(matrix.run_case, each, tmp_path_factory.mktemp("case")) for each in cases}


@pytest.fixture
def outcome(case, launched):
    outcome = launched[case].result()
    assert outcome.exit_code not in (0, None), outcome.output
    assert outcome.left == (), "a process stays behind on the node, where the next job meets it"
    return outcome


def with_h_for_hosts(text):
    return re.sub(r"\([^()]+\)", "H", text)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            case("stop", 1, "mpiexec", "sgd", "mpi"),
            f"rank [02] H: waited {TIMEOUT_S:g} s for the other ranks in an all-reduce; no response from rank 1 H",
        ),
        (
            case("stop", 0, "mpiexec", "sgd", "ddp"),
            "rank [12] H: lost the other ranks: .*; the store on .+, host of rank 0, does not answer",
        ),
        (
            case("stop", 0, "torchrun", "manual", "allreduce"),
            "rank [12] H: lost the other ranks: Timed out .*; no response from rank 0 H",
        ),
    ],
    ids=["mpi", "ddp", "allreduce"],
)
def test_ranks_that_wait_for_a_stopped_one_end_and_name_it(case, reason, outcome):
    # A node that swaps or hangs would hold all others until walltime, and nobody would know which node it was.
    assert len(outcome.reasons) == 1, outcome.output
    assert re.fullmatch(f"torchreg: error on {reason}", with_h_for_hosts(outcome.reasons[0]))
    assert TIMEOUT_S - 1 < outcome.ranks_end_s < TIMEOUT_S + GRACE_S
    assert "most recent call" not in outcome.output.partition("torch/distributed/elastic")[0]


@pytest.mark.parametrize(
    "case", [case("kill", 0, "mpiexec", "manual", "mpi"), case("kill", 0, "torchrun", "manual", "allreduce")]
)
def test_a_killed_main_rank_ends_all_before_the_time_out(case, outcome):
    # The out-of-memory killer takes the rank that reads and writes, and the store with it.
    assert outcome.ranks_end_s < TIMEOUT_S
    assert "nothing" not in outcome.reported()


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (case("no memory", 0, "mpiexec", "sgd", "mpi"), "MemoryError: Unable to allocate 3.00 GiB"),
        (case("hook", 1, "mpiexec", "sgd", "mpi"), "KeyError: 'weights'"),  # raised inside autograd
    ],
    ids=["MemoryError", "defect"],
)
def test_what_a_rank_raises_is_reported_once_with_rank_and_host(case, reason, outcome):
    # The reason would drown in the other ranks' time-outs, or be dropped by the launcher that ends the job.
    assert outcome.ranks_end_s < TIMEOUT_S
    assert with_h_for_hosts("\n".join(outcome.reasons)) == f"torchreg: error on rank {case.rank} H: {reason}"
    assert outcome.output.count("Traceback") == (case.fault == "hook"), "a traceback is for a defect, and only for one"


AT_THE_EDGES = f"""
import os, signal, sys
from torchreg.distributed.init import init_distributed

class StopsRank1:
    def __str__(self):
        if sys.argv[1] == "start" and os.environ["PMI_RANK"] == "1":
            os.kill(os.getpid(), {signal.SIGSTOP:d})
        return "a value of an option"

options = {{"option": StopsRank1()}}
with init_distributed(device="cpu", distributed="torch", timeout_s={TIMEOUT_S}, run=options) as communicator:
    communicator.barrier()
if communicator.rank == 1:
    os.kill(os.getpid(), {signal.SIGSTOP:d})
"""


def test_ranks_do_not_wait_for_ever_for_one_that_is_stopped_outside_of_training(run, tmp_path):
    # While MPI starts or finalises nothing of torch's has a time-out: results are there and the job does not end.
    script = tmp_path / "edges.py"
    script.write_text(AT_THE_EDGES)

    def launch(edge):
        return run("mpiexec", "-n", "3", sys.executable, str(script), edge, cwd=tmp_path, timeout_s=60)

    start_s = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        at_start, at_end = pool.map(launch, ["start", "end"])
    assert time.monotonic() - start_s < TIMEOUT_S + 3 * GRACE_S
    assert at_start.returncode not in (0, None)
    assert at_end.returncode not in (0, None)
    assert re.findall(r"torchreg: error on rank \d \(.+\): (.+)", at_start.stderr) == [
        f"waited {TIMEOUT_S:g} s for the other ranks to connect"
    ]


NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, {}, NCCL version 2.28.9\n{}\nLast error:\n{}"
)


@pytest.mark.parametrize(
    ("error", "line", "lost"),
    [
        (
            # As seen on an H100 with two ranks.
            dist.DistBackendError(
                NCCL.format(
                    "invalid usage (run with NCCL_DEBUG=WARN for details)",
                    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
                    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 60",
                )
            ),
            "NCCL: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 60",
            False,
        ),
        (
            dist.DistBackendError(
                NCCL.format(
                    "unhandled system error", "ncclSystemError: System call failed.", "network Libfabric not found"
                )
            ),
            "NCCL: network Libfabric not found",
            False,
        ),
        (
            dist.DistBackendError(
                NCCL.format("remote process exited", "ncclRemoteError: A call failed.", "Connection closed by n2")
            ),
            "lost the other ranks: NCCL: Connection closed by n2",
            True,
        ),
        (
            RuntimeError(
                "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be …\nFor debugging …"
            ),
            "CUDA error: uncorrectable ECC error encountered",
            False,
        ),
    ],
    ids=["two ranks on a GPU", "no network", "a rank is gone", "ECC"],
)
def test_errors_of_nccl_and_cuda_keep_their_cause_in_one_line(error, line, lost):
    # "lost the other ranks" would send the user to look for a dead node.
    assert is_lost_contact(error) == lost
    assert is_expected(error), "a traceback is for defects"
    assert one_line(error) == line


def test_a_fault_of_the_program_on_the_device_keeps_its_traceback():
    assert not is_expected(RuntimeError("CUDA error: an illegal memory access was encountered"))
