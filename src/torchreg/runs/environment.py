"""Where a result comes from: source, libraries, machine, environment variables."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

from torchreg.runs.record import utc_now

_LIBRARIES = ("torchreg", "torch", "numpy", "pandas", "ezpz", "mpi4py", "matplotlib")
_ALLOWED_VARIABLES = re.compile(
    r"(OMP|KMP|GOMP|MKL|OPENBLAS|BLIS)_[A-Z0-9_]+|(CUDA|ROCR|HIP)_VISIBLE_DEVICES|CUDA_DEVICE_(ORDER|MAX_CONNECTIONS)|"
    r"GPU_DEVICE_ORDINAL|ZE_(AFFINITY_MASK|FLAT_DEVICE_HIERARCHY)|ZEX_NUMBER_OF_CCS|ONEAPI_DEVICE_SELECTOR|CPU_BIND|"
    r"NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|CUBLAS_WORKSPACE_CONFIG|PYTORCH_[A-Z]*_?ALLOC_CONF|"
    r"(NCCL|RCCL|FI|MPICH|CCL|GLOO|UCX|HSA|TORCH_(NCCL|GLOO))_[A-Z0-9_]+|"
    r"MASTER_(ADDR|PORT)|(LOCAL_)?(RANK|WORLD_SIZE)|PBS_(JOBNAME|QUEUE)|"
    r"SLURM_(JOB_NUM_NODES|NTASKS|JOB_PARTITION|(CPU|GPU|MEM)_BIND[A-Z_]*|CPUS_PER_TASK|DISTRIBUTION)|"
    r"TORCHELASTIC_RUN_ID"
)


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
        "environment": {name: os.environ[name] for name in sorted(os.environ) if _ALLOWED_VARIABLES.fullmatch(name)},
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that numbers may depend on."""
    found = {name: _version("torchreg-hpc" if name == "torchreg" else name) for name in _LIBRARIES}
    return {name: version for name, version in found.items() if version}


def machine_facts() -> dict[str, str | None]:
    """What decides numbers or their speed below the Python libraries; None for what is not there or cannot be known.

    What only torch knows is None in a process that has not imported it.
    """
    torch: Any = sys.modules.get("torch")
    adapters = [path.name for kind in ("cxi", "infiniband") for path in Path("/sys/class", kind).glob("*")]
    return {
        "driver": _driver(torch),
        "cuda": torch and torch.version.cuda,
        "rocm": torch and torch.version.hip,
        "oneccl": _version("oneccl") or _version("oneccl-bind-pt"),
        "libfabric": _libfabric(),
        "fabric": ", ".join(sorted(adapters)) or None,
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
    with contextlib.suppress(OSError, AttributeError):
        version = ctypes.CDLL("libfabric.so.1").fi_version()
        return f"{version >> 16}.{version & 0xFFFF}"
    return None


def _tf32(torch: Any) -> str:
    """Whether float32 matrix products on a GPU are rounded to TF32: `tf32` or `ieee`."""
    matmul = torch.backends.cuda.matmul
    is_new = hasattr(matmul, "fp32_precision")  # since torch 2.9, where reading the older settings may raise
    return "tf32" if (matmul.fp32_precision == "tf32" if is_new else matmul.allow_tf32) else "ieee"


@cache  # every checkpoint and record asks
def _version(library: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(library)
    return None


@cache  # git takes as long as a short trial of a sweep
def _source_version() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that this package is in; nulls where it is installed without one."""
    package = Path(__file__).resolve().parents[1]
    git: Any = partial(subprocess.run, check=True, capture_output=True, text=True, timeout=10, cwd=package)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (package.parents[1] / "pyproject.toml").is_file():
            commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
            return {"commit": commit, "dirty": bool(git(["git", "status", "--porcelain", "--", "."]).stdout)}
    return {"commit": None, "dirty": None}
