"""A Slurm of two nodes on the loopback interface, from unpacked packages: nothing is installed, and root not needed."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..conftest import ROOT

SLURM = os.environ.get("TORCHREG_SLURM")  # the folder that scripts/test_real.sh unpacked the packages into


class Slurm:
    """slurmctld, one slurmd for each of two nodes, and munged, with their files in `folder`."""

    def __init__(self, packages: Path, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        (library,) = packages.glob("usr/lib/*/slurm*/accounting_storage_none.so")
        plugins = library.parent
        self.programs = {
            name: str(next(packages.glob(f"usr/sbin/{name}*")))
            for name in ("munged", "slurmctld", "slurmd", "slurmstepd")
        }
        self.variables = {
            **{name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ},
            "PATH": f"{Path(sys.executable).parent}:{packages}/usr/bin:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{plugins.parent}:{plugins}",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        for name in ("home", "state", "node1", "node2", "tmp"):
            (folder / name).mkdir()
        # What a site's profile does: a login shell sets the PATH anew.
        (self.home / ".bash_profile").write_text(
            "".join(f"export {name}='{self.variables[name]}'\n" for name in ("PATH", "LD_LIBRARY_PATH"))
        )
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        host = socket.gethostname().split(".")[0]
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        ports = free_ports(3)
        # MPICH's shared memory is named after the job: a killed job of an earlier cluster may have left its own.
        (folder / "slurm.conf").write_text(f"""\
ClusterName=torchreg
FirstJobId={random.randrange(1000, 60_000_000)}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge.socket
CredType=cred/munge
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,requeue_delay=1
LaunchParameters=use_interactive_step
InteractiveStepOptions="--interactive --preserve-env bash"
KillWait=10
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{min(ports[1:])}-{max(ports[1:])}] CPUs=128 \
Feature=gpu
PartitionName=debug Nodes=ALL Default=YES MaxTime=01:00:00
""")

    def start(self) -> None:
        munge = [
            f"--{name}={self.folder}/munge.{name.split('-')[0]}"
            for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")
        ]
        self._start("munged", *munge, "--force")
        self._start("slurmctld")
        for node in ("node1", "node2"):
            self._start("slurmd", "-N", node, "-d", self.programs["slurmstepd"])
        for _ in range(200):
            if self.run("sinfo", "--noheader", "--format=%D %t").stdout.split() == ["2", "idle"]:
                return
            time.sleep(0.1)
        raise AssertionError("\n".join(path.read_text() for path in self.folder.glob("*.log")))

    def _start(self, name: str, *options: str) -> None:
        """Daemons go into the background by themselves."""
        done = subprocess.run(
            [self.programs[name], *options], env=self.variables, capture_output=True, text=True, check=False, timeout=30
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self) -> None:
        """End the daemons; first the jobs, whose own daemons would stay."""
        for _ in range(150):
            if not self.run("squeue", "--noheader").stdout:
                break
            time.sleep(0.2)
        for name in ("slurmd-*", "slurmctld", "munge"):  # munged last: the others end with a message that it signs
            for path in self.folder.glob(f"{name}.pid"):
                end_process(int(path.read_text()))

    def run(self, *command: str, cwd: Path | None = None, stdin: str = "", **variables: str):
        return subprocess.run(
            command,
            cwd=cwd or self.home,
            env=self.variables | variables,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def submit(self, script: str, *options: str, cwd: Path, **variables: str) -> str:
        """Submit a script of jobs/, for nodes without a GPU, from a checkout; returns the job's id."""
        settings = {"MACHINE": "generic", "VENV": "", "RANKS_PER_NODE": "1", "SLURM_MPI_TYPE": "pmi2"}
        options = ("--gpus-per-node=0", "--output=job.out", *options)
        done = self.run("sbatch", "--parsable", *options, script, cwd=cwd, **settings | variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """What Slurm says of the job when it is in one of the states (by default: when it has ended)."""
        for _ in range(600):
            fields = dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job).stdout))
            if fields["JobState"] in (states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")):
                return fields
            time.sleep(0.2)
        raise AssertionError(fields)


def end_process(number: int) -> None:
    """End a daemon, which is no child of this process; by force if it does not within ten seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGTERM)
        for _ in range(100):
            time.sleep(0.1)
            os.kill(number, 0)
        os.kill(number, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Ports that follow each other, for a list of nodes is written as a range."""
    for first in range(21_000, 32_000, 10):
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no free ports")


@pytest.fixture
def slurm(cluster):
    yield cluster
    cluster.run("scancel", "--user", str(os.getuid()))  # nothing of a failed test stays


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if SLURM is None:
        pytest.skip("needs a real Slurm, which `bash scripts/test_real.sh slurm` gets from Debian and runs this with")
    slurm = Slurm(Path(SLURM).resolve(), tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture
def checkout(tmp_path):
    """A folder to submit from, as a checkout is."""
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    (tmp_path / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    return tmp_path
