"""If these fail, the number of ranks changes what is learned, or a failed rank leaves the others hanging."""

import json
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from torchreg.distributed.init import init_distributed
from torchreg.runs.run import train

from .worker import bits, configurations, ordered_configurations

WORKER = str(Path(__file__).parent / "worker.py")
RTOL = 1e-10


def launch(launcher, num_ranks):
    if launcher == "mpiexec":
        return ["mpiexec", "-n", str(num_ranks), sys.executable]
    return ["torchrun", "--standalone", "--local-addr", "localhost", "--nproc-per-node", str(num_ranks)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """The weights of one process, to which every world size is held."""
    runs_dir = str(tmp_path_factory.mktemp("one"))
    with init_distributed(device="cpu") as communicator:
        return {key: train(config, communicator) for key, config in configurations(runs_dir, with_mpi=True)}


@pytest.mark.parametrize(("launcher", "num_ranks"), [("mpiexec", 3), ("torchrun", 4), ("torchrun", 8)])
def test_the_same_global_batch_gives_the_same_weights_at_every_world_size(launcher, num_ranks, one_rank, run, tmp_path):
    output = tmp_path / "results.json"
    sync = "mpi" if launcher == "mpiexec" else "torch"
    done = run(*launch(launcher, num_ranks), WORKER, str(output), str(tmp_path / "runs"), sync, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(output.read_text())
    assert answer["world_size"] == num_ranks
    assert len(answer["results"]) == len([*configurations("", with_mpi=sync == "mpi")])
    for key, result in answer["results"].items():
        expected = one_rank[key]
        np.testing.assert_allclose(result["weight"], expected.weight, rtol=RTOL, err_msg=key)
        np.testing.assert_allclose(result["bias"], expected.bias, rtol=RTOL, err_msg=key)
        np.testing.assert_allclose(result["loss"], expected.loss, rtol=RTOL, err_msg=key)
        assert result["num_samples"] == expected.num_samples


@pytest.fixture(scope="module")
def one_rank_bits(tmp_path_factory):
    runs_dir = str(tmp_path_factory.mktemp("reproducible"))
    with init_distributed(device="cpu") as communicator:
        return {
            key: bits(train(config, communicator)) for key, config in ordered_configurations(runs_dir, with_mpi=True)
        }


@pytest.mark.parametrize(("launcher", "num_ranks"), [("torchrun", 6)])  # 1 to 3 under mpiexec: test_golden.py
def test_ordered_reduction_gives_the_same_bits_at_every_world_size(launcher, num_ranks, one_rank_bits, run, tmp_path):
    output = tmp_path / "results.json"
    sync = "mpi" if launcher == "mpiexec" else "torch"
    done = run(
        *launch(launcher, num_ranks), WORKER, str(output), str(tmp_path / "runs"), sync, "reproducible", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(output.read_text())
    assert answer["world_size"] == num_ranks
    assert len(answer["results"]) == len([*ordered_configurations("", with_mpi=sync == "mpi")])
    for key, numbers in answer["results"].items():
        assert numbers == one_rank_bits[key], key


def test_ordered_reduction_of_all_combinations_agrees_to_rounding(one_rank_bits):
    for name in ("shuffle", "random"):
        ends = [
            [float.fromhex(number) for number in numbers]
            for key, numbers in one_rank_bits.items()
            if key.endswith(name) and "sequential" not in key
        ]
        assert len(ends) == 4
        for end in ends:
            np.testing.assert_allclose(end, ends[0], rtol=1e-9)


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_the_command_speaks_once_and_only_json_on_stdout(launcher, run, tmp_path):
    done = run(
        *launch(launcher, 3),
        "-m",
        "torchreg",
        "train",
        "--json",
        "--distributed",
        "torch",
        "--max-steps",
        "4",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["world_size"] == 3
    assert done.stderr.count("3 ranks on 1 node · launcher") == 1
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_divergence_ends_every_rank_with_exit_code_3_and_a_record(run, tmp_path):
    options = ["--base-learning-rate", "9", "9", "--name", "gone", "--distributed", "torch"]
    done = run(*launch("mpiexec", 3), "-m", "torchreg", "train", *options, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("diverged at step") == 1
    assert json.loads((tmp_path / "runs/gone/record.json").read_text())["result"]["stopped_by"] == "divergence"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--data", "nowhere.csv"], "nowhere.csv, which does not exist"),
        (["--global-batch-size", "0"], "global_batch_size is 0"),
        (["--local-batch-size", "200"], "200 samples × 3 ranks"),
    ],
)
def test_bad_input_is_told_once_and_ends_all_ranks_with_exit_code_2(options, part, run, tmp_path):
    done = run(*launch("mpiexec", 3), "-m", "torchreg", "train", "--distributed", "torch", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("torchreg: error:") == 1
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


FAILING = """
import sys
from torchreg.distributed.init import init_distributed
with init_distributed(sync="ddp", device="cpu", distributed="torch") as communicator:
    if communicator.rank == 1:
        raise OSError("the disk of rank 1 is gone")
    communicator.barrier()
    communicator.barrier()
"""


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_a_failure_on_one_rank_ends_all_with_its_reason_once(launcher, run, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    started = time.monotonic()
    done = run(*launch(launcher, 3), str(script), cwd=tmp_path)
    assert done.returncode != 0
    assert time.monotonic() - started < 60, "the others must not wait for the time-out of 300 s"
    assert done.stderr.count("torchreg: error on rank") == 1, done.stderr
    assert "OSError: the disk of rank 1 is gone" in done.stderr


KILLED = """
import os, signal
from torchreg.distributed.init import init_distributed
with init_distributed(sync="ddp", device="cpu", distributed="torch") as communicator:
    if communicator.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    communicator.barrier()
"""


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_a_killed_rank_ends_all(launcher, run, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = run(*launch(launcher, 3), str(script), cwd=tmp_path, timeout_s=120)
    assert done.returncode not in (0, -signal.SIGKILL)


def test_a_launcher_that_mpi_does_not_know_of_is_an_error_that_names_both(run, tmp_path):
    # Four copies that each think MPI has one rank: what a wrong mpiexec does.
    environment = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4"}
    script = (
        "from torchreg.distributed.rendezvous import agree_with_mpi\n"
        "from torchreg.distributed.launcher import detect_launcher\n"
        f"env = {environment}\n"
        "try:\n"
        "    agree_with_mpi(detect_launcher(env), 'ddp', env)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = run(sys.executable, "-c", script, cwd=tmp_path)
    assert "MPICH mpiexec started rank 2 of 4, but MPI (MPICH Version" in done.stdout, done.stderr
    assert "reports rank 0 of 1" in done.stdout


def test_torchrun_with_mpi_averaging_is_refused(run, tmp_path):
    done = run(*launch("torchrun", 2), "-m", "torchreg", "train", "--sync", "mpi", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("torchreg: error:") == 1
    assert "torchrun started rank 0 of 2, but MPI" in done.stderr


LISTENING = """
import os
from pathlib import Path
from torchreg.distributed.init import init_distributed

with init_distributed(sync="ddp", device="cpu", distributed="torch") as communicator:
    communicator.barrier()
    descriptors = Path("/proc/self/fd")
    mine = {os.readlink(descriptors / name) for name in os.listdir(descriptors) if os.path.islink(descriptors / name)}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                print(f"listens {fields[1].split(':')[0]}\\n", end="", flush=True)  # one write
    communicator.barrier()
"""


def test_sockets_of_one_node_are_on_loopback_only(run, tmp_path):
    # Ranks started by hand: MPI, whose sockets are its own, has no part in it.
    script = tmp_path / "listening.py"
    script.write_text(LISTENING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = f"LOCAL_RANK=0 RANK=0 {sys.executable} {script} & LOCAL_RANK=1 RANK=1 {sys.executable} {script}; wait $!"
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = run("bash", "-ec", both, cwd=tmp_path, **world)
    assert done.returncode == 0, done.stderr
    addresses = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("listens")}
    assert addresses, done.stdout
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}, "anyone on the network can connect"
