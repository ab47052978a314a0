"""If these fail, the ranks of a Slurm job without MPI wait for a host that does not exist."""

import pytest

from torchreg.distributed.rendezvous import first_slurm_node


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("nid001", "nid001"),
        ("nid[001-004,007],login1", "nid001"),
        ("gpu-a-2,gpu-a-3", "gpu-a-2"),
        ("rack[2-3]node[10,12],nid001", "rack2node10"),
    ],
)
def test_the_first_host_of_a_slurm_list_keeps_its_zeros_and_dashes(nodes, first):
    assert first_slurm_node(nodes) == first


@pytest.mark.parametrize("nodes", [",nid001", "[1-3]nid 2", "(null)"])
def test_what_is_no_slurm_list_is_named(nodes):
    with pytest.raises(ValueError, match=r"SLURM_JOB_NODELIST is .*must be a Slurm node list"):
        first_slurm_node(nodes)
