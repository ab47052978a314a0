"""Devices, CPU binding and environment variables of each machine, from the user guides of its site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

MachineName = Literal["generic", "polaris", "aurora", "perlmutter", "frontier", "lumi"]


@dataclass(frozen=True)
class Machine:
    """What a launch needs on a machine. `rank_cpus` and `srun_options` bind a rank to the CPUs near its device."""

    device: Literal["auto", "cuda", "xpu"] = "auto"  # of its nodes, in torch's terms: ROCm is cuda; auto: any
    ranks_per_node: int | None = None  # devices of a node: default and maximum; None: any number
    rank_cpus: tuple[str, ...] = ()  # of each local rank, for PALS and srun
    srun_options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)  # of every rank, under every launcher
    environment_across_nodes: Mapping[str, str] = field(default_factory=dict)  # in a launch on several nodes
    library_path: tuple[str, ...] = ()  # folders that are prepended to LD_LIBRARY_PATH


# Modules of sites enable the GPU support of Cray MPICH, which then aborts a process that does not link its GPU library,
# as Python does not. torchreg passes no device memory to MPI.
_CRAY_MPICH = {"MPICH_GPU_SUPPORT_ENABLED": "0"}
_SLINGSHOT = {
    "NCCL_NET_GDR_LEVEL": "PHB", "NCCL_CROSS_NIC": "1",
    "FI_CXI_DISABLE_HOST_REGISTER": "1", "FI_CXI_DEFAULT_CQ_SIZE": "131072", **_CRAY_MPICH,
}  # fmt: skip

MACHINES: dict[MachineName, Machine] = {
    "generic": Machine(),
    # GPU k is near NUMA domain 3 - k. The list of CPUs keeps the order of the GPUs and gives a rank all sixteen threads
    # of its domain. `--depth 8 --cpu-bind depth` would give it half of them, with the GPU order reversed: never both.
    # The job's own TMPDIR exists on its first node only. On one node NCCL's plug-in does not initialise, and NCCL fails
    # if it is named. Version 1.9.1, in the folder below, has this name; from 1.12 on "OFI" is accepted as well.
    "polaris": Machine(
        device="cuda",
        ranks_per_node=4,
        rank_cpus=("24-31,56-63", "16-23,48-55", "8-15,40-47", "0-7,32-39"),
        environment={**_SLINGSHOT, "NCCL_COLLNET_ENABLE": "1", "FI_MR_CACHE_MONITOR": "userfaultfd", "TMPDIR": "/tmp"},
        environment_across_nodes={"NCCL_NET": "AWS Libfabric"},
        library_path=("/soft/libraries/hwloc/lib", "/soft/libraries/aws-ofi-nccl/v1.9.1-aws/lib"),
    ),
    # Twelve tiles, six near each socket, whose first core is reserved for the system.
    "aurora": Machine(
        device="xpu",
        ranks_per_node=12,
        rank_cpus=tuple(f"{first}-{first + 3}" for first in (*range(4, 28, 4), *range(56, 80, 4))),
        environment={
            "CCL_PROCESS_LAUNCHER": "pmix",
            "CCL_ATL_TRANSPORT": "mpi",
            "CCL_KVS_MODE": "mpi",
            "CCL_OP_SYNC": "1",  # this and the next against hangs on many nodes
            "CCL_ATL_SYNC_COLL": "1",
            "FI_MR_CACHE_MONITOR": "userfaultfd",
            "TMPDIR": "/tmp",
        },
    ),
    # Slurm assigns cores from the first on, and GPU 3 is nearest to those: the GPU order is reversed. All four stay
    # visible to each rank (--gpu-bind none). The site's pytorch module configures NCCL.
    "perlmutter": Machine(
        device="cuda",
        ranks_per_node=4,
        srun_options=("--cpus-per-task", "32", "--cpu-bind", "cores", "--gpus-per-node", "4", "--gpu-bind", "none"),
        environment={"CUDA_VISIBLE_DEVICES": "3,2,1,0", **_CRAY_MPICH},
    ),
    # Eight dies of four MI250X, each near seven cores: the first core of each L3 region is reserved for the system.
    # Slurm shows each rank only the die near its cores.
    "frontier": Machine(
        device="cuda",
        ranks_per_node=8,
        srun_options=("--cpus-per-task", "7", "--gpus-per-task", "1", "--gpu-bind", "closest"),
        environment={**_SLINGSHOT, "NCCL_SOCKET_IFNAME": "hsn0"},
    ),
    # The same node; all dies stay visible, and rank k uses die k.
    "lumi": Machine(
        device="cuda",
        ranks_per_node=8,
        rank_cpus=("49-55", "57-63", "17-23", "25-31", "1-7", "9-15", "33-39", "41-47"),
        srun_options=("--gpus-per-node", "8"),
        environment={"NCCL_SOCKET_IFNAME": "hsn0,hsn1,hsn2,hsn3", "NCCL_NET_GDR_LEVEL": "PHB", **_CRAY_MPICH},
    ),
}
