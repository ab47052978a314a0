"""The files of a run, in `runs/<name>/`: `config.json`, `record.json`, `metrics.jsonl`, figures.

Each file appears whole (temporary file, fsync, rename) or not at all. Only the main rank writes.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from torchreg.core.checkpoint import PARTIAL, read_regular, sync, write_atomically
from torchreg.runs.config import RunConfig

SCHEMA_VERSION = 2

CONFIG_FILE = "config.json"
RECORD_FILE = "record.json"
METRICS_FILE = "metrics.jsonl"
PLAN_FILE = "plan.json"
CHECKPOINTS_FOLDER = "checkpoints"
TRAINING_FIGURE = "training"

_ENDING_FILES = (RECORD_FILE, *(f"{TRAINING_FIGURE}.{kind}" for kind in ("png", "svg")))
_OWN_FILES = (CONFIG_FILE, METRICS_FILE, METRICS_FILE + PARTIAL, *_ENDING_FILES)
_IS_WRITTEN_WITHIN_S = 0.1  # how long `is_written` keeps a run from locking its folder, at most
_METRICS_JSON = json.JSONEncoder(allow_nan=False)  # made once: a line is written from inside the loop


def utc_now() -> str:
    """The time in UTC, to the second, in ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def create_run_folder(runs_dir: str | Path, name: str | None, kind: str, *, overwrite: bool = False) -> Path:
    """Make the folder `runs_dir/name`; without a name <kind>-<date>-<time> in UTC, numbered within a second.

    Raises `ValueError` when it exists already and `overwrite` is not given, or cannot be written.
    """
    first = name or datetime.now(timezone.utc).strftime(f"{kind}-%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        path = Path(runs_dir) / (first if number == 1 else f"{first}-{number}")
        try:
            path.mkdir(parents=True, exist_ok=overwrite and name is not None)
            probe = path / PARTIAL
            probe.touch()
            probe.unlink(missing_ok=True)  # another run may have the same
            break
        except FileExistsError:
            if name is not None:  # else another run was started in the same second
                reason = f"name is {name!r}, and {path} exists already"
                raise ValueError(f"{reason}: choose another --name, or --overwrite") from None
        except OSError as error:
            what = f"runs_dir is {str(runs_dir)!r}, where {path} cannot be written ({error.strerror})"
            raise ValueError(f"{what}: choose another --runs-dir") from error
    return path


class RunDirectory:
    """The folder of one run, locked until it is closed: another run that would write there gets a `ValueError`."""

    def __init__(self, config: RunConfig) -> None:
        overwrite = config.overwrite or config.resume == "auto"
        self.path = create_run_folder(config.runs_dir, config.name, "train", overwrite=overwrite)
        try:
            self._lock = _lock(self.path)
        except ValueError:
            time.sleep(_IS_WRITTEN_WITHIN_S)
            self._lock = _lock(self.path)
        self._partial_metrics = self.path / (METRICS_FILE + PARTIAL)
        self._metrics: BinaryIO | None = None
        self._digest = hashlib.sha256()  # of the metrics so far

    def start(self) -> None:
        """Start from scratch: delete what an earlier run left."""
        for checkpoint in (self.path / CHECKPOINTS_FOLDER).glob("step-*"):
            checkpoint.unlink()
        for file in _OWN_FILES:
            (self.path / file).unlink(missing_ok=True)
        self._metrics = self._partial_metrics.open("wb")

    def resume(self, num_bytes: int) -> None:
        """Resume a record whose metrics were so many bytes long; delete what a finished run has."""
        for file in _ENDING_FILES:
            (self.path / file).unlink(missing_ok=True)
        self._digest = hashlib.sha256(self.first_metrics(num_bytes))
        if not self._partial_metrics.exists():
            (self.path / METRICS_FILE).replace(self._partial_metrics)
        self._metrics = self._partial_metrics.open("r+b")
        self._metrics.truncate(num_bytes)
        self._metrics.seek(num_bytes)

    def first_metrics(self, num_bytes: int) -> bytes:
        """So many bytes of the metrics on disk, under their final name where a run ended while it wrote its record."""
        for path in (self._partial_metrics, self.path / METRICS_FILE):
            if path.exists():
                return read_regular(path, num_bytes)
        return b""

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add a line to the metrics, which appear under their name when the run is finished."""
        assert self._metrics
        text = _METRICS_JSON.encode(line).encode() + b"\n"
        self._metrics.write(text)
        self._digest.update(text)

    def sync(self) -> tuple[int, str]:
        """Bring the metrics to disk; how many bytes they have, and their SHA-256."""
        assert self._metrics
        self._metrics.flush()
        sync(self._metrics.fileno())
        return self._metrics.tell(), self._digest.hexdigest()

    def finish(self, record: Mapping[str, Any]) -> None:
        """Close the metrics and write the record: the run is complete when `record.json` is there."""
        assert self._metrics
        self.sync()
        self._metrics.close()
        self._partial_metrics.replace(self.path / METRICS_FILE)
        write_json(self.path / RECORD_FILE, record)

    def close(self) -> None:
        """Close the files and release the lock."""
        try:
            if self._metrics:
                self._metrics.close()
        finally:
            if self._lock is not None:
                os.close(self._lock)


def is_written(folder: Path) -> bool:
    """Whether a process has locked the folder of a run. To find out, this locks it too, for an instant."""
    try:
        descriptor = _lock(folder, fcntl.LOCK_SH)
    except ValueError:
        return True
    if descriptor is not None:
        os.close(descriptor)
    return False


def _lock(folder: Path, kind: int = fcntl.LOCK_EX) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends, however it ends.

    None where the file system has no locks. Raises `ValueError` where another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            reason = f"name is {folder.name!r}, and another run is writing {folder} just now"
            raise ValueError(f"{reason}: wait for its end, or choose another --name") from None
        return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that appears whole or not at all."""
    write_atomically(path, (to_json(content, indent=2) + "\n").encode())


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON that any reader accepts: a number that is not finite becomes null."""
    plain = json.loads(json.dumps(content), parse_constant=lambda not_finite: None)
    return json.dumps(plain, indent=indent, allow_nan=False)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of a finished run, one dictionary a logged step."""
    return [json.loads(line) for line in read_regular(run / METRICS_FILE).splitlines()]
