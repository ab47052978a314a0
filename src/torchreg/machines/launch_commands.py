"""The command line of a launcher, as a list of tokens, and what each machine adds to it.

All but `available_launcher` and `allocated_hosts` are pure functions: what a job would start on Polaris is known, and
tested token for token, on a laptop. Options of one launcher that another refuses (PALS's `--cpu-bind`, for one) are
here and nowhere else.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

LauncherName = Literal["mpich", "pals", "openmpi", "srun", "none"]
MachineName = Literal["generic", "polaris", "aurora", "perlmutter", "frontier", "lumi"]

_VERSION_WITHIN_S = 30.0
_NAME_OF_VARIABLE = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Machine:
    """What a machine asks of a launch. `rank_cpus` and `srun_options` bind a rank to the CPUs near its device."""

    device: Literal["auto", "cuda", "xpu"] = "auto"
    """Device type of its nodes, by torch's name: ROCm's torch calls it cuda. auto: any."""

    ranks_per_node: int | None = None
    """Devices of a node: the default number of ranks, and the largest. None: any number."""

    rank_cpus: tuple[str, ...] = ()
    """CPUs of each local rank, the nearest to its device, for PALS and srun."""

    srun_options: tuple[str, ...] = ()

    environment: Mapping[str, str] = field(default_factory=dict)
    """Of every rank, under every launcher."""

    environment_across_nodes: Mapping[str, str] = field(default_factory=dict)
    """Of every rank where there are several nodes."""

    library_path: tuple[str, ...] = ()
    """Folders that come before the others in LD_LIBRARY_PATH."""


# Nothing here hands device memory to MPI. Modules of sites turn on the GPU support of Cray MPICH, which then ends a
# process that does not link its library for GPUs, as Python does not.
_CRAY_MPICH = {"MPICH_GPU_SUPPORT_ENABLED": "0"}

MACHINES: dict[MachineName, Machine] = {
    "generic": Machine(),
    # GPU k is near NUMA domain 3 - k. The list of CPUs leaves the GPUs their own numbers and gives a rank all sixteen
    # threads of its domain; `--depth 8 --cpu-bind depth` would give it half of them, and needs the GPUs turned round.
    # Never both.
    "polaris": Machine(
        device="cuda",
        ranks_per_node=4,
        rank_cpus=("24-31,56-63", "16-23,48-55", "8-15,40-47", "0-7,32-39"),
        environment={
            "NCCL_NET_GDR_LEVEL": "PHB",
            "NCCL_CROSS_NIC": "1",
            "NCCL_COLLNET_ENABLE": "1",
            "FI_CXI_DISABLE_HOST_REGISTER": "1",
            "FI_MR_CACHE_MONITOR": "userfaultfd",
            "FI_CXI_DEFAULT_CQ_SIZE": "131072",
            "TMPDIR": "/tmp",  # the job's own is on its first node only
            **_CRAY_MPICH,
        },
        # On one node the plug-in does not initialise, and NCCL fails where it is asked for. This is what version 1.9.1
        # of the folder below calls itself; from 1.12 on "OFI" is understood as well.
        environment_across_nodes={"NCCL_NET": "AWS Libfabric"},
        library_path=("/soft/libraries/hwloc/lib", "/soft/libraries/aws-ofi-nccl/v1.9.1-aws/lib"),
    ),
    # Twelve tiles; the first core of each socket belongs to the system.
    "aurora": Machine(
        device="xpu",
        ranks_per_node=12,
        rank_cpus=(
            *("4-7", "8-11", "12-15", "16-19", "20-23", "24-27"),
            *("56-59", "60-63", "64-67", "68-71", "72-75", "76-79"),
        ),
        environment={
            "CCL_PROCESS_LAUNCHER": "pmix",
            "CCL_ATL_TRANSPORT": "mpi",
            "CCL_KVS_MODE": "mpi",
            "CCL_OP_SYNC": "1",  # these two against hangs on many nodes
            "CCL_ATL_SYNC_COLL": "1",
            "FI_MR_CACHE_MONITOR": "userfaultfd",
            "TMPDIR": "/tmp",
        },
    ),
    # Slurm hands out cores from the first on, and GPU 3 is near those: turn the GPUs round. All four stay visible to
    # each rank (--gpu-bind none), which takes the one of its local rank. The site's pytorch module sets up NCCL.
    "perlmutter": Machine(
        device="cuda",
        ranks_per_node=4,
        srun_options=(
            *("--cpus-per-task", "32", "--cpu-bind", "cores"),
            *("--gpus-per-node", "4", "--gpu-bind", "none"),
        ),
        environment={"CUDA_VISIBLE_DEVICES": "3,2,1,0", **_CRAY_MPICH},
    ),
    # Eight dies of four MI250X, each near seven cores: the first core of each L3 region belongs to the system. Slurm
    # gives each rank the die near its cores, and shows it no other.
    "frontier": Machine(
        device="cuda",
        ranks_per_node=8,
        srun_options=("--cpus-per-task", "7", "--gpus-per-task", "1", "--gpu-bind", "closest"),
        environment={
            "NCCL_SOCKET_IFNAME": "hsn0",
            "NCCL_NET_GDR_LEVEL": "PHB",
            "NCCL_CROSS_NIC": "1",
            "FI_CXI_DISABLE_HOST_REGISTER": "1",
            "FI_CXI_DEFAULT_CQ_SIZE": "131072",
            **_CRAY_MPICH,
        },
    ),
    # The same node; all dies stay visible, and rank k computes on die k.
    "lumi": Machine(
        device="cuda",
        ranks_per_node=8,
        rank_cpus=("49-55", "57-63", "17-23", "25-31", "1-7", "9-15", "33-39", "41-47"),
        srun_options=("--gpus-per-node", "8"),
        environment={"NCCL_SOCKET_IFNAME": "hsn0,hsn1,hsn2,hsn3", "NCCL_NET_GDR_LEVEL": "PHB", **_CRAY_MPICH},
    ),
}


def launch_command(
    launcher: LauncherName,
    machine: MachineName = "generic",
    *,
    num_ranks: int,
    ranks_per_node: int,
    hosts: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    extra: Sequence[str] = (),
    without: Sequence[str] = (),
    library_path: str = "",
) -> list[str]:
    """The tokens that, put before a program, start it on `num_ranks` ranks, `ranks_per_node` of them on each node.

    `hosts` names the nodes, each once; without it the launcher takes those of the allocation. Every rank gets the
    machine's variables but those named in `without`, and `env`, which wins; `library_path` is the LD_LIBRARY_PATH that
    the machine's folders come before. `extra` are options for the launcher, after all others. `none` starts one
    process, and is empty where there is no variable to set.

    Raises `ValueError` where the numbers do not fit together, or the machine.
    """
    num_nodes = _num_nodes(num_ranks, ranks_per_node, hosts)
    most = MACHINES[machine].ranks_per_node
    if most is not None and ranks_per_node > most:
        raise ValueError(
            f"ranks_per_node is {ranks_per_node}, and a node of {machine} has {most} devices: give at most {most}, or "
            "choose machine generic"
        )
    if launcher == "none" and num_ranks > 1:
        raise ValueError(
            f"num_ranks is {num_ranks} and launcher is none, which starts one process: name another, or put an mpiexec "
            "on the PATH (a module of the site, or torchreg's extra mpi)"
        )
    variables = _variables(machine, num_nodes, env or {}, without, library_path)
    rank_cpus = MACHINES[machine].rank_cpus[:ranks_per_node]
    host_list = ",".join(hosts)
    count = str(num_ranks)

    if launcher == "mpich":
        where = ["--hosts", host_list] if hosts else []
        given = _pairs("--env", variables)
        return ["mpiexec", "-n", count, "--ppn", str(ranks_per_node), *where, *extra, *given]
    if launcher == "pals":
        where = ["--hosts", host_list] if hosts else []  # without it: those of PBS_NODEFILE
        binding = ["--cpu-bind", "list:" + ":".join(rank_cpus)] if rank_cpus else []
        given = _pairs("--env", variables)
        return ["mpiexec", "-n", count, "--ppn", str(ranks_per_node), *where, *binding, *extra, *given]
    if launcher == "openmpi":
        # A host has as many slots as it is named with, one if with none: without the number it counts as full.
        where = ["--host", ",".join(f"{host}:{ranks_per_node}" for host in hosts)] if hosts else []
        given = ["-x", "PATH", *_pairs("-x", variables)]  # it passes on nothing by itself
        return ["mpiexec", "-n", count, "--map-by", f"ppr:{ranks_per_node}:node", *where, *extra, *given]
    # `env` in front of the program: srun's own --export splits values at commas.
    given = ["env", *(f"{name}={value}" for name, value in variables.items())] if variables else []
    if launcher == "none":
        return given
    placements = ["--nodes", str(num_nodes), "--ntasks", count, "--ntasks-per-node", str(ranks_per_node)]
    where = ["--nodelist", host_list] if hosts else []
    binding = ["--cpu-bind", "mask_cpu:" + ",".join(map(_mask, rank_cpus))] if rank_cpus else []
    options = [*MACHINES[machine].srun_options, *binding]
    return ["srun", *placements, *where, "--kill-on-bad-exit=1", *options, *extra, *given]


def _num_nodes(num_ranks: int, ranks_per_node: int, hosts: Sequence[str]) -> int:
    for name, value in (("num_ranks", num_ranks), ("ranks_per_node", ranks_per_node)):
        if value < 1:
            raise ValueError(f"{name} is {value}: give a whole number of at least 1")
    if num_ranks % ranks_per_node:
        raise ValueError(
            f"num_ranks is {num_ranks} and ranks_per_node is {ranks_per_node}: give a multiple, so that every node has "
            "as many ranks"
        )
    num_nodes = num_ranks // ranks_per_node
    for host, times in Counter(hosts).items():
        if times > 1:
            raise ValueError(f"hosts names {host} {times} times: give each host once, ranks_per_node says how many")
        if not host or re.search(r"[\s,:]", host):
            raise ValueError(f"hosts has {host!r}: give the names of hosts, separated by commas")
    if hosts and len(hosts) != num_nodes:
        raise ValueError(
            f"hosts names {len(hosts)}, and {num_ranks} ranks at {ranks_per_node} a node need {num_nodes}: name as many"
        )
    return num_nodes


def _mask(cpus: str) -> str:
    """The CPUs of "0-7,32-39" as the bits of a hexadecimal number, as srun reads them."""
    ends = [(int(part.split("-")[0]), int(part.split("-")[-1])) for part in cpus.split(",")]
    return f"0x{sum(1 << cpu for first, last in ends for cpu in range(first, last + 1)):x}"


def _variables(
    machine: MachineName, num_nodes: int, env: Mapping[str, str], without: Sequence[str], library_path: str
) -> dict[str, str]:
    known = MACHINES[machine]
    variables = {**known.environment, **known.environment_across_nodes}
    if folders := known.library_path:
        variables["LD_LIBRARY_PATH"] = ":".join([*folders, library_path] if library_path else folders)
    for name in without:
        if name not in variables:
            raise ValueError(f"without names {name}, which machine {machine} does not set: it sets {list(variables)}")
    excluded = {*without, *(known.environment_across_nodes if num_nodes == 1 else ())}
    variables = {name: value for name, value in variables.items() if name not in excluded} | dict(env)
    for name, value in variables.items():
        if not _NAME_OF_VARIABLE.fullmatch(name):
            raise ValueError(f"env has the name {name!r}: give NAME=VALUE")
        if "\n" in value or "\0" in value:
            raise ValueError(f"env has {name} with a line break, which no launcher passes on: leave it out")
    return variables


def _pairs(flag: str, variables: Mapping[str, str]) -> list[str]:
    return [token for name, value in variables.items() for token in (flag, f"{name}={value}")]


def words(field: str, options: str) -> list[str]:
    """Options as one would type them, split as a shell does. Raises `ValueError`, naming the field."""
    try:
        return shlex.split(options)
    except ValueError as error:
        raise ValueError(f"{field} is {options!r}, which no shell could split ({error}): close what it opens") from None


def choose_launcher(version: str | None, environ: Mapping[str, str], *, has_srun: bool) -> LauncherName:
    """The launcher of this place: `version` is what `mpiexec --version` prints, None where there is no mpiexec.

    `environ` is the environment of the job. In a Slurm job it is srun. Raises `ValueError` for an mpiexec that is none
    of the known.
    """
    if has_srun and "SLURM_JOB_ID" in environ:
        return "srun"
    if version is None:
        return "none"
    if re.search(r"HYDRA|MPICH", version) and "Intel" not in version:
        return "mpich"
    if re.search(r"Open ?MPI|OpenRTE|PRRTE", version, re.IGNORECASE):
        return "openmpi"
    # PALS calls itself no more than "mpiexec version 1.2.12".
    if re.search(r"PALS|^mpiexec version", version, re.MULTILINE) or "cray-pals" in environ.get("LOADEDMODULES", ""):
        return "pals"
    first_line = (version.strip().splitlines() or [""])[0]
    raise ValueError(
        f"launcher is auto, and mpiexec says {first_line!r}, which is none of MPICH, PALS and Open MPI: name the "
        f"launcher ({', '.join(get_args(LauncherName))})"
    )


def available_launcher(environ: Mapping[str, str] = os.environ) -> LauncherName:
    """What `auto` means here: asks the mpiexec on the PATH for its version."""
    path = environ.get("PATH")
    has_srun = shutil.which("srun", path=path) is not None
    mpiexec = shutil.which("mpiexec", path=path)
    if mpiexec is None or (has_srun and "SLURM_JOB_ID" in environ):
        return choose_launcher(None, environ, has_srun=has_srun)
    try:
        asked = subprocess.run(
            [mpiexec, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_VERSION_WITHIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"launcher is auto, and {mpiexec} --version said nothing for {_VERSION_WITHIN_S:g} s: name the launcher"
        ) from None
    return choose_launcher(asked.stdout + asked.stderr, environ, has_srun=has_srun)


def allocated_hosts(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The hosts of this PBS job, each once, in the order of its nodefile; empty outside PBS, where launchers know.

    Raises `ValueError` for a nodefile that is not there or names no host.
    """
    nodefile = environ.get("PBS_NODEFILE")
    if nodefile is None:
        if "PBS_JOBID" in environ:
            raise ValueError(
                "PBS_JOBID is set and PBS_NODEFILE is not, so that the nodes of the job are unknown: name hosts"
            )
        return ()
    try:
        lines = Path(nodefile).read_text().split()
    except OSError as error:
        raise ValueError(f"PBS_NODEFILE is {nodefile}, which cannot be read ({error.strerror}): name hosts") from error
    if not lines:
        raise ValueError(f"PBS_NODEFILE is {nodefile}, which names no host: name hosts")
    return tuple(dict.fromkeys(lines))  # a host is listed once a chunk, times mpiprocs


def place_ranks(
    machine: MachineName,
    *,
    num_nodes: int | None,
    ranks_per_node: int | None,
    num_ranks: int | None,
    hosts: Sequence[str],
) -> tuple[int, int, tuple[str, ...]]:
    """`num_ranks`, `ranks_per_node` and the hosts to take, from what is given and what the machine has.

    Without `num_nodes` all `hosts` are taken, or one node where there are none; without `num_ranks` each node gets
    `ranks_per_node`, by default the machine's; `num_ranks` alone is spread evenly. Raises `ValueError` where numbers
    contradict each other or there are too few hosts.
    """
    nodes = num_nodes or max(1, len(hosts))
    if ranks_per_node is None and num_ranks is not None:
        ranks_per_node, num_nodes = max(1, num_ranks // nodes), nodes
    elif ranks_per_node is None:
        ranks_per_node = MACHINES[machine].ranks_per_node
    if ranks_per_node is None:
        raise ValueError(f"ranks_per_node is not given, and machine {machine} has no default: give a number")
    if num_nodes is None:
        num_nodes = nodes if num_ranks is None else -(-num_ranks // max(1, ranks_per_node))
    if num_ranks is None:
        num_ranks = num_nodes * ranks_per_node
    if num_ranks != num_nodes * ranks_per_node:
        raise ValueError(
            f"num_ranks is {num_ranks}, num_nodes is {num_nodes} and ranks_per_node is {ranks_per_node}: the first "
            "must be the product of the others"
        )
    if hosts and num_nodes > len(hosts):
        raise ValueError(f"num_nodes is {num_nodes}, and there are {len(hosts)} hosts: give at most {len(hosts)}")
    return num_ranks, ranks_per_node, tuple(hosts[:num_nodes])
