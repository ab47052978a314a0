"""Synthetic launch records of known truth: a machine with an α, a β, a serial part and noise.

On such a machine a step of B samples at p ranks takes, before noise,

    serial_s + row_s · B / p + (α + β · message_bytes) · ⌈log₂ p⌉          (no reduction at p = 1)

of which `rows_s` takes samples (inside the serial part), and an all-reduce takes (α + β · bytes) · ⌈log₂ p⌉.
So in a strong series Amdahl's serial fraction is serial_s / (serial_s + row_s · B) where α = β = 0.
Noise multiplies each launch by a log-normal factor that all its times share, and each time by one of its own.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from torchreg.scaling.launch_record import checksummed

START = 1_764_000_000  # seconds since 1970: the synthetic campaigns started in November 2025


@dataclass(frozen=True)
class Machine:
    """A synthetic machine, and how fast it is."""

    name: str = "laptop"
    device_name: str = "Synthetic CPU, 8 cores"
    backend: str = "gloo"
    dtype: str = "float64"
    torch: str = "2.13.0"
    alpha_s: float = 100e-6
    beta_s_per_byte: float = 1e-9
    serial_s: float = 50e-6
    row_s: float = 10e-6
    rows_s: float = 10e-6
    launch_noise: float = 0.02
    time_noise: float = 0.01
    environment: dict[str, str] = field(default_factory=lambda: {"OMP_NUM_THREADS": "1"})
    facts: dict[str, str | None] = field(default_factory=dict)

    def transfer_s(self, world_size: int, num_bytes: int) -> float:
        """An all-reduce, without noise."""
        return (self.alpha_s + self.beta_s_per_byte * num_bytes) * math.ceil(math.log2(world_size))

    def local_s(self, world_size: int, global_batch_size: int) -> float:
        """A step without reduction, without noise."""
        return self.serial_s + self.row_s * global_batch_size / world_size


@dataclass(frozen=True)
class SyntheticCampaign:
    """A synthetic campaign: every setting at every world size (nodes × ranks per node), `num_blocks` launches each."""

    machine: Machine = Machine()
    campaign: str = "synthetic"
    nodes: Sequence[int] = (1,)
    ranks_per_node: Sequence[int] = (1, 2, 4)
    num_blocks: int = 7
    combinations: Sequence[tuple[str, str]] = (("manual", "allreduce"), ("sgd", "ddp"))
    num_features: Sequence[int] = (1, 64)
    global_batch_sizes: Sequence[int] = (256,)
    local_batch_sizes: Sequence[int] = (64,)
    message_sizes: Sequence[int] = (8, 1024, 65_536, 1_048_576)
    steps_to_target: float = 400.0
    seed: int = 0

    def write(self, folder: Path) -> Path:
        """The launches of the campaign in a directory, which is returned."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "campaign.yaml").write_text(f"name: {self.campaign}\nmachine: {self.machine.name}\n")
        for record in self.records():
            write_launch(folder, record)
        return folder

    def records(self) -> Iterable[dict[str, Any]]:
        """The launch records, without checksums, so that a test can change them."""
        random = np.random.default_rng(self.seed)
        for block in range(self.num_blocks):
            for num_nodes in self.nodes:
                for ranks_per_node in self.ranks_per_node:
                    yield self._record(block, num_nodes, ranks_per_node, random)

    def _record(self, block: int, num_nodes: int, ranks_per_node: int, random: np.random.Generator) -> dict[str, Any]:
        machine, world_size = self.machine, num_nodes * ranks_per_node
        launch_factor = float(np.exp(machine.launch_noise * random.standard_normal()))

        def noisy(seconds: float) -> float:
            return seconds * launch_factor * float(np.exp(machine.time_noise * random.standard_normal()))

        points = [
            self._point(order, optimizer, sync, features, batch, world_size, noisy)
            for order, (optimizer, sync, features, batch) in enumerate(self._settings(world_size))
        ]
        allreduce = [
            {
                "backend": machine.backend, "sync": "allreduce", "message_bytes": size, "num_repeats": 20,
                "time_s": noisy(machine.transfer_s(world_size, size)),
            }
            for size in self.message_sizes if world_size > 1
        ]  # fmt: skip
        hosts = [f"n{node + 1}" for node in range(num_nodes) for _ in range(ranks_per_node)]
        single = world_size == 1
        return {
            **self._heading(block, num_nodes, ranks_per_node),
            "status": "ok",
            "exit_code": 0,
            "wall_s": 40.0,
            "start_up_s": 8.0,
            "distributed": {
                "launcher": "mpich",
                "requested": "auto",
                "effective": "single" if single else "torch",
                "ezpz_version": None,
                "backend": "none" if single else machine.backend,
                "world_size": world_size,
                "num_nodes": num_nodes,
                "mpi_library": None if single else "MPICH 4.3",
                "nccl_version": None,
                "device_name": machine.device_name,
                "num_cpus": 8,
                "cpus_per_rank": 1,
                "placements": [
                    {
                        "rank": rank,
                        "host": host,
                        "local_rank": rank % ranks_per_node,
                        "device": "cpu",
                        "device_name": machine.device_name,
                    }
                    for rank, host in enumerate(hosts)
                ],
            },
            "machine_facts": machine.facts,
            "dtype": machine.dtype,
            "points": points,
            "allreduce": allreduce,
        }

    def _heading(self, block: int, num_nodes: int, ranks_per_node: int) -> dict[str, Any]:
        world_size = num_nodes * ranks_per_node
        return {
            "schema_version": 2,
            "kind": "scale-launch",
            "campaign": {
                "name": self.campaign,
                "machine": self.machine.name,
                "fingerprint": f"sha256:{self.campaign}-{self.machine.name}",
                "device": "auto",
                "without": [],
            },
            "launch": {
                "id": f"block-{block:02}-nodes-{num_nodes}-ranks-{world_size}",
                "block": block,
                "world_size": world_size,
                "num_nodes": num_nodes,
                "ranks_per_node": ranks_per_node,
                "seed": block,
            },
            "command": ["mpiexec", "-n", str(world_size)],
            "started_utc": _utc(START + 60 * block),
            "provenance": {
                "started_utc": _utc(START + 60 * block),
                "finished_utc": _utc(START + 60 * block + 40),
                "argv": ["torchreg", "scale"],
                "source": {"commit": "0" * 40, "dirty": False},
                "python": "3.11.7",
                "platform": "Linux",
                "libraries": {"torchreg": "0.1.0", "torch": self.machine.torch, "numpy": "2.3.0"},
                "job_id": None,
                "environment": self.machine.environment,
            },
        }

    def failure(self, block: int, num_nodes: int, ranks_per_node: int, reason: str) -> dict[str, Any]:
        """The record of a launch that failed."""
        return {
            **self._heading(block, num_nodes, ranks_per_node),
            "status": "failed",
            "exit_code": 1,
            "reason": reason,
            "wall_s": 5.0,
        }

    def _settings(self, world_size: int) -> Iterable[tuple[str, str, int, int]]:
        batches = {*self.global_batch_sizes, *(size * world_size for size in self.local_batch_sizes)}
        combinations = dict.fromkeys(
            (optimizer, sync if world_size > 1 else "none") for optimizer, sync in self.combinations
        )
        for optimizer, sync in combinations:
            for features in self.num_features:
                for batch in sorted(batches):
                    yield optimizer, sync, features, batch

    def _point(
        self, order: int, optimizer: str, sync: str, features: int, batch: int, world_size: int, noisy: Any
    ) -> dict[str, Any]:
        machine, num_bytes = self.machine, 8 * (features + 1)
        local_s = noisy(machine.local_s(world_size, batch))
        step_s = local_s if world_size == 1 else local_s + noisy(machine.transfer_s(world_size, num_bytes))
        num_steps = math.ceil(1 / step_s)
        target: dict[str, float | None] = dict.fromkeys(
            ["target_excess", "predicted_steps", "measured_steps", "measured_time_s", "stability_limit", "noise_floor"]
        )
        if features <= 16:
            steps = self.steps_to_target * 256 / batch
            target = {
                "target_excess": 0.01,
                "predicted_steps": round(steps),
                "measured_steps": steps,
                "measured_time_s": noisy(steps * step_s),
                "stability_limit": 1024 / batch,
                "noise_floor": 0.0003,
            }
        return {
            "optimizer": optimizer,
            "sync": sync,
            "num_features": features,
            "global_batch_size": batch,
            "local_batch_size": batch / world_size,
            "message_bytes": num_bytes,
            "order": order,
            "num_warmup_steps": 300,
            "num_steps": num_steps,
            "window_s": num_steps * step_s,
            "step_time_s": step_s,
            "rank_min_s": step_s * 0.98,
            "rank_median_s": step_s * 0.99,
            "rank_max_s": step_s,
            "slowest_rank": world_size - 1,
            "slowest_host": "n1",
            "local_step_time_s": None if world_size == 1 else local_s,
            "data_time_s": noisy(machine.rows_s),
            "throughput": batch / step_s,
            "check_passed": True,
            "check_difference": 1e-14,
            "check_tolerance": 1e-9,
            "check_excess": 3e-15,
            "check_message": "40 full-batch steps end at the closed form",
            **target,
        }


def write_launch(folder: Path, record: dict[str, Any], file: str = "launch.json") -> Path:
    """Write a record with its checksum where `scale run` would; the file is returned."""
    path = folder / "launches" / record["launch"]["id"] / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(checksummed(record), indent=1))
    return path


def without_noise(machine: Machine) -> Machine:
    """The same machine, without noise."""
    return replace(machine, launch_noise=0.0, time_noise=0.0)


def _utc(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()
