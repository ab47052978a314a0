"""The command line of each launcher, as a list of tokens: what a job would start on Polaris can be tested on a laptop.

Only `available_launcher` and `allocated_hosts` look at the machine.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from torchreg.machines.known_machines import MACHINES, MachineName

LauncherName = Literal["mpich", "pals", "openmpi", "srun", "none"]

_VERSION_TIMEOUT_S = 30.0
_VERSION_PATTERNS: dict[LauncherName, str] = {  # in the output of `mpiexec --version`
    "mpich": r"(?s)\A(?!.*Intel).*(HYDRA|MPICH)",
    "openmpi": r"(?i)Open ?MPI|OpenRTE|PRRTE",
    "pals": r"(?m)PALS|^mpiexec version",  # all of it is "mpiexec version 1.2.12"
}


def launch_command(
    launcher: LauncherName,
    machine: MachineName = "generic",
    *,
    num_nodes: int,
    ranks_per_node: int,
    hosts: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    extra: Sequence[str] = (),
    without: Sequence[str] = (),
    library_path: str = "",
) -> list[str]:
    """The tokens that, before a program, start it on `num_nodes` nodes with `ranks_per_node` ranks each.

    `hosts` names the nodes, each once; by default the launcher takes those of the allocation. Every rank gets the
    machine's variables except those named in `without`, and `env`, which takes precedence. `library_path` is the
    LD_LIBRARY_PATH to which the machine's folders are prepended. `extra` are further options of the launcher. `none`
    starts one process.

    Raises `ValueError` if the numbers do not fit each other or the machine.
    """
    needs, num_ranks = MACHINES[machine], num_nodes * ranks_per_node
    for name, value in (("num_nodes", num_nodes), ("ranks_per_node", ranks_per_node)):
        if value < 1:
            raise ValueError(f"{name} is {value}: give a whole number of at least 1")
    if (num_devices := needs.ranks_per_node) is not None and ranks_per_node > num_devices:
        raise ValueError(
            f"ranks_per_node is {ranks_per_node}, and a node of {machine} has {num_devices} devices: give at most "
            f"{num_devices}, or choose machine generic"
        )
    for host, count in Counter(hosts).items():
        if count > 1:
            raise ValueError(f"hosts names {host} {count} times: give each host once, and ranks_per_node")
        if not host or re.search(r"[\s,:]", host):
            raise ValueError(f"hosts has {host!r}: give the names of hosts, separated by commas")
    if hosts and len(hosts) != num_nodes:
        raise ValueError(f"num_nodes is {num_nodes}, and hosts names {len(hosts)}: give as many hosts as nodes")
    if launcher == "none" and num_ranks > 1:
        raise ValueError(
            f"num_ranks is {num_ranks} and launcher is none, which starts one process: name another, or put an mpiexec "
            "on the PATH (a module of the site, or torchreg's extra mpi)"
        )
    variables = _variables(machine, num_nodes, env or {}, without, library_path)
    host_list, cpus = ",".join(hosts), needs.rank_cpus[:ranks_per_node]
    pals_cpus = f"list:{':'.join(cpus)}" if cpus else ""
    srun_cpus = f"mask_cpu:{','.join(map(_cpu_mask, cpus))}" if cpus else ""
    mpiexec = ["mpiexec", "-n", str(num_ranks)]
    mpiexec_on_hosts = [*mpiexec, "--ppn", str(ranks_per_node), *_option("--hosts", host_list)]
    env_command = ["env", *variables] if variables else []
    commands: dict[LauncherName, list[str]] = {
        "none": env_command,
        "mpich": [*mpiexec_on_hosts, *extra, *_option("--env", *variables)],
        # Without hosts PALS takes those of PBS_NODEFILE.
        "pals": [*mpiexec_on_hosts, *_option("--cpu-bind", pals_cpus), *extra, *_option("--env", *variables)],
        # A host without a number has one slot. Open MPI passes on no variable by itself.
        "openmpi": [
            *(*mpiexec, "--map-by", f"ppr:{ranks_per_node}:node"),
            *_option("--host", ",".join(f"{host}:{ranks_per_node}" for host in hosts)),
            *(*extra, *_option("-x", "PATH", *variables)),
        ],
        # `env` before the program, because srun's own --export splits values at commas.
        "srun": [
            *("srun", "--nodes", str(num_nodes), "--ntasks", str(num_ranks), "--ntasks-per-node", str(ranks_per_node)),
            *_option("--nodelist", host_list),
            *("--kill-on-bad-exit=1", *needs.srun_options),
            *_option("--cpu-bind", srun_cpus),
            *(*extra, *env_command),
        ],
    }
    return commands[launcher]


def _variables(
    machine: MachineName, num_nodes: int, env: Mapping[str, str], without: Sequence[str], library_path: str
) -> list[str]:
    needs = MACHINES[machine]
    variables = {**needs.environment, **needs.environment_across_nodes}
    if needs.library_path:
        variables["LD_LIBRARY_PATH"] = ":".join(filter(None, [*needs.library_path, library_path]))
    for name in without:
        if name not in variables:
            raise ValueError(f"without names {name}, which machine {machine} does not set: it sets {list(variables)}")
    excluded = {*without, *(needs.environment_across_nodes if num_nodes == 1 else ())}
    variables = {name: value for name, value in variables.items() if name not in excluded} | dict(env)
    for name, value in variables.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"env has the name {name!r}: give NAME=VALUE")
        if "\n" in value or "\0" in value:
            raise ValueError(f"env has {name} with a line break, which no launcher passes on: remove it")
    return [f"{name}={value}" for name, value in variables.items()]


def _option(flag: str, *values: str) -> list[str]:
    return [token for value in values if value for token in (flag, value)]


def _cpu_mask(cpus: str) -> str:
    """The CPUs of "0-7,32-39" as a hexadecimal bit mask."""
    ranges = [(int(part.split("-")[0]), int(part.split("-")[-1])) for part in cpus.split(",")]
    return f"0x{sum(1 << cpu for first, last in ranges for cpu in range(first, last + 1)):x}"


def split_options(field: str, options: str) -> list[str]:
    """Options as typed in a shell, as tokens. Raises `ValueError`, naming the field."""
    try:
        return shlex.split(options)
    except ValueError as error:
        raise ValueError(f"{field} is {options!r}, which no shell could split ({error}): close what it opens") from None


def place_ranks(
    machine: MachineName, num_nodes: int | None, ranks_per_node: int | None, num_ranks: int | None, available_nodes: int
) -> tuple[int, int]:
    """`num_nodes` and `ranks_per_node`; what is not given follows from the rest and the machine.

    Defaults: all available nodes, or as few as `num_ranks` needs; as many ranks on each as its machine has devices.
    `num_ranks` alone is spread evenly. Raises `ValueError` for numbers that contradict each other.
    """
    if num_nodes is None and num_ranks is not None and ranks_per_node is not None:
        num_nodes = math.ceil(num_ranks / max(1, ranks_per_node))
    num_nodes = available_nodes if num_nodes is None else num_nodes
    if ranks_per_node is None and num_ranks is not None:
        ranks_per_node = max(1, num_ranks // max(1, num_nodes))
    ranks_per_node = MACHINES[machine].ranks_per_node if ranks_per_node is None else ranks_per_node
    if ranks_per_node is None:
        raise ValueError(f"ranks_per_node is not given, and machine {machine} has no default: give a number")
    if num_ranks is not None and num_ranks != num_nodes * ranks_per_node:
        raise ValueError(
            f"num_ranks is {num_ranks}, num_nodes is {num_nodes} and ranks_per_node is {ranks_per_node}: the first "
            "must be the product of the others"
        )
    return num_nodes, ranks_per_node


def available_launcher(environ: Mapping[str, str] = os.environ) -> LauncherName:
    """The launcher of this environment: srun in a Slurm job, else identified by `mpiexec --version`.

    Raises `ValueError` for an unknown mpiexec.
    """
    path = environ.get("PATH")
    if "SLURM_JOB_ID" in environ and shutil.which("srun", path=path):
        return "srun"
    mpiexec = shutil.which("mpiexec", path=path)
    if mpiexec is None:
        return "none"
    try:
        done = subprocess.run(
            [mpiexec, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"launcher is auto, and {mpiexec} --version did not end within {_VERSION_TIMEOUT_S:g} s: name the launcher"
        ) from None
    version = done.stdout + done.stderr
    for name, pattern in _VERSION_PATTERNS.items():
        if re.search(pattern, version):
            return name
    if "cray-pals" in environ.get("LOADEDMODULES", ""):
        return "pals"
    first_line = (version.strip().splitlines() or [""])[0]
    raise ValueError(
        f"launcher is auto, and mpiexec --version prints {first_line!r}, which is none of MPICH, PALS and Open MPI: "
        f"name the launcher ({', '.join(get_args(LauncherName))})"
    )


def allocated_hosts(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The hosts of this PBS job, each once, in the order of its nodefile; empty outside PBS: launchers know them.

    Raises `ValueError` for a nodefile that is missing or names no host.
    """
    nodefile = environ.get("PBS_NODEFILE")
    if nodefile is None:
        if "PBS_JOBID" in environ:
            raise ValueError(
                "PBS_JOBID is set and PBS_NODEFILE is not, so that the nodes of the job are unknown: name hosts"
            )
        return ()
    try:
        hosts = Path(nodefile).read_text().split()
    except OSError as error:
        raise ValueError(f"PBS_NODEFILE is {nodefile}, which cannot be read ({error.strerror}): name hosts") from error
    if not hosts:
        raise ValueError(f"PBS_NODEFILE is {nodefile}, which names no host: name hosts")
    return tuple(dict.fromkeys(hosts))  # a host is listed once a chunk, times mpiprocs
