"""If these fail, a report counts damaged, foreign or repeated launches, or fails because of one file of a thousand."""

import contextlib
import copy
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchreg.cli import main
from torchreg.reporting.analysis import analyse
from torchreg.scaling import sources
from torchreg.scaling.launch_record import check, checksummed
from torchreg.scaling.records import allreduce_table, launches_table, points_table, read_records
from torchreg.scaling.sources import merge

from .synthetic_records import SyntheticCampaign, write_launch

SMALL = SyntheticCampaign(num_blocks=2, ranks_per_node=(1, 2), combinations=(("sgd", "ddp"),), num_features=(1,))
RECORDS = list(SMALL.records())
TWO_RANKS = RECORDS[1]
assert TWO_RANKS["launch"]["id"] == "block-00-nodes-1-ranks-2"


def changed(*path, to):
    """The record of two ranks with one field changed, or removed where `to` is `...`."""
    record = copy.deepcopy(TWO_RANKS)
    parent = record
    for key in path[:-1]:
        parent = parent[key]
    if to is ...:
        del parent[path[-1]]
    else:
        parent[path[-1]] = to
    return record


def read(folder="campaign"):
    return read_records([Path(folder)])


def reasons(records):
    return [one.reason for one in records.excluded]


def test_tables_have_a_row_for_each_launch_and_point():
    records = read(SMALL.write(Path("campaign")))
    assert len(records.launches) == 4
    assert (records.failed, records.excluded) == ([], [])
    points = points_table(records)
    # 2 blocks × 2 world sizes × 1 combination × 1 size; strong 256, and weak 64 or 128.
    assert len(points) == 2 * 2 * 2
    row = points[(points["launch"] == "block-00-nodes-1-ranks-2") & (points["global_batch_size"] == 128)].iloc[0]
    point = next(point for point in TWO_RANKS["points"] if point["global_batch_size"] == 128)
    assert row[list(point)].to_dict() == point
    # Only two ranks reduce: 2 launches × 4 sizes.
    assert len(allreduce_table(records)) == 2 * 4
    launches = launches_table(records)
    assert launches["block"].tolist() == [0, 0, 1, 1]
    assert launches["torch"].unique().tolist() == ["2.13.0"]


REFUSED = {
    "negative time": (changed("points", 1, "step_time_s", to=-1.0), "points[1].step_time_s is -1.0: expected float >="),
    "no time": (changed("points", 0, "step_time_s", to=0), "points[0].step_time_s is 0"),
    "time as text": (changed("points", 0, "step_time_s", to="0.1"), "points[0].step_time_s is '0.1': expected float"),
    "true for a time": (changed("wall_s", to=True), "wall_s is True: expected float, got bool"),
    "not a number": (changed("points", 0, "data_time_s", to=float("nan")), "points[0].data_time_s is None"),
    "infinite": (changed("allreduce", 0, "time_s", to=1e300), "allreduce[0].time_s is 1e+300"),
    "too large": (changed("points", 0, "num_steps", to=10**30), "points[0].num_steps is 1000000"),
    "missing": (changed("points", 0, "check_passed", to=...), "partial: points[0].check_passed is missing"),
    "all missing": (changed("campaign", to=...), "partial: campaign is missing"),
    "no points": ({**TWO_RANKS, "points": [], "allreduce": []}, "partial: points and allreduce are empty"),
    "points no list": (changed("points", to={"a": 1}), "points is {'a': 1}: expected array, got object"),
    "point no object": (changed("points", 0, to=3), "points[0] is 3: expected object, got int"),
    "older": (changed("schema_version", to=1), "older: schema_version is 1, and this torchreg reads 2: measure again"),
    "newer": (changed("schema_version", to=3), "newer: schema_version is 3, and this torchreg reads 2: update it"),
    "version text": (changed("schema_version", to="2"), "foreign: schema_version is '2'"),
    "version true": (changed("schema_version", to=True), "foreign: schema_version is True"),
    "foreign": (changed("kind", to="train"), "foreign: kind is 'train'"),
    "no kind": (changed("kind", to=...), "foreign: kind is None"),
    "unknown status": (changed("status", to="perhaps"), "status is 'perhaps': invalid value"),
    "no status": (changed("status", to=...), "partial: status is missing"),
    "ok with exit code 1": (changed("exit_code", to=1), "exit_code is 1: invalid"),
    # The worst failure of all: two copies of a run of one rank, which would look like perfect weak scaling.
    "silent copies": (changed("distributed", "world_size", to=1), "distributed.world_size is 1, expected 2 (launch."),
    "on one node": (
        changed("launch", to={**TWO_RANKS["launch"], "num_nodes": 2, "ranks_per_node": 1}),
        "distributed.num_nodes is 1, expected 2 (launch.num_nodes)",
    ),
    "ranks missing": (changed("distributed", "placements", to=[]), "partial: distributed.placements has 0 of 2 ranks"),
    # A node whose torch sees no GPU: its CPUs would stand for the machine.
    "on another device": (
        changed("campaign", "device", to="cuda"),
        "distributed.placements has cpu, expected cuda (campaign.device)",
    ),
    "facts no object": (changed("machine_facts", to=["6.4"]), "machine_facts is ['6.4']: expected object, got array"),
    "fact no text": (changed("machine_facts", to={"cuda": 13}), "machine_facts is {'cuda': 13}: expected str"),
    "no product": (changed("launch", "ranks_per_node", to=3), "launch.world_size is 2, not num_nodes 1"),
    "same setting twice": (changed("points", 1, to=TWO_RANKS["points"][0]), "points[1] is measured twice"),
    "same message twice": (changed("allreduce", 1, to=TWO_RANKS["allreduce"][0]), "allreduce has a backend and"),
    "wrong throughput": (changed("points", 0, "throughput", to=5.0), "points[0].throughput is 5, not"),
    "wrong local batch": (changed("points", 0, "local_batch_size", to=7), "points[0].local_batch_size is 7, not"),
    "ranks in disorder": (changed("points", 0, "rank_min_s", to=9.0), "points[0].rank_median_s is"),
    "no message": (changed("points", 0, "message_bytes", to=0), "points[0].message_bytes is 0 at world size 2"),
    "steps without a time": (changed("points", 0, "measured_time_s", to=None), "points[0].measured_steps is"),
    "target without a limit": (changed("points", 0, "stability_limit", to=None), "points[0].target_excess is 0.01"),
    "two ranks do not reduce": (changed("points", 0, "sync", to="none"), "points[0].sync is 'none' at world size 2"),
    "name with a slash": (changed("points", 0, "optimizer", to="../x"), "points[0].optimizer is '../x'"),
    "no time of day": (changed("started_utc", to="yesterday"), "started_utc is 'yesterday': invalid RFC3339"),
    "endless text": (changed("dtype", to="x" * 5000), "expected str of length <= 4000"),
    "other id": (changed("launch", "id", to="block-09"), "launch.id is 'block-09', not the folder's name"),
}  # fmt: skip


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """A campaign of four launches, and beside them, as other launches of one name, all records that are refused."""
    campaign = SMALL.write(tmp_path_factory.mktemp("refused"))
    for number, (record, _) in enumerate(REFUSED.values()):
        path = campaign / f"launches/block-00-nodes-1-ranks-2~{number}/launch.json"
        path.parent.mkdir()
        path.write_text(json.dumps(checksummed(record)))
    return read(campaign)


@pytest.mark.parametrize("case", REFUSED)
def test_a_record_that_cannot_be_used_is_excluded_with_its_reason(case, refused):
    folder = f"block-00-nodes-1-ranks-2~{list(REFUSED).index(case)}"
    (reason,) = [one.reason for one in refused.excluded if one.file.parent.name == folder]
    assert REFUSED[case][1] in reason
    assert "\n" not in reason


def test_records_that_can_be_used_are_read_whatever_lies_beside_them(refused):
    assert len(refused.launches) == 4
    assert len(points_table(refused)) == 4 * 2
    assert len(refused.excluded) == len(REFUSED)


def test_a_record_is_what_was_written():
    path = SMALL.write(Path("campaign")) / "launches/block-00-nodes-1-ranks-2/launch.json"
    whole = path.read_bytes()
    path.write_bytes(json.dumps({key: value for key, value in json.loads(whole).items() if key != "sha256"}).encode())
    assert reasons(read()) == ["partial: sha256, the checksum of a finished record, is missing"]
    path.write_bytes(whole.replace(b'"num_repeats": 20', b'"num_repeats": 30', 1))
    assert reasons(read()) == ["damaged: the content is not what was written (sha256 differs)"]
    path.write_bytes(json.dumps(json.loads(whole)).encode())  # spaces are no content
    assert reasons(read()) == []
    path.write_bytes(whole[:-40])
    assert reasons(read())[0].startswith("damaged: no JSON")
    path.write_bytes(b"[" * 100_000)
    assert reasons(read())[0].startswith("damaged: no JSON")


def test_what_is_no_plain_file_is_named_and_never_opened(monkeypatch):
    campaign = SMALL.write(Path("campaign"))
    Path("elsewhere").mkdir()
    target = campaign / "launches/block-00-nodes-1-ranks-1/launch.json"
    shutil.copy(target, "elsewhere/launch.json")
    odd = {name: campaign / "launches" / name for name in ("a-link", "b-pipe", "c-folder", "d-locked", "e-empty")}
    for folder in odd.values():
        folder.mkdir()
    (odd["a-link"] / "launch.json").symlink_to(target.resolve())
    os.mkfifo(odd["b-pipe"] / "launch.json")
    (odd["c-folder"] / "launch.json").mkdir()
    (odd["d-locked"] / "lock.json").write_text("{}")
    (campaign / "launches/f-linked-folder").symlink_to(Path("elsewhere").resolve())
    (campaign / "launches/g-file").write_text("hello")
    records = read()
    assert len(records.launches) == 4
    assert reasons(records) == [
        "a link, not a regular file",
        "a special file, not a regular file",
        "a directory, not a regular file",
        "partial: locked and not finished: it still runs, or was killed",
        "partial: no launch.json",
        "a link, not a directory",
        "a file, not a directory",
    ]
    monkeypatch.setattr(sources, "_MOST_BYTES", 100)
    assert sum(reason.startswith("too large: ") for reason in reasons(read())) == 4


def test_an_empty_directory_is_refused_with_the_command_to_run(capsys):
    Path("empty/launches").mkdir(parents=True)
    for folder, error in (("empty", "has no launches"), ("nowhere", "is no directory")):
        assert main(["report", folder]) == 2
        err = capsys.readouterr().err
        assert f"{folder} {error}" in err
        assert f"torchreg scale run CAMPAIGN.yaml --dir {folder}" in err


def test_failed_launches_and_earlier_attempts_are_failures_with_their_log():
    campaign = SMALL.write(Path("campaign"))
    write_launch(campaign, SMALL.failure(0, 1, 2, "time-out"), "launch.failed-1.json")
    write_launch(campaign, SMALL.failure(7, 1, 2, "died"))
    (campaign / "launches/block-07-nodes-1-ranks-2/stderr.log").write_text("segmentation fault")
    shutil.copy(
        campaign / "launches/block-00-nodes-1-ranks-1/launch.json",
        campaign / "launches/block-00-nodes-1-ranks-1/launch.failed-1.json",
    )
    records = read()
    assert [(one.name, one.content["reason"]) for one in records.failed] == [
        ("block-00-nodes-1-ranks-2", "time-out"),
        ("block-07-nodes-1-ranks-2", "died"),
    ]
    assert [one.log and one.log.name for one in records.failed] == [None, "stderr.log"]
    assert len(records.launches) == 4
    assert reasons(records) == ["status is ok, and the file's name is that of a failed attempt"]
    report = analyse(records)
    assert [one["is_retried"] for one in report["failed"]] == [True, False]
    assert report["cost"]["num_launches"] == 6
    # 4 launches of 40 s and 2 failures of 5 s, on one node each.
    assert report["cost"]["node_hours"] == pytest.approx(170 / 3600)


def test_what_could_move_a_cursor_or_break_a_page_is_made_printable():
    record = changed("dtype", to="float64\x1b[31m\x00\ud800 <b>&")
    write_launch(Path("campaign"), record)
    (Path("campaign/launches") / "odd\x1b[2J\udcff").mkdir()
    records = read()
    assert launches_table(records)["dtype"].tolist() == ["float64\\x1b[31m\\x00\\ud800 <b>&"]
    assert analyse(records)["excluded"][0]["file"] == "campaign/launches/odd\\x1b[2J\\udcff"


# Damage


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
WHOLE = json.dumps(checksummed(TWO_RANKS), indent=1).encode()


def paths_of(content, path=()):
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from paths_of(value, (*path, key))


PATHS = [path for path in paths_of(TWO_RANKS) if path]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A campaign of two launches, and the file of the second one."""
    campaign = tmp_path_factory.mktemp("fuzz")
    write_launch(campaign, RECORDS[0])
    return campaign, write_launch(campaign, RECORDS[1])


@settings(max_examples=400)
@given(st.data())
def test_a_damaged_file_is_excluded_or_its_numbers_are_the_same(data):
    damaged = bytearray(WHOLE)
    if data.draw(st.booleans(), "truncated"):
        damaged = damaged[: data.draw(st.integers(0, len(damaged) - 1), "length")]
    flips = data.draw(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), max_size=3), "flips")
    for position, bits in flips:
        if position < len(damaged):
            damaged[position] ^= bits
    with contextlib.suppress(ValueError):  # excluded, with the reason
        assert check(bytes(damaged)) == TWO_RANKS


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[" * 100_000, "damaged: no JSON (RecursionError"),
        ("[" * 5000 + "]" * 5000, "damaged: n"),  # no JSON for one Python, nested too deeply for another
        ("[" * 30 + "]" * 30, "points[0].num_steps is [[["),
        ("1" * 5000, "damaged: no JSON (ValueError"),
        ("1" * 4000, "points[0].num_steps is 1111"),
        ("NaN", "points[0].num_steps is nan"),
        ("-Infinity", "points[0].num_steps is -inf"),
        ("1e999", "points[0].num_steps is inf"),
    ],
)
def test_hostile_json_is_refused_in_one_line(value, reason):
    text = json.dumps(changed("points", 0, "num_steps", to="VALUE")).replace('"VALUE"', value)
    with contextlib.suppress(ValueError, RecursionError):  # with the right checksum, where JSON can be read at all
        content = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
        text = text[:-1] + f', "sha256": "{hashlib.sha256(content.encode()).hexdigest()}"}}'
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        check(text.encode())
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300


@settings(max_examples=50)
@given(path=st.sampled_from(PATHS), value=VALUES, has_checksum=st.booleans())
def test_a_changed_type_never_breaks_a_report(fuzzed, path, value, has_checksum):
    campaign, file = fuzzed
    record = (
        checksummed(changed(*path, to=value))
        if has_checksum
        else {**checksummed(TWO_RANKS), **changed(*path, to=value)}
    )
    file.write_text(json.dumps(record))
    records = read_records([campaign])
    assert len(records.launches) + len(records.failed) + len(records.excluded) >= 2
    if not has_checksum and len(records.launches) == 2:
        assert records.launches[1].content == TWO_RANKS
    if not records.excluded:
        json.dumps(analyse(records), allow_nan=False)


# Several directories


def same_points(one, other):
    columns = ["machine", "launch", "world_size", "global_batch_size", "step_time_s"]
    left, right = (points_table(records)[columns] for records in (one, other))
    pd.testing.assert_frame_equal(*(table.sort_values(columns, ignore_index=True) for table in (left, right)))


def test_merging_keeps_both_of_two_launches_of_one_name_and_copies_each_once():
    first = SMALL.write(Path("first"))
    second = SyntheticCampaign(**{**vars(SMALL), "seed": 1}).write(Path("second"))
    shutil.copytree(first, "copy")
    lines = merge(Path("all"), [first, second, Path("copy")])
    assert lines[-3:] == [
        "merged       first: 4 launches copied into all",
        "merged       second: 4 launches copied into all",
        "merged       copy: 0 launches copied into all",
    ]
    names = sorted(path.name for path in Path("all/launches").iterdir())
    assert names == sorted(path.name + end for path in (first / "launches").iterdir() for end in ("", "~2"))
    merged = read("all")
    assert not merged.excluded
    assert len(points_table(merged)) == 2 * len(points_table(read(first)))
    same_points(merged, read_records([first, second, Path("copy")]))
    # Block 0 of one directory ran at another time than that of the other: 4 blocks, not 2.
    assert launches_table(merged).groupby("block").size().tolist() == [2, 2, 2, 2]


def test_merging_again_adds_what_is_new_under_the_same_suffix():
    first = SMALL.write(Path("first"))
    grown = SyntheticCampaign(**{**vars(SMALL), "seed": 1, "num_blocks": 3}).write(Path("second"))
    merge(Path("all"), [first, grown])
    later = next(
        record
        for record in SyntheticCampaign(**{**vars(SMALL), "seed": 5, "num_blocks": 4}).records()
        if record["launch"]["block"] == 3
    )
    write_launch(grown, later)
    before = {path.name for path in Path("all/launches").iterdir()}
    merge(Path("all"), [grown])
    assert {path.name for path in Path("all/launches").iterdir()} - before == {"block-03-nodes-1-ranks-1~2"}
    assert sum(line.endswith("1 launches copied into all") for line in merge(Path("all"), [grown])) == 0
    # What was merged can be merged.
    merge(Path("more"), [Path("all"), grown])
    same_points(read("more"), read("all"))


def test_a_later_state_of_a_launch_replaces_the_earlier():
    campaign = SMALL.write(Path("campaign"))
    write_launch(campaign, SMALL.failure(5, 1, 2, "died"))
    merge(Path("all"), [campaign])
    folder = campaign / "launches/block-05-nodes-1-ranks-2"
    (folder / "launch.json").rename(folder / "launch.failed-1.json")
    good = copy.deepcopy(TWO_RANKS)
    good["launch"] |= {"id": folder.name, "block": 5}
    write_launch(campaign, good)
    for records in (read_records([Path("all"), campaign]), merge(Path("all"), [campaign]) and read("all")):
        assert [launch.name for launch in records.launches].count(folder.name) == 1
        assert [one.content["reason"] for one in records.failed] == ["died"]
        assert len(records.launches) == 5


def test_merging_copies_logs_and_damage_but_nothing_unfinished():
    campaign = SMALL.write(Path("campaign"))
    (campaign / "launches/block-00-nodes-1-ranks-1/stderr.log").write_text("warning")
    (campaign / "launches/x-running").mkdir()
    (campaign / "launches/x-running/lock.json").write_text("{}")
    (campaign / "launches/y-damaged").mkdir()
    (campaign / "launches/y-damaged/launch.json").write_text("{")
    lines = merge(Path("all"), [campaign])
    assert [line for line in lines if line.startswith("not copied")] == [
        "not copied   campaign/launches/x-running: partial: locked and not finished: it still runs, or was killed"
    ]
    assert Path("all/launches/block-00-nodes-1-ranks-1/stderr.log").read_text() == "warning"
    assert [one.file for one in read("all").excluded] == [Path("all/launches/y-damaged/launch.json")]
    assert Path("all/campaign.yaml").read_bytes() == (campaign / "campaign.yaml").read_bytes()


def test_merging_refuses_to_write_into_something_else():
    one = SMALL.write(Path("one"))
    other = SyntheticCampaign(**{**vars(SMALL), "campaign": "other"}).write(Path("other"))
    with pytest.raises(ValueError, match="where another campaign is measured"):
        merge(one, [other])
    Path("home").mkdir()
    Path("home/letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="home, which is not the directory of a campaign"):
        merge(Path("home"), [one])
    with pytest.raises(ValueError, match=r"letter\.txt, which is not the directory of a campaign"):
        merge(Path("home/letter.txt"), [one])
    with pytest.raises(ValueError, match="torchreg scale run"):
        merge(Path("new"), [Path("home")])
    assert len(merge(Path("both"), [one, other])) == 2 + 4  # the other campaign's launches have the same names
    assert not Path("both/campaign.yaml").exists()
    assert len(analyse(read("both"))["sources"]) == 2
