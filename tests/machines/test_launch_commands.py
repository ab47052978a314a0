"""If these fail, a job starts the wrong ranks in the wrong places, or a launcher refuses its command line at once.

Each command line is written out as the launcher's own manual or the site's guide spells it.
"""

import shlex
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchreg.cli.scale_command import run
from torchreg.machines.known_machines import MACHINES
from torchreg.machines.launch_commands import allocated_hosts, available_launcher, launch_command, place_ranks

TWO_HOSTS = ("x3001c0s1b0n0", "x3001c0s7b0n0")


def test_polaris_under_pals():
    tokens = launch_command(
        "pals",
        "polaris",
        num_nodes=2,
        ranks_per_node=4,
        hosts=TWO_HOSTS,
        env={"OMP_NUM_THREADS": "8"},
        library_path="/opt/cray/lib",
    )
    assert tokens == [
        *("mpiexec", "-n", "8", "--ppn", "4", "--hosts", "x3001c0s1b0n0,x3001c0s7b0n0"),
        *("--cpu-bind", "list:24-31,56-63:16-23,48-55:8-15,40-47:0-7,32-39"),
        *("--env", "NCCL_NET_GDR_LEVEL=PHB"),
        *("--env", "NCCL_CROSS_NIC=1"),
        *("--env", "FI_CXI_DISABLE_HOST_REGISTER=1"),
        *("--env", "FI_CXI_DEFAULT_CQ_SIZE=131072"),
        *("--env", "MPICH_GPU_SUPPORT_ENABLED=0"),
        *("--env", "NCCL_COLLNET_ENABLE=1"),
        *("--env", "FI_MR_CACHE_MONITOR=userfaultfd"),
        *("--env", "TMPDIR=/tmp"),
        *("--env", "NCCL_NET=AWS Libfabric"),
        "--env",
        "LD_LIBRARY_PATH=/soft/libraries/hwloc/lib:/soft/libraries/aws-ofi-nccl/v1.9.1-aws/lib:/opt/cray/lib",
        *("--env", "OMP_NUM_THREADS=8"),
    ]


def test_half_a_polaris_node_is_bound_to_the_cpus_of_its_first_gpus():
    tokens = launch_command("pals", "polaris", num_nodes=1, ranks_per_node=2)
    assert tokens[:7] == ["mpiexec", "-n", "2", "--ppn", "2", "--cpu-bind", "list:24-31,56-63:16-23,48-55"]


def test_variables_of_nccl_can_be_excluded_where_the_plugin_hangs():
    nccl = ["NCCL_NET_GDR_LEVEL", "NCCL_CROSS_NIC", "NCCL_COLLNET_ENABLE", "NCCL_NET"]
    for num_nodes in (1, 2):  # a campaign excludes a variable from all its launches
        tokens = launch_command("pals", "polaris", num_nodes=num_nodes, ranks_per_node=4, without=nccl)
        assert "NCCL" not in " ".join(tokens)
        assert "FI_MR_CACHE_MONITOR=userfaultfd" in tokens


def test_nccl_is_asked_for_the_plugin_across_nodes_only():
    """On one node the plug-in does not initialise, and NCCL ends the run where NCCL_NET names it."""
    one, two = (launch_command("pals", "polaris", num_nodes=n, ranks_per_node=4) for n in (1, 2))
    assert "NCCL_NET=AWS Libfabric" in two
    assert "NCCL_NET=" not in " ".join(one)
    asked = launch_command("pals", "polaris", num_nodes=1, ranks_per_node=4, env={"NCCL_NET": "OFI"})
    assert "NCCL_NET=OFI" in asked


@pytest.mark.parametrize("machine", ["polaris", "perlmutter", "frontier", "lumi"])
def test_cray_mpich_is_kept_from_asking_for_a_library_that_python_does_not_link(machine):
    tokens = launch_command("srun", machine, num_nodes=1, ranks_per_node=1)
    assert "MPICH_GPU_SUPPORT_ENABLED=0" in tokens


def test_aurora_under_pals():
    tokens = launch_command("pals", "aurora", num_nodes=2, ranks_per_node=12, hosts=TWO_HOSTS)
    assert tokens == [
        *("mpiexec", "-n", "24", "--ppn", "12", "--hosts", "x3001c0s1b0n0,x3001c0s7b0n0", "--cpu-bind"),
        "list:4-7:8-11:12-15:16-19:20-23:24-27:56-59:60-63:64-67:68-71:72-75:76-79",
        *("--env", "CCL_PROCESS_LAUNCHER=pmix"),
        *("--env", "CCL_ATL_TRANSPORT=mpi"),
        *("--env", "CCL_KVS_MODE=mpi"),
        *("--env", "CCL_OP_SYNC=1"),
        *("--env", "CCL_ATL_SYNC_COLL=1"),
        *("--env", "FI_MR_CACHE_MONITOR=userfaultfd"),
        *("--env", "TMPDIR=/tmp"),
    ]


def test_perlmutter_under_slurm():
    tokens = launch_command(
        "srun", "perlmutter", num_nodes=2, ranks_per_node=4, hosts=("nid001", "nid002"), extra=["--label"]
    )
    assert tokens == [
        *("srun", "--nodes", "2", "--ntasks", "8", "--ntasks-per-node", "4", "--nodelist", "nid001,nid002"),
        *("--kill-on-bad-exit=1", "--cpus-per-task", "32", "--cpu-bind", "cores"),
        *("--gpus-per-node", "4", "--gpu-bind", "none", "--label"),
        *("env", "CUDA_VISIBLE_DEVICES=3,2,1,0"),  # srun's --export would end at the first comma
        "MPICH_GPU_SUPPORT_ENABLED=0",
    ]


def test_frontier_under_slurm():
    # The options of OLCF's guide to PyTorch.
    tokens = launch_command("srun", "frontier", num_nodes=2, ranks_per_node=8)
    assert tokens == [
        *("srun", "--nodes", "2", "--ntasks", "16", "--ntasks-per-node", "8", "--kill-on-bad-exit=1"),
        *("--cpus-per-task", "7", "--gpus-per-task", "1", "--gpu-bind", "closest"),
        *("env", "NCCL_NET_GDR_LEVEL=PHB", "NCCL_CROSS_NIC=1", "FI_CXI_DISABLE_HOST_REGISTER=1"),
        *("FI_CXI_DEFAULT_CQ_SIZE=131072", "MPICH_GPU_SUPPORT_ENABLED=0", "NCCL_SOCKET_IFNAME=hsn0"),
    ]


def test_lumi_under_slurm():
    # The masks of LUMI's guide to CPU-GPU binding: rank k near die k, without the first core of each L3 region.
    tokens = launch_command("srun", "lumi", num_nodes=1, ranks_per_node=8)
    assert tokens[8:14] == [
        *("--gpus-per-node", "8", "--cpu-bind"),
        "mask_cpu:0xfe000000000000,0xfe00000000000000,0xfe0000,0xfe000000,0xfe,0xfe00,0xfe00000000,0xfe0000000000",
        *("env", "NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3"),
    ]


def test_any_slurm_cluster():
    tokens = launch_command("srun", num_nodes=3, ranks_per_node=2)
    assert tokens == [
        *("srun", "--nodes", "3", "--ntasks", "6", "--ntasks-per-node", "2", "--kill-on-bad-exit=1"),
    ]


def test_mpich_hydra():
    assert launch_command("mpich", num_nodes=1, ranks_per_node=4) == ["mpiexec", "-n", "4", "--ppn", "4"]
    tokens = launch_command(
        "mpich", num_nodes=2, ranks_per_node=2, hosts=("n1", "n2"), env={"A": "x y=z"}, extra=["-launcher", "ssh"]
    )
    assert tokens == [
        *("mpiexec", "-n", "4", "--ppn", "2", "--hosts", "n1,n2", "-launcher", "ssh", "--env", "A=x y=z"),
    ]


@pytest.mark.parametrize("machine", ["polaris", "aurora"])
def test_hydra_never_sees_what_only_pals_knows(machine):
    # It ends with 255 for each of these.
    tokens = launch_command("mpich", machine, num_nodes=1, ranks_per_node=2)
    assert not {"--cpu-bind", "--depth", "--no-vni"} & set(tokens)


def test_open_mpi():
    tokens = launch_command("openmpi", num_nodes=2, ranks_per_node=2, hosts=("n1", "n2"), env={"A": "1"})
    assert tokens == [
        *("mpiexec", "-n", "4", "--map-by", "ppr:2:node", "--host", "n1:2,n2:2", "-x", "PATH", "-x", "A=1"),
    ]


def test_without_a_launcher_there_is_one_process():
    assert launch_command("none", num_nodes=1, ranks_per_node=1) == []
    assert launch_command("none", num_nodes=1, ranks_per_node=1, env={"A": "1"}) == ["env", "A=1"]
    with pytest.raises(ValueError, match="num_ranks is 2 and launcher is none, which starts one process"):
        launch_command("none", num_nodes=1, ranks_per_node=2)


def test_what_the_user_sets_wins_over_the_machine():
    tokens = launch_command("pals", "polaris", num_nodes=1, ranks_per_node=1, env={"NCCL_NET": "Socket"})
    assert [token for token in tokens if token.startswith("NCCL_NET=")] == ["NCCL_NET=Socket"]


BAD = {
    "no nodes": ({"num_nodes": 0}, "num_nodes is 0"),
    "negative": ({"ranks_per_node": -1}, "ranks_per_node is -1"),
    "a host twice": ({"hosts": ("n1", "n1")}, "hosts names n1 2 times"),
    "too few hosts": ({"hosts": ("n1",)}, "num_nodes is 2, and hosts names 1"),
    "too many hosts": ({"hosts": ("n1", "n2", "n3")}, "num_nodes is 2, and hosts names 3"),
    "an empty host": ({"hosts": ("n1", "")}, "hosts has ''"),
    "two hosts in one": ({"hosts": ("n1", "n2,n3")}, "hosts has 'n2,n3'"),
    "an oversubscribed node": ({"machine": "polaris", "ranks_per_node": 8}, "a node of polaris has 4 devices"),
    "no such variable": ({"machine": "polaris", "without": ["NCCL"]}, "without names NCCL"),
    "an odd name": ({"env": {"A B": "1"}}, "env has the name 'A B'"),
    "two lines": ({"env": {"A": "1\n2"}}, "env has A with a line break"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_reported_with_its_numbers(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        launch_command("mpich", **{"num_nodes": 2, "ranks_per_node": 2} | options)


@given(
    launcher=st.sampled_from(["mpich", "pals", "openmpi", "srun"]),
    machine=st.sampled_from(sorted(MACHINES)),
    num_nodes=st.integers(1, 50),
    ranks_per_node=st.integers(1, 4),
    value=st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"])),
)
def test_every_host_and_every_value_arrives_whole(launcher, machine, num_nodes, ranks_per_node, value):
    hosts = [f"n{i}" for i in range(num_nodes)]
    tokens = launch_command(
        launcher,
        machine,
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node,
        hosts=hosts,
        env={"VALUE": value},
    )
    assert f"VALUE={value}" in tokens
    joined = ",".join(f"{host}:{ranks_per_node}" for host in hosts) if launcher == "openmpi" else ",".join(hosts)
    assert joined in tokens
    assert not any("\n" in token for token in tokens), "a job script reads one token a line"


VERSIONS = {
    "mpich": "HYDRA build details:\n    Version:                                 5.0.2\n",
    "openmpi": "mpiexec (Open MPI) 5.0.7\n\nReport bugs to https://www.open-mpi.org/community/help/\n",
    "pals": "mpiexec version 1.2.12\n",
}


@pytest.fixture
def launcher_with(tmp_path):
    """The launcher of an environment whose mpiexec prints this version; None: there is no mpiexec."""

    def detect(version, *, has_srun=False, **variables):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        if version is not None:
            program(folder / "mpiexec", f"echo {shlex.quote(version)}")
        if has_srun:
            program(folder / "srun", "exit 1")
        return available_launcher({"PATH": str(folder), **variables})

    return detect


def test_the_launcher_is_identified_by_the_version_of_mpiexec(launcher_with):
    assert launcher_with(None) == "none"
    for launcher, version in VERSIONS.items():
        assert launcher_with(version) == launcher
    assert launcher_with("mpiexec (OpenRTE) 3.1.4") == "openmpi", "its old name"


def test_a_slurm_job_uses_srun_with_any_mpiexec(launcher_with):
    assert launcher_with(VERSIONS["mpich"], SLURM_JOB_ID="7") == "mpich", "there is no srun"
    assert launcher_with(VERSIONS["mpich"], has_srun=True) == "mpich", "a login node"
    assert launcher_with(VERSIONS["mpich"], SLURM_JOB_ID="7", has_srun=True) == "srun"


def test_an_mpich_of_the_users_own_on_a_pals_machine_is_mpich(launcher_with):
    assert launcher_with(VERSIONS["mpich"], LOADEDMODULES="cray-pals/1.4.0") == "mpich"
    assert launcher_with("1.9", LOADEDMODULES="cray-pals/1.4.0") == "pals"


def test_an_unknown_mpiexec_is_an_error(launcher_with):
    reason = r"mpiexec --version prints {}.*name the launcher \(mpich, pals, openmpi, srun, none\)"
    for version in ("Intel(R) MPI Library for Linux* OS, Version 2021.12 Build 20240213", "Intel MPICH"):
        with pytest.raises(ValueError, match=reason.format(f"'{version[:5]}")):
            launcher_with(version)


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_nodefile_gives_each_host_once_in_its_order(tmp_path):
    # Two chunks of four mpiprocs on n2, one on n1.
    (tmp_path / "nodes").write_text("n2\n" * 4 + "n1\n" * 4 + "n2\n" * 4)
    assert allocated_hosts({"PBS_NODEFILE": str(tmp_path / "nodes")}) == ("n2", "n1")
    assert allocated_hosts({}) == ()


def test_a_nodefile_without_hosts_is_reported(tmp_path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="empty, which names no host"):
        allocated_hosts({"PBS_NODEFILE": str(tmp_path / "empty")})
    with pytest.raises(ValueError, match="missing, which cannot be read"):
        allocated_hosts({"PBS_NODEFILE": str(tmp_path / "missing")})
    with pytest.raises(ValueError, match="PBS_JOBID is set and PBS_NODEFILE is not"):
        allocated_hosts({"PBS_JOBID": "7.polaris"})


def placed(machine="generic", num_nodes=None, ranks_per_node=None, num_ranks=None, available_nodes=3):
    return place_ranks(
        machine,
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node,
        num_ranks=num_ranks,
        available_nodes=available_nodes,
    )


def test_nodes_and_ranks_per_node_follow_from_what_is_given():
    assert placed(ranks_per_node=2) == (3, 2)
    assert placed("polaris") == (3, 4)
    assert placed("aurora", num_nodes=1) == (1, 12)
    assert placed(num_ranks=4, ranks_per_node=2) == (2, 2)
    assert placed(num_ranks=4, num_nodes=2) == (2, 2)
    assert placed(num_ranks=6) == (3, 2)
    assert placed(num_ranks=3, available_nodes=1) == (1, 3)
    assert placed("perlmutter", num_nodes=2, available_nodes=1) == (2, 4)
    assert placed("lumi", num_nodes=2, available_nodes=1) == (2, 8)


def test_numbers_that_contradict_each_other_are_errors():
    with pytest.raises(ValueError, match="num_ranks is 5, num_nodes is 3 and ranks_per_node is 2"):
        placed(num_ranks=5, ranks_per_node=2)
    with pytest.raises(ValueError, match="num_ranks is 4, num_nodes is 3 and ranks_per_node is 1"):
        placed(num_ranks=4)
    with pytest.raises(ValueError, match="ranks_per_node is not given, and machine generic has no default"):
        placed()


def test_the_command_prints_one_token_a_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PBS_NODEFILE", str(tmp_path / "nodes"))
    (tmp_path / "nodes").write_text("n1\nn1\nn2\n")
    options = "--launcher mpich --ranks-per-node 2 --env A=1 'B=2 3' --extra='-launcher ssh'"
    assert run(["command", *shlex.split(options)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *("mpiexec", "-n", "4", "--ppn", "2", "--hosts", "n1,n2", "-launcher", "ssh", "--env", "A=1", "--env", "B=2 3"),
    ]


def test_the_command_in_a_slurm_job_takes_its_nodes(capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    assert run(["command", "--launcher", "srun", "--machine", "perlmutter"]) == 0
    assert capsys.readouterr().out.split()[:7] == ["srun", "--nodes", "3", "--ntasks", "12", "--ntasks-per-node", "4"]


def test_the_command_with_nothing_to_print_prints_nothing(capsys):
    assert run(["command", "--launcher", "none", "--num-ranks", "1"]) == 0
    assert capsys.readouterr().out == ""


def test_the_command_reports_what_is_wrong():
    with pytest.raises(ValueError, match="env has 'A': give NAME=VALUE"):
        run(["command", "--num-ranks", "1", "--env", "A"])
    with pytest.raises(ValueError, match="hosts has ''"):
        run(["command", "--launcher", "mpich", "--ranks-per-node", "1", "--hosts", "n1,"])
    with pytest.raises(ValueError, match="num_nodes is 4, and hosts names 2"):
        run(["command", "--launcher", "mpich", "--num-nodes", "4", "--ranks-per-node", "1", "--hosts", "n1,n2"])
    with pytest.raises(ValueError, match='extra is "\'open", which no shell could split'):
        run(["command", "--num-ranks", "1", "--extra", "'open"])
