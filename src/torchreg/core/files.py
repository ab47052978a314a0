"""Files that appear whole or not at all, on file systems that lack an operation too, and the names they may have."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from pathlib import Path

PARTIAL = ".part"
"""What the name of an unfinished file ends with."""

_NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_LINKS = _NOT_SUPPORTED | {errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV}
_LONGEST_NAME = 255  # bytes, on nearly every file system


def check_name(field: str, name: str) -> None:
    """Raise `ValueError`, naming the field, for a name that is not that of one file in its folder."""
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise ValueError(f"{field} is {name!r}, which is not a plain file name: leave out folders, as in friday-2")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"{field} has {len(name.encode())} bytes, and a file's name has at most {_LONGEST_NAME}")


def sync(descriptor: int) -> None:
    """Bring a file to disk, where the file system can: some network and FUSE file systems cannot.

    Raises `OSError` where it can and fails.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file by way of a temporary one beside it: readers see the old file or the whole new one.

    Raises `OSError` where it cannot be written; the old file is then untouched, and nothing unfinished stays.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        _write(partial, content, "wb")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def create(path: Path, content: bytes) -> bool:
    """Write a file that nobody else has written; False where there is one. Of several processes one succeeds.

    The file appears whole where the file system has hard links, and as it is written elsewhere.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
    try:
        _write(partial, content, "wb")
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_slowly(path, content)
        return True
    finally:
        partial.unlink(missing_ok=True)


def _create_slowly(path: Path, content: bytes) -> bool:
    try:
        _write(path, content, "xb")
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _write(path: Path, content: bytes, mode: str) -> None:
    with path.open(mode) as file:
        file.write(content)
        file.flush()
        sync(file.fileno())


def read_regular(path: Path, num_bytes: int = -1) -> bytes:
    """The content of a regular file, or its first `num_bytes`.

    Raises `OSError` where it cannot be read, and for a FIFO or a device, which might never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(num_bytes)
    finally:
        os.close(descriptor)
