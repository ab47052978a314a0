"""If these fail, a job trains over TCP on a machine with a fast network, and verify gives no warning."""

import pytest

from torchreg.verification import network

from .test_topology import Ranks

# Lines as NCCL 2.14 to 2.28, aws-ofi-nccl and RCCL write them.
SLINGSHOT = """
nid001:51404:52019 [0] NCCL INFO Bootstrap : Using hsn0:10.150.0.12<0>
nid001:51404:52019 [0] NCCL INFO NET/OFI Using aws-ofi-nccl 1.6.0
nid001:51404:52019 [0] NCCL INFO NET/OFI Selected Provider is cxi (found 4 nics)
nid001:51404:52019 [0] NCCL INFO Using network AWS Libfabric
nid001:51404:52019 [0] NCCL INFO Channel 00/0 : 3[3] -> 4[0] [receive] via NET/AWS Libfabric/0/GDRDMA
nid001:51404:52019 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[1] via P2P/CUMEM/read
"""
INFINIBAND = """
gpu01:4015539:4015652 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB ib0:10.0.0.1<0>
gpu01:4015539:4015652 [0] NCCL INFO Using network IB
gpu01:4015539:4015652 [0] NCCL INFO Channel 07/0 : 0[0] -> 2[0] [receive] via NET/IB/3/GDRDMA
"""
SOCKETS = """
ubuntu:9621:9692 [7] NCCL INFO NET/Plugin : No plugin found (libnccl-net.so), using internal implementation
ubuntu:9621:9692 [7] NCCL INFO NET/IB : No device found.
ubuntu:9621:9692 [7] NCCL INFO Using network Socket
ubuntu:9621:9692 [7] NCCL INFO Channel 14/0 : 15[7] -> 0[0] [send] via NET/Socket/0
ubuntu:9621:9688 [3] NCCL INFO Channel 05 : 11[3] -> 12[4] via SHM/direct/direct
"""
NO_CHANNEL = "gpu:919:1150 [0] NCCL INFO Using network Socket\n"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (SLINGSHOT, "NCCL: NET/AWS Libfabric with GDRDMA, P2P (libfabric cxi)"),
        (INFINIBAND, "NCCL: NET/IB with GDRDMA"),
        (SOCKETS, "NCCL: NET/Socket, SHM"),
        (NO_CHANNEL, "NCCL: NET/Socket, not used yet"),
        ("", ""),
    ],
)
def test_the_transports_are_read_from_the_log_of_nccl(log, expected):
    assert network.nccl_network(log) == expected


@pytest.mark.parametrize(
    ("version", "environ", "expected"),
    [
        ("MPICH Version:      5.0.2\nMPICH Device:       ch4:ucx ofi\n", {}, "MPI: ch4:ucx ofi, no settings"),
        ("MPICH Device:\tch4:ofi", {"FI_PROVIDER": "cxi"}, "MPI: ch4:ofi, FI_PROVIDER=cxi"),
        ("Open MPI v5.0.3, package: Open MPI", {"UCX_TLS": "tcp"}, "MPI: Open MPI v5.0.3, UCX_TLS=tcp"),
        ("MPI VERSION    : CRAY MPICH version 8.1.28\nMPI BUILD", {}, "MPI: CRAY MPICH version 8.1.28, no settings"),
    ],
)  # fmt: skip
def test_the_network_of_mpi_is_known_by_its_version_and_settings(version, environ, expected):
    assert network.mpi_network(version, environ) == expected


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("net/hsn0", "Slingshot"),
        ("cxi/cxi0", "Slingshot"),
        ("infiniband/mlx5_0", "InfiniBand or RoCE"),
        ("net/lo", None),
    ],
)
def test_a_fast_network_is_known_by_its_devices(tmp_path, device, expected):
    (tmp_path / device).mkdir(parents=True)
    assert network.fast_fabric(tmp_path) == expected


@pytest.fixture
def row(tmp_path, monkeypatch):
    """The row of a rank whose NCCL wrote this log, on hosts with Slingshot."""
    monkeypatch.setattr(network, "fast_fabric", lambda classes: "Slingshot")

    def check(log, hosts=("n1", "n2"), backend="nccl"):
        if log is not None:
            (tmp_path / "log").write_text(log)
        monkeypatch.setenv("NCCL_DEBUG_FILE", str(tmp_path / ("log" if log is not None else "log.%h")))
        return network.network_check(Ranks(hosts=hosts, backend=backend)).measured

    return check


def test_tcp_beside_a_fast_network_is_a_warning(row):
    assert row(SOCKETS).endswith("; warning: NCCL: NET/Socket, SHM, on a host with Slingshot")
    assert "warning: gloo over TCP" in row("", backend="gloo")
    assert "warning" not in row(SLINGSHOT)
    assert row(None) == "gloo over TCP (interface of the host name); NCCL, whose log is not captured"
    assert "warning" not in row(SOCKETS, hosts=("n1", "n1")), "one node needs no network"


def test_a_log_that_the_user_asked_for_stays_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(network.torch.cuda, "is_available", lambda: True)
    environ = {"NCCL_DEBUG": "WARN"}
    network.capture_nccl_log(environ)
    assert environ == {"NCCL_DEBUG": "WARN"}
    monkeypatch.setattr(network.tempfile, "tempdir", str(tmp_path))
    environ = {}
    network.capture_nccl_log(environ)
    assert environ["NCCL_DEBUG"] == "INFO"
    assert environ["NCCL_DEBUG_FILE"].startswith(str(tmp_path))
