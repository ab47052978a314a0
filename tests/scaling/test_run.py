"""If these fail, a campaign loses launches, repeats them, runs one twice at once, or records a failure as a result.

Launches are small programs here; tests/mpi/test_scale.py runs real ones.
"""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from multiprocessing import Process
from pathlib import Path

import pytest

from torchreg.cli import main
from torchreg.distributed.stopping import StopRequest
from torchreg.scaling import campaign_run, locks
from torchreg.scaling.campaign import Campaign, campaign_of, launches
from torchreg.scaling.campaign_run import open_campaign, run_campaign, status_of
from torchreg.scaling.records import launches_table, read_records
from torchreg.verification.checks import Check

from .synthetic_records import SyntheticCampaign

ONE = Campaign(ranks_per_node=(1,), repeats=1)
CAMPAIGN = Campaign(ranks_per_node=(1, 2), repeats=1)
FIRST, SECOND = "block-00-nodes-1-ranks-1", "block-00-nodes-1-ranks-2"
MEASURED = {
    record["launch"]["world_size"]: {
        name: record[name] for name in ("start_up_s", "distributed", "machine_facts", "dtype", "points", "allreduce")
    }
    for record in SyntheticCampaign(num_blocks=1, nodes=(1,), ranks_per_node=(1, 2)).records()
}
MEASURE = f"""
import json, pathlib, sys
world_size = int(sys.argv[2].rsplit("-", 1)[1])
folder = pathlib.Path(sys.argv[1]) / "launches" / sys.argv[2]
with open(pathlib.Path(sys.argv[1]) / "log", "a") as log:
    print(sys.argv[2], file=log)
(folder / f"measured-{{sys.argv[-1]}}.json").write_text(json.dumps({MEASURED!r}[world_size]))
"""


@pytest.fixture
def play(monkeypatch, tmp_path):
    """Run a campaign with a program in place of the ranks, until `stop`; its states, and `play.stopped`."""

    def run(program=MEASURE, stop=None, campaign=CAMPAIGN, folder=tmp_path / "campaign", **options):
        def command_of(campaign, launch, folder, launcher, hosts):
            return [sys.executable, "-Sc", program, str(folder), launch.id]

        monkeypatch.setattr(campaign_run, "command_of", command_of)
        stop = stop or StopRequest(None, {})
        states, run.stopped = run_campaign(campaign, folder, stop, lambda line: None, **options)
        return states

    return run


@pytest.fixture
def played(play):
    """The command line runs a program in place of the ranks, too."""
    play(stop=StopRequest(1e-9, {}))  # due before the first launch


def ran(folder):
    log = folder / "log"
    return sorted(log.read_text().split()) if log.exists() else []


def record_of(folder, launch=FIRST):
    return json.loads((folder / "launches" / launch / "launch.json").read_text())


def test_a_second_run_measures_nothing_twice_and_what_is_missing_once(play, tmp_path):
    folder = tmp_path / "campaign"
    assert play() == {"done": 2}
    assert play.stopped is None
    assert ran(folder) == [FIRST, SECOND]
    assert play() == {"done": 2}
    assert ran(folder) == [FIRST, SECOND]
    (folder / "launches" / SECOND / "launch.json").unlink()
    play()
    assert ran(folder) == [FIRST, SECOND, SECOND]
    record = record_of(folder, SECOND)
    assert (record["status"], record["exit_code"]) == ("ok", 0)
    assert record["campaign"]["fingerprint"] == CAMPAIGN.fingerprint
    assert record["launch"]["world_size"] == 2
    assert sorted(path.name for path in (folder / "launches").iterdir()) == [FIRST, SECOND]
    for launch in (FIRST, SECOND):
        files = sorted(path.name for path in (folder / "launches" / launch).iterdir())
        assert files == ["launch.json", "stderr.log", "stdout.log"]


VERIFY = """
file = folder / f"measured-{sys.argv[-1]}.json"
if "--verify" in sys.argv:
    check = {"area": "collectives", "name": "all-reduce", "measured": "off by 1", "expected": "exact", "status": status}
    file.write_text(json.dumps({"verification": [check], **(json.loads(file.read_text()) if status == "PASS" else {})}))
"""


def test_launches_verify_the_stack_until_one_of_their_world_size_has_passed(play, tmp_path):
    campaign = Campaign(ranks_per_node=(1, 2), repeats=2)
    assert play("status = 'PASS'\n" + MEASURE + VERIFY, campaign=campaign) == {"done": 4}
    records = {
        launch.id: record_of(tmp_path / "campaign", launch.id).get("verification") for launch in launches(campaign)
    }
    assert {name for name, checks in records.items() if checks} == {FIRST, SECOND}
    table = launches_table(read_records([tmp_path / "campaign"]))
    assert table.groupby("recorded_block")["num_verified"].apply(list).to_dict() == {0: [1, 1], 1: [0, 0]}


def test_a_stack_that_fails_verification_has_failed_launches_and_no_points(play, tmp_path):
    # Its times would be compared like those of a stack that trains correctly, and an efficiency claimed.
    assert play("status = 'FAIL'\n" + MEASURE + VERIFY) == {"failed": 2}
    record = record_of(tmp_path / "campaign")
    assert record["reason"] == "the stack does not train correctly: collectives: all-reduce: off by 1"
    assert record["verification"][0]["status"] == "FAIL"
    assert read_records([tmp_path / "campaign"]).launches == []
    assert play("status = 'PASS'\n" + MEASURE + VERIFY, retry_failed=True) == {"done": 2}, "after it was repaired"
    assert record_of(tmp_path / "campaign")["verification"][0]["status"] == "PASS"


def test_a_launch_whose_stack_fails_a_check_measures_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "campaign/launches" / FIRST
    folder.mkdir(parents=True)
    open_campaign(ONE, tmp_path / "campaign")
    wrong = Check("collectives", "all-reduce", "FAIL", "off by 1", "exact")
    monkeypatch.setattr("torchreg.verification.verify.verify", lambda *args, **options: iter([wrong]))
    monkeypatch.setattr("torchreg.scaling.measure.measure_launch", None)
    assert main(["scale", "measure", str(tmp_path / "campaign"), FIRST, "--launched-at", "1.5", "--verify"]) == 0
    measured = json.loads((folder / "measured-1.5.json").read_text())
    assert measured.keys() == {"start_up_s", "verification"}
    found = {"area": "collectives", "name": "all-reduce", "status": "FAIL", "measured": "off by 1", "expected": "exact"}
    assert measured["verification"] == [found]


def test_an_invalid_record_is_a_failure_and_no_result(play, tmp_path):
    play()
    path = tmp_path / "campaign/launches" / FIRST / "launch.json"
    path.write_text(path.read_text().replace('"block": 0', '"block": 7'))
    assert status_of(path.parent)[0] == "failed"
    assert "damaged" in status_of(path.parent)[2]
    assert play() == {"done": 1, "failed": 1}
    assert play(retry_failed=True) == {"done": 2}


def test_repeats_can_be_added_and_another_measurement_is_refused(play, tmp_path):
    play(campaign=ONE)
    assert play(campaign=Campaign(ranks_per_node=(1,), repeats=2)) == {"done": 2}
    with pytest.raises(ValueError, match=r"window_s is 2.0, and .* has 1.0: choose another --dir"):
        play(campaign=Campaign(ranks_per_node=(1,), window_s=2.0))
    assert campaign_of(tmp_path / "campaign").repeats == 2


def test_a_failure_is_recorded_and_repeated_only_on_request(play, tmp_path, capsys):
    folder = tmp_path / "campaign"
    program = "import sys; print('noise', file=sys.stderr); sys.exit('torchreg: error on rank 1 (n1): no luck')"
    assert play(program) == {"failed": 2}
    record = record_of(folder)
    assert record["status"] == "failed"
    assert record["reason"] == "exit code 1: torchreg: error on rank 1 (n1): no luck"
    assert "points" not in record
    assert main(["scale", "status", str(folder)]) == 0
    assert re.search(r"^failed       block-00-nodes-1-ranks-\d: .*no luck$", capsys.readouterr().out, re.MULTILINE)
    assert play() == {"failed": 2}, "nothing is retried silently"
    assert ran(folder) == []
    assert play(retry_failed=True) == {"done": 2}
    assert len(list(folder.glob("launches/*/launch.failed-1.json"))) == 2, "the failures stay on record"


HYDRA_CAUSE = '[proxy:0@vm] get (topo.c:378): no directive "nowhere"'
FAILURES = {
    "a killed rank": (
        "print('=   PID 7 RUNNING AT n2\\n=   EXIT CODE: 9\\n=   CLEANING UP'); raise SystemExit(9)",
        "exit code 9: PID 7 RUNNING AT n2 EXIT CODE: 9",
    ),
    "hydra cannot start: the cause, not the call trace": (
        f"import sys; print({HYDRA_CAUSE!r}, file=sys.stderr)\n"
        "print('[mpiexec@vm] main (mpiexec.c:270): error waiting', file=sys.stderr); raise SystemExit(255)",
        f"exit code 255: {HYDRA_CAUSE}",
    ),
    "silence": ("raise SystemExit(3)", "exit code 3: nothing on stderr"),
    "no measurement": ("pass", "exit code 0, and measured-"),
    "a measurement that is no object": (
        MEASURE + "(folder / f'measured-{sys.argv[-1]}.json').write_text('7')",
        "exit code 0, and measured-",
    ),
    "ranks of an earlier attempt": (MEASURE.replace("sys.argv[-1]", "'1795799211.050'"), "exit code 0, and measured-"),
    "a bad end after the measurement": (MEASURE + "sys.exit(7)", "exit code 7: "),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_launch_that_fails_has_its_reason_and_no_points(case, play, tmp_path):
    program, reason = FAILURES[case]
    assert play(program, campaign=ONE) == {"failed": 1}
    record = record_of(tmp_path / "campaign")
    assert record["reason"].startswith(reason)
    assert "points" not in record


def test_a_launch_that_hangs_is_ended_with_all_that_it_started(play, tmp_path):
    pid_file = tmp_path / "pid"
    program = (
        "import pathlib, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    campaign = Campaign(ranks_per_node=(1,), repeats=1, launch_timeout_s=1.0)
    assert play(program, campaign=campaign) == {"failed": 1}
    assert "launch_timeout_s, 1 s" in record_of(tmp_path / "campaign")["reason"]
    assert not alive(int(pid_file.read_text()))


def alive(pid):
    """Whether a process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_signal_ends_the_launch_and_leaves_it_open(play):
    stop = StopRequest(None, {})
    program = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(600)"
    with stop:
        start_s = time.monotonic()
        assert play(program, stop) == {"open": 2}
    assert play.stopped == "SIGTERM"
    assert time.monotonic() - start_s < 10, "a scheduler kills ten seconds after its signal"
    assert play() == {"done": 2}


def test_no_launch_is_started_that_would_outlive_the_job(play, tmp_path):
    assert play(stop=StopRequest(20.0, {})) == {"open": 2}  # the first estimate is above 20 s
    assert "the next launch takes about" in play.stopped
    assert ran(tmp_path / "campaign") == []


def test_two_jobs_on_one_host_run_each_launch_once_and_one_at_a_time(play, tmp_path):
    # W3: steps that share cores with another campaign's are slower, and look like a result.
    folder, campaign = tmp_path / "campaign", Campaign(ranks_per_node=(1,), repeats=4)
    timed = f"import time; start_s = time.time(); time.sleep(0.1)\n{MEASURE}"
    timed += "open(sys.argv[1] + '/times', 'a').write(f'{start_s} {time.time()}\\n')"
    jobs = [Process(target=play, args=(timed, None, campaign, folder)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert ran(folder) == sorted(launch.id for launch in launches(campaign))
    times = sorted([float(part) for part in line.split()] for line in (folder / "times").read_text().splitlines())
    assert all(end_s <= start_s for (_, end_s), (start_s, _) in pairwise(times)), times


OTHER = {"host": "elsewhere", "boot": "1", "pid": 1, "job_id": "7.pbs"}
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
HERE = {"host": socket.gethostname(), "boot": BOOT_ID.read_text().strip() if BOOT_ID.exists() else None}


@pytest.fixture
def locked(tmp_path):
    """Leave the lock of another process on a launch."""

    def lock(age_s=0.0, **changes):
        path = tmp_path / "campaign/launches" / FIRST / "lock.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(OTHER | changes))
        os.utime(path, (time.time() - age_s,) * 2)
        return path

    return lock


def test_launches_that_another_job_runs_are_left_and_the_exit_code_is_75(played, locked, capsys):
    # L10: a job script that gets 0 makes its report of half a campaign, and submits no job for the rest.
    path = locked()
    command = ["scale", "run", "--ranks-per-node", "1", "2", "--repeats", "1", "--dir", "campaign"]
    assert main(command) == 75
    out = capsys.readouterr().out
    assert f"elsewhere    {FIRST}: process 1 on elsewhere, job 7.pbs" in out
    assert "1 of 2 done, 0 failed, 1 running elsewhere" in out
    path.unlink()
    assert main(command) == 0


@pytest.mark.parametrize(
    "stale",
    [
        {"age_s": 1e4},  # its host is gone, or its job: it was not renewed
        {"job_id": "9.pbs"},  # this job, which was restarted on other nodes
        {"job_id": "9.pbs", "host": socket.gethostname()},  # and on the same one, which was rebooted
        HERE,  # no process holds that one's lock
        {**HERE, "pid": os.getpid()},  # nor if its pid is in use again
    ],
)
def test_a_stale_lock_is_removed(stale, play, locked, monkeypatch):
    # L10: nobody runs the launch, and nobody would for as long as the lock held.
    monkeypatch.setenv("PBS_JOBID", "9.pbs")
    monkeypatch.setenv("PBS_NODEFILE", __file__)
    monkeypatch.setattr(campaign_run.launch_commands, "allocated_hosts", tuple)
    locked(**stale)
    assert play(campaign=ONE) == {"done": 1}


def test_a_lock_of_another_host_holds_until_it_is_not_renewed(play, locked):
    path = locked()
    assert play() == {"done": 1, "running": 1}
    assert status_of(path.parent)[0] == "running"
    for damage in (b"", b"{", b"[]", b"[" * 10_000):  # it may just be being written
        path.write_bytes(damage)
        assert status_of(path.parent)[0] == "running"
        assert play()["running"] == 1
    os.utime(path, (time.time() - 1e4,) * 2)
    assert play() == {"done": 2}


def test_a_lock_is_renewed_while_the_launch_runs(play, monkeypatch):
    monkeypatch.setattr(locks, "RENEW_EVERY_S", 0.1)
    program = (
        MEASURE
        + """
import time
times = [(folder / "lock.json").stat().st_mtime for _ in range(3) if time.sleep(0.3) is None]
assert len(set(times)) == 3, times
"""
    )
    assert play(program, campaign=ONE) == {"done": 1}


def test_a_launch_that_another_job_took_over_is_not_recorded(play, tmp_path):
    # A laptop's lid was closed for an hour, or a process stopped: the lock became stale, and another job measures.
    program = MEASURE + f"(folder / 'lock.json').write_text({json.dumps(OTHER)!r})"
    assert play(program) == {"running": 2}
    assert not list((tmp_path / "campaign").glob("launches/*/launch.json"))
    assert len(list((tmp_path / "campaign").glob("launches/*/lock.json"))) == 2, "those of the other job stay"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_links_is_good_enough(number, play, monkeypatch):
    # F2: FAT, some FUSE and network file systems.
    def no_link(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", no_link)
    assert play(campaign=ONE) == {"done": 1}


def test_a_file_system_without_locks_is_good_enough(play, monkeypatch):
    def no_lock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    assert play(campaign=ONE) == {"done": 1}


def test_a_campaign_has_one_machine_whatever_its_hosts_are_called(play, tmp_path, monkeypatch):
    # F3: otherwise a report has as many machines as there were nodes, and nothing to compare.
    folders = [tmp_path / name for name in ("old", "new", "named")]
    for host, folder in zip(("x1000c0s0b0n0", "x1001c3s2b1n1", "gpu-01"), folders, strict=True):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        name = "xcsbn" if folder.name == "named" else None
        play(campaign=Campaign(ranks_per_node=(1,), repeats=1, machine_name=name), folder=folder)
    play(campaign=Campaign(ranks_per_node=(1,), repeats=2), folder=folders[0])  # from the host gpu-01
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*/launches/*/launch.json")]
    assert [record["campaign"]["machine"] for record in records] == ["xcsbn"] * 4
    with pytest.raises(ValueError, match=r"machine_name is other, and .* has xcsbn"):
        play(campaign=Campaign(ranks_per_node=(1,), repeats=1, machine_name="other"), folder=folders[0])


LAUNCHER = """#!/bin/sh
# Stands for mpiexec: its ranks are in sessions of their own, and take a while to end.
case $1 in --version) echo HYDRA; exit ;; esac
test -e ranks && for rank in $(cat ranks); do kill -0 $rank 2>/dev/null && echo $rank >>beside; done
for rank in 1 2; do setsid sh -c 'trap "kill \\$!; sleep 0.5; exit" TERM; echo $$ >>ranks; sleep 99 & wait' & done
trap 'kill -TERM $(cat ranks); wait; wait; exit 143' TERM
wait
"""


@pytest.fixture
def start(tmp_path):
    """Start `torchreg scale run` with a stand-in for mpiexec, and wait until its ranks are there."""
    (tmp_path / "mpiexec").write_text(LAUNCHER)
    (tmp_path / "mpiexec").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    processes, ranks = [], tmp_path / "ranks"

    def start_run():
        command = [sys.executable, "-m", "torchreg", "scale", "run", "--ranks-per-node", "2", "--launcher", "mpich"]
        before = ranks.read_text() if ranks.exists() else ""
        processes.append(subprocess.Popen([*command, "--dir", "out"], cwd=tmp_path, env={**os.environ, "PATH": path}))
        end_s = time.monotonic() + 60
        while not ranks.exists() or ranks.read_text().count("\n") < before.count("\n") + 2:
            assert processes[-1].poll() is None, "it has started no ranks"
            assert time.monotonic() < end_s
            time.sleep(0.05)
        return processes[-1], [int(pid) for pid in ranks.read_text().split()[-2:]]

    yield start_run
    for process in processes:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def gone_within(pids, seconds):
    end_s = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > end_s:
            return False
        time.sleep(0.05)
    return True


def test_ranks_end_when_scale_run_is_killed_and_the_next_one_waits_for_that(start, tmp_path):
    # W3: the old ranks went on for minutes, beside the new ones, and both were recorded as valid.
    process, ranks = start()
    process.kill()
    process.wait()
    _, new_ranks = start()
    assert gone_within(ranks, 0.5)
    assert all(alive(pid) for pid in new_ranks)
    assert not (tmp_path / "beside").exists(), "a rank of the killed campaign was still there"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_ranks_and_leaves_nothing_half_recorded(number, start, tmp_path):
    # W3: a closed terminal, Ctrl-C, and a scheduler.
    process, ranks = start()
    process.send_signal(number)
    assert process.wait(15) == 75
    assert gone_within(ranks, 0.5)
    (folder,) = [path for path in (tmp_path / "out/launches").iterdir() if path.is_dir()]
    assert sorted(path.name for path in folder.iterdir()) == ["stderr.log", "stdout.log"]


@pytest.mark.parametrize(
    "variables",
    [
        {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
        {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"PMIX_RANK": "0"},
    ],
)
def test_under_a_launcher_it_is_refused_for_it_starts_ranks_itself(variables, monkeypatch, capsys):
    # L9: two campaigns would measure on the same cores. One rank's variables would reach the ranks that it starts.
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["scale", "run"]) == 2
    err = capsys.readouterr().err
    assert "scale run starts ranks itself" in err
    assert err.count("\n") == 1
    for name in variables.keys() & {"PMI_RANK", "RANK"} if "2" in variables.values() else ():
        monkeypatch.setenv(name, "1")
        assert main(["scale", "run"]) == 2
        assert capsys.readouterr().err == "", "reported once"
    assert not list(Path().iterdir())


def test_in_the_shell_of_a_batch_job_it_runs(played, monkeypatch):
    # L9: sbatch's own shell has SLURM_PROCID too, and is in no step.
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["scale", "run", "--ranks-per-node", "1", "2", "--repeats", "1", "--dir", "campaign"]) == 0


def test_what_is_for_one_process_is_done_by_the_main_rank_alone(play, monkeypatch, capsys):
    # L9: two processes that write one folder or one page.
    play()
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("MPI_LOCALRANKID", "1")
    for command in ("scale merge all campaign", "report campaign", "scale status campaign", "data show", "scale plan"):
        assert main(command.split()) == 0
    assert capsys.readouterr() == ("", "")
    assert sorted(path.name for path in Path().iterdir()) == ["campaign"]


def test_nodes_come_from_the_nodefile_each_once_and_too_few_are_reported(play, tmp_path, monkeypatch):
    nodefile = tmp_path / "nodes"
    nodefile.write_text("x1\nx1\nx2\nx2\n")
    monkeypatch.setenv("PBS_NODEFILE", str(nodefile))
    assert campaign_run.launch_commands.allocated_hosts() == ("x1", "x2")
    with pytest.raises(ValueError, match="nodes has 4, and the job has 2"):
        play(campaign=Campaign(nodes=(1, 4)))
    monkeypatch.setenv("PBS_NODEFILE", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="cannot be read"):
        play()


def test_launches_on_some_of_the_nodes_use_them_all_over_the_campaign():
    campaign = Campaign(nodes=(2,), ranks_per_node=(1,), repeats=12, launcher="mpich")
    hosts = ("a", "b", "c", "d")
    used = set()
    for launch in launches(campaign):
        command = campaign_run.command_of(campaign, launch, Path("DIR"), "mpich", hosts)
        (chosen,) = [word for word in command if "," in word]
        assert len(chosen.split(",")) == 2
        used.update(chosen.split(","))
    assert used == set(hosts), "a slow node would never be seen"


def test_a_folder_without_a_campaign_is_reported_with_the_command_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"torchreg scale run CAMPAIGN.yaml --dir"):
        campaign_of(tmp_path)
    (tmp_path / "campaign.yaml").write_text("nodes: x\n")
    with pytest.raises(ValueError, match="Expected `int`, got `str`"):
        campaign_of(tmp_path)


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        open_campaign(CAMPAIGN, tmp_path / "file")


def test_ending_a_launch_survives_a_second_signal(play):
    with StopRequest(None, {}) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert play(stop=stop) == {"open": 2}
    assert play.stopped == "SIGUSR1"
