"""If these fail, a run that was killed and resumed ends elsewhere than one that was left alone, or never ends."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torchreg.console import Reporter
from torchreg.core import checkpoint
from torchreg.distributed.rendezvous import AgreedError
from torchreg.runs.config import TrainConfig
from torchreg.runs.record import METRICS_FILE, read_metrics
from torchreg.runs.run import Seams, train

BASE = TrainConfig.of(
    name="run",
    num_rows=60,
    global_batch_size=16,
    max_steps=45,
    reduction="reproducible",
    base_learning_rate=(0.03, 0.04),
)
RUNS = {
    "sgd, shuffle, a line a step": {"log_every": 1, "checkpoint_every": 4},
    "sgd, random, between lines": {"sampling": "random", "log_every": 10, "checkpoint_every": 7, "micro_batch_size": 3},
    "hand, shuffle, one line": {"optimizer": "manual", "log_every": 1000, "checkpoint_every": 5, "num_features": 3},
    "hand, sequential, full": {
        "optimizer": "manual",
        "update_order": "sequential",
        "sampling": "full",
        "global_batch_size": None,
        "checkpoint_every": 1,
        "keep_checkpoints": 1,
    },
    "more steps than a flush": {"optimizer": "manual", "max_steps": 260, "log_every": 130, "checkpoint_every": 60},
    "warm-up and decay": {"warmup_steps": 9, "decay": "cosine", "checkpoint_every": 8, "log_full_loss": True},
    "steps down": {"decay": "step", "decay_every": 11, "epochs": 9.5, "max_steps": None, "checkpoint_every": 11},
    "until a target": {"sampling": "random", "target_excess": 6.0, "log_every": 3, "checkpoint_every": 2},
    "into divergence": {"base_learning_rate": (9.0, 9.0), "log_every": 1000, "checkpoint_every": 3, "max_steps": 90},
    "beyond float32": {"initial_bias": 1e22, "log_every": 1000, "checkpoint_every": 3},
    "into infinity": {"base_learning_rate": (1e160, 1e160), "log_every": 20, "checkpoint_every": 1},
    "float32, by the clock": {"dtype": "float32", "log_every": 2, "checkpoint_every_s": 1e-9},
}


class Killed(BaseException):
    """The end of a process, which nothing can catch."""


@contextmanager
def killed(after):
    """Seams that end the run after so many steps and calls of the file system, from its start on; never for None."""
    left = after

    def counted(function):
        def call(*arguments, **options):
            nonlocal left
            if left is not None:
                left -= 1
                if left == 0:
                    raise Killed
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # nobody cuts the power here
        for owner, name in ((os, "fsync"), *((Path, name) for name in ("replace", "unlink", "mkdir"))):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield Seams(step=counted)


class Stop:
    """A request to stop that comes when it is asked for the `at`-th time."""

    reason = "SIGTERM"
    nothing_to_save = True

    def __init__(self, at=None):
        self.left = at

    def is_due(self):
        if self.left is not None:
            self.left -= 1
        return self.left is not None and self.left <= 0


class Listening(Reporter):
    def __init__(self):
        super().__init__()
        self.said = []

    def info(self, text, style=None):
        self.said.append(text)


def ends(result):
    """All that must be equal to the last bit."""
    lines = read_metrics(Path(result.run_dir))
    times = [line.pop("time_s") for line in lines]
    assert times == sorted(times), "the time of training goes backwards"
    numbers = [*result.weight, result.bias, result.loss]
    return {
        "numbers": [float(number).hex() for number in numbers],
        "end": (result.stopped_by, result.num_steps, result.num_samples, result.diverged_at_step),
        "metrics": [json.dumps(line) for line in lines],
    }


def go_on(config, kill=None, stop=None):
    """One process of a run; None where it was killed or stopped."""
    try:
        with killed(kill) as seams:
            result = train(config.replace(resume="auto"), stop=stop, seams=seams)
    except Killed:
        return None
    return None if result.stopped_by == "request" else result


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """How each run ends where nobody disturbs it; it saves nothing, and so has nothing from a checkpoint."""
    runs_dir = str(tmp_path_factory.mktemp("uninterrupted"))
    never = {"checkpoint_every": None, "checkpoint_every_s": None}
    return {
        key: ends(train(BASE.replace(**changes | never, name=key, runs_dir=runs_dir))) for key, changes in RUNS.items()
    }


@pytest.mark.parametrize("key", RUNS)
@settings(max_examples=6)
@given(st.lists(st.tuples(st.sampled_from(["kill", "stop"]), st.integers(1, 150)), min_size=1, max_size=4))
@example([("kill", 1), ("stop", 1)])
def test_a_run_that_is_killed_and_stopped_anywhere_ends_as_if_nothing_had_happened(key, uninterrupted, interruptions):
    shutil.rmtree("runs", ignore_errors=True)
    config = BASE.replace(**RUNS[key])
    for what, when in [*interruptions, ("kill", None)]:
        result = go_on(config, when if what == "kill" else None, Stop(when) if what == "stop" else None)
        if result:
            break
    assert ends(result) == uninterrupted[key]
    assert sorted(path.name for path in Path("runs/run").iterdir() if path.is_file()) == [
        "config.json",
        "metrics.jsonl",
        "record.json",
    ]


SAVING = BASE.replace(checkpoint_every=10, log_every=5)


def killed_after(num_steps, config=SAVING):
    """A run that saved and was then killed after so many steps."""

    def ending(step):
        def step_or_end(batch, learning_rates):
            if batch.step >= num_steps:
                raise Killed
            return step(batch, learning_rates)

        return step_or_end

    with pytest.raises(Killed):
        train(config, seams=Seams(step=ending))
    return Path(config.run.runs_dir) / config.run.name


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def resumed(config=SAVING):
    listening = Listening()
    return train(config.replace(resume="auto"), reporter=listening), listening.said


def test_it_says_where_it_goes_on_and_the_record_tells_of_both_processes():
    run = killed_after(34)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"step-00000000{step}.pt" for step in (10, 20, 30)
    ]
    assert not (run / "record.json").exists()
    _, said = resumed(SAVING.replace(keep_checkpoints=1, plot=True))
    assert "resumed      after 30 steps" in said
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000000045.pt"]
    record = json.loads((run / "record.json").read_text())
    assert [session["first_step"] for session in record["sessions"]] == [0, 30]
    assert {session["world_size"] for session in record["sessions"]} == {1}
    assert json.loads((run / "config.json").read_text()) == record["config"]


def test_without_a_checkpoint_it_starts_from_scratch(uninterrupted):
    _, said = resumed(SAVING)
    assert "resumed      no checkpoint yet: from scratch" in said
    killed_after(7, SAVING.replace(name="young"))
    result, said = resumed(SAVING.replace(name="young"))
    assert "resumed      no checkpoint yet: from scratch" in said
    assert [line["step"] for line in read_metrics(Path(result.run_dir))] == list(range(4, 45, 5))


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"global_batch_size": 20}, "global_batch_size was 16 and is 20"),
        ({"micro_batch_size": 3}, "micro_batch_size was 2 and is 3"),
        ({"optimizer": "manual"}, "optimizer was sgd and is manual"),
        ({"reduction": "fast"}, "reduction was reproducible and is fast"),
        ({"base_learning_rate": (0.03, 0.05)}, "base_learning_rate was [0.03, 0.04] and is [0.03, 0.05]"),
        ({"warmup_steps": 3}, "warmup_steps was 0 and is 3"),
        ({"decay": "linear"}, "decay was constant and is linear"),
        ({"dtype": "float32"}, "dtype was float64 and is float32"),
        ({"data_seed": 1}, "data_fingerprint was sha256:"),
        ({"num_rows": 61}, "data_fingerprint was sha256:"),
    ],
)
@pytest.mark.parametrize("is_finished", [False, True])
def test_a_changed_configuration_is_refused_with_what_differs_and_nothing_is_lost(changes, differs, is_finished):
    run = Path(train(SAVING).run_dir) if is_finished else killed_after(30)
    before = contents(run)
    with pytest.raises(AgreedError, match="--name") as refused:
        resumed(SAVING.replace(**changes))
    assert differs in str(refused.value)
    assert contents(run) == before
    assert resumed()[0].num_steps == 45


def test_what_changes_no_number_may_change(uninterrupted):
    killed_after(30, BASE.replace(**RUNS["warm-up and decay"]))
    changes = {"dtype": "float64", "checkpoint_every": 5, "keep_checkpoints": 1, "timeout_s": 60.0}
    result, said = resumed(BASE.replace(**RUNS["warm-up and decay"] | changes))
    assert "resumed      after 24 steps" in said
    assert ends(result) == uninterrupted["warm-up and decay"]


LONGER = {
    "constant rates": {},
    "a warm-up": {"warmup_steps": 9, "optimizer": "manual"},
    "steps down of a given length": {"decay": "step", "decay_every": 11},
    "another cadence": {"log_every": None, "reduction": "fast"},
}


@pytest.mark.parametrize("key", LONGER)
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_may_be_given_more_steps_and_ends_as_if_it_had_them_from_the_start(key, is_finished):
    # T4: nobody set the number of steps of a rate that does not depend on it, nor what follows from that number.
    config = BASE.replace(log_every=5) if key != "another cadence" else BASE
    whole = config.replace(**LONGER[key], name="whole", max_steps=None, epochs=30.0)  # 120 steps
    short = whole.replace(name="run", checkpoint_every=None if is_finished else 10, epochs=None, max_steps=45)
    if is_finished:
        train(short.replace(plot=True))
        (Path("runs/run") / "training.png").touch()  # the picture of the shorter run
    else:
        killed_after(34, short)
    result, said = resumed(whole.replace(name="run"))
    assert f"resumed      after {45 if is_finished else 30} steps" in said
    longer, from_scratch = ends(result), ends(train(whole))
    if key == "another cadence":  # a line every second step before, every third step after; the numbers are the same
        assert longer.pop("metrics")[-1] == from_scratch.pop("metrics")[-1]
    assert longer == from_scratch
    assert not (Path("runs/run") / "training.png").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"decay": "cosine"}, "num_steps was 45 and is 50, because max_steps is 50, and cosine decay depends on it"),
        ({"decay": "linear"}, "num_steps was 45 and is 50, because max_steps is 50, and linear decay depends on it"),
        ({"decay": "step"}, "decay_every was 15 and is 17, because max_steps is 50, .* give --decay-every 15"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_more_steps_are_refused_where_earlier_rates_depend_on_them(changes, told, is_finished):
    config = SAVING.replace(**changes)
    run = Path(train(config).run_dir) if is_finished else killed_after(34, config)
    before = contents(run)
    with pytest.raises(AgreedError, match=told):
        resumed(config.replace(max_steps=50))
    assert contents(run) == before
    if changes == {"decay": "step"}:
        assert resumed(config.replace(max_steps=50, decay_every=15))[0].num_steps == 50


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("length", "told"),
    [
        ({"max_steps": 20}, "max_steps is 20, and"),
        ({"max_steps": None, "epochs": 5.0}, "epochs is 5, which is 20 steps"),
    ],
)
def test_fewer_steps_than_were_taken_are_refused(is_finished, length, told):
    run = Path(train(SAVING).run_dir) if is_finished else killed_after(34)
    before = contents(run)
    with pytest.raises(AgreedError, match=f"{told}.* has taken {45 if is_finished else 30} already"):
        resumed(SAVING.replace(**length))
    assert contents(run) == before


def test_a_run_that_reached_its_target_needs_no_more_steps():
    config = SAVING.replace(target_excess=6.0)
    result = train(config)
    assert result.stopped_by == "target"
    assert resumed(config.replace(max_steps=60))[0] == result


def test_a_longer_run_without_a_checkpoint_to_go_on_from_is_refused():
    run = Path(train(SAVING).run_dir)
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    with pytest.raises(AgreedError, match=r"no checkpoint of runs/run can be used: choose another --name"):
        resumed(SAVING.replace(max_steps=50))
    assert contents(run) == before


def test_a_run_whose_end_cannot_be_saved_has_its_result(uninterrupted):
    config = BASE.replace(**RUNS["steps down"] | {"checkpoint_every": None})
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/checkpoints").touch()
    assert ends(train(config.replace(overwrite=True))) == uninterrupted["steps down"]


def test_a_checkpoint_of_a_gpu_goes_on_on_the_cpu_in_its_precision():
    # `auto` is float32 there and float64 here: the run keeps what it has, whatever `auto` would be.
    config = SAVING.replace(dtype="float32")
    whole = ends(train(config.replace(name="whole")))
    run = killed_after(34, config)
    newest = run / "checkpoints/step-0000000030.pt"
    saved = checkpoint.load(newest)
    saved.progress["sessions"][-1]["device"] = "cuda"
    checkpoint.save(newest.parent, saved, keep=3)
    result, said = resumed(config.replace(dtype="auto"))
    assert (
        "resumed      after 30 steps; the checkpoint was written on cuda, and this run is on cpu, in float32 as before"
        in said
    )
    assert ends(result) == whole
    assert json.loads((run / "record.json").read_text())["derived"]["dtype"] == "float32"
    assert resumed(config.replace(dtype="auto"))[0] == result


def unreadable(path, how):
    path.unlink(missing_ok=True)
    {"FIFO": os.mkfifo, "folder": Path.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[how](path)


@pytest.mark.parametrize("how", ["FIFO", "folder", "device"])
def test_a_record_or_metrics_that_are_no_file_are_refused_and_nothing_waits_for_them(how):
    # W5: opening a FIFO waits for a writer for ever, and a device may have no end.
    run = killed_after(34)
    unreadable(run / "metrics.jsonl.part", how)
    with pytest.raises(AgreedError, match=r"its metrics cannot be read \(it is not a regular file\)"):
        resumed()
    unreadable(run / "record.json", how)
    with pytest.raises(AgreedError, match=r"record\.json cannot be read: move the folder away"):
        resumed()


def test_a_finished_run_is_left_alone():
    result = train(SAVING)
    before = contents(Path(result.run_dir))
    again, said = resumed()
    assert again == result
    assert said[-1] == "finished     runs/run is a finished run: nothing to do"
    assert contents(Path(result.run_dir)) == before


def test_the_newest_good_checkpoint_is_taken_and_bad_ones_are_told_of(uninterrupted):
    config = BASE.replace(**RUNS["warm-up and decay"])
    run = killed_after(30, config)
    newest = run / "checkpoints/step-0000000024.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    result, said = resumed(config)
    (told,) = (line for line in said if line.startswith("not used"))
    assert str(newest) in told
    assert "truncated or damaged" in told
    assert "resumed      after 16 steps" in said
    assert ends(result) == uninterrupted["warm-up and decay"]


def test_where_no_checkpoint_is_good_nothing_is_lost():
    run = killed_after(30)
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"torchreg checkpoint 9\n")
    before = contents(run)
    with pytest.raises(AgreedError, match=r"no checkpoint of runs/run .*choose another --name, or .*--overwrite"):
        resumed()
    assert contents(run) == before
    assert train(SAVING.replace(overwrite=True)).num_steps == 45


def test_metrics_that_are_not_the_runs_are_not_gone_on_with():
    run = killed_after(34)
    metrics = run / f"{METRICS_FILE}.part"
    lines = metrics.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    # Four lines belong to the first 20 steps. The fifth is now another's, as long as it was.
    metrics.write_bytes(b"".join([*lines[:4], lines[4].replace(b"24", b"23", 1), lines[5]]))
    result, said = resumed()
    assert "metrics that were written before it are not there" in "".join(said)
    assert "resumed      after 20 steps" in said
    assert [line["step"] for line in read_metrics(Path(result.run_dir))] == list(range(4, 45, 5))


def test_without_its_metrics_a_run_is_not_gone_on_with():
    (killed_after(34) / f"{METRICS_FILE}.part").unlink()
    with pytest.raises(AgreedError, match="metrics that were written before it are not there"):
        resumed()


def test_a_run_that_ends_while_it_writes_its_record_is_finished_by_the_next(uninterrupted, monkeypatch):
    config = BASE.replace(**RUNS["warm-up and decay"])
    write = Path.replace

    def full_disk(path, target):
        if Path(target).name == "record.json":
            raise OSError(28, "No space left on device")
        return write(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            train(config)
    assert sorted(path.name for path in Path("runs/run").glob("*.*")) == ["config.json", "metrics.jsonl"]
    assert ends(resumed(config)[0]) == uninterrupted["warm-up and decay"]


@pytest.mark.parametrize("garbage", ["", "[]", "{", '{"result": {}}', '{"result": [1], "contract": {}}', "[" * 100_000])
def test_a_record_that_cannot_be_read_is_refused(garbage):
    run = killed_after(30)
    (run / "record.json").write_text(garbage)
    with pytest.raises(AgreedError, match=r"record\.json cannot be read: move the folder away"):
        resumed()


def test_overwriting_removes_the_checkpoints_of_the_earlier_run():
    run = killed_after(34)
    train(SAVING.replace(overwrite=True, seed=1, checkpoint_every=None))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000000045.pt"]
    assert resumed(SAVING.replace(seed=1, max_steps=50))[0].num_steps == 50


def test_a_run_that_is_only_looked_at_is_resumed(monkeypatch):
    # `torchreg runs` holds a shared lock for an instant: a job that is queued again then would be refused, and end.
    run = killed_after(34)
    looking = os.open(run, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("torchreg.runs.record.time.sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
    try:
        assert resumed()[0].num_steps == 45
    finally:
        os.close(looking)


HOLDING = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", [{"resume": "auto"}, {"overwrite": True}])
def test_a_run_that_another_process_is_writing_is_refused_and_untouched(how):
    run = killed_after(34)
    before = contents(run)
    command = [sys.executable, "-c", HOLDING, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(AgreedError, match="another run is writing runs/run just now"):
            train(SAVING.replace(**how))
        assert contents(run) == before
        other.communicate()
    assert train(SAVING.replace(**how)).num_steps == 45


def test_a_run_that_is_interrupted_leaves_its_folder_free_in_the_same_process():
    # Ctrl-C in a notebook: the process lives on.
    def interrupt(batch, learning_rates):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(SAVING, seams=Seams(step=lambda step: interrupt))
    assert resumed()[0].num_steps == 45


def test_a_stop_request_saves_once_and_leaves_no_record():
    result = train(SAVING.replace(checkpoint_every=None), stop=Stop(3))
    # It is asked for a third time when the third line of metrics is written, after 15 steps.
    assert (result.stopped_by, result.num_steps) == ("request", 15)
    assert [path.name for path in Path("runs/run/checkpoints").iterdir()] == ["step-0000000015.pt"]
    assert not Path("runs/run/record.json").exists()
    assert result.lines() == ["stopped after 15 steps, and saved: resume with --resume auto"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every is 0: give a whole number of at least 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0: give a whole number of at least 1"),
        ({"checkpoint_every_s": 0.0}, "checkpoint_every_s is 0.0: give a number above 0"),
        ({"checkpoint_every_s": float("nan")}, "checkpoint_every_s is nan"),
        ({"time_limit_s": -1.0}, "time_limit_s is -1.0: give a number above 0"),
        ({"time_limit_s": float("inf")}, "time_limit_s is inf"),
        ({"resume": "auto"}, "resume is auto and name is None: name the run to resume with --name"),
        ({"resume": "auto", "name": "run", "overwrite": True}, "choose one of the two"),
    ],
)
def test_options_of_checkpoints_that_cannot_be_meant_are_refused(options, told):
    with pytest.raises(ValueError, match="is") as refused:
        TrainConfig.of(**options)
    assert told in str(refused.value)
