"""If these fail, a job is killed at its walltime with hours of work unsaved, or stops long before it must."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from torchreg.distributed.stopping import SIGNALS, StopRequest


@pytest.fixture
def clock(monkeypatch):
    """Two clocks that stand still until a test moves them: seconds since an unknown moment, and since 1970."""
    hands = {"monotonic": 5_000.0, "time": 1_700_000_000.0}
    for name in hands:
        monkeypatch.setattr(time, name, lambda name=name: hands[name])

    def move(by_s, *names):
        for name in names or hands:
            hands[name] += by_s

    return move


@pytest.fixture(autouse=True)
def _usual_signals():
    """Handlers as a new process has them; what the test leaves is taken away."""
    usual = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def all_signals():
    """Send every signal that asks for an end; what is not ignored or caught ends the test."""
    for number in SIGNALS:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_only_sets_the_flag_and_further_ones_change_nothing(number):
    # T3, T7, and S1: srun answers the first rank that leaves with 75 by SIGTERM to the others, while they leave.
    with StopRequest(environ={}) as stop:
        assert not stop.is_due()
        os.kill(os.getpid(), number)
        assert stop.is_due()
        all_signals()
    all_signals()
    assert stop.reason == number.name


def test_ranks_that_stop_for_anothers_reason_ignore_signals_too():
    with StopRequest(environ={}) as stop:
        stop.reason = "SIGHUP"
    all_signals()
    assert stop.reason == "SIGHUP"


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest(environ={}) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_due()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_ctrl_c_saves_where_a_script_started_the_run_in_the_background():
    # A shell ignores SIGINT for what follows with `&`, as the job scripts start mpiexec.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest(environ={}) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_due()


def test_ctrl_c_ends_at_once_while_there_is_nothing_to_save():
    with StopRequest(environ={}, nothing_to_save=True) as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # the scheduler's is kept: 75 makes it start the run again
        assert stop.is_due()


@pytest.mark.parametrize("fails", [False, True])
def test_handlers_are_what_they_were_afterwards(fails):
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with StopRequest(environ={}):
            assert all(callable(signal.getsignal(number)) for number in SIGNALS)
            if fails:
                raise OSError("a full disk")
    except OSError:
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_without_a_limit_time_is_never_over(clock):
    stop = StopRequest(environ={})
    clock(1e9)
    assert not stop.is_due()


@pytest.mark.parametrize(("limit_s", "stops_after_s"), [(3600.0, 3540.0), (600.0, 540.0), (100.0, 90.0), (10.0, 9.0)])
def test_it_stops_a_minute_before_the_limit_or_a_tenth_of_it(limit_s, stops_after_s, clock):
    stop = StopRequest(limit_s, environ={})
    clock(stops_after_s - 0.01)
    assert not stop.is_due()
    clock(0.02)
    assert stop.is_due()
    assert stop.reason == "the time limit is near"


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
@pytest.mark.parametrize("limit", [{"time_limit_s": 3600.0}, {"environ": {"SLURM_JOB_END_TIME": "1700003600"}}])
def test_a_wall_clock_that_jumps_changes_nothing(limit, jump_s, clock):
    stop = StopRequest(**{"environ": {}} | limit)
    clock(jump_s, "time")
    clock(3539.0, "monotonic")
    assert not stop.is_due()
    clock(2.0, "monotonic")
    assert stop.is_due()


def test_the_end_of_a_slurm_job_counts_where_no_limit_is_given(clock):
    environ = {"SLURM_JOB_END_TIME": "1700007200"}  # two hours from now
    stop, limited = StopRequest(environ=environ), StopRequest(1200.0, environ=environ)
    clock(1141.0)
    assert limited.is_due()
    assert not stop.is_due()
    clock(6000.0)
    assert stop.is_due()
    assert stop.reason == "the end of the job is near"


def test_a_job_that_is_over_already_stops_at_once(clock):
    assert StopRequest(environ={"SLURM_JOB_END_TIME": "1600000000"}).is_due()


@pytest.mark.parametrize("text", ["", "soon", "-1", "1e9", "1700003600.5", "0x10"])
def test_an_end_that_is_no_number_is_no_end(text, clock):
    stop = StopRequest(environ={"SLURM_JOB_END_TIME": text})
    clock(1e9)
    assert not stop.is_due()


def test_the_first_reason_stays(clock):
    with StopRequest(10.0, environ={}) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        clock(100.0)
        assert stop.is_due()
    assert stop.reason == "SIGUSR1"


# A run of 20 steps whose 11th takes until the test says so, by a line on stdin. torch.optim would import for seconds.
PAUSED = """
import sys
from torchreg.cli import command
from torchreg.runs.logger import Logger
log = Logger.__call__
def log_and_wait(self, batch, squared_error):
    if batch.step == 10:
        print("in step 10", file=sys.stderr, flush=True)
        sys.stdin.readline()
    return log(self, batch, squared_error)
Logger.__call__ = log_and_wait
sys.argv[1:] = ["train", "--optimizer", "manual", "--max-steps", "20", "--log-every", "1", *sys.argv[1:]]
sys.exit(command())
"""


@contextmanager
def paused(*options, program=(sys.executable, "-c", PAUSED), **streams):
    """The run of `PAUSED`, in its step 10."""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    with subprocess.Popen([*program, *options], text=True, **streams) as process:
        try:
            while process.stderr.readline() not in ("in step 10\n", ""):
                pass
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_interrupted_saves_and_keeps_its_name(number):
    # T3, T7: Ctrl-C, or a terminal that is closed; a second signal comes while the run is leaving.
    with paused("--name", "run") as process:
        process.send_signal(number)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate("\n", timeout=60)
    assert process.returncode == 75, err
    assert err == ""
    assert out.count("stopped after ") == 1
    assert f"reason       {number.name}\n" in out or "reason       SIGTERM\n" in out  # whichever Python sees first
    assert len(list(Path("runs/run/checkpoints").iterdir())) == 1
    with paused("--name", "run", "--resume", "auto", stdin=subprocess.DEVNULL) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "resumed      after 11 steps" in out


def test_ctrl_c_before_the_first_step_is_one_line(tmp_path):
    # T3: there is nothing to save, and a table of gigabytes may be half read.
    code = "import torchreg.runs.run as t, signal\n" + PAUSED.replace(
        "log = Logger.__call__\n", "t.open_run = lambda *_: signal.raise_signal(signal.SIGINT)\nlog = Logger.__call__\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "torchreg: error: interrupted\n")


def test_ctrl_c_while_a_library_is_imported_ends_at_once(run, tmp_path):
    # T3: NumPy takes a Ctrl-C for a missing part of it and goes on without; the run would fail later, or ignore it.
    (tmp_path / "numpy.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass\n"
    )
    done = run(sys.executable, "-m", "torchreg", "train", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "torchreg: error: interrupted\n")


def test_output_that_nobody_reads_is_lost_and_the_run_goes_on():
    # T7: `torchreg train | head -1`, and a terminal that is closed.
    with paused("--name", "run") as process:
        process.stdout.close()
        process.stderr.close()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(60) == 0
    assert json.loads(Path("runs/run/record.json").read_text())["result"]["num_steps"] == 20
    assert len(Path("runs/run/metrics.jsonl").read_text().splitlines()) == 20


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ("torchreg plan | head -1; exit ${PIPESTATUS[0]}", 0, ""),
        ("torchreg --help | true; exit ${PIPESTATUS[0]}", 0, ""),
        ("torchreg train --help >&- 2>&- <&-", 0, ""),
        ("torchreg train --optimizer manual --max-steps 2 --name run >&- <&- && test -s runs/run/metrics.jsonl", 0, ""),
        ("torchreg train --nonsense 2>&-", 2, ""),
        ("torchreg --version > /dev/full", 1, "torchreg: error: stdout cannot be written (No space left on device)"),
    ],
)
def test_streams_that_are_closed_leave_the_exit_code_as_it_is_and_no_traceback(command, code, told, run, tmp_path):
    done = run("bash", "-c", command, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(told) if told else done.stderr == ""
