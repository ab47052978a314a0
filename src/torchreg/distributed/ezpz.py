"""Everything that torchreg needs of ezpz (github.com/saforem2/ezpz).

torchreg makes the process group; `ezpz.setup_torch()` adopts the group that exists, and ezpz then makes the
DistributedDataParallel model. ezpz is imported only on several ranks: it imports transformers and wandb.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

import torch
from torch import nn

_REMEDY = "pip install '.[ezpz]' in torchreg's checkout, or --distributed torch"


def find_ezpz(choice: Literal["auto", "ezpz", "torch"]) -> str | None:
    """The version of the real ezpz if it is to be used, or None for torch alone.

    Raises `ValueError` when another package of that name is installed, or when ezpz is chosen and not installed.
    """
    if choice == "torch":
        return None
    spec = importlib.util.find_spec("ezpz")
    if spec is None or spec.origin is None:  # no origin: only a folder of that name
        if choice == "auto":
            return None
        raise ValueError(f"distributed is ezpz, which is not installed: {_REMEDY}")
    try:
        version = importlib.metadata.version("ezpz")
    except importlib.metadata.PackageNotFoundError:
        version = "of no known version"
    try:
        with _quiet_ezpz() as ezpz:
            is_real = hasattr(ezpz, "setup_torch")
    except ImportError as error:
        raise ValueError(f"ezpz {version} cannot be imported ({error}): fix it, or --distributed torch") from error
    if not is_real:
        reason = f"the installed package ezpz {version} has no setup_torch: it is another package of that name"
        raise ValueError(f"{reason} (PyPI's ezpz crops images). pip uninstall ezpz, and {_REMEDY}")
    return version


def adopt(rank: int, world_size: int, device: torch.device, timeout_s: float) -> None:
    """Let ezpz adopt the default process group; LOCAL_RANK becomes the index of this rank's device."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(device.index or 0), TORCH_DEVICE=device.type
    )
    if not {"PBS_JOBID", "SLURM_JOB_ID"} & os.environ.keys():
        os.environ.setdefault("EZPZ_SCHEDULER", "UNKNOWN")  # it takes any sbatch on the PATH for a job of Slurm
    with _quiet_ezpz() as ezpz, tempfile.NamedTemporaryFile("w", suffix=".hostfile") as hostfile:
        os.environ.setdefault("HOSTFILE", hostfile.name)  # else ezpz writes ./hostfile
        ezpz.setup_torch(timeout=int(timeout_s))
        if os.environ["HOSTFILE"] == hostfile.name:
            del os.environ["HOSTFILE"]


def wrap(model: nn.Module) -> nn.Module:
    """The model as DistributedDataParallel, made by ezpz."""
    with _quiet_ezpz() as ezpz:
        wrapped: nn.Module = ezpz.wrap_model(model, use_fsdp=False)
    return wrapped


@contextmanager
def _quiet_ezpz() -> Iterator[ModuleType]:
    """ezpz, with its log lines kept off stdout, which is for results, and its changes of warning filters undone."""
    previous = logging.root.manager.disable
    with warnings.catch_warnings():
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations in its dependencies
                ezpz = importlib.import_module("ezpz")
            yield ezpz
        finally:
            logging.disable(previous)
            logging.captureWarnings(False)
