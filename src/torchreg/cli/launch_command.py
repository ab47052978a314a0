"""`torchreg scale command`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from torchreg.cli.options import parse
from torchreg.machines.launch_commands import (
    LauncherName,
    MachineName,
    allocated_hosts,
    available_launcher,
    launch_command,
    place_ranks,
    words,
)


@dataclass(frozen=True)
class CommandArguments:
    """Print what starts ranks here, for a job script to put before the program: one token a line.

    In a PBS job the hosts are those of PBS_NODEFILE, each once.
    """

    launcher: LauncherName | Literal["auto"] = "auto"
    """Whose options to write. `auto`: srun in a Slurm job, else what `mpiexec --version` says."""

    machine: MachineName = "generic"
    """Whose CPU binding and variables to add."""

    num_nodes: int | None = None
    """How many of the hosts to take, from the first on. Default: all of them."""

    ranks_per_node: int | None = None
    """Ranks on each node. Default: as many as a node of the machine has devices."""

    num_ranks: int | None = None
    """Ranks on all nodes together. Default: nodes times ranks per node."""

    hosts: str = ""
    """Names of the hosts, separated by commas."""

    env: tuple[str, ...] = ()
    """Variables for every rank, as NAME=VALUE; they win over the machine's."""

    without: tuple[str, ...] = ()
    """Names of the machine's variables to leave out."""

    extra: str = ""
    """Further options for the launcher, in one argument, as in --extra="--no-vni"."""


def run_command(argv: list[str]) -> int:
    """Print the launcher's tokens, one a line."""
    arguments = parse(CommandArguments, "torchreg scale command", argv)
    variables = {}
    for assignment in arguments.env:
        name, equals, variables[name] = assignment.partition("=")
        if not equals:
            raise ValueError(f"env has {assignment!r}: give NAME=VALUE")
    hosts = tuple(arguments.hosts.split(",")) if arguments.hosts else allocated_hosts(os.environ)
    launcher = available_launcher(os.environ) if arguments.launcher == "auto" else arguments.launcher
    num_nodes = arguments.num_nodes
    if (
        num_nodes is None
        and launcher == "srun"
        and not hosts
        and None in (arguments.num_ranks, arguments.ranks_per_node)
    ):
        num_nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    num_ranks, ranks_per_node, hosts = place_ranks(
        arguments.machine,
        num_nodes=num_nodes,
        ranks_per_node=arguments.ranks_per_node,
        num_ranks=arguments.num_ranks,
        hosts=hosts,
    )
    tokens = launch_command(
        launcher,
        arguments.machine,
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        hosts=hosts,
        env=variables,
        extra=words("extra", arguments.extra),
        without=arguments.without,
        library_path=os.environ.get("LD_LIBRARY_PATH", ""),
    )
    for token in tokens:
        print(token)
    return 0
