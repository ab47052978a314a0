"""If these fail, ranks that share a GPU or a core, or a host counted twice, go unnoticed: slow or wrong runs."""

import os
from dataclasses import dataclass, field

import pytest
import torch

from torchreg.distributed.communicator import Placement
from torchreg.distributed.launcher import Launcher
from torchreg.verification import topology


@dataclass
class Ranks:
    """What the checks see of a communicator, with simulated other ranks: `gather` returns their `masks`."""

    hosts: tuple[str, ...] = ("n1", "n1")
    local_ranks: tuple[int, ...] = (0, 1)
    promised: int | None = 2
    sizes: dict[str, int] = field(default_factory=lambda: {"launcher": 2, "MPI": 2, "torch": 2})
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    identities: tuple[str, ...] = ()
    masks: tuple[tuple[str, frozenset[int], bool], ...] = ()
    rank: int = 0
    backend: str = "gloo"
    over_mpi: bool = False

    @property
    def placements(self):
        pairs = zip(self.hosts, self.local_ranks, strict=True)
        ids = self.identities or ("",) * self.world_size
        return tuple(Placement(rank, host, local, "cpu", "CPU", ids[rank]) for rank, (host, local) in enumerate(pairs))

    @property
    def world_size(self):
        return len(self.hosts)

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def launcher(self):
        return Launcher("MPICH mpiexec", self.rank, self.world_size, 0, self.promised, uses_mpi=True)

    @property
    def num_nodes(self):
        return len(set(self.hosts))

    def all_reduce(self, tensor):
        pass

    def world_sizes(self):
        return self.sizes

    def gather(self, item):
        if isinstance(item, tuple):
            return list(self.masks)
        return [item if rank == self.rank else None for rank in range(self.world_size)]


def check(ranks, name):
    return next(row for row in topology.topology_checks(ranks) if row.name == name)


@pytest.fixture(autouse=True)
def unbound(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


UNBOUND = (("n1", frozenset({0, 1}), False), ("n1", frozenset({0, 1}), False))


def test_a_correct_topology_passes():
    rows = list(topology.topology_checks(Ranks(masks=UNBOUND)))
    assert [row.status for row in rows] == ["PASS", "PASS", "SKIP", "SKIP", "PASS"]


def test_an_mpi_that_knows_of_one_rank_is_named():
    row = check(Ranks(sizes={"launcher": 2, "MPI": 1, "torch": 2}, masks=UNBOUND), "world size")
    assert row.status == "FAIL"
    assert "rank 0 (n1): launcher 2, MPI 1, torch 2" in row.measured


def test_a_host_that_is_counted_twice_is_named():
    # The launcher meant two hosts with one rank each, but both ranks are on n1.
    row = check(Ranks(promised=1, masks=UNBOUND), "ranks on hosts")
    assert row.status == "FAIL"
    assert "2 ranks are on this host, and MPICH mpiexec started 1: a host is counted twice" in row.measured


def test_a_local_rank_that_occurs_twice_is_named():
    row = check(Ranks(local_ranks=(0, 0), masks=UNBOUND), "ranks on hosts")
    assert (row.status, "local ranks here are [0, 0]" in row.measured) == ("FAIL", True)


@pytest.mark.parametrize(("identities", "status"), [(("GPU-a", "GPU-b"), "PASS"), (("GPU-a", "GPU-a"), "FAIL")])
def test_two_ranks_on_one_gpu_are_named(identities, status):
    row = check(Ranks(device=torch.device("cuda", 0), identities=identities, masks=UNBOUND), "devices")
    assert row.status == status
    assert (status == "PASS") or "rank 0 (n1): shares its cuda device with rank 1" in row.measured


@pytest.mark.parametrize(
    ("second", "status"),
    [
        (("n1", frozenset({2, 3}), True), "PASS"),
        (("n1", frozenset({1, 2}), True), "FAIL"),
        (("n2", frozenset({0, 1}), True), "PASS"),  # another host's CPU 0 is another CPU
    ],
)
def test_cpu_masks_that_overlap_are_named(second, status):
    hosts = ("n1", second[0])
    local = (0, 1) if hosts[1] == "n1" else (0, 0)
    promised = 2 if hosts[1] == "n1" else 1
    ranks = Ranks(hosts, local, promised, masks=(("n1", frozenset({0, 1}), True), second))
    row = check(ranks, "CPU masks")
    assert row.status == status
    assert (status == "PASS") or "ranks 0 and 1 on n1 share CPU 1" in row.measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_with_fewer_bits_fail_by_name(monkeypatch, dtype):
    """A GPU that computes in TF32 rounds the factors to 11 bits, and trains to another end."""
    really_multiply = torch.Tensor.__matmul__

    def with_fewer_bits(left, right):
        return really_multiply(*(each.half().to(each.dtype) if each.dtype == dtype else each for each in (left, right)))

    assert {row.status for row in topology.arithmetic_checks(Ranks())} == {"PASS"}
    monkeypatch.setattr(torch.Tensor, "__matmul__", with_fewer_bits)
    failing = [row.name for row in topology.arithmetic_checks(Ranks()) if row.status == "FAIL"]
    assert failing == [f"{str(dtype).removeprefix('torch.')} products"]
