"""If these fail, ranks speak over each other, or a failed rank leaves the others hanging."""

import json
import signal
import socket
import sys

import pytest


def launch(launcher, num_ranks):
    if launcher == "mpiexec":
        return ["mpiexec", "-n", str(num_ranks), sys.executable]
    return ["torchrun", "--standalone", "--local-addr", "localhost", "--nproc-per-node", str(num_ranks)]


TRAIN = ["train", "--distributed", "torch"]
BAD_INPUT = {
    "data": (["--data", "nowhere.csv"], "nowhere.csv, which does not exist"),
    "batch": (["--global-batch-size", "0"], "global_batch_size is 0"),
    "world size": (["--local-batch-size", "200"], "200 samples × 3 ranks"),
}
JSON = {"json": {"arguments": [*TRAIN, "--json", "--max-steps", "4"]}}
FAILING = {"failing": {"program": "tests.mpi.failing:main", "last": True}}
ON_THREE_RANKS = {
    **JSON,
    **{f"bad {name}": {"arguments": [*TRAIN, *options]} for name, (options, _) in BAD_INPUT.items()},
    "divergence": {"arguments": [*TRAIN, "--base-learning-rate", "9", "9", "--name", "gone"]},
    **FAILING,
}
ON_TORCHRUN = {name: entry | {"world_size": 3} for name, entry in (JSON | FAILING).items()}


@pytest.fixture(params=["on_three_ranks", "on_torchrun"], ids=["mpiexec", "torchrun"])
def launched(request):
    return request.getfixturevalue(request.param)


def test_the_command_speaks_once_and_only_json_on_stdout(launched):
    main, *others = launched["json"]
    assert main.code == 0
    assert json.loads(main.out)["world_size"] == 3
    assert main.err.count("3 ranks on 1 node · launcher") == 1
    assert [(end.code, end.out, end.err) for end in others] == [(0, "", "")] * 2
    assert len(list((launched.folder / "json/runs").iterdir())) == 1


def test_divergence_ends_every_rank_with_exit_code_3_and_a_record(on_three_ranks):
    ends = on_three_ranks["divergence"]
    assert [end.code for end in ends] == [3] * 3
    assert "".join(end.out for end in ends).count("diverged at step") == 1
    record = on_three_ranks.folder / "divergence/runs/gone/record.json"
    assert json.loads(record.read_text())["result"]["stopped_by"] == "divergence"


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_told_once_and_ends_all_ranks_with_exit_code_2(name, on_three_ranks):
    ends = on_three_ranks[f"bad {name}"]
    assert [end.code for end in ends] == [2] * 3
    (error,) = [end.err for end in ends if end.err]
    assert error.count("torchreg: error:") == 1
    assert BAD_INPUT[name][1] in error
    assert "Traceback" not in error
    assert "error" not in "".join(end.out for end in ends)
    assert not (on_three_ranks.folder / f"bad {name}/runs").exists()


def test_a_failure_on_one_rank_ends_all_with_its_reason_once(launched):
    end = launched["failing"][0]
    assert end.code != 0
    assert launched.seconds_of_last < 60, "the others must not wait for the time-out of 300 s"
    assert end.err.count("torchreg: error on rank") == 1, end.err
    assert "OSError: the disk of rank 1 is gone" in end.err


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
