"""What a run leaves behind: its configuration, where it comes from, its metrics, its result.

`runs/<name>/` holds `config.json`, `record.json`, `metrics.jsonl` and figures. Each file appears whole
(temporary file, fsync, rename) or not at all. Only the main rank writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from torchreg.core.files import PARTIAL, read_regular, sync, write_atomically

SCHEMA_VERSION = 1

CONFIG_FILE = "config.json"
RECORD_FILE = "record.json"
METRICS_FILE = "metrics.jsonl"
PLAN_FILE = "plan.json"
CHECKPOINTS_FOLDER = "checkpoints"
TRAINING_FIGURE = "training"

_ENDING_FILES = (RECORD_FILE, *(f"{TRAINING_FIGURE}.{kind}" for kind in ("png", "svg")))
_OWN_FILES = (CONFIG_FILE, METRICS_FILE, METRICS_FILE + PARTIAL, *_ENDING_FILES)
_METRICS_JSON = json.JSONEncoder(allow_nan=False)  # made once: a line is written from inside the loop
_LIBRARIES = {"torchreg": "torchreg-hpc"} | {
    name: name for name in ("torch", "numpy", "pandas", "ezpz", "mpi4py", "matplotlib")
}
_ALLOWED_VARIABLES = re.compile(
    r"(OMP|KMP|GOMP|MKL|OPENBLAS|BLIS)_[A-Z0-9_]+|(CUDA|ROCR|HIP)_VISIBLE_DEVICES|CUDA_DEVICE_(ORDER|MAX_CONNECTIONS)|"
    r"GPU_DEVICE_ORDINAL|ZE_(AFFINITY_MASK|FLAT_DEVICE_HIERARCHY)|ZEX_NUMBER_OF_CCS|ONEAPI_DEVICE_SELECTOR|CPU_BIND|"
    r"NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|CUBLAS_WORKSPACE_CONFIG|PYTORCH_[A-Z]*_?ALLOC_CONF|"
    r"(NCCL|RCCL|FI|MPICH|CCL|GLOO|UCX|HSA|TORCH_(NCCL|GLOO))_[A-Z0-9_]+|"
    r"MASTER_(ADDR|PORT)|(LOCAL_)?(RANK|WORLD_SIZE)|PBS_(JOBNAME|QUEUE)|"
    r"SLURM_(JOB_NUM_NODES|NTASKS|JOB_PARTITION|(CPU|GPU|MEM)_BIND[A-Z_]*|CPUS_PER_TASK|DISTRIBUTION)|"
    r"TORCHELASTIC_RUN_ID"
)


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
        except FileExistsError:
            if name is None:  # another run was started in the same second
                continue
            raise ValueError(
                f"name is {name!r}, and {path} exists already: choose another --name, or replace it with --overwrite"
            ) from None
        except OSError as error:
            raise ValueError(
                f"runs_dir is {str(runs_dir)!r}, where {path} cannot be written ({error.strerror}): choose another "
                "--runs-dir"
            ) from error
        break
    return path


class RunDirectory:
    """The folder of one run; see `create_run_folder` for its name and what can go wrong.

    While it is open no other run can write there: a second one gets a `ValueError`.
    """

    def __init__(
        self, runs_dir: str | Path, name: str | None = None, *, overwrite: bool = False, resume: bool = False
    ) -> None:
        self.path = create_run_folder(runs_dir, name, "train", overwrite=overwrite or resume)
        self._lock = _lock(self.path)
        self._partial_metrics = self.path / (METRICS_FILE + PARTIAL)
        self._metrics: BinaryIO | None = None
        self._digest = hashlib.sha256()  # of the metrics so far

    def start(self) -> None:
        """Begin the record anew: nothing of an earlier run stays."""
        for checkpoint in (self.path / CHECKPOINTS_FOLDER).glob("step-*"):
            checkpoint.unlink()
        for file in _OWN_FILES:
            (self.path / file).unlink(missing_ok=True)
        self._metrics = self._partial_metrics.open("wb")

    def has_metrics(self, num_bytes: int, sha256: str) -> bool:
        """Whether the metrics on disk begin with so many bytes of this SHA-256."""
        return hashlib.sha256(self._first_metrics(num_bytes)).hexdigest() == sha256

    def go_on(self, num_bytes: int) -> None:
        """Go on with a record whose metrics were so many bytes long; what says that the run is finished goes."""
        for file in _ENDING_FILES:
            (self.path / file).unlink(missing_ok=True)
        self._digest = hashlib.sha256(self._first_metrics(num_bytes))
        if not self._partial_metrics.exists():
            (self.path / METRICS_FILE).replace(self._partial_metrics)
        self._metrics = self._partial_metrics.open("r+b")
        self._metrics.truncate(num_bytes)
        self._metrics.seek(num_bytes)

    def _first_metrics(self, num_bytes: int) -> bytes:
        """They have their last name already where a run ended while it wrote its record."""
        for path in (self._partial_metrics, self.path / METRICS_FILE):
            if path.exists():
                return read_regular(path, num_bytes)
        return b""

    def write_json(self, file: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file that appears whole or not at all."""
        write_json(self.path / file, content)

    def note(self, line: Mapping[str, Any]) -> None:
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
        self.write_json(RECORD_FILE, record)

    def close(self) -> None:
        """Leave the run to whoever goes on with it."""
        try:
            if self._metrics:
                self._metrics.close()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None


def _lock(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends, however it ends.

    None where the file system has no locks. Raises `ValueError` where another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"name is {folder.name!r}, and another run is writing {folder} just now: wait for its end, or choose "
            "another --name"
        ) from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that appears whole or not at all."""
    write_atomically(path, (to_json(content, indent=2) + "\n").encode())


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON that any reader accepts: a number that is not finite becomes null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of a finished run, one dictionary a logged step."""
    return [json.loads(line) for line in read_regular(run / METRICS_FILE).splitlines()]


def provenance(started: str) -> dict[str, Any]:
    """Where a result comes from: source, command, libraries, machine, job, and an allow-list of the environment.

    The rest of the environment, which may hold secrets, is never looked at.
    """
    return {
        "started_utc": started,
        "finished_utc": utc_now(),
        "argv": sys.argv,
        "source": _source_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": versions(),
        "job_id": os.environ.get("PBS_JOBID") or os.environ.get("SLURM_JOB_ID"),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if _ALLOWED_VARIABLES.fullmatch(name)
        },
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that numbers may depend on."""
    return {name: version for name, package in _LIBRARIES.items() if (version := _version(package))}


def machine_facts() -> dict[str, str | None]:
    """What decides numbers or their speed below the Python libraries; None for what is not there or cannot be known.

    What only torch knows is None in a process that has not imported it.
    """
    torch: Any = sys.modules.get("torch")
    return {
        "driver": _driver(torch),
        "cuda": torch and torch.version.cuda,
        "rocm": torch and torch.version.hip,
        "oneccl": _version("oneccl") or _version("oneccl-bind-pt"),
        "libfabric": _libfabric(),
        "kernel": platform.release(),
        "tf32": torch and _tf32(torch),
    }


def _driver(torch: Any) -> str | None:
    """The drivers of accelerators that this machine has loaded, such as `nvidia 580.159.04`."""
    found = []
    for name in ("nvidia", "amdgpu", "i915", "xe"):
        with contextlib.suppress(OSError):  # a driver that comes with the kernel has the kernel's version
            found.append(f"{name} {Path('/sys/module', name, 'version').read_text().strip()}")
    if torch and hasattr(torch, "xpu") and torch.xpu.is_initialized():
        found.append(f"level-zero {torch.xpu.get_device_properties().driver_version}")
    return ", ".join(found) or None


def _libfabric() -> str | None:
    """The version of the libfabric that this process has loaded, or would."""
    try:
        version = ctypes.CDLL("libfabric.so.1").fi_version()
    except (OSError, AttributeError):
        return None
    return f"{version >> 16}.{version & 0xFFFF}"


def _tf32(torch: Any) -> str:
    """Whether float32 matrix products on a GPU are rounded to TF32: `tf32` or `ieee`."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9, where reading the older settings may raise
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_version() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that this file is in; nulls where it is installed without one."""
    here = Path(__file__).resolve()
    if not (here.parents[2] / "pyproject.toml").is_file():
        return {"commit": None, "dirty": None}
    try:
        commit = _git(here.parent, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(here.parent, "status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
