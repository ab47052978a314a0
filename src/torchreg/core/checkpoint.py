"""Checkpoints: they appear whole or not at all, are checked before they are believed, and run no code when read.

A file is a line `torchreg checkpoint 2 <SHA-256 of what follows>`, a line of JSON, and the tensors as `torch.save`
writes them, which are read with `weights_only`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchreg.core.files import read_regular, sync_folder, write_atomically

SCHEMA_VERSION = 2

_MAGIC = "torchreg checkpoint"
_FIRST_LINE = re.compile(rf"{_MAGIC} (\d{{1,9}}) ([0-9a-f]{{64}})")


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is after `step` steps.

    `run_signature` is all that the run's numbers depend on: a run with another signature must not resume from here.
    `progress` is what the record needs to resume, `tensors` the state of model and optimizer (nested dictionaries and lists
    of tensors and numbers). Signature, progress and `versions` are plain JSON.
    """

    step: int
    run_signature: Mapping[str, Any]
    progress: Mapping[str, Any]
    versions: Mapping[str, str]
    tensors: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, and remove all but the newest `keep` once it is safely there.

    Those of later steps go too: a run comes back to an earlier step only where it could not go on from them. Raises
    `OSError` where it cannot be written; what was there before is then untouched.
    """
    tensors = io.BytesIO()
    torch.save(dict(checkpoint.tensors), tensors)
    plain = {name: getattr(checkpoint, name) for name in ("step", "run_signature", "progress", "versions")}
    body = json.dumps(plain, allow_nan=False).encode() + b"\n" + tensors.getvalue()
    first_line = f"{_MAGIC} {SCHEMA_VERSION} {hashlib.sha256(body).hexdigest()}\n".encode()

    folder.mkdir(exist_ok=True)
    path = folder / f"step-{checkpoint.step:010}.pt"
    write_atomically(path, first_line + body)
    sync_folder(folder)
    up_to_this = [found for found in _newest_first(folder) if found.name <= path.name]
    for found in folder.glob("step-*"):
        if found not in up_to_this[:keep]:
            with contextlib.suppress(OSError):  # what is in the way of nothing need not end the run
                found.unlink()
    return path


def load(path: Path) -> Checkpoint:
    """Read and check a checkpoint. Raises `ValueError` with the reason why it cannot be used."""
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
    except Exception as error:  # torch's reader has no list of what a file made to mislead it can raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"its content cannot be read: {reason}") from error
    mappings = (loaded.run_signature, loaded.progress, loaded.versions, loaded.tensors)
    if not (isinstance(loaded.step, int) and all(isinstance(part, dict) for part in mappings)):
        raise ValueError("its content is not that of a checkpoint")
    return loaded


def newest(folder: Path, reason_against: Callable[[Checkpoint], str | None]) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that can be gone on from, and why each newer one cannot."""
    refused = []
    for path in _newest_first(folder):
        try:
            checkpoint = load(path)
        except ValueError as error:
            refused.append(f"{path}: {error}")
            continue
        reason = reason_against(checkpoint)
        if reason is None:
            return checkpoint, refused
        refused.append(f"{path}: {reason}")
    return None, refused


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs between two contracts, in words; None if nothing does."""
    plain = json.loads(json.dumps(dict(now)))
    differing = [
        f"{key} was {before.get(key)} and is {plain.get(key)}"
        for key in sorted(before.keys() | plain.keys())
        if before.get(key) != plain.get(key)
    ]
    return "; ".join(differing) or None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True) if folder.is_dir() else []
