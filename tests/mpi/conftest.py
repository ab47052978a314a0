"""Ranks that are started one by one, each with an environment of its own, and launches that tests share."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from ..conftest import ROOT


@pytest.fixture
def start_ranks(tmp_path):
    """Start one process for each mapping of variables, as RANK of WORLD_SIZE, and wait for all of them."""

    def start(command, environments, *, timeout_s=60, **shared):
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        common = {
            **os.environ,
            "PATH": path,
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(len(environments)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **shared,
        }

        def run_rank(rank):
            return subprocess.run(
                command,
                env={**common, "RANK": str(rank), **environments[rank]},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )

        with ThreadPoolExecutor(len(environments)) as pool:
            return list(pool.map(run_rank, range(len(environments))))

    return start


class Launched(dict):
    """How each command ended on each rank, by the command's name; `done` is the launcher's completed process."""

    def __init__(self, done, folder, seconds_of_last):
        self.done, self.folder, self.seconds_of_last = done, folder, seconds_of_last

    def __missing__(self, name):
        raise AssertionError(f"the ranks ended before or in {name!r}: {self.done.stdout}\n{self.done.stderr}")


@pytest.fixture(scope="session")
def launch_commands(run, tmp_path_factory):
    """Run the commands one after the other on the ranks of one launch, each in a folder of its name."""

    def launch(launcher, commands):
        folder = tmp_path_factory.mktemp("launched")
        program = ["-m", "tests.mpi.commands", json.dumps(commands), str(folder)]
        start = launcher if launcher[0] == "torchrun" else [*launcher, sys.executable]
        done = run(*start, *program, cwd=ROOT, timeout_s=200, TORCH_CPP_LOG_LEVEL="FATAL")
        files = sorted(folder.glob("ends.*"), key=lambda path: int(path.suffix[1:]))
        last_s = time.time() - files[0].stat().st_mtime if files else None
        launched = Launched(done, folder, last_s)
        for path in files:
            for line in path.read_text().splitlines():
                end = json.loads(line)
                launched.setdefault(end["name"], []).append(SimpleNamespace(**end))
        names = [*commands]
        if len(names) == 1 or names[-2] in launched:  # the last one wrote to the launcher's streams
            nothing = SimpleNamespace(name=names[-1], trained=[])
            vars(launched.setdefault(names[-1], [nothing])[0]).update(
                code=done.returncode, out=done.stdout, err=done.stderr
            )
        return launched

    return launch


def _commands(request, kind):
    """Those of the selected tests' modules. One that ends the launch in a way of its own is `last`."""
    modules = {item.module: None for item in request.session.items}
    found = [each for module in modules for each in getattr(module, kind, {}).items()]
    names = [name for name, _ in found]
    assert len(set(names)) == len(names), f"two commands of {kind} have one name"
    # Ranks that take part have to have run the same commands before: torchreg counts its uses of the store.
    return dict(sorted(found, key=lambda each: (each[1].get("last", False), -each[1].get("world_size", 0))))


@pytest.fixture(scope="session")
def on_two_ranks(request, launch_commands):
    """One launch of two ranks for the ON_TWO_RANKS of all modules."""
    return launch_commands(["mpiexec", "-n", "2"], _commands(request, "ON_TWO_RANKS"))


@pytest.fixture(scope="session")
def on_three_ranks(request, launch_commands):
    """One launch of three ranks for the ON_THREE_RANKS of all modules."""
    return launch_commands(["mpiexec", "-n", "3"], _commands(request, "ON_THREE_RANKS"))


@pytest.fixture(scope="session")
def on_torchrun(request, launch_commands):
    """One launch of eight ranks for the ON_TORCHRUN of all modules; each takes as many as its `world_size`."""
    launcher = ["torchrun", "--standalone", "--local-addr", "localhost", "--nproc-per-node", "8"]
    return launch_commands(launcher, _commands(request, "ON_TORCHRUN"))
