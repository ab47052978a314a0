"""Names of files, and files that one process of many creates."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

from torchreg.core.checkpoint import PARTIAL, write_synced

_NO_LINKS = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EMLINK,
             errno.EXDEV}  # fmt: skip
_LONGEST_NAME = 255  # bytes, on nearly every file system


def check_name(field: str, name: str) -> None:
    """Raise `ValueError`, naming the field, for a name that is not that of one file in its folder."""
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise ValueError(f"{field} is {name!r}, which is not a plain file name: leave out folders, as in friday-2")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"{field} has {len(name.encode())} bytes, and a file's name has at most {_LONGEST_NAME}")


def create(path: Path, content: bytes) -> bool:
    """Write a file that nobody else has written; False where there is one. Of several processes one succeeds.

    The file appears whole where the file system has hard links, and as it is written elsewhere.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
    try:
        write_synced(partial, content)
        os.link(partial, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    finally:
        partial.unlink(missing_ok=True)
    try:
        write_synced(path, content, "xb")
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True
