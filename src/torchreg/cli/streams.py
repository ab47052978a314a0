"""Standard streams that never raise."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any


class Stream(io.FileIO):
    """A standard stream that drops what cannot be written. `error` is why, unless only the reader is gone."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, or drop."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):  # a closed pipe, terminal, descriptor
                self.error = error
            return len(data)


def protect_streams() -> Stream:
    """Replace stdout and stderr by streams that never raise and print `?` for what their encoding lacks.

    Returns the raw stream of stdout.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by `>&-`: the next file that is opened would take its number
            os.open(os.devnull, os.O_RDWR)
    raw = {name: Stream(descriptor, "w", closefd=False) for descriptor, name in ((1, "stdout"), (2, "stderr"))}
    for name, stream in raw.items():
        before = getattr(sys, name) or open(stream.fileno(), "w", closefd=False)  # noqa: SIM115
        with contextlib.suppress(OSError):
            before.flush()
        raises = before.errors == "strict" or (before.errors == "surrogateescape" and before.encoding != "utf-8")
        protected = io.TextIOWrapper(
            io.BufferedWriter(stream),
            encoding=before.encoding,
            errors="replace" if raises else before.errors,
            line_buffering=before.line_buffering,
            write_through=before.write_through,
        )
        setattr(sys, name, protected)
    return raw["stdout"]
