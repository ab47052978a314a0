"""If these fail, a broken link between nodes hangs a job, or a campaign mixes the wire with the node."""

import json
import os
import re

import pytest

from ..fault_matrix import GRACE_S, TIMEOUT_S, matrix

LAUNCHER = "mpiexec on 2 nodes"


@pytest.mark.parametrize(("optimizer", "sync"), [("sgd", "ddp"), ("manual", "mpi")])
def test_a_cut_cable_ends_the_ranks_on_both_sides_within_the_time_out(optimizer, sync, nodes, tmp_path):
    # MPI and TCP would wait for minutes to for ever; the ranks that were cut off hear no launcher that could end them.
    case = matrix.Case("cut", 2, LAUNCHER, sync, optimizer, TIMEOUT_S)
    outcome = matrix.run_case(case, tmp_path, nodes)
    assert outcome.ranks_end_s is not None
    assert TIMEOUT_S - 1 < outcome.ranks_end_s < TIMEOUT_S + GRACE_S
    assert outcome.exit_code != 0
    assert outcome.left == ()
    assert len(outcome.reasons) == 1, outcome.output
    assert re.search(
        r"error on rank [01] \(n1\): .*; no response from rank 2 \(n2\), rank 3 \(n2\)", outcome.reasons[0]
    )


CAMPAIGN = """
name: nodes
nodes: [1, 2]
ranks_per_node: [2]
global_batch_sizes: [64]
local_batch_sizes: []
num_features: [1]
combinations: [manual/mpi]
repeats: 1
window_s: 0.05
distributed: torch
base_learning_rate: 0.01
"""


def test_a_step_between_nodes_is_told_apart_from_one_within(nodes, run, tmp_path):
    (tmp_path / "nodes.yaml").write_text(CAMPAIGN)
    (tmp_path / "nodefile").write_text("n1\nn1\nn2\nn2\n")
    variables = {
        "PBS_NODEFILE": str(tmp_path / "nodefile"),
        "HYDRA_LAUNCHER": "ssh",
        "HYDRA_LAUNCHER_EXEC": f"{os.environ.get('HOSTS_STATE', '/tmp/torchreg-hosts')}/launch",
        "UCX_TLS": "tcp",  # make-believe nodes share a kernel: UCX would reach the other node through its shared memory
    }
    nodes(
        "mpiexec", "-hosts", "n1,n2", "-ppn", "1", "-n", "2", "sleep", "1"
    )  # makes that launcher; hydra dies of SIGPIPE where ranks end at once
    command = [str(nodes.script), "on", "n1", "torchreg", "scale", "run", "nodes.yaml", "--dir", "out"]
    done = run(*command, cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    hosts = {}
    for path in (tmp_path / "out/launches").glob("*/launch.json"):
        record = json.loads(path.read_text())
        hosts[record["launch"]["num_nodes"]] = [place["host"] for place in record["distributed"]["placements"]]
        assert all(point["check_passed"] for point in record["points"])
    assert hosts[2] == ["n1", "n1", "n2", "n2"]
    assert len(set(hosts[1])) == 1
    done = run("torchreg", "report", "out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (group,) = json.loads(done.stdout)["groups"]
    assert "across nodes, 2 ranks a node" in {series["scope"] for series in group["series"]}
