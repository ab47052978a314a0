"""If these fail, ranks that cannot work together train apart, wait for a time-out, or never start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FAKE_GPUS = [sys.executable, str(Path(__file__).parent / "fake_gpus.py")]
TRAIN = ["torchreg", "train", "--device", "cpu", "--distributed", "torch", "--max-steps", "3", "--name", "met"]


def test_ranks_started_by_hand_train_together(start_ranks, tmp_path):
    # Case L4: without LOCAL_RANK each was a one-rank run of its own.
    ends = start_ranks(TRAIN, [{}, {}])
    assert [end.returncode for end in ends] == [0, 0], ends
    assert "2 ranks on 1 node" in ends[0].stdout
    assert ends[1].stdout == ""
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["met"]


def test_a_rank_of_srun_trains(run, tmp_path):
    # Case L2: every start under srun died.
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
    done = run(*TRAIN, cwd=tmp_path, **step)
    assert done.returncode == 0, done.stderr
    assert "launcher srun" in done.stdout


COMPILED_WITH_NCCL = """
import torch.distributed as dist
from torchreg.distributed.init import init_distributed
dist.is_backend_available = dist.is_nccl_available = lambda *_: True
with init_distributed(device="cpu", runtime="torch") as runtime:
    print(dist.get_backend_config())
"""


def test_the_group_has_the_backends_of_its_device_only(start_ranks):
    # Case L1: torch's CUDA build has NCCL, and refuses it on a machine without a GPU.
    ends = start_ranks([sys.executable, "-c", COMPILED_WITH_NCCL], [{}, {}])
    assert [end.stdout.strip() for end in ends] == ["cpu:gloo", "cpu:gloo"], ends


@pytest.mark.parametrize(
    ("ranks", "answers"),
    [
        # One GPU each, by a launcher's binding: number 0 of every rank (case L8; ROCm's variables too).
        ([{"FAKE_GPUS": "a", "ROCR_VISIBLE_DEVICES": "0"}, {"FAKE_GPUS": "b"}], ["cuda:0|a", "cuda:0|b"]),
        # All GPUs visible to all: the local rank's own.
        ([{"FAKE_GPUS": "a,b", "LOCAL_RANK": "0"}, {"FAKE_GPUS": "a,b", "LOCAL_RANK": "1"}], ["cuda:0|a", "cuda:1|b"]),
        # Two GPUs each: no rank beyond the count of devices.
        ([{"FAKE_GPUS": "a,b"}, {"FAKE_GPUS": "c,d"}], ["cuda:0|a", "cuda:1|d"]),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own(ranks, answers, start_ranks):
    ends = start_ranks(FAKE_GPUS, ranks)
    assert [end.stdout.strip() for end in ends] == [f"{answer}|Fake GPU|Fake GPU" for answer in answers], ends


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        ([{"FAKE_GPUS": "a"}] * 2, "rank 0 and rank 1 (HOST) have one cuda device (a): start 1 rank on this host"),
        ([{"FAKE_GPUS": "a"}, {}], "device is cuda on rank 0 (HOST) and cpu on rank 1 (HOST): name one with --device"),
        ([{"FAKE_GPUS": "a", "DEVICE": "cuda"}, {"DEVICE": "cuda"}], "rank 1 (HOST): device is cuda, and torch"),
    ],
    ids=["one GPU for two", "no GPU on one rank", "a driver that is broken on one rank"],
)
def test_ranks_that_cannot_have_a_gpu_each_are_all_refused_with_their_hosts(ranks, reason, start_ranks):
    # NCCL would end the job with "invalid usage", or ranks of two kinds of device would wait for each other (case L5).
    ends = start_ranks(FAKE_GPUS, ranks)
    assert [end.returncode for end in ends] == [2] * len(ranks), ends
    for end in ends:
        assert reason.replace("HOST", os.uname().nodename) in end.stdout


def test_options_that_differ_between_ranks_are_refused_by_name(start_ranks):
    # Case L7: the main rank's options were everybody's, silently.
    command = ["bash", "-c", f'{" ".join(TRAIN)} --dtype "$OWN_DTYPE"']
    ends = start_ranks(command, [{"OWN_DTYPE": "float32"}, {"OWN_DTYPE": "float64"}])
    assert [end.returncode for end in ends] == [2, 2], ends
    assert "torchreg: error: dtype is float32 on rank 0 (" in ends[0].stderr
    assert "and float64 on rank 1 (" in ends[0].stderr
    assert ends[1].stderr == ""


def test_a_rank_of_another_job_is_refused_by_the_jobs_names(start_ranks):
    # Case L7: two jobs on one host and one MASTER_PORT trained each other's runs.
    ends = start_ranks(TRAIN, [{"PBS_JOBID": "17.host"}, {"PBS_JOBID": "18.host"}])
    assert [end.returncode for end in ends] == [2, 2], ends
    assert "job is PBS_JOBID=17.host on rank 0 (" in ends[0].stderr
    assert "choose another MASTER_PORT" in ends[0].stderr


def test_a_second_rank_of_one_number_is_refused_and_the_first_goes_on(start_ranks):
    ends = start_ranks(TRAIN, [{}, {"RANK": "1"}, {"RANK": "1"}], WORLD_SIZE="2")
    codes = [end.returncode for end in ends]
    assert sorted(codes) == [0, 0, 2], ends
    assert "this is a second rank 1 of 2" in ends[codes.index(2)].stderr


def test_a_rank_that_does_not_come_is_named_in_one_line(start_ranks):
    # "waited for the other ranks" of a job of a thousand does not say where to look.
    ends = start_ranks([*TRAIN, "--timeout-s", "10"], [{}, {"RANK": "2"}], WORLD_SIZE="3")
    assert [end.returncode for end in ends] == [1, 1], ends
    assert ends[0].stderr.count("\n") == 1, ends
    assert "waited 10 s for rank 1 of 3 to come" in ends[0].stderr
    assert ends[1].stderr.count("\n") <= 1, "no launcher ends it: it may say that the main rank is gone"


def test_a_port_that_is_none_is_refused(start_ranks):
    # Case W5.
    ports = "99999", "0", "x"
    ends = start_ranks(TRAIN, [{"MASTER_PORT": port} for port in ports])
    assert [end.returncode for end in ends] == [2, 2, 2], ends
    for port, end in zip(ports, ends, strict=True):
        assert f"MASTER_PORT is '{port}': it must be a number from 1 to 65535" in end.stderr


@pytest.mark.parametrize("sign", ["PALS_RANKID", "ALPS_APP_PE"])
def test_a_rank_of_a_launcher_that_mpi_does_not_know_is_refused(sign, run, tmp_path):
    # N silent copies of a one-rank run are the worst failure of all (case L4).
    done = run(*TRAIN, cwd=tmp_path, **{sign: "3"})
    assert done.returncode == 2
    assert f"{sign} says rank 3, but MPI" in done.stderr
    assert not (tmp_path / "runs").exists()


def in_namespace(*commands):
    """A shell line with network and host name of its own, as no user of the machine sees them."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("a host of its own is made by ip and unshare: apt install iproute2 util-linux")
    probe = subprocess.run(["unshare", "--net", "--uts", "ip", "link", "set", "lo", "up"], check=False)
    if probe.returncode:
        pytest.skip("a host of its own (IPv6 alone, an unknown name) is a network namespace, which takes root")
    return ["unshare", "--net", "--uts", "bash", "-ec", "; ".join(["ip link set lo up", *commands])]


@pytest.mark.parametrize(
    ("address", "before"),
    [("::1", ["ip addr del 127.0.0.1/8 dev lo"]), ("127.0.0.1", ["hostname nobody-knows-this"])],
    ids=["IPv6 only", "host name that does not resolve"],
)
def test_ranks_meet_where_plain_torch_meets(address, before, run, tmp_path):
    # Case L6.
    ranks = f"RANK=1 {' '.join(TRAIN)} & RANK=0 {' '.join(TRAIN)}; wait $!"
    done = run(
        *in_namespace(*before, ranks),
        cwd=tmp_path,
        WORLD_SIZE="2",
        MASTER_ADDR=address,
        MASTER_PORT="29811",
        timeout_s=60,
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks on 1 node" in done.stdout


SLOW_TO_PREPARE = """
import time
from torchreg.distributed.init import init_distributed
with init_distributed(device="cpu", runtime="torch", timeout_s=3) as runtime:
    print(runtime.from_main(lambda: time.sleep(7) or "prepared"))
"""


def test_ranks_wait_for_a_main_rank_that_is_busy_longer_than_the_time_out(start_ranks):
    # Case W2: a table that takes longer than --timeout-s to read was "lost the other ranks".
    ends = start_ranks([sys.executable, "-c", SLOW_TO_PREPARE], [{}, {}])
    assert [end.stdout.strip() for end in ends] == ["state", "state"], ends


def test_ranks_do_not_wait_for_a_main_rank_that_is_stopped(tmp_path, run):
    script = tmp_path / "stopped.py"
    script.write_text(
        "import os, signal\n"
        "from torchreg.distributed.init import init_distributed\n"
        'with init_distributed(device="cpu", runtime="torch", timeout_s=3) as runtime:\n'
        "    runtime.from_main(lambda: os.kill(os.getpid(), signal.SIGSTOP))\n"
    )
    done = run("mpiexec", "-n", "3", sys.executable, str(script), cwd=tmp_path, timeout_s=60)
    assert done.returncode not in (0, None)
    assert "waited 3 s for the other ranks to prepare the run" in done.stderr


def test_auto_on_a_machine_with_a_driver_says_why_it_is_the_cpu(monkeypatch, tmp_path):
    # A job that paid for GPUs trained on CPUs, and nothing said so.
    from torchreg.distributed import devices

    monkeypatch.setattr(devices, "_DRIVERS", (str(tmp_path),))
    assert f"this machine has a GPU driver ({tmp_path})" in devices.why_not_a_gpu("auto", {})
    assert devices.why_not_a_gpu("cpu", {}) is None
    assert devices.why_not_a_gpu("auto", {"CUDA_VISIBLE_DEVICES": ""}) is None
    monkeypatch.setattr(devices, "_DRIVERS", (str(tmp_path / "none"),))
    assert devices.why_not_a_gpu("auto", {}) is None
