"""Which device a rank computes on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

_XPU = ("ZE_AFFINITY_MASK",)
_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", *_XPU)
_DRIVERS = "/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/kfd"  # NVIDIA's, in a container too; AMD's


def choose_device_type(device: str, sync: str, world_size: int, dtype: str = "auto") -> str:
    """The kind of device for the user's choice. `auto` is the first that is there and does what is asked of it.

    Raises `ValueError` for one that is not there, or that cannot do what is asked of it.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "xpu": hasattr(torch, "xpu") and torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        unable = {"cuda", "xpu", "mps"} if sync == "mpi" else {"mps"} if world_size > 1 or dtype == "float64" else set()
        device = next(name for name in present if present[name] and name not in unable)
    if not present[device]:
        raise ValueError(f"device is {device}, and torch {torch.__version__} sees none here: choose --device cpu")
    if device == "mps" and world_size > 1:
        raise ValueError(f"device is mps, which trains on one rank only, not {world_size}: choose --device cpu")
    if sync == "mpi" and device != "cpu":
        raise ValueError(
            f"sync is mpi and the device is {device}, whose tensors mpi4py cannot reduce: add --device cpu, or "
            "choose --sync ddp or allreduce"
        )
    return device


def why_not_a_gpu(device: str, environ: Mapping[str, str]) -> str | None:
    """Why `auto` is the CPU on a machine that has the driver of a GPU; None where it has none, or the GPU is hidden."""
    hidden = any(environ.get(name) in ("", "-1") for name in _VISIBLE_DEVICES)
    driver = next((path for path in _DRIVERS if os.path.exists(path)), None)
    if device != "auto" or hidden or driver is None:
        return None
    return (
        f"device is auto, which is the CPU here: this machine has a GPU driver ({driver}), and torch "
        f"{torch.__version__} sees no GPU; --device cuda makes this an error, --device cpu is silent"
    )


def take_device(device_type: str, local_rank: int) -> tuple[torch.device, str]:
    """Make a device of this host the current one of this process: the device, and its identity.

    The identity is the same for two ranks that compute on one device, whatever each of them sees of the host.
    """
    if device_type in ("cpu", "mps"):
        return torch.device(device_type), ""
    module = torch.get_device_module(device_type)
    index = local_rank % module.device_count()  # launchers may leave a rank its own device alone, which is number 0
    module.set_device(index)
    return torch.device(device_type, index), device_identity(torch.device(device_type, index), os.environ)


def device_identity(device: torch.device, environ: Mapping[str, str]) -> str:
    """What tells an accelerator from all others of its host, whatever number this process has for it."""
    names = "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"
    visible = next((environ[name] for name in (names if device.type == "cuda" else _XPU) if environ.get(name)), "")
    listed = visible.split(",")
    number = listed[device.index].strip() if device.index < len(listed) and visible else str(device.index)
    # Tiles of one XPU, and the parts of a GPU in MIG mode, may have one UUID.
    if device.type == "cuda" and not number.startswith("MIG"):
        properties = torch.cuda.get_device_properties(device)
        return str(getattr(properties, "uuid", number))
    return number


def own_cpus() -> int:
    """The CPUs that this process may run on, as the bits of a number."""
    if hasattr(os, "sched_getaffinity"):
        return sum(1 << cpu for cpu in os.sched_getaffinity(0))
    return (1 << (os.cpu_count() or 1)) - 1


def threads_for(own: int, of_node: Sequence[int]) -> int:
    """How many threads a rank should compute with, from its CPUs and those of all ranks of its node, itself included.

    Ranks that are bound have their CPUs for themselves; others share them.
    """
    sharing = sum(bool(own & other) for other in of_node)
    return max(1, own.bit_count() // sharing)


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cpu":
        return _cpu_model() or platform.processor() or platform.machine()
    if device.type == "mps":
        return "Apple GPU"
    return str(torch.get_device_module(device).get_device_name(device))


def _cpu_model() -> str | None:
    """What Linux calls the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else None
