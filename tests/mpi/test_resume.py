"""If these fail, a job that meets its walltime, a full disk or a dead node loses its work, or hangs until it is billed.

What happens to a rank happens at a known step (`accident.py`), so that the step that all agree on is known too.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from torchreg.core import checkpoint
from torchreg.runs.config import TrainConfig
from torchreg.runs.record import METRICS_FILE
from torchreg.runs.run import train

from .test_ranks import launch

ACCIDENT = str(Path(__file__).parent / "accident.py")
BASE = TrainConfig.of(
    name="run",
    global_batch_size=100,
    reduction="reproducible",
    max_steps=240,
    log_every=30,
    base_learning_rate=(0.02, 0.03),
    distributed="torch",
)
COMBINATIONS = {
    "sgd-ddp": {"optimizer": "sgd", "sync": "ddp", "micro_batch_size": 7},
    "sgd-mpi": {"optimizer": "sgd", "sync": "mpi", "sampling": "random"},
    "manual-allreduce": {"optimizer": "manual", "sync": "allreduce", "log_full_loss": True},
    "manual-mpi": {"optimizer": "manual", "sync": "mpi", "update_order": "sequential", "num_features": 3},
}


def of(combination, **changes):
    return BASE.replace(**COMBINATIONS[combination] | changes)


def options(config):
    """The command line that makes a configuration."""
    given, defaults = [], TrainConfig().options()
    for name, value in config.options().items():
        if value != defaults[name]:
            flag = "--" + name.replace("_", "-")
            values = value if isinstance(value, tuple) else [value]
            given += [flag] if value is True else [flag, *map(str, values)]
    return given


SIGNALS = {  # the combination, the signal, the ranks that it hits, the number of ranks that resume
    "SIGINT": ("manual-allreduce", "SIGINT", "0,1", 1),
    "SIGHUP": ("manual-mpi", "SIGHUP", "1", 3),
    "SIGTERM": ("sgd-ddp", "SIGTERM", "0,1", 1),
}
STEPS = ["train", "--distributed", "torch", "--log-every", "1", "--global-batch-size", "100", "--name"]
LENGTHS = {
    "first steps": ["run", "--epochs", "4"],
    "more steps": ["run", "--max-steps", "48", "--resume", "auto"],
    "whole": ["whole", "--max-steps", "48"],
}
ON_TWO_RANKS = {
    "time limit": {"arguments": ["train", *options(of("manual-mpi", max_steps=1_000_000_000, time_limit_s=1.0))]},
    **{name: {"arguments": [*STEPS, *length], "folder": "steps"} for name, length in LENGTHS.items()},
    **{
        name: {
            "arguments": ["train", *options(of(combination, checkpoint_every=1000))],
            "accident": [signal, hit, "70"],
            "last": name == "SIGTERM",
        }
        for name, (combination, signal, hit, _) in SIGNALS.items()
    },
}


def one_process(config):
    """The same run in this process, which has no MPI: `sync` changes no bit of an ordered run."""
    return train(config.replace(sync="auto"))


def ends(run):
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    result = json.loads((run / "record.json").read_text())["result"]
    names = ("weight", "bias", "loss", "num_steps", "num_samples", "stopped_by")
    return [{name: result[name] for name in names}, *({**line, "time_s": None} for line in lines)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """How each combination ends in one process that nobody disturbs and that saves nothing."""
    runs_dir = tmp_path_factory.mktemp("uninterrupted")
    for key in COMBINATIONS:
        one_process(of(key, name=key, runs_dir=str(runs_dir)))
    return {key: ends(runs_dir / key) for key in COMBINATIONS}


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_stops_all_ranks_at_one_step_and_any_number_goes_on(name, uninterrupted, on_two_ranks, run, tmp_path):
    combination, signal, _, num_ranks_then = SIGNALS[name]
    stopped = on_two_ranks[name]
    # T3, T7. The signal comes in the 71st step; ranks hear of each other when the next line is due, after the 90th.
    assert [(end.code, end.err) for end in stopped] == [(75, "")] * 2
    assert (
        "".join(end.out for end in stopped).count("stopped after 90 steps, and saved: resume with --resume auto") == 1
    )
    assert f"reason       {signal}\n" in stopped[0].out
    folder = Path(shutil.copytree(on_two_ranks.folder / name, tmp_path / "resumed"))
    assert checkpoints(folder / "runs/run") == ["step-0000000090.pt"]
    assert not (folder / "runs/run/record.json").exists()

    again = of(combination, checkpoint_every=1000, resume="auto")
    if num_ranks_then == 1:
        one_process(again.replace(runs_dir=str(folder / "runs")))
    else:
        command = launch("mpiexec", num_ranks_then)
        done = run(*command, "-m", "torchreg", "train", *options(again), cwd=folder, timeout_s=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("resumed      after 90 steps") == 1
    assert ends(folder / "runs/run") == uninterrupted[combination]
    sessions = json.loads((folder / "runs/run/record.json").read_text())["sessions"]
    assert [(session["world_size"], session["first_step"]) for session in sessions] == [(2, 0), (num_ranks_then, 90)]


def test_a_signal_under_torchrun_saves_too(uninterrupted, run, tmp_path):
    # torchrun itself ends with 1 whatever its ranks end with.
    config = of("manual-allreduce")
    command = [*launch("torchrun", 2), ACCIDENT, "SIGUSR1", "1", "70", "train", *options(config)]
    done = run(*command, cwd=tmp_path, timeout_s=60)
    assert done.returncode == 1
    assert "stopped after 90 steps" in done.stdout
    assert "exitcode  : 75" in done.stderr
    assert checkpoints(tmp_path / "runs/run") == ["step-0000000090.pt"]
    one_process(config.replace(resume="auto"))
    assert ends(tmp_path / "runs/run") == uninterrupted["manual-allreduce"]


def test_a_signal_to_ranks_that_leave_changes_nothing(run, tmp_path):
    # S1: srun answers the first rank that leaves with 75 by SIGTERM to the others, and 75 would become 143.
    command = [*launch("mpiexec", 2), ACCIDENT, "SIGTERMs", "0,1", "70", "train", *options(of("manual-mpi"))]
    done = run(*command, cwd=tmp_path, timeout_s=60)
    assert (done.returncode, done.stderr) == (75, "")
    assert "stopped after 90 steps" in done.stdout


def test_two_ranks_go_on_to_more_steps_than_they_were_asked_for_first(on_two_ranks):
    # T4, in the fast reduction too: its bits depend on the number of ranks alone.
    assert [end.code for length in LENGTHS for end in on_two_ranks[length]] == [0] * 6
    assert ends(on_two_ranks.folder / "steps/runs/run") == ends(on_two_ranks.folder / "steps/runs/whole")


def test_a_terminal_that_is_closed_saves_a_run_of_torchrun(uninterrupted, run, tmp_path):
    # T7. torchrun passes SIGHUP on; MPICH's mpiexec dies of it and kills its ranks, which cannot be caught.
    config = of("manual-allreduce", checkpoint_every=1000)
    script = tmp_path / "hang_up.py"
    script.write_text(Path(ACCIDENT).read_text().replace("os.getpid()", "os.getppid()"))
    command = [*launch("torchrun", 2), str(script), "SIGHUP", "0", "70", "train", *options(config)]
    done = run(*command, cwd=tmp_path, timeout_s=60)
    assert "reason       SIGHUP" in done.stdout
    assert len(checkpoints(tmp_path / "runs/run")) == 1
    one_process(config.replace(resume="auto"))
    assert ends(tmp_path / "runs/run") == uninterrupted["manual-allreduce"]


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(uninterrupted, run, tmp_path):
    config = of("sgd-mpi", checkpoint_every=25)
    command = [*launch("mpiexec", 2), ACCIDENT, "SIGKILL", "1", "130", "train", *options(config)]
    assert run(*command, cwd=tmp_path, timeout_s=60).returncode not in (0, 75)
    assert checkpoints(tmp_path / "runs/run")[-1] == "step-0000000125.pt"
    one_process(config.replace(resume="auto"))
    assert ends(tmp_path / "runs/run") == uninterrupted["sgd-mpi"]


def test_a_time_limit_stops_all_ranks_in_time(on_two_ranks):
    main, other = on_two_ranks["time limit"]
    assert (main.code, other.code) == (75, 75)
    assert "reason       the time limit is near" in main.out
    (name,) = checkpoints(on_two_ranks.folder / "time limit/runs/run")
    assert f"stopped after {int(name[5:15])} steps, and saved" in main.out
    assert int(name[5:15]) % 30 == 0


def test_a_folder_that_is_removed_ends_all_ranks_with_its_reason(run, tmp_path):
    config = of("sgd-ddp", checkpoint_every=50)
    command = [*launch("mpiexec", 2), ACCIDENT, "remove", "0", "110", "train", *options(config)]
    done = run(*command, cwd=tmp_path, timeout_s=60)
    assert done.returncode not in (0, 75)
    assert done.stderr.count("torchreg: error") == 1
    assert "FileNotFoundError" in done.stderr
    assert "runs/run/checkpoints" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"only root can mount a disk small enough to fill (64 KiB of tmpfs): {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_all_ranks_and_leaves_only_whole_files(small_disk, uninterrupted, run, tmp_path):
    config = of("manual-allreduce", checkpoint_every=2, keep_checkpoints=1000)
    done = run(*launch("mpiexec", 2), "-m", "torchreg", "train", *options(config), cwd=tmp_path, timeout_s=60)
    assert done.returncode == 1
    assert done.stderr.count("torchreg: error") == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(name.endswith(".pt") for name in checkpoints(small_disk / "run"))
    steps = [checkpoint.load(path).step for path in sorted((small_disk / "run/checkpoints").iterdir())]
    assert steps == list(range(2, steps[-1] + 1, 2))

    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    one_process(config.replace(resume="auto"))
    assert ends(small_disk / "run") == uninterrupted["manual-allreduce"]


def test_two_jobs_on_one_run_do_not_mix(run, tmp_path):
    # Both are started at once; whichever comes second is told so, and the first is whole.
    config = of("sgd-ddp", max_steps=300, resume="auto")
    one = " ".join([sys.executable, "-m", "torchreg", "train", *options(config)])
    both = f"{one} >first 2>first.err & {one} >second 2>second.err; echo $?; wait $!; echo $?"
    done = run("bash", "-c", both, cwd=tmp_path)
    errors = (tmp_path / "first.err").read_text() + (tmp_path / "second.err").read_text()
    codes = sorted(done.stdout.split())
    assert codes in (["0", "2"], ["0", "0"])
    assert errors.count("another run is writing runs/run just now") == codes.count("2")
    lines = (tmp_path / "runs/run" / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(29, 300, 30))


def test_ctrl_c_in_a_terminal_saves_on_all_ranks():
    """A terminal sends SIGINT to mpiexec and to its ranks at once, and mpiexec sends it to the ranks once more."""
    train = ["torchreg", "train", "--device", "cpu", "--optimizer", "manual", "--name", "run", "--log-every", "100"]
    command = ["mpiexec", "-n", "2", sys.executable, "-m", *train, "--max-steps", "100000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert any(line.startswith("step ") for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert "reason       SIGINT" in out
    assert len(list(Path("runs/run/checkpoints").iterdir())) == 1
