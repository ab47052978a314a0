"""If these fail, a run dies at its first save on a file system that lacks an operation, or writes where it must not."""

import errno
import os

import pytest

from torchreg.core.checkpoint import sync_folder, write_atomically
from torchreg.runs.files import check_name, create


def refuse(number, monkeypatch, name="fsync"):
    def refusing(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, refusing)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_is_good_enough(number, tmp_path, monkeypatch):
    # F1: fsync of a folder, and on some of a file, is refused by network and FUSE file systems.
    refuse(number, monkeypatch)
    write_atomically(tmp_path / "file", b"content")
    sync_folder(tmp_path)
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_what_was_not_brought_to_disk_is_a_failure(number, tmp_path, monkeypatch):
    refuse(number, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_atomically(tmp_path / "file", b"content")
    with pytest.raises(OSError, match=os.strerror(number)):
        sync_folder(tmp_path)
    with pytest.raises(OSError, match=os.strerror(number)):
        create(tmp_path / "file", b"content")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [None, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_of_several_who_create_a_file_the_first_has_it(number, tmp_path, monkeypatch):
    # F2: FAT and some network file systems have no hard links.
    if number is not None:
        refuse(number, monkeypatch, "link")
    assert create(tmp_path / "file", b"first")
    assert not create(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/tmp/x", "a/b", "a\0", "a\n", "\x1b[2J", "\udcff", "x" * 256])
def test_a_name_that_is_not_a_plain_one_is_refused(name):
    # W5
    with pytest.raises(ValueError, match=r"^name "):
        check_name("name", name)


@pytest.mark.parametrize("name", ["friday", "v1.2-x_3", "näme: # 'x'", ".hidden", "...", "é" * 127])
def test_a_plain_name_is_taken(name):
    check_name("name", name)
