"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

PARTIAL = ".part"
"""What the name of an unfinished file ends with."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file by way of a temporary one beside it: readers see the old file or the whole new one.

    Raises `OSError` where it cannot be written; the old file is then untouched, and nothing unfinished stays.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


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


def check_name(field: str, name: str) -> None:
    """Raise `ValueError` unless `name` is one plain path component of at most 255 bytes."""
    plain = name not in ("", ".", "..") and "/" not in name and name.isprintable()
    if not plain or len(os.fsencode(name)) > 255:
        raise ValueError(f"{field} is {name!r}: give a plain folder name of at most 255 bytes")
