"""If these fail, a job is killed at its walltime with hours of work unsaved, or stops long before it must."""

import os
import signal
import time

import pytest

from torchreg.stopping import SIGNALS, StopRequest


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_only_sets_the_flag_and_names_its_reason(number):
    with StopRequest(environ={}) as stop:
        assert not stop.is_due()
        os.kill(os.getpid(), number)
        assert stop.is_due()
        os.kill(os.getpid(), number)  # the scheduler insists, while the run is saving
        assert stop.is_due()
    assert stop.reason == number.name


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


def test_two_requests_inside_one_another_restore_each_others_handlers():
    with StopRequest(environ={}) as outer:
        with StopRequest(environ={}) as inner:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert (inner.is_due(), outer.is_due()) == (True, False)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert outer.is_due()


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
