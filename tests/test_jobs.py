"""If these fail, a job waits hours in a queue and then starts wrongly, loses its work, or bills nodes that do nothing.

The scripts run for real, on ranks of this machine, in what a scheduler would give them: a login shell, a nodefile that
lists a host several times, `module`, `conda` and `qsub` that write down how they are called.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import requires
from pathlib import Path

import pytest

from torchreg.machines.known_machines import MACHINES

from .conftest import ROOT

JOBS = ROOT / "jobs"
PBS = sorted(JOBS.glob("*.pbs"))
SLURM = sorted(JOBS.glob("*.sbatch"))
SCRIPTS = [*PBS, *SLURM]
SHELL = [*SCRIPTS, *JOBS.glob("*.sh")]

STAND_INS = {
    "module": "exit 0",
    "conda": "exit 0",
    "qsub": 'echo "$REQUEUE $NAME" >>"$HOME/submitted"; echo 8.pbs',
    # As OpenPBS prints it.
    "qstat": "printf '    Account_Name = Physics\\n    Resource_List.select = 1:system=polaris\\n'",
    "scontrol": "exit 0",
}


class Job:
    """A checkout, and the shell in which a scheduler starts one of its scripts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder / "checkout", folder / "home"
        self.started: list[subprocess.Popen[str]] = []
        self.folder.mkdir(parents=True)
        bin_folder = self.home / "bin"
        bin_folder.mkdir(parents=True)
        (self.folder / "jobs").symlink_to(JOBS)
        (self.folder / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
        for name, script in STAND_INS.items():
            self.stand_in(name, script)
        # A login shell resets the PATH and then reads this, from where a site's `module` comes too.
        path = f"{bin_folder}:{Path(sys.executable).parent}"
        (self.home / ".bash_profile").write_text(f'export PATH="{path}:$PATH"\n')
        (folder / "nodes").write_text("localhost\n" * 4)
        self.variables = {
            **{name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ},
            "HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "VENV": "",
            "DEVICE": "cpu",
            "LAUNCHER": "mpich",
            "RANKS_PER_NODE": "2",
            "PBS_JOBID": "7.pbs",
            "PBS_O_WORKDIR": str(self.folder),
            "PBS_O_QUEUE": "debug",
            "PBS_NODEFILE": str(folder / "nodes"),
        }

    def stand_in(self, name: str, script: str) -> None:
        path = self.home / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>"$HOME/calls"\n{script}\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        """How a stand-in was called."""
        path = self.home / "calls"
        return [line for line in path.read_text().splitlines() if line.split()[0] == name] if path.is_file() else []

    def start(self, script: str, **variables: str) -> subprocess.Popen[str]:
        # As PBS does: a copy in a spool, from the home folder, by a login shell.
        spooled = self.home / "7.pbs.SC"
        shutil.copy(JOBS / script, spooled)
        process = subprocess.Popen(
            ["bash", "-l", str(spooled)],
            cwd=self.home,
            env=self.variables | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, script: str, **variables: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        process = self.start(script, **variables)
        out, err = process.communicate(timeout=180)  # machines of CI are busy
        return process.returncode, out, err

    def end(self) -> None:
        """End what a failed test has started: a script passes SIGTERM on."""
        for process in self.started:
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=30)

    def record(self, name: str) -> dict:
        return json.loads((self.folder / "runs" / name / "record.json").read_text())


@pytest.fixture
def job(tmp_path):
    job = Job(tmp_path / "cluster")
    yield job
    job.end()


FAST = "--global-batch-size 64 --optimizer manual --sync mpi --distributed torch --log-every 100"
SHORT = f"{FAST} --max-steps 100"
A_WHILE = f"{FAST} --max-steps 60000 --checkpoint-every 1000 --keep-checkpoints 1"
WRONG = "--global-batch-size 0"


def test_a_training_job_runs_to_its_end_on_every_rank(job):
    code, out, err = job.run("polaris.pbs", TRAIN=SHORT)
    assert (code, err) == (0, "")
    assert "ezpz is not installed here" in out
    assert "2 ranks on 1 node · launcher MPICH mpiexec" in out
    assert "+ mpiexec -n 2 --ppn 2 --hosts localhost --env " in out, "the host is listed four times, and is one node"
    assert job.record("polaris")["result"]["num_steps"] == 100
    assert job.calls("module") == ["module use /soft/modulefiles", "module load conda"]
    assert job.calls("qsub") == []


def test_the_job_on_aurora_starts_the_same_command(job):
    job.stand_in("mpiexec", "exit 0")
    code, _, err = job.run("aurora.pbs", TRAIN=SHORT)
    assert (code, err) == (0, "")
    assert job.calls("module") == ["module load frameworks"]
    (call,) = job.calls("mpiexec")
    assert call.startswith("mpiexec -n 2 --ppn 2 --hosts localhost --env ")
    assert " torchreg train --device cpu --name aurora --resume auto --time-limit-s " in call
    assert call.endswith(SHORT)


def test_the_job_on_perlmutter_runs_to_its_end(job):
    # An srun that starts one rank.
    job.stand_in("srun", 'for ((i = 1; i <= $#; i++)); do [[ ${!i} == env ]] && exec "${@:i}"; done; exit 1')
    end = str(int(time.time()) + 600)
    slurm = {"SLURM_SUBMIT_DIR": str(job.folder), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
    slurm |= {"SLURM_JOB_END_TIME": end, "LAUNCHER": "srun"}
    for name in ("PBS_JOBID", "PBS_O_WORKDIR", "PBS_O_QUEUE", "PBS_NODEFILE"):
        del job.variables[name]
    code, _, err = job.run("perlmutter.sbatch", TRAIN=SHORT, **slurm)
    assert (code, err) == (0, "")
    (call,) = job.calls("srun")
    assert call.startswith("srun --nodes 1 --ntasks 2 --ntasks-per-node 2 --kill-on-bad-exit=1 --cpus-per-task 32")
    assert " env CUDA_VISIBLE_DEVICES=3,2,1,0 MPICH_GPU_SUPPORT_ENABLED=0 torchreg train --device cpu --name " in call
    assert " --name perlmutter --resume auto --time-limit-s 4" in call
    assert job.record("perlmutter")["result"]["num_steps"] == 100


def test_the_verification_job_proves_the_stack(job):
    code, out, err = job.run("polaris_verify.pbs", VERIFY="--quick --distributed torch")
    assert (code, err) == (0, "")
    assert "verdict      this stack trains this model correctly" in out


TINY_CAMPAIGN = """\
name: tiny
machine: generic
nodes: [1]
ranks_per_node: [2]
global_batch_sizes: [64]
local_batch_sizes: []
num_features: [1]
combinations: [manual/mpi]
repeats: 1
window_s: 0.05
"""


def test_the_scaling_job_measures_and_reports_and_a_laptop_resumes_from_its_files(job, run, tmp_path):
    campaign, folder = tmp_path / "tiny.yaml", tmp_path / "tiny"
    campaign.write_text(TINY_CAMPAIGN)
    code, out, err = job.run("polaris_scaling.pbs", CAMPAIGN=str(campaign), DIR=str(folder))
    assert code == 0, out + err
    launches = {path.parent.name.split("-", 2)[2]: path for path in folder.glob("launches/*/launch.json")}
    assert launches.keys() == {"nodes-1-ranks-2"}
    page = folder / "report/report.html"
    times = {path: path.stat().st_mtime_ns for path in (page, *launches.values())}

    variables = {"CAMPAIGN": str(campaign), "DIR": str(folder)}
    done = run("bash", str(JOBS / "local.sh"), "--launcher", "mpich", cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(path.stat().st_mtime_ns == times[path] for path in launches.values()), "nothing is measured twice"
    assert page.stat().st_mtime_ns > times[page]


def wait_for(folder, process):
    """The run has saved for the first time."""
    for _ in range(5000):
        if folder.is_dir() and any(folder.glob("*.pt")):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"nothing in {folder} after 100 s")


def test_sigterm_saves_and_the_next_job_resumes_to_the_end(job):
    job.variables["RANKS_PER_NODE"] = "1"  # tests/mpi/test_resume.py has several
    process = job.start("polaris.pbs", TRAIN=A_WHILE, REQUEUE="3")
    wait_for(job.folder / "runs/polaris/checkpoints", process)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - start < 10, "PBS kills after 10 s"
    assert (process.returncode, err) == (75, "")
    assert "reason       SIGTERM" in out
    assert "submit jobs/polaris.pbs again with the same settings to resume" in out
    assert job.calls("qsub") == [], "nobody who deletes a job wants another one"
    (checkpoint,) = (job.folder / "runs/polaris/checkpoints").iterdir()
    steps = int(checkpoint.stem.removeprefix("step-"))

    assert 0 < steps < 60_000

    code, out, err = job.run("polaris.pbs", TRAIN=A_WHILE)
    assert (code, err) == (0, "")
    assert f"resumed      after {steps} steps" in out
    assert job.record("polaris")["result"]["num_steps"] == 60_000


def test_a_copied_program_runs_in_the_same_script(job):
    """Who copies an example writes no job script: the copy gets the time limit and SIGTERM, saves, and resumes."""
    job.variables["RANKS_PER_NODE"] = "1"  # tests/examples has several
    shutil.copy(ROOT / "examples/05_checkpoint_resume.py", job.folder / "mine.py")
    process = job.start("polaris.pbs", PROGRAM="python mine.py --checkpoint a.pt --epochs 1000000", REQUEUE="1")
    wait_for(job.folder, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (75, "")
    assert re.search(r"\+ mpiexec -n 1 .* python mine\.py .* --time-limit-s 1[67]\d\d\n", out)
    assert "submit jobs/polaris.pbs again" in out

    code, out, err = job.run("polaris.pbs", PROGRAM="python mine.py --checkpoint a.pt --epochs 1")  # fewer than done
    assert (code, err) == (0, "")
    assert re.search(r"^fit  .*\nclosed form  ", out, re.MULTILINE)
    assert "step" not in out


def test_a_job_out_of_time_is_submitted_again_as_it_was_and_not_for_ever(job):
    job.stand_in("mpiexec", "exit 75")  # as torchreg does at its time limit
    times = {"WALLTIME": "00:01:00", "RESERVE_S": "57"}
    code, out, _ = job.run("polaris.pbs", TRAIN=SHORT, REQUEUE="1", NAME="long", **times)
    assert code == 75, out
    (limit,) = re.findall(r" --time-limit-s (\d+) ", out)
    assert 0 < int(limit) <= 60 - 57
    assert "submitted again, with 0 more to follow" in out
    (call,) = job.calls("qsub")
    assert call == (
        "qsub -q debug -A Physics -l select=1:system=polaris -l walltime=00:01:00 -v REQUEUE,WALLTIME,MACHINE,MODULES,"
        "CONTAINER,DEVICE,LAUNCHER,RANKS_PER_NODE,VENV,WITHOUT,RESERVE_S,KILL_AFTER_S,NAME,TRAIN,PROGRAM "
        "jobs/polaris.pbs"
    )
    assert (job.home / "submitted").read_text() == "0 long\n"


# A launcher whose ranks save on SIGTERM, and end as they then do.
SAVES = 'trap "exit 75" TERM; touch "$HOME/up"; for ((;;)); do sleep 0.05; done'


@pytest.mark.parametrize(("walltime", "num_jobs"), [("00:30:00", 0), ("00:03:30", 1)])
def test_sigterm_asks_for_another_job_only_when_time_is_over(walltime, num_jobs, job):
    job.stand_in("mpiexec", SAVES)
    process = job.start("polaris.pbs", TRAIN=SHORT, REQUEUE="2", WALLTIME=walltime)
    for _ in range(200):
        if (job.home / "up").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # a scheduler insists
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert len(job.calls("qsub")) == num_jobs


@pytest.mark.parametrize(("left_s", "restarts", "queued"), [(200, "0", True), (200, "2", False), (1500, "0", False)])
def test_slurm_queues_the_job_again_when_time_is_over_and_not_for_ever(left_s, restarts, queued, job):
    # With 1500 s left it was scancel, which signals the ranks alone.
    job.stand_in("srun", "exit 75")
    slurm = {"SLURM_SUBMIT_DIR": str(job.folder), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts}
    slurm |= {"SLURM_JOB_END_TIME": str(int(time.time()) + left_s), "LAUNCHER": "srun"}
    code, out, _ = job.run("perlmutter.sbatch", TRAIN=SHORT, REQUEUE="2", **slurm)
    assert code == 75
    assert job.calls("scontrol") == ["scontrol requeue 7"] * queued
    assert ("job 7 is queued again" in out) == queued


def test_the_walltime_is_that_of_pbs(job):
    job.stand_in("qstat", "echo '    Resource_List.walltime = 00:01:30'")
    code, _, err = job.run("polaris.pbs", TRAIN=SHORT)
    assert code == 2
    assert re.fullmatch(r"job: error: the job ends in (90|8\d) s, of which 120 s are for its start and end: .*\n", err)


def test_a_launcher_that_hangs_is_ended(job):
    job.stand_in("mpiexec", 'trap "" TERM; for ((;;)); do sleep 0.2; done')
    times = {"WALLTIME": "00:00:18", "RESERVE_S": "1", "KILL_AFTER_S": "1"}
    start = time.monotonic()
    code, _, err = job.run("polaris.pbs", TRAIN=SHORT, REQUEUE="1", **times)
    assert time.monotonic() - start < 10
    assert code in (124, 137)
    assert re.fullmatch(r"job: error: the launcher did not end within \d s, and was ended .*", err.splitlines()[-1])
    assert job.calls("qsub") == [], "it would hang again"


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("", "names no host")])
def test_a_nodefile_without_hosts_ends_the_job_with_one_line(content, message, job, tmp_path):
    nodefile = tmp_path / "cluster/nodes"
    nodefile.unlink()
    if content is not None:
        nodefile.write_text(content)
    code, out, err = job.run("polaris.pbs", TRAIN=SHORT)
    assert code == 2
    assert "mpiexec" not in out
    assert err.startswith(f"torchreg: error: PBS_NODEFILE is {nodefile}, which {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_submitted_from_a_wrong_folder_a_script_reports_how_to_start_it(path, job, tmp_path):
    """S10."""
    for folder in ("", str(tmp_path), str(tmp_path / "missing")):
        code, out, err = job.run(path.name, PBS_O_WORKDIR=folder, SLURM_SUBMIT_DIR=folder)
        assert (code, out, err.count("\n")) == (2, "", 1)
        submit = "qsub" if path in PBS else "sbatch"
        assert f"submit jobs/{path.name} with {submit}, from the folder of the checkout" in err


WITHOUT_SITE = {
    "no module": (["module"], {}, "there is no command module here, to load conda"),
    "a module that is not there": (
        [],
        {"MODULES": "konda"},
        "module load konda failed: name the site's modules in MODULES",
    ),
    "no python": ([], {"MODULES": "", "PATH_ALONE": "1"}, "there is no python3 on the PATH"),
    "an old python": ([], {"MODULES": "old"}, "python3 is Python 3.6.15, and torchreg needs 3.10 or newer"),
    "no venv": (
        [],
        {"VENV": "missing"},
        "checkout/missing, where there is no python: run 'bash jobs/setup.sh polaris'",
    ),
    "no torchreg": ([], {"MODULES": "bare"}, "there is no torchreg in the python on the PATH: run 'bash jobs/setup.sh"),
    "an unknown machine": ([], {"MACHINE": "polar"}, "the machine is 'polar': give generic, polaris, aurora"),
}


@pytest.mark.parametrize("case", WITHOUT_SITE)
def test_what_a_site_lacks_is_reported_in_one_line(case, job, tmp_path):
    """S10."""
    lacking, variables, message = WITHOUT_SITE[case]
    for name in lacking:
        (job.home / "bin" / name).unlink()
    job.stand_in("module", "[[ $2 != konda ]]")
    if lacking:
        (job.home / "bin/module").unlink()
    tools = job.home / "tools"  # what a bare system has
    tools.mkdir()
    for name in ("bash", "cat", "date", "sed", "mkdir", "env"):
        (tools / name).symlink_to(shutil.which(name))
    if case in ("no python", "no torchreg", "an old python"):
        (job.home / ".bash_profile").write_text(f'export PATH="{job.home}/bin:{tools}"\n')
    if case == "no torchreg":
        job.stand_in("python3", "exit 0")
    if case == "an old python":
        job.stand_in("python3", "[[ $1 == -V ]] && echo Python 3.6.15; exit 1")
    code, out, err = job.run("polaris.pbs", TRAIN=SHORT, **variables)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_the_machines_device_is_required(job):
    """S7: a verification on CPUs would be taken for one of the node's GPUs."""
    del job.variables["DEVICE"]
    code, out, err = job.run("polaris_verify.pbs", VERIFY="--quick --distributed torch", RANKS_PER_NODE="1")
    assert code == 2
    assert "device is cuda" in err
    assert "trains correctly" not in out


@pytest.mark.parametrize("machine", MACHINES)
def test_jobs_and_campaigns_ask_for_the_same_device(machine, job):
    done = subprocess.run(
        ["bash", "-c", f"MACHINE={machine}; source jobs/common.sh; echo $DEVICE"],
        cwd=job.folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == MACHINES[machine].device


def test_bad_options_are_not_tried_again(job):
    code, _, err = job.run("polaris.pbs", TRAIN=WRONG, REQUEUE="1", RANKS_PER_NODE="1")
    assert code == 2
    assert "global_batch_size is 0" in err
    assert job.calls("qsub") == []


def test_nccls_plugin_can_be_excluded(job):
    job.stand_in("mpiexec", "exit 0")
    _, out, _ = job.run("polaris.pbs", TRAIN=SHORT, WITHOUT="NCCL_NET NCCL_CROSS_NIC", NCCL_NET="AWS Libfabric")
    assert "NCCL_NET_GDR_LEVEL=PHB" in out
    assert "NCCL_NET=" not in out


# A python whose pip writes down what it is asked for, and whose venv holds another like it.
SITE_PYTHON = """
case "$*" in
"-m venv"*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python3"; cp "$0" "${@: -1}/bin/torchreg" ;;
"-m pip"*) ;;
*) exec PYTHON "$@" ;;
esac"""


@pytest.fixture
def set_up(job):
    """Run jobs/setup.sh as on a login node."""
    job.stand_in("python3", SITE_PYTHON.replace("PYTHON", sys.executable))

    def run_set_up(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in job.variables.items() if not key.startswith(("PBS_", "VENV"))}
        return subprocess.run(
            ["bash", "-l", "jobs/setup.sh", *arguments],
            cwd=job.folder,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    (job.folder / "jobs").unlink()  # the script goes to the folder above its own
    shutil.copytree(JOBS, job.folder / "jobs")
    return run_set_up


def test_one_command_on_a_login_node_makes_the_venv_of_the_jobs(job, set_up):
    """S6: over the site's python, from requirements that cannot bring another torch, with ezpz's pinned commit."""
    done = set_up("polaris")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("ready: the jobs of polaris find it, ezpz included\n")
    assert job.calls("module") == ["module use /soft/modulefiles", "module load conda"]
    venv = job.folder / ".venv-polaris"
    assert f"python3 -m venv --system-site-packages {venv}" in job.calls("python3")
    pip = [call.partition("--constraint ")[2] for call in job.calls("python3") if " pip " in call]
    assert pip == [f"{venv}/site.txt --editable .[scale]", f"{venv}/site.txt .[ezpz]"]
    pinned = (venv / "site.txt").read_text().splitlines()
    assert any(line.startswith("torch==") for line in pinned)
    assert all("+" not in line for line in pinned), "pip takes no local version in a constraint for one without"
    (ezpz,) = [need for need in requires("torchreg-hpc") or [] if need.startswith("ezpz")]
    assert re.search(r"@ git\+https://github.com/saforem2/ezpz@[0-9a-f]{40}", ezpz)

    assert set_up("polaris", EZPZ="").stdout.endswith("ready: the jobs of polaris find it\n")


def test_a_folder_that_others_filled_is_never_emptied(job, set_up, tmp_path):
    """S5."""
    folder = tmp_path / "myenv"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    done = set_up("polaris", VENV=str(folder))
    assert done.returncode == 2
    assert (
        done.stderr == f"job: error: VENV is {folder}, which this script did not make: name an empty or a new folder\n"
    )
    code, _, _ = job.run("polaris.pbs", VENV=str(folder), TRAIN=SHORT)
    assert code == 2
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]

    (folder / "thesis.tex").unlink()
    assert set_up("polaris", VENV=str(folder)).returncode == 0, "it is empty"
    (folder / "left").touch()
    assert set_up("polaris", VENV=str(folder)).returncode == 0, "it is ours"
    assert not (folder / "left").exists()


def test_a_venv_over_another_python_is_not_used(job, set_up):
    assert set_up("polaris").returncode == 0
    stamp = job.folder / ".venv-polaris/torchreg.stamp"
    stamp.write_text("/soft/conda/2024/bin/python3\n")
    code, _, err = job.run("polaris.pbs", VENV=str(stamp.parent), TRAIN=SHORT)
    assert code == 2
    assert "lies over '/soft/conda/2024/bin/python3', not " in err
    assert "run 'bash jobs/setup.sh polaris' again" in err


def test_a_login_node_without_torch_or_with_a_wrong_name_is_reported_in_one_line(job, set_up):
    """S10."""
    job.stand_in("python3", "[[ $2 == *torch* ]] && exit 0; exec " + sys.executable + ' "$@"')
    for arguments, message in ((["polaris"], "has no torch: name its module in MODULES"), ([], "the machine is ''")):
        done = set_up(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr


def test_a_program_in_a_container_is_started_through_it(job):
    code, out, err = job.run("polaris.pbs", TRAIN=WRONG, CONTAINER="env INSIDE=1", VENV=str(Path(sys.prefix)))
    assert code == 2
    assert f" env INSIDE=1 {sys.prefix}/bin/torchreg train --device cpu" in out
    assert "global_batch_size is 0" in err


# The rules of the machines, from their user guides.

MANDATORY = ("-A", "-q", "-l select=", "-l walltime=", "-l filesystems=", "-l place=scatter")
QUEUES = {  # machine: queue: fewest nodes, most nodes, most seconds
    "polaris": {"debug": (1, 2, 3600), "debug-scaling": (1, 10, 3600), "prod": (10, 496, 86400)},
    "aurora": {"debug": (1, 2, 3600), "debug-scaling": (2, 256, 3600), "prod": (256, 10624, 86400)},
}
FILE_SYSTEMS = {"polaris": "home:eagle", "aurora": "home:flare"}


def directives(path: Path, mark: str) -> list[str]:
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/bin/bash -l"
    marked = [number for number, line in enumerate(lines) if line.startswith(mark)]
    # PBS stops looking at the first line that is none, and takes a comment behind an option for its value.
    assert marked == list(range(1, len(marked) + 1)), f"{path.name}: directives follow the first line without a gap"
    assert all("#" not in lines[number][1:] for number in marked)
    return [lines[number].removeprefix(mark).strip() for number in marked]


def value(options: list[str], start: str) -> str:
    (found,) = [option.removeprefix(start).strip() for option in options if option.startswith(start)]
    return found


def in_seconds(walltime: str) -> int:
    hours, minutes, seconds = map(int, walltime.split(":"))
    return hours * 3600 + minutes * 60 + seconds


@pytest.mark.parametrize("path", PBS, ids=lambda path: path.name)
def test_pbs_accepts_the_directives(path):
    options = directives(path, "#PBS")
    for option in MANDATORY:
        assert value(options, option) or option == "-l place=scatter", option
    machine = path.stem.split("_")[0]
    nodes = int(value(options, "-l select=").split(":")[0])
    fewest, most, most_s = QUEUES[machine][value(options, "-q")]
    assert fewest <= nodes <= most
    assert 300 <= in_seconds(value(options, "-l walltime=")) <= most_s
    assert value(options, "-l filesystems=") == FILE_SYSTEMS[machine]
    if machine == "polaris":
        assert value(options, "-l select=") == f"{nodes}:system=polaris"
    assert f"WALLTIME=${{WALLTIME:-{value(options, '-l walltime=')}}}" in path.read_text()


NODES = {
    "perlmutter": {"constraint": "gpu", "ntasks-per-node": "4", "gpus-per-node": "4"},
    "frontier": {"ntasks-per-node": "8"},
}


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.name)
def test_slurm_accepts_the_directives(path):
    options = directives(path, "#SBATCH")
    asked = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    assert {"account", "nodes", "time"} <= asked.keys()
    assert {"qos", "partition"} & asked.keys()
    assert NODES[path.stem.split("_")[0]].items() <= asked.items()
    assert in_seconds(asked["time"]) <= (1800 if asked.get("qos") == "debug" else 7200)
    assert f"WALLTIME=${{WALLTIME:-{asked['time']}}}" in path.read_text()
    # S2: to the ranks, which save; a campaign's script passes it on to the campaign.
    signal_to = {"train": "TERM@120", "verify": None, "scaling": "B:TERM@120"}
    assert asked.get("signal") == signal_to[path.stem.partition("_")[2] or "train"]


def test_nothing_personal_and_no_secret_is_in_a_job():
    for path in [*SHELL, *JOBS.glob("campaigns/*.yaml"), JOBS / "README.md"]:
        text = path.read_text()
        assert not re.search(r"/home/|/Users/|/lus/|/eagle/|/flare/|/pscratch|/global/|@\w+\.(gov|edu|com)", text), path
        assert not re.search(r"(?i)(token|secret|password|key)\s*[=:]|wandb", text), path
        assert socket.gethostname() not in re.findall(r"[\w.-]+", text) or len(socket.gethostname()) < 4
    for path in SCRIPTS:
        assert re.search("^#(PBS -A |SBATCH --account=)YOUR_PROJECT$", path.read_text(), re.MULTILINE)


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    done = subprocess.run([shellcheck, *map(str, SHELL)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_options_that_only_pals_knows_are_in_no_script():
    for path in SHELL:
        assert not re.search(r"--cpu-bind|--depth|--no-vni|--ppn", path.read_text()), path


@pytest.mark.parametrize("path", sorted(JOBS.glob("campaigns/*.yaml")), ids=lambda path: path.name)
def test_a_campaign_names_the_device_of_its_machine(path):
    """S7."""
    named = dict(re.findall(r"^(\w+): (\w+)", path.read_text(), re.MULTILINE))
    assert named.get("device", "auto") == MACHINES[named["machine"]].device


def test_every_script_is_in_the_readme():
    text = (JOBS / "README.md").read_text()
    for path in [*SCRIPTS, JOBS / "local.sh", JOBS / "setup.sh", *JOBS.glob("campaigns/*.yaml")]:
        assert path.name in text
