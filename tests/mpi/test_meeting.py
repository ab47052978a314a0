"""If these fail, ranks that cannot work together train apart, wait for a time-out, or never start."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torchreg.distributed import devices
from torchreg.distributed.init import init_distributed

TRAIN = ["torchreg", "train", "--device", "cpu", "--distributed", "torch", "--max-steps", "3", "--name", "met"]
TRAIN += ["--optimizer", "manual"]  # torch's optimizers import for seconds what only torch.compile needs


def test_ranks_with_an_address_train_together_and_a_second_one_of_a_number_is_refused(start_ranks, tmp_path):
    # Case L4: without a launcher and LOCAL_RANK each was a one-rank run of its own.
    ends = start_ranks(TRAIN, [{}, {"RANK": "1"}, {"RANK": "1"}], WORLD_SIZE="2")
    assert sorted(end.returncode for end in ends) == [0, 0, 2], ends
    (refused,) = [end for end in ends if end.returncode == 2]
    assert "this is a second rank 1 of 2" in refused.stderr
    assert "2 ranks on 1 node" in ends[0].stdout
    assert [end.stdout for end in ends[1:]] == ["", ""]
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["met"]


def test_a_rank_of_srun_trains(run, tmp_path):
    # Case L2: every start under srun died.
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
    done = run(*TRAIN, cwd=tmp_path, **step)
    assert done.returncode == 0, done.stderr
    assert "launcher srun" in done.stdout


MEETINGS = {
    # Case L1: torch's CUDA build has NCCL, and refuses it on a machine without a GPU.
    "compiled with NCCL": ([{"NCCL": "1", "DEVICE": "cpu"}] * 2, ["cpu|cpu:gloo", "cpu|cpu:gloo"]),
    # A launcher's binding: each rank sees one GPU, at index 0 (case L8; ROCm's variables too).
    "one GPU each": (
        [{"FAKE_GPUS": "a", "ROCR_VISIBLE_DEVICES": "0"}, {"FAKE_GPUS": "b"}],
        ["cuda:0|a|Fake GPU|Fake GPU", "cuda:0|b|Fake GPU|Fake GPU"],
    ),
    "all GPUs visible": (
        [{"FAKE_GPUS": "a,b", "LOCAL_RANK": "0"}, {"FAKE_GPUS": "a,b", "LOCAL_RANK": "1"}],
        ["cuda:0|a|Fake GPU|Fake GPU", "cuda:1|b|Fake GPU|Fake GPU"],
    ),
    "two GPUs each": (
        [{"FAKE_GPUS": "a,b"}, {"FAKE_GPUS": "c,d"}],
        ["cuda:0|a|Fake GPU|Fake GPU", "cuda:1|d|Fake GPU|Fake GPU"],
    ),
    # NCCL would end the job with "invalid usage", or ranks of two kinds of device would wait for each other (case L5).
    "one GPU for two": (
        [{"FAKE_GPUS": "a"}] * 2,
        "rank 0 and rank 1 (HOST) have one cuda device (a): start 1 rank on this host",
    ),
    "no GPU on one rank": (
        [{"FAKE_GPUS": "a"}, {}],
        "device is cuda on rank 0 (HOST) and cpu on rank 1 (HOST): name one with --device",
    ),
    "a broken driver on one rank": (
        [{"FAKE_GPUS": "a", "DEVICE": "cuda"}, {"DEVICE": "cuda"}],
        "rank 1 (HOST): device is cuda, and torch",
    ),
    # Case L7: two jobs on one host and one MASTER_PORT trained each other's runs.
    "two jobs": (
        [{"PBS_JOBID": "17.host"}, {"PBS_JOBID": "18.host"}],
        "job is PBS_JOBID=17.host on rank 0 (HOST) and PBS_JOBID=18.host on rank 1 (HOST): two jobs have one "
        "MASTER_ADDR and MASTER_PORT; choose another MASTER_PORT",
    ),
    "other options": (
        [{"OPTION": "a"}, {"OPTION": "b"}],
        "option is a on rank 0 (HOST) and b on rank 1 (HOST): start all ranks with the same options",
    ),
}


def test_ranks_agree_on_devices_jobs_and_options_or_are_all_refused_with_the_reason(start_ranks):
    scenarios = json.dumps([ranks for ranks, _ in MEETINGS.values()])
    ends = start_ranks([sys.executable, str(Path(__file__).parent / "meetings.py")], [{}, {}], SCENARIOS=scenarios)
    answers = dict(zip(MEETINGS, zip(*(end.stdout.splitlines() for end in ends), strict=True), strict=True))
    for name, (_, expected) in MEETINGS.items():
        if isinstance(expected, list):
            assert list(answers[name]) == expected, name
        else:
            assert all(expected.replace("HOST", os.uname().nodename) in answer for answer in answers[name]), answers


def test_options_that_differ_between_ranks_are_refused_by_name(start_ranks):
    # Case L7: the main rank's options were everybody's, silently.
    command = ["bash", "-c", f'{" ".join(TRAIN)} --dtype "$OWN_DTYPE"']
    ends = start_ranks(command, [{"OWN_DTYPE": "float32"}, {"OWN_DTYPE": "float64"}])
    assert [end.returncode for end in ends] == [2, 2], ends
    assert "torchreg: error: dtype is float32 on rank 0 (" in ends[0].stderr
    assert "and float64 on rank 1 (" in ends[0].stderr
    assert ends[1].stderr == ""


def test_a_rank_that_does_not_join_is_named_in_one_line(start_ranks):
    # "waited for the other ranks" of a job of a thousand does not name the host to look at.
    ends = start_ranks([*TRAIN, "--timeout-s", "8"], [{}, {"RANK": "2"}], WORLD_SIZE="3")
    assert [end.returncode for end in ends] == [1, 1], ends
    assert ends[0].stderr.count("\n") == 1, ends
    assert "waited 8 s for rank 1 of 3 to join" in ends[0].stderr
    assert ends[1].stderr.count("\n") <= 1, "no launcher ends it: it may report that the main rank is gone"


@pytest.mark.parametrize("port", ["99999", "0", "x"])
def test_a_port_that_is_none_is_refused(port, monkeypatch):
    # Case W5.
    variables = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    for name, value in {**variables, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"MASTER_PORT is '{port}': it must be a number from 1 to 65535"):
        init_distributed(device="cpu", distributed="torch")


def test_a_rank_of_a_launcher_that_mpi_does_not_know_is_refused(run, tmp_path):
    # N silent copies of a one-rank run are the worst failure of all (case L4).
    signs = "PALS_RANKID", "ALPS_APP_PE"
    started = " ".join(f"{sign}=3 {' '.join(TRAIN)} & pids+=($!);" for sign in signs)
    done = run("bash", "-c", f'{started} for pid in "${{pids[@]}}"; do wait $pid; echo $?; done', cwd=tmp_path)
    assert done.stdout.split() == ["2", "2"]
    for sign in signs:
        assert f"{sign} is 3, but MPI" in done.stderr
    assert not (tmp_path / "runs").exists()


def in_namespace(*commands):
    """A shell line with network and host name of its own, as no user of the machine sees them."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("ip and unshare make a host with other addresses or names: apt install iproute2 util-linux")
    unshare = ["unshare", *(["--map-root-user"] if os.geteuid() else []), "--net", "--uts"]
    probe = subprocess.run([*unshare, "ip", "link", "set", "lo", "up"], check=False, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"the kernel refuses network namespaces, even as root of a user namespace: {probe.stderr.strip()}")
    return [*unshare, "bash", "-ec", "; ".join(["ip link set lo up", *commands])]


@pytest.mark.parametrize(
    ("address", "before"),
    [("::1", ["ip addr del 127.0.0.1/8 dev lo"]), ("127.0.0.1", ["hostname nobody-knows-this"])],
    ids=["IPv6 only", "host name that does not resolve"],
)
def test_ranks_connect_where_plain_torch_does(address, before, run, tmp_path):
    # Case L6.
    ranks = f"RANK=1 {' '.join(TRAIN)} & RANK=0 {' '.join(TRAIN)}; wait $!"
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": "29811"}
    done = run(*in_namespace(*before, ranks), cwd=tmp_path, timeout_s=60, **address)
    assert done.returncode == 0, done.stderr
    assert "2 ranks on 1 node" in done.stdout


BUSY_THEN_STOPPED = """
import os, signal, time
from torchreg.distributed.init import init_distributed
with init_distributed(device="cpu", distributed="torch", timeout_s=3) as communicator:
    print(communicator.from_main(lambda: time.sleep(5) or "prepared"), flush=True)
    communicator.barrier()  # rank 0 has the store: the others must have read it before rank 0 stops
    communicator.from_main(lambda: os.kill(os.getpid(), signal.SIGSTOP))
"""


def test_ranks_wait_for_a_busy_main_rank_longer_than_the_time_out_and_not_for_a_stopped_one(tmp_path, run):
    # Case W2: a table that takes longer than --timeout-s to read was "lost the other ranks".
    script = tmp_path / "busy.py"
    script.write_text(BUSY_THEN_STOPPED)
    done = run("mpiexec", "-n", "3", sys.executable, str(script), cwd=tmp_path, timeout_s=60)
    assert done.stdout.count("prepared") == 3, done.stderr  # mpiexec may join lines
    assert done.returncode not in (0, None)
    assert "waited 3 s for rank 0 to prepare the run" in done.stderr


def test_auto_on_a_machine_with_a_driver_explains_why_it_is_the_cpu(monkeypatch, tmp_path):
    # A job that paid for GPUs trained on CPUs, silently.
    monkeypatch.setattr(devices, "DRIVERS", (str(tmp_path),))
    assert f"this machine has a GPU driver ({tmp_path})" in devices.why_not_a_gpu("auto", {})
    assert devices.why_not_a_gpu("cpu", {}) is None
    assert devices.why_not_a_gpu("auto", {"CUDA_VISIBLE_DEVICES": ""}) is None
    monkeypatch.setattr(devices, "DRIVERS", (str(tmp_path / "none"),))
    assert devices.why_not_a_gpu("auto", {}) is None
