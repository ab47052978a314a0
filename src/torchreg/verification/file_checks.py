"""Can every rank read what one of them wrote?"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from torchreg.core import checkpoint
from torchreg.core.checkpoint import Checkpoint
from torchreg.distributed.communicator import Communicator
from torchreg.verification.checks import Check, agree

_LEAST_FREE_BYTES = 1 << 28


def file_checks(communicator: Communicator, runs_dir: str) -> Iterator[Check]:
    """A checkpoint of one rank, read by all; free space; a rename that replaces."""
    row = partial(agree, communicator, "files")
    values = torch.arange(1_000, dtype=torch.float64).sqrt()

    def write() -> str:
        folder = Path(runs_dir) / f"verify-{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        checkpoint.save(folder, Checkpoint(1, {}, {}, {}, {"values": values}), keep=1)
        return str(folder)

    folder = Path(communicator.from_main(write))
    try:
        error = _read_error(folder, values)
        yield row("shared checkpoint", error, f"read by {communicator.world_size}", "by all ranks")
        free_bytes = shutil.disk_usage(folder).free if folder.is_dir() else 0
        error = f"{free_bytes >> 20} MiB are free in {runs_dir}" if free_bytes < _LEAST_FREE_BYTES else None
        yield row("free space", error, f"{free_bytes >> 30} GiB", f"at least {_LEAST_FREE_BYTES >> 20} MiB")
        error = _rename_error(folder) if communicator.is_main else None
        yield row("atomic rename", error, "replaced at once", "the new file")
        start_s = time.perf_counter()
        error = _fsync_error(folder) if communicator.is_main else None
        yield row("fsync", error, f"1 MiB in {1e3 * (time.perf_counter() - start_s):.3g} ms", "no error")
        error, links = _hard_links(folder) if communicator.is_main else (None, "")
        yield row("hard links", error, links, "refused where a file exists")
    finally:
        communicator.barrier()
        if communicator.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _read_error(folder: Path, values: torch.Tensor) -> str | None:
    if not folder.is_dir():
        return f"{folder} does not exist here: this file system is not shared with rank 0"
    found, refused = checkpoint.newest(folder, lambda found: None)
    if found is None:
        return refused[0] if refused else f"{folder} is empty here: this file system is not shared with rank 0"
    return None if torch.equal(found.tensors["values"], values) else "the checkpoint has other numbers here"


def _rename_error(folder: Path) -> str | None:
    old, new = folder / "old", folder / "new"
    old.write_text("old")
    new.write_text("new")
    try:
        new.replace(old)
    except OSError as error:
        return f"rename fails ({error.strerror})"
    return None if old.read_text() == "new" and not new.exists() else "rename leaves the old content"


def _fsync_error(folder: Path) -> str | None:
    try:
        checkpoint.write_synced(folder / "synced", bytes(1 << 20))
    except OSError as error:
        return f"fsync fails ({error.strerror})"
    return None


def _hard_links(folder: Path) -> tuple[str | None, str]:
    """An error, and what there is: locks are links, or files that are created, where a file system has no links."""
    try:
        os.link(folder / "old", folder / "link")
        os.link(folder / "old", folder / "link")
    except FileExistsError:
        return None, "refused where a file exists"
    except OSError as error:
        return None, f"none ({error.strerror}): locks are files"
    return "a link replaces a file: two jobs would have one lock", ""
