"""Which device a rank computes on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch


def choose_device_type(device: str, sync: str, world_size: int) -> str:
    """The kind of device for the user's choice: what is there, where it is `auto`.

    Raises `ValueError` for one that is not there, or that cannot do what is asked of it.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "xpu": hasattr(torch, "xpu") and torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name in present if present[name] and not (name == "mps" and world_size > 1))
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


def device_of(device_type: str, local_rank: int) -> tuple[torch.device, str | None]:
    """The device of a local rank, and what is wrong with it, if anything."""
    if device_type == "cpu":
        return torch.device("cpu"), None
    module = torch.get_device_module(device_type)
    count = module.device_count()
    index = 0 if count == 1 and _sees_its_own_device() else local_rank
    device = torch.device(device_type, index)
    if index >= count:
        return device, (
            f"local rank {local_rank} has no {device_type} device of its own: {count} are visible; start at most "
            f"{count} ranks a node, or --device cpu"
        )
    module.set_device(index)
    return device, None


def _sees_its_own_device() -> bool:
    """An affinity script left this rank one device, which is then number 0 for every rank."""
    return any(name in os.environ for name in ("CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"))


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
