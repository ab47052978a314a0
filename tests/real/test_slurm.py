"""If these fail, a job under Slurm does not start, loses its work at its end of time, or is not queued again.

The Slurm is a real one (`conftest.py`). Rows of the cases table are in the docstrings.
"""

import json
import re
import time

import pytest

FAST = "--global-batch-size 64 --optimizer manual --sync mpi --distributed torch --log-every 100"
ENDLESS = f"{FAST} --max-steps 1000000000"


def complaints(done):
    """What is on stderr but for srun's lines on how it waits for nodes that the last job is still leaving."""
    return [line for line in done.stderr.splitlines() if not line.startswith("srun: job")]


def wait_for(path, pattern):
    for _ in range(600):
        if path.is_file() and re.search(pattern, path.read_text()):
            return
        time.sleep(0.05)
    raise AssertionError(path.read_text() if path.is_file() else f"no {path}")


def test_srun_starts_ranks_that_find_each_other(slurm, checkout):
    """L2: every start under srun."""
    done = slurm.run("srun", "-N2", "-n2", "--mpi=pmi2", *f"torchreg train {FAST} --max-steps 20".split(), cwd=checkout)
    assert (done.returncode, complaints(done)) == (0, [])
    assert "2 ranks on" in done.stdout
    assert "launcher srun" in done.stdout


def test_an_mpi_that_slurm_does_not_start_is_named_with_its_remedy(slurm, checkout):
    """S4: MpiDefault=none and mpi4py installed."""
    done = slurm.run("srun", "-N2", "-n2", "torchreg", "train", "--max-steps", "3", cwd=checkout)
    assert done.returncode == 2, done.stderr
    assert "SLURM_MPI_TYPE" in done.stderr


def test_ranks_that_save_at_their_time_limit_end_with_75(slurm, checkout):
    """S1: srun signals the others as soon as the first rank has left."""
    command = "torchreg train --max-steps 1000000000 --log-every 100000 --time-limit-s 1"
    done = slurm.run("srun", "-N2", "-n4", "--mpi=pmi2", "--kill-on-bad-exit=1", *command.split(), cwd=checkout)
    assert done.returncode == 75, done.stderr
    assert "Terminating" in done.stderr, "Slurm signalled ranks that were leaving"


def test_a_shell_of_salloc_is_one_process(slurm, checkout):
    """L3: the shell is in a step of its own, and has the job's SLURM_NTASKS."""
    done = slurm.run("salloc", "-n4", stdin="torchreg train --max-steps 3\nenv | grep ^SLURM_\n", cwd=checkout)
    assert "SLURM_NTASKS=4" in done.stdout, done.stderr
    assert "SLURM_STEP_ID=4294967290" in done.stdout
    assert "closed form" in done.stdout, done.stderr


def test_a_job_asks_slurm_for_its_end_and_saves_before_it(slurm, checkout):
    """S1, S3: Slurm 22.05 sets no SLURM_JOB_END_TIME, and the script is written for 30 minutes."""
    limits = {"RESERVE_S": "50", "KILL_AFTER_S": "5"}
    # The script's own signal, 120 s before the end, would come while ranks start.
    job = slurm.submit("jobs/perlmutter.sbatch", "--time=1", "--signal=TERM@1", cwd=checkout, TRAIN=ENDLESS, **limits)
    ended = slurm.wait(job)
    out = (checkout / "job.out").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0"), out
    assert "SIGTERM" not in out
    assert "saved, and not finished: submit jobs/perlmutter.sbatch again" in out


def test_a_job_that_is_queued_again_ends_with_the_bits_of_one_that_was_not(slurm, checkout):
    train = "--global-batch-size 64 --distributed torch --log-every 100 --max-steps 4000"  # some seconds
    again = {"REQUEUE": "1", "RESERVE_S": "125"}
    job = slurm.submit("jobs/perlmutter.sbatch", "--time=4", cwd=checkout, NAME="cut", TRAIN=train, **again)
    wait_for(checkout / "job.out", "step 100/")
    slurm.run("scancel", "--signal=TERM", job)  # as Slurm signals ranks some time before the end
    wait_for(checkout / "job.out", f"job {job} is queued again")
    # Slurm holds it back for some seconds.
    done = slurm.run("srun", "-N2", "-n2", "--mpi=pmi2", *f"torchreg train --name whole {train}".split(), cwd=checkout)
    assert done.returncode == 0, done.stderr
    ended = slurm.wait(job)
    out = (checkout / "job.out").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), out
    assert re.search(r"resumed +after \d+ steps", out)
    cut, whole = (
        json.loads((checkout / f"runs/{name}/record.json").read_text())["result"] for name in ("cut", "whole")
    )
    assert (cut["weight"], cut["bias"], cut["loss"]) == (whole["weight"], whole["bias"], whole["loss"])


@pytest.mark.parametrize("receiver", ["ranks", "script"])
def test_a_signal_before_the_end_saves(receiver, slurm, checkout):
    """S2: --signal=TERM@120 is for the ranks; one for the script (B:) must not end them through srun."""
    job = slurm.submit("jobs/perlmutter.sbatch", cwd=checkout, TRAIN=ENDLESS)
    wait_for(checkout / "job.out", "step 100/")
    slurm.run("scancel", "--signal=TERM", *["--batch"] * (receiver == "script"), job)
    ended = slurm.wait(job)
    out = (checkout / "job.out").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0"), out
    assert "saved, and not finished: submit jobs/perlmutter.sbatch again" in out
    assert list(checkout.glob("runs/perlmutter/checkpoints/*.pt"))


def test_a_stack_is_verified(slurm, checkout):
    # On one node: the two have one host's name, which the checks would report.
    variables = {"VERIFY": "--quick --distributed torch", "RANKS_PER_NODE": "2"}
    job = slurm.submit("jobs/perlmutter_verify.sbatch", "--nodes=1", cwd=checkout, **variables)
    ended = slurm.wait(job)
    out = (checkout / "job.out").read_text()
    assert ended["ExitCode"] == "0:0", out
    assert "this stack trains this model correctly" in out


def test_a_campaign_measures_with_srun_and_reports(slurm, checkout):
    (checkout / "tiny.yaml").write_text(
        "name: tiny\nmachine: generic\nnodes: [1]\nranks_per_node: [1, 2]\nglobal_batch_sizes: [64]\n"
        "num_features: [1]\ncombinations: [manual/mpi]\nrepeats: 1\nwindow_s: 0.05\ndistributed: torch\n"
    )
    job = slurm.submit("jobs/perlmutter_scaling.sbatch", "--nodes=1", cwd=checkout, CAMPAIGN="tiny.yaml", DIR="tiny")
    ended = slurm.wait(job)
    out = (checkout / "job.out").read_text()
    assert ended["ExitCode"] == "0:0", out
    assert len(list(checkout.glob("tiny/launches/*/launch.json"))) == 2
    assert (checkout / "tiny/report/report.html").is_file()
