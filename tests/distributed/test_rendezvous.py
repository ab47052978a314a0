"""If these fail, ranks of a Slurm job without MPI wait for a host that does not exist, and many ranks do not start."""

import os
import resource
import threading
from datetime import timedelta

import pytest
import torch
from torch._C._distributed_c10d import AllreduceOptions, ProcessGroupGloo, TCPStore

from torchreg.distributed.rendezvous import allow_connections, first_slurm_node


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


def sockets_of(world_size):
    """The sockets of a gloo group of threads, after an all-reduce."""
    timeout = timedelta(seconds=60)
    main = TCPStore("127.0.0.1", 0, world_size, True, timeout, wait_for_workers=False)
    groups, before, sums = {}, len(os.listdir("/proc/self/fd")), [torch.ones(1) for _ in range(world_size)]

    def join(rank):
        store = TCPStore("127.0.0.1", main.port, world_size, False, timeout, wait_for_workers=False)
        groups[rank] = ProcessGroupGloo(store, rank, world_size, timeout)
        groups[rank].allreduce([sums[rank]], AllreduceOptions()).wait()

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(each.item() == world_size for each in sums)
    return len(os.listdir("/proc/self/fd")) - before


def test_many_ranks_connect_only_where_they_exchange_messages(monkeypatch):
    """All pairs of 2,240 ranks would be 10 million requests of the store, and more sockets than a process may open."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT", raising=False)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1_024, limits[1]))
        allow_connections(64)
        assert "TORCH_GLOO_LAZY_INIT" not in os.environ
        assert sockets_of(24) > 24 * 23  # each pair has one at both ends
        allow_connections(2_240)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 2_240
        assert sockets_of(24) < 24 * 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_ranks_than_open_files_are_refused(monkeypatch):
    """C++ would end the process without a word of why."""
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1_024, 4_096))
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "0")
    with pytest.raises(ValueError, match=r"ulimit -Hn.* is 4096: 10000 ranks need 10256"):
        allow_connections(10_000)
