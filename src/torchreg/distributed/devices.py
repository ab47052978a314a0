"""The device that a rank computes on."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

_VISIBLE_CUDA = "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"
_VISIBLE_XPU = ("ZE_AFFINITY_MASK",)
DRIVERS = "/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/kfd"  # NVIDIA's, in a container too; AMD's


def choose_device_type(device: str, sync: str, world_size: int, dtype: str = "auto") -> str:
    """The type of device for the user's choice; `auto` is the first available one that supports the other options.

    Raises `ValueError` for a device that is not available, or does not support them.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "xpu": hasattr(torch, "xpu") and torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        unable = {"cuda", "xpu", "mps"} if sync == "mpi" else {"mps"} if world_size > 1 or dtype == "float64" else set()
        device = next(name for name in available if available[name] and name not in unable)
    if not available[device]:
        raise ValueError(f"device is {device}, and torch {torch.__version__} sees none here: choose --device cpu")
    if device == "mps" and world_size > 1:
        raise ValueError(f"device is mps, which trains on one rank only, not {world_size}: choose --device cpu")
    if sync == "mpi" and device != "cpu":
        reason = f"sync is mpi and the device is {device}, whose tensors mpi4py cannot reduce"
        raise ValueError(f"{reason}: choose --device cpu, or --sync ddp or allreduce")
    return device


def why_not_a_gpu(device: str, environ: Mapping[str, str]) -> str | None:
    """Why `auto` is the CPU on a machine with a GPU driver; None where there is no driver, or the GPU is hidden."""
    hidden = any(environ.get(name) in ("", "-1") for name in (*_VISIBLE_CUDA, *_VISIBLE_XPU))
    driver = next((path for path in DRIVERS if os.path.exists(path)), None)
    if device != "auto" or hidden or driver is None:
        return None
    reason = f"this machine has a GPU driver ({driver}), and torch {torch.__version__} sees no GPU"
    return f"device is auto, which is the CPU here: {reason}; --device cuda makes this an error, --device cpu is silent"


def take_device(device_type: str, local_rank: int) -> tuple[torch.device, str]:
    """Make a device of this host the current one of this process: the device, and its identity.

    Two ranks that compute on one device have the same identity, whatever each of them sees of the host.
    """
    if device_type in ("cpu", "mps"):
        return torch.device(device_type), ""
    module = torch.get_device_module(device_type)
    index = local_rank % module.device_count()  # launchers may leave a rank its own device alone, which is number 0
    module.set_device(index)
    device = torch.device(device_type, index)
    names = _VISIBLE_CUDA if device_type == "cuda" else _VISIBLE_XPU
    visible = next((os.environ[name] for name in names if os.environ.get(name)), "").split(",")
    number = (visible[index].strip() if index < len(visible) else "") or str(index)
    # Tiles of one XPU, and the parts of a GPU in MIG mode, may have one UUID.
    if device_type == "cuda" and not number.startswith("MIG"):
        return device, str(getattr(torch.cuda.get_device_properties(device), "uuid", number))
    return device, number


def own_cpus() -> int:
    """CPU affinity of this process as an integer bit mask."""
    if hasattr(os, "sched_getaffinity"):
        return sum(1 << cpu for cpu in os.sched_getaffinity(0))
    return (1 << (os.cpu_count() or 1)) - 1


def threads_for(own: int, of_node: Sequence[int]) -> int:
    """Intra-op threads of a rank, from its CPU affinity and that of all ranks of its node, itself included.

    Ranks that are bound have their CPUs for themselves; others divide them.
    """
    overlapping = sum(bool(own & other) for other in of_node)
    return max(1, own.bit_count() // overlapping)


def free_bytes(device: torch.device) -> int:
    """Free memory of an accelerator, or of the host; 0 where that is unknown."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    with suppress(ValueError, OSError):  # not Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def device_name(device: torch.device) -> str:
    """The model of the device."""
    if device.type == "mps":
        return "Apple GPU"
    if device.type != "cpu":
        return str(torch.get_device_module(device).get_device_name(device))
    with suppress(OSError):  # not Linux
        cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if model := re.search(r"^model name[ \t]*:[ \t]*(.*\S)", cpus, re.MULTILINE):
            return model[1]
    return platform.processor() or platform.machine()
