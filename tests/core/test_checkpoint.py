"""If these fail, a run is lost to a kill or a full disk, goes on from wrong numbers, or runs what a stranger wrote."""

import errno
import hashlib
import json
import os
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchreg.core import checkpoint
from torchreg.core.checkpoint import Checkpoint
from torchreg.runs.resume import differences

FOLDER = Path("checkpoints")
CONTRACT = {"data_fingerprint": "sha256:00", "seed": 3, "base": [0.1, 1e-7]}


def made(step, **changes):
    """A checkpoint whose numbers have no short decimal form."""
    numbers = torch.rand(1, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    tensors = {
        "model": {"weight": numbers, "bias": torch.tensor([1 / 3], dtype=torch.float32)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1 + 0.2, "params": [0, 1]}]},
    }
    values = {
        "step": step,
        "run_signature": CONTRACT,
        "progress": {"num_samples": 7 * step, "elapsed_s": 0.1 + 0.2, "pending_rows": [64, 39]},
        "versions": {"torch": torch.__version__},
        "tensors": tensors,
    }
    return Checkpoint(**values | changes)


def same(one, other):
    return (
        replace(one, tensors={}) == replace(other, tensors={})
        and one.tensors["optimizer"] == other.tensors["optimizer"]
        and all(
            torch.equal(one.tensors["model"][name], other.tensors["model"][name])
            and one.tensors["model"][name].dtype == other.tensors["model"][name].dtype
            for name in ("weight", "bias")
        )
    )


def newest(run_signature=CONTRACT):
    return checkpoint.newest(FOLDER, lambda found: differences(found.run_signature, run_signature))


def steps_there():
    return sorted(int(path.stem.removeprefix("step-")) for path in FOLDER.glob("*.pt"))


def test_a_checkpoint_comes_back_bit_for_bit():
    saved = made(12)
    assert same(checkpoint.load(checkpoint.save(FOLDER, saved, keep=3)), saved)


def test_a_new_folder_and_each_new_file_are_brought_to_disk_by_their_names(monkeypatch):
    # Else a power cut may lose the name of a file that is on disk. The name is in the folder, the folder's in its own.
    synced, fsync = [], os.fsync

    def noted(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    checkpoint.save(FOLDER, made(1), keep=3)
    assert synced == [Path().stat().st_ino, FOLDER.stat().st_ino]
    checkpoint.save(FOLDER, made(2), keep=3)
    assert synced[2:] == [FOLDER.stat().st_ino]


def test_numbers_that_are_not_finite_come_back_too():
    weight = torch.tensor([[float("nan"), float("inf"), -float("inf")]], dtype=torch.float64)
    saved = made(1, tensors={"model": {"weight": weight}})
    loaded = checkpoint.load(checkpoint.save(FOLDER, saved, keep=3))
    assert loaded.tensors["model"]["weight"].tolist()[0][1:] == [float("inf"), -float("inf")]
    assert loaded.tensors["model"]["weight"].isnan().tolist() == [[True, False, False]]


def test_only_the_newest_are_kept():
    for step in (5, 10, 99, 100, 2_000_000_000):
        checkpoint.save(FOLDER, made(step), keep=2)
    assert steps_there() == [100, 2_000_000_000]


def test_those_that_could_not_be_gone_on_from_do_not_push_out_good_ones():
    # The run had come to step 30, and 20 and 30 are damaged: it goes on from 10, and is killed again after 12.
    for step in (10, 20, 30):
        path = checkpoint.save(FOLDER, made(step), keep=3)
        if step > 10:
            path.write_bytes(path.read_bytes()[:-1])
    found, _ = newest()
    assert found.step == 10
    checkpoint.save(FOLDER, made(12), keep=1)
    found, refused = newest()
    assert found.step == 12
    assert refused == []


def test_what_a_kill_left_half_written_is_cleared_away():
    FOLDER.mkdir()
    (FOLDER / "step-0000000007.pt.part").write_bytes(b"torchreg checkpoint 3 ")
    checkpoint.save(FOLDER, made(8), keep=3)
    assert [path.name for path in FOLDER.iterdir()] == ["step-0000000008.pt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_save_that_fails_leaves_what_was_there(failing, monkeypatch):
    for step in (1, 2):
        checkpoint.save(FOLDER, made(step), keep=2)
    before = {path.name: path.read_bytes() for path in FOLDER.iterdir()}

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(FOLDER, made(3), keep=1)
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir()} == before


def spoiled(path, how):
    content = path.read_bytes()
    plain, _, tensors = content.partition(b"\n")[2].partition(b"\n")
    spoilt = {
        "truncated": content[:-100],
        "cut in its first line": content[:40],
        "empty": b"",
        "foreign": b"PK\x03\x04 some archive\n",
        "damaged": content[:-1] + bytes([content[-1] ^ 1]),
        "older schema": content.replace(b"checkpoint 3 ", b"checkpoint 1 ", 1),
        "no JSON": signed(b"{\n" + tensors),
        "no tensors": signed(plain + b"\n"),
        "other JSON": signed(json.dumps(json.loads(plain) | {"progress": [1]}).encode() + b"\n" + tensors),
    }
    path.write_bytes(spoilt[how])


def signed(body):
    """A file that the checksum does not give away."""
    return f"torchreg checkpoint 3 {hashlib.sha256(body).hexdigest()}\n".encode() + body


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", "truncated or damaged"),
        ("cut in its first line", "no checkpoint of torchreg"),
        ("empty", "no checkpoint of torchreg"),
        ("foreign", "no checkpoint of torchreg"),
        ("damaged", "truncated or damaged"),
        ("older schema", "schema version is 1, and this torchreg reads 3"),
        ("no JSON", "content cannot be read"),
        ("no tensors", "content cannot be read"),
        ("other JSON", "content is not that of a checkpoint"),
    ],
)
def test_a_bad_checkpoint_is_refused_with_its_reason_and_the_next_older_taken(how, reason):
    checkpoint.save(FOLDER, made(1), keep=3)
    spoiled(checkpoint.save(FOLDER, made(2), keep=3), how)
    found, refused = newest()
    assert same(found, made(1))
    (told,) = refused
    assert "step-0000000002.pt" in told
    assert reason in told
    assert "\n" not in told


@pytest.mark.parametrize(
    "make",
    [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("nowhere")],
    ids=["folder", "FIFO", "device", "broken link"],
)
def test_what_is_not_a_file_is_refused_with_its_reason_and_nothing_waits_for_it(make):
    # W5: opening a FIFO waits for a writer for ever, and a device may have no end.
    checkpoint.save(FOLDER, made(1), keep=3)
    make(FOLDER / "step-0000000002.pt")
    found, refused = newest()
    assert found.step == 1
    assert re.search(r"step-0000000002.pt: it cannot be read \((it is not a regular file|No such file.*)\)", refused[0])


def test_one_of_another_run_is_refused_with_all_that_differs():
    checkpoint.save(FOLDER, made(1), keep=3)
    found, refused = newest(CONTRACT | {"seed": 4, "data_fingerprint": "sha256:ff", "new": True})
    assert found is None
    (told,) = refused
    for part in ("data_fingerprint was sha256:00 and is sha256:ff", "seed was 3 and is 4", "new was None and is True"):
        assert part in told


def test_any_reason_against_one_is_told():
    for step in (1, 2):
        checkpoint.save(FOLDER, made(step), keep=3)
    found, refused = checkpoint.newest(FOLDER, lambda one: "too new" if one.step > 1 else None)
    assert found.step == 1
    assert refused[0].endswith("step-0000000002.pt: too new")


def test_no_checkpoint_is_no_error():
    assert newest() == (None, [])


def test_tuples_and_lists_of_a_contract_are_the_same():
    assert differences({"base": [1.0, 2.0]}, {"base": (1.0, 2.0)}) is None


class Bomb:
    """What a pickle can do to whoever loads it: run any function."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("as_archive", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(as_archive):
    path = checkpoint.save(FOLDER, made(1), keep=3)
    plain = path.read_bytes().split(b"\n")[1]
    torch.save({"model": Bomb()}, "bomb.pt", _use_new_zipfile_serialization=as_archive)
    bomb = Path("bomb.pt").read_bytes()
    for content in (signed(plain + b"\n" + bomb), path.read_bytes() + bomb, bomb):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"content cannot be read|truncated or damaged|no checkpoint"):
            checkpoint.load(path)
    assert not Path("exploded").exists()
    torch.load("bomb.pt", weights_only=False)
    assert Path("exploded").is_dir(), "the bomb was none"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return checkpoint.save(tmp_path_factory.mktemp("whole") / "checkpoints", made(7), keep=1).read_bytes()


@st.composite
def edits(draw):
    """A function that changes a few bytes, cuts some out, or puts some in."""
    kind = draw(st.sampled_from(["change", "cut", "end", "insert", "replace"]))
    place, length = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 60))
    new = draw(st.binary(min_size=1, max_size=60))

    def edit(content):
        start = int(place * len(content))
        return {
            "change": content[:start] + new + content[start + len(new) :],
            "cut": content[:start] + content[start + length :],
            "end": content[:start],
            "insert": content[:start] + new + content[start:],
            "replace": new,
        }[kind]

    return edit


@given(edit=edits(), and_signed=st.booleans())
def test_any_change_of_its_bytes_is_refused_or_changes_nothing(edit, and_signed, whole):
    body = whole.partition(b"\n")[2]
    Path("fuzzed.pt").write_bytes(signed(edit(body)) if and_signed else edit(whole))
    try:
        loaded = checkpoint.load(Path("fuzzed.pt"))
    except ValueError as error:
        told = str(error)
    else:
        # Whoever signs anew what they changed can change numbers; nobody else can.
        assert and_signed or same(loaded, made(7))
        return
    assert told
    assert "\n" not in told
