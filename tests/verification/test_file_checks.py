"""If these fail, a job saves checkpoints or takes locks on a file system that keeps neither, and verify passes it."""

import errno
import os

from torchreg.verification.file_checks import file_checks

from .test_topology import Ranks


class OneRank(Ranks):
    def __init__(self):
        super().__init__(hosts=("n1",), local_ranks=(0,))

    def from_main(self, work):
        return work()

    def gather(self, item):
        return [item]

    def barrier(self):
        pass


def rows():
    return {row.name: row for row in file_checks(OneRank(), "runs")}


def test_a_right_file_system_passes():
    assert {row.status for row in rows().values()} == {"PASS"}
    assert rows()["fsync"].measured.startswith("1 MiB in ")


def fails_with(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def test_an_fsync_that_fails_is_named(monkeypatch):
    from torchreg.core import checkpoint

    really_write = checkpoint.write_synced
    monkeypatch.setattr(
        checkpoint,
        "write_synced",
        lambda path, *others: fails_with(errno.EIO)() if path.name == "synced" else really_write(path, *others),
    )
    row = rows()["fsync"]
    assert (row.status, "Input/output error" in row.measured) == ("FAIL", True)


def test_links_that_replace_fail_and_missing_ones_are_named(monkeypatch):
    monkeypatch.setattr(os, "link", fails_with(errno.EPERM))
    row = rows()["hard links"]
    assert (row.status, row.measured) == ("PASS", "none (Operation not permitted): locks are files")
    monkeypatch.setattr(os, "link", lambda source, path: None)
    assert rows()["hard links"].status == "FAIL"
