"""If these fail, a network that has become slower passes a comparison, or one that has not fails it."""

import json
from xml.etree import ElementTree

import pytest
import torch

from torchreg.distributed.communicator import Communicator, Placement
from torchreg.distributed.launcher import Launcher
from torchreg.verification import verify_record
from torchreg.verification.checks import Check, verdict


def row_of(*times, operation="all-reduce"):
    """The row of a collective with medians and spreads in seconds, by bytes."""
    timings = [
        {"operation": operation, "message_bytes": size, "median_s": median_s, "spread_s": spread_s}
        for size, median_s, spread_s in times
    ]
    return Check("collectives", f"{operation} time", "PASS", "", timings=tuple(timings))


@pytest.mark.parametrize(
    ("before", "now", "status"),
    [
        ((1.0, 0.01), (1.19, 0.01), "PASS"),  # launches differ by a fifth
        ((1.0, 0.01), (1.21, 0.01), "FAIL"),
        ((1.0, 0.2), (1.8, 0.2), "PASS"),  # 3 × √(0.2² + 0.2²) = 0.85
        ((1.0, 0.2), (1.9, 0.2), "FAIL"),
        ((1.0, 0.01), (0.5, 0.01), "PASS"),
    ],
)
def test_slower_is_what_neither_spread_nor_drift_explains(before, now, status):
    timings = row_of((8, *before)).timings
    (row,) = verify_record.compare([row_of((8, *now)), Check("files", "fsync", "PASS", "")], timings)
    assert (row.area, row.name, row.status) == ("baseline", "all-reduce", status)


def test_each_size_that_is_slower_is_named_and_other_sizes_are_not_compared():
    baseline = row_of((8, 1e-5, 1e-7), (1 << 20, 1e-3, 1e-5)).timings
    (row,) = verify_record.compare([row_of((8, 1e-5, 1e-7), (1 << 20, 2e-3, 1e-5))], baseline)
    assert (row.status, row.measured) == ("FAIL", "1 MiB takes 2.00 times as long")
    assert verify_record.compare([row_of((64, 1.0, 0.0))], baseline) == []


def test_a_timing_has_the_bandwidths_of_nccl_tests():
    # 1 MiB in 2 ms on 4 ranks: 524 MB/s, on the bus 2·3/4 of it. Quartiles of 1, 2, 3 ms are 1 and 3: 2 ms / 1.349.
    timing = verify_record.timing("all-reduce", 1 << 20, 1.5, [1e-3, 2e-3, 3e-3])
    assert timing["algorithm_bytes_per_s"] == pytest.approx(524_288_000)
    assert timing["bus_bytes_per_s"] == pytest.approx(786_432_000)
    assert timing["spread_s"] == pytest.approx(2e-3 / 1.349)


@pytest.fixture
def written(tmp_path):
    """A communicator of one rank, and the path of its record."""
    placement = Placement(0, "n1", 0, "cpu", "CPU", "")
    launcher = Launcher("none", 0, 1, 0, 1, uses_mpi=False)
    communicator = Communicator(launcher, 0, 1, torch.device("cpu"), "single", None, "none", (placement,))
    checks = [row_of((8, 1e-5, 1e-7))]
    record = verify_record.make_record(communicator, "auto", checks, "2026-01-01T00:00:00+00:00")
    (tmp_path / "runs").mkdir()
    paths = [verify_record.write_record(tmp_path / "runs", record) for _ in range(2)]
    assert len(set(paths)) == 2, "two of one second have names of their own"
    return communicator, paths[0]


def test_a_record_can_be_a_baseline(written):
    communicator, path = written
    assert verify_record.read_timings(str(path), communicator) == [dict(row_of((8, 1e-5, 1e-7)).timings[0])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "train"}, "kind is train, and here it is verify"),
        ({"schema_version": 2}, "schema_version is 2, and here it is 1"),
        ({"checks": 3}, "which is no record of torchreg verify"),
        ({"distributed": {"world_size": 8, "num_nodes": 2, "backend": "nccl", "device_name": "A100"}},
         "world_size is 8, and here it is 1: compare with a record of the same ranks"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_baseline_is_named(written, change, message):
    communicator, path = written
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=r"^baseline is ") as caught:
        verify_record.read_timings(str(path), communicator)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match=r"^baseline is 'none.json'.*No such file"):
        verify_record.read_timings("none.json", communicator)


def test_junit_has_what_failed_and_what_was_skipped():
    checks = [
        Check("a", "right", "PASS", "1"),
        Check("a", "wrong", "FAIL", "2 < 3", "3"),
        Check("b", "none", "SKIP", "x"),
    ]
    suite = ElementTree.fromstring(verify_record.junit(checks))
    assert [suite.get(name) for name in ("tests", "failures", "skipped")] == ["3", "1", "1"]
    assert suite.find("testcase[@name='wrong']/failure").text == "2 < 3; expected: 3"


def test_the_verdict_has_what_was_covered():
    checks = [
        Check("collectives", "all-reduce", "PASS", "", message_bytes=3 << 19),
        Check("training", "ddp", "PASS", "", num_steps=1_200),
        Check("training", "mpi", "PASS", "", num_steps=300),
    ]
    assert "trains this model correctly in 1,500 steps, with messages to 1.5 MiB (3 passed" in verdict(checks)
