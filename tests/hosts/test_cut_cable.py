"""If these fail, a broken link between nodes hangs the ranks on both sides, and the job until its walltime."""

import re

import pytest

from ..fault_matrix import GRACE_S, TIMEOUT_S, matrix

LAUNCHER = "mpiexec on 2 nodes"


@pytest.mark.parametrize(("optimizer", "sync"), [("sgd", "ddp"), ("hand", "mpi")])
def test_a_cut_cable_ends_the_ranks_on_both_sides_within_the_time_out(optimizer, sync, nodes, tmp_path):
    # MPI and TCP would wait for minutes to for ever; the ranks that were cut off hear no launcher that could end them.
    case = matrix.Case("cut", 2, LAUNCHER, sync, optimizer, TIMEOUT_S)
    outcome = matrix.run_case(case, tmp_path, nodes)
    assert outcome.ranks_end_s is not None
    assert TIMEOUT_S - 1 < outcome.ranks_end_s < TIMEOUT_S + GRACE_S
    assert outcome.exit_code != 0
    assert outcome.left == ()
    assert len(outcome.reasons) == 1, outcome.output
    assert re.search(r"error on rank [01] \(n1\): .*; no word from rank 2 \(n2\), rank 3 \(n2\)", outcome.reasons[0])
