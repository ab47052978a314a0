"""Can every rank read what one of them wrote?"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch

from torchreg.core import checkpoint
from torchreg.core.checkpoint import Checkpoint
from torchreg.distributed.communicator import Communicator
from torchreg.runs import resume
from torchreg.verification.checks import Check, agree

_AREA = "files"
_LEAST_FREE_BYTES = 1 << 28


def file_checks(communicator: Communicator, runs_dir: str) -> Iterator[Check]:
    """A checkpoint by one rank, read by all; free space; a rename that replaces."""
    values = torch.arange(1_000, dtype=torch.float64).sqrt()

    def write() -> str:
        folder = Path(runs_dir) / f"verify-{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        checkpoint.save(folder, Checkpoint(1, {"verify": True}, {}, {}, {"values": values}), keep=1)
        return str(folder)

    folder = Path(communicator.from_main(write))
    try:
        yield agree(
            communicator,
            _AREA,
            "shared checkpoint",
            _unreadable(folder, values),
            f"read by {communicator.world_size}",
            "by all ranks",
        )
        free_bytes = shutil.disk_usage(folder).free if folder.is_dir() else 0
        little = f"{free_bytes >> 20} MiB are free in {runs_dir}" if free_bytes < _LEAST_FREE_BYTES else None
        yield agree(
            communicator,
            _AREA,
            "free space",
            little,
            f"{free_bytes >> 30} GiB",
            f"at least {_LEAST_FREE_BYTES >> 20} MiB",
        )
        problem = _rename(folder) if communicator.is_main else None
        yield agree(
            communicator, _AREA, "atomic rename", problem, "replaced at once", "the new file in the old one's place"
        )
    finally:
        communicator.barrier()
        if communicator.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _unreadable(folder: Path, values: torch.Tensor) -> str | None:
    if not folder.is_dir():
        return f"{folder} is not there: this file system is not shared with rank 0"
    found, refused = checkpoint.newest(folder, lambda found: resume.differences(found.run_signature, {"verify": True}))
    if found is None:
        return refused[0] if refused else f"{folder} is empty here: this file system is not shared with rank 0"
    return None if torch.equal(found.tensors["values"], values) else "the checkpoint has other numbers here"


def _rename(folder: Path) -> str | None:
    old, new = folder / "old", folder / "new"
    old.write_text("old")
    new.write_text("new")
    try:
        new.replace(old)
    except OSError as error:
        return f"rename fails ({error.strerror})"
    return None if old.read_text() == "new" and not new.exists() else "rename leaves the old content"
