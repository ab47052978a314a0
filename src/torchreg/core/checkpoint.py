"""Checkpoints, and files that appear whole or not at all.

A checkpoint is a line `torchreg checkpoint 3 <SHA-256 of what follows>`, a line of JSON, and the tensors as
`torch.save` writes them. Its checksum is verified before it is used, and reading it runs no code (`weights_only`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 3
PARTIAL = ".part"
"""The suffix of an unfinished file."""

_NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_MAGIC = "torchreg checkpoint"
_FIRST_LINE = re.compile(rf"{_MAGIC} (\d{{1,9}}) ([0-9a-f]{{64}})")


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is after `step` steps.

    `run_signature` is all that the run's numbers depend on: a run with another one must not resume from here.
    `progress` is what the record needs to resume. `tensors` is the state of model and optimizer: nested dictionaries
    and lists of tensors and numbers. The other fields are plain JSON.
    """

    step: int
    run_signature: Mapping[str, Any]
    progress: Mapping[str, Any]
    versions: Mapping[str, str]
    tensors: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint; then remove all but the newest `keep`, and those of later steps, which could not be used.

    Raises `OSError` where it cannot be written; earlier checkpoints are then untouched.
    """
    import torch  # here, because commands that need no torch write files too

    tensors = io.BytesIO()
    torch.save(dict(checkpoint.tensors), tensors)
    plain = {name: getattr(checkpoint, name) for name in ("step", "run_signature", "progress", "versions")}
    body = json.dumps(plain, allow_nan=False).encode() + b"\n" + tensors.getvalue()
    first_line = f"{_MAGIC} {SCHEMA_VERSION} {hashlib.sha256(body).hexdigest()}\n".encode()

    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        sync_folder(folder.parent)  # else a power cut may lose the folder, with all that is in it
    path = folder / f"step-{checkpoint.step:010}.pt"
    write_atomically(path, first_line + body)
    sync_folder(folder)
    up_to_this = sorted(found for found in folder.glob("step-*.pt") if found.name <= path.name)
    for found in {*folder.glob("step-*")} - {*up_to_this[-keep:]}:
        with contextlib.suppress(OSError):  # an old file that stays is no reason to end the run
            found.unlink()
    return path


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint. Raises `ValueError` with the reason why it cannot be used."""
    import torch

    try:
        content = read_regular(path)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    first_line, _, body = content.partition(b"\n")
    match = _FIRST_LINE.fullmatch(first_line.decode("ascii", errors="replace"))
    if not match:
        raise ValueError("it is no checkpoint of torchreg")
    if int(match[1]) != SCHEMA_VERSION:
        raise ValueError(f"its schema version is {match[1]}, and this torchreg reads {SCHEMA_VERSION}")
    if hashlib.sha256(body).hexdigest() != match[2]:
        raise ValueError("it is truncated or damaged: its checksum does not match")
    plain_line, _, tensors = body.partition(b"\n")
    try:
        plain = json.loads(plain_line)
        loaded = Checkpoint(**plain, tensors=torch.load(io.BytesIO(tensors), map_location="cpu", weights_only=True))
    except Exception as error:  # torch does not document what a malicious file can raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"its content cannot be read: {reason}") from error
    mappings = (loaded.run_signature, loaded.progress, loaded.versions, loaded.tensors)
    if not (isinstance(loaded.step, int) and all(isinstance(part, dict) for part in mappings)):
        raise ValueError("its content is not that of a checkpoint")
    return loaded


def newest(folder: Path, reason_against: Callable[[Checkpoint], str | None]) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint without a `reason_against` it, and why each newer one cannot be used."""
    refused = list[str]()
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            checkpoint = load(path)
            if (reason := reason_against(checkpoint)) is None:
                return checkpoint, refused
        except ValueError as error:
            reason = str(error)
        refused.append(f"{path}: {reason}")
    return None, refused


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file by way of a temporary one beside it: readers see the old file or the whole new one.

    Raises `OSError` where it cannot be written; the old file is then untouched, and nothing unfinished stays.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        write_synced(partial, content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_synced(path: Path, content: bytes, mode: str = "wb") -> None:
    """Write a file, and bring it to disk."""
    with path.open(mode) as file:
        file.write(content)
        file.flush()
        sync(file.fileno())


def sync(descriptor: int) -> None:
    """Bring a file to disk; some network and FUSE file systems cannot. Raises `OSError` where one can and fails."""
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


def read_regular(path: Path, num_bytes: int = -1) -> bytes:
    """The content of a regular file, or its first `num_bytes`. Raises `OSError`, also for a FIFO or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(num_bytes)
    finally:
        os.close(descriptor)
