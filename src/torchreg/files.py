"""Files that appear whole or not at all."""

from __future__ import annotations

import os
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
