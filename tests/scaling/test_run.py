"""If these fail, a campaign loses launches, repeats them, runs one twice at once, or calls a failure a result.

Launches are small programs here; tests/mpi/test_scale.py runs real ones.
"""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import Process
from pathlib import Path

import pytest

from torchreg.scaling import claims
from torchreg.scaling import run as running
from torchreg.scaling.campaign import Campaign, launches
from torchreg.scaling.run import campaign_of, open_campaign, run_campaign, state_of
from torchreg.scaling.tell import status, status_lines
from torchreg.stopping import StopRequest

from .made import Made

CAMPAIGN = Campaign(ranks_per_node=(1, 2), repeats=2)
MEASURED = {
    record["launch"]["world_size"]: {
        name: record[name] for name in ("start_up_s", "runtime", "dtype", "points", "allreduce")
    }
    for record in Made(num_blocks=1, nodes=(1,), ranks_per_node=(1, 2)).records()
}
MEASURE = f"""
import json, pathlib, sys
world_size = int(sys.argv[2].rsplit("-", 1)[1])
place = pathlib.Path(sys.argv[1]) / "launches" / sys.argv[2]
with open(pathlib.Path(sys.argv[1]) / "log", "a") as log:
    print(sys.argv[2], file=log)
(place / "measured.json").write_text(json.dumps({MEASURED!r}[world_size]))
"""


@pytest.fixture
def play(monkeypatch, tmp_path):
    """Run the campaign with a program in place of the ranks; `stop` stops it."""

    def run(program=MEASURE, stop=None, campaign=CAMPAIGN, folder=tmp_path / "campaign", **options):
        def command_of(campaign, launch, folder, launcher, hosts):
            return [sys.executable, "-c", program, str(folder), launch.id]

        monkeypatch.setattr(running, "command_of", command_of)
        return run_campaign(campaign, folder, stop or StopRequest(None, {}), lambda line: None, **options)

    return run


def ran(folder):
    log = folder / "log"
    return sorted(log.read_text().split()) if log.exists() else []


def test_a_second_run_measures_nothing_twice_and_what_is_missing_once(play, tmp_path):
    folder = tmp_path / "campaign"
    outcome = play()
    assert (outcome.num_done, outcome.num_failed, outcome.stopped) == (4, 0, None)
    assert ran(folder) == sorted(launch.id for launch in launches(CAMPAIGN))
    assert play().num_done == 4
    assert len(ran(folder)) == 4
    lost = folder / "launches/block-01-nodes-1-ranks-2/launch.json"
    lost.unlink()
    play()
    assert ran(folder).count("block-01-nodes-1-ranks-2") == 2
    assert len(ran(folder)) == 5
    record = json.loads(lost.read_text())
    assert (record["status"], record["exit_code"]) == ("ok", 0)
    assert record["campaign"]["fingerprint"] == CAMPAIGN.fingerprint
    assert record["launch"]["world_size"] == 2
    assert not list(folder.glob("launches/*/claim.json"))
    assert not list(folder.glob("launches/*/measured.json"))


def test_a_record_that_no_report_would_take_is_a_failure_and_no_result(play, tmp_path):
    play()
    path = tmp_path / "campaign/launches/block-00-nodes-1-ranks-1/launch.json"
    path.write_text(path.read_text().replace('"block": 0', '"block": 7'))
    assert state_of(path.parent) == "failed"
    (told,) = [each.told for each in status(tmp_path / "campaign") if each.state == "failed"]
    assert "damaged" in told
    assert play().num_failed == 1
    assert play(retry_failed=True).num_done == 4


def test_more_repeats_go_on_and_another_measurement_is_refused(play, tmp_path):
    play()
    assert play(campaign=Campaign(ranks_per_node=(1, 2), repeats=3)).num_done == 6
    with pytest.raises(ValueError, match=r"window_s is 2.0, and .* has 1.0: choose another --dir"):
        play(campaign=Campaign(ranks_per_node=(1, 2), window_s=2.0))
    assert campaign_of(tmp_path / "campaign").repeats == 3


def test_a_failure_is_recorded_and_only_run_again_when_asked_for(play, tmp_path):
    folder = tmp_path / "campaign"
    program = "import sys; print('noise', file=sys.stderr); sys.exit('torchreg: error on rank 1 (n1): no luck')"
    outcome = play(program)
    assert (outcome.num_done, outcome.num_failed) == (0, 4)
    record = json.loads((folder / "launches/block-00-nodes-1-ranks-1/launch.json").read_text())
    assert record["status"] == "failed"
    assert record["reason"] == "exit code 1: torchreg: error on rank 1 (n1): no luck"
    assert record["points"] == []
    told = status_lines(status(folder), folder)
    assert "failed       block-00-nodes-1-ranks-" in told[0]
    assert "no luck" in told[0]
    assert play().num_failed == 4, "nothing is retried silently"
    assert ran(folder) == []
    assert play(retry_failed=True).num_done == 4
    assert len(list(folder.glob("launches/*/launch.failed-1.json"))) == 4, "the failures stay on record"


def test_a_killed_rank_is_told_by_its_launchers_banner(play, tmp_path):
    banner = "=   PID 7 RUNNING AT n2\\n=   EXIT CODE: 9\\n=   CLEANING UP"
    assert play(f"print('{banner}'); raise SystemExit(9)").num_failed == 4
    record = json.loads((tmp_path / "campaign/launches/block-00-nodes-1-ranks-1/launch.json").read_text())
    assert record["reason"] == "exit code 9: PID 7 RUNNING AT n2 EXIT CODE: 9"


def test_a_launcher_that_cannot_start_tells_the_cause_and_not_who_called_whom(play, tmp_path):
    cause = '[proxy:0@vm] get (topo.c:378): no directive "nowhere"'
    trace = f"{cause}\n[mpiexec@vm] main (mpiexec.c:270): error waiting"
    assert play(f"import sys; print({trace!r}, file=sys.stderr); raise SystemExit(255)").num_failed == 4
    record = json.loads((tmp_path / "campaign/launches/block-00-nodes-1-ranks-1/launch.json").read_text())
    assert record["reason"] == f"exit code 255: {cause}"


def test_a_launch_that_measures_nothing_or_ends_badly_after_it_is_a_failure(play, tmp_path):
    assert play("pass").num_failed == 4
    record = json.loads((tmp_path / "campaign/launches/block-00-nodes-1-ranks-1/launch.json").read_text())
    assert "was not written" in record["reason"]
    assert play(MEASURE + "sys.exit(7)", retry_failed=True).num_failed == 4
    record = json.loads((tmp_path / "campaign/launches/block-00-nodes-1-ranks-1/launch.json").read_text())
    assert (record["exit_code"], record["points"], record["runtime"]) == (7, [], None)


def test_a_launch_that_hangs_is_ended_with_all_that_it_started(play, tmp_path):
    pid_file = tmp_path / "pid"
    program = (
        "import pathlib, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    campaign = Campaign(ranks_per_node=(1,), repeats=1, launch_timeout_s=1.5)
    assert play(program, campaign=campaign).num_failed == 1
    record = json.loads((tmp_path / "campaign/launches/block-00-nodes-1-ranks-1/launch.json").read_text())
    assert "launch_timeout_s, 1.5 s" in record["reason"]
    assert not alive(int(pid_file.read_text()))


def alive(pid):
    """Whether a process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_signal_ends_the_launch_and_leaves_it_open(play, tmp_path):
    folder = tmp_path / "campaign"
    stop = StopRequest(None, {})
    program = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(600)"
    with stop:
        start_s = time.monotonic()
        outcome = play(program, stop)
    assert outcome.stopped == "SIGTERM"
    assert time.monotonic() - start_s < 10, "a scheduler kills ten seconds after its signal"
    states = {state_of(path) for path in folder.glob("launches/*")}
    assert states == {"open"}
    assert play().num_done == 4


def test_no_launch_is_begun_that_would_outlive_the_job(play, tmp_path):
    outcome = play(stop=StopRequest(30.0, {}))  # the first estimate is above 30 s
    assert outcome.num_done == 0
    assert "the next launch takes about" in outcome.stopped
    assert ran(tmp_path / "campaign") == []


def test_two_jobs_share_a_campaign_and_run_each_launch_once(play, tmp_path):
    folder = tmp_path / "campaign"
    campaign = Campaign(ranks_per_node=(1,), repeats=8)
    slow = MEASURE + "import time; time.sleep(0.1)"
    jobs = [Process(target=play, args=(slow, None, campaign, folder)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert ran(folder) == sorted(launch.id for launch in launches(campaign))


def test_a_claim_is_void_when_its_process_is_gone_or_its_time_is_over(tmp_path):
    place = tmp_path / "launch"
    assert claims.claim(place, 60)
    assert not claims.claim(place, 60)
    assert f"process {os.getpid()}" in claims.claimed_by(place)
    claims.release(place)
    assert claims.claimed_by(place) is None

    gone = subprocess.Popen([sys.executable, "-c", f"from torchreg.scaling.claims import claim; claim(__import__('pathlib').Path({str(place)!r}), 60)"])  # fmt: skip  # noqa: E501
    assert gone.wait() == 0
    assert claims.claim(place, -1), "its process is gone"
    assert claims.claim(place, 60), "its time is over"
    assert sorted(path.name for path in place.iterdir()) == ["claim.json"]


def test_a_claim_of_another_host_holds_until_its_time_is_over(tmp_path):
    place = tmp_path / "launch"
    place.mkdir()
    content = {"host": "elsewhere", "pid": 1, "job_id": "7.pbs", "until": time.time() + 60}
    (place / "claim.json").write_text(json.dumps(content))
    assert not claims.claim(place, 60)
    assert claims.claimed_by(place) == "process 1 on elsewhere, job 7.pbs"
    (place / "claim.json").write_text(json.dumps(content | {"until": time.time() - 1}))
    assert claims.claim(place, 60)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"until": "soon"}'])
def test_a_damaged_claim_is_void(damage, tmp_path):
    (tmp_path / "claim.json").write_bytes(damage)
    assert claims.claim(tmp_path, 60)


def test_nodes_come_from_the_nodefile_each_once_and_too_few_are_told(play, tmp_path, monkeypatch):
    nodefile = tmp_path / "nodes"
    nodefile.write_text("x1\nx1\nx2\nx2\n")
    monkeypatch.setenv("PBS_NODEFILE", str(nodefile))
    assert running.allocated_hosts() == ("x1", "x2")
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
        command = running.command_of(campaign, launch, Path("DIR"), "mpich", hosts)
        (chosen,) = [word for word in command if "," in word]
        assert len(chosen.split(",")) == 2
        used.update(chosen.split(","))
    assert used == set(hosts), "a slow node would never be seen"


def test_a_folder_without_a_campaign_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"torchreg scale run CAMPAIGN.yaml --dir"):
        status(tmp_path)
    (tmp_path / "campaign.yaml").write_text("nodes: x\n")
    with pytest.raises(ValueError, match="values of wrong types"):
        status(tmp_path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        open_campaign(CAMPAIGN, tmp_path / "file")


def test_ending_a_launch_survives_a_second_signal(play):
    stop = StopRequest(None, {})
    with stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert play(stop=stop).stopped == "SIGUSR1"
