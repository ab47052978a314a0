"""`torchreg scale command`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from torchreg.cli.options import parse
from torchreg.machines import launch_commands
from torchreg.machines.known_machines import MachineName
from torchreg.machines.launch_commands import LauncherName


@dataclass(frozen=True)
class CommandArguments:
    """Print the launcher's command line, for a job script to put before the program: one token a line.

    In a PBS job the hosts are those of PBS_NODEFILE, each once.
    """

    launcher: LauncherName | Literal["auto"] = "auto"
    """Whose options to write. `auto`: srun in a Slurm job, else identified by `mpiexec --version`."""

    machine: MachineName = "generic"
    """Whose CPU binding and variables to add."""

    num_nodes: int | None = None
    """How many of the hosts to use, from the first on. Default: all of them."""

    ranks_per_node: int | None = None
    """Ranks on each node. Default: as many as a node of the machine has devices."""

    num_ranks: int | None = None
    """Ranks on all nodes together. Default: nodes times ranks per node."""

    hosts: str = ""
    """Names of the hosts, separated by commas."""

    env: tuple[str, ...] = ()
    """Variables for every rank, as NAME=VALUE; they take precedence over the machine's."""

    without: tuple[str, ...] = ()
    """Names of the machine's variables to exclude."""

    extra: str = ""
    """Further options for the launcher, in one argument, as in --extra="--no-vni"."""


def run_command(argv: list[str]) -> int:
    """Print the launcher's tokens, one a line."""
    arguments = parse(CommandArguments, "torchreg scale command", argv)
    for assignment in arguments.env:
        if "=" not in assignment:
            raise ValueError(f"env has {assignment!r}: give NAME=VALUE")
    hosts = arguments.hosts.split(",") if arguments.hosts else launch_commands.allocated_hosts()
    launcher = launch_commands.available_launcher() if arguments.launcher == "auto" else arguments.launcher
    slurm_nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) if launcher == "srun" else 1
    sizes = arguments.num_nodes, arguments.ranks_per_node, arguments.num_ranks
    num_nodes, ranks_per_node = launch_commands.place_ranks(arguments.machine, *sizes, len(hosts) or slurm_nodes)
    tokens = launch_commands.launch_command(
        launcher,
        arguments.machine,
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node,
        hosts=hosts[:num_nodes],
        env=dict(assignment.split("=", 1) for assignment in arguments.env),
        extra=launch_commands.split_options("extra", arguments.extra),
        without=arguments.without,
        library_path=os.environ.get("LD_LIBRARY_PATH", ""),
    )
    print(*tokens, sep="\n", end="\n" if tokens else "")
    return 0
