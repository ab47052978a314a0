"""Who started this process, read from the environment that each launcher leaves: a pure function.

What the launchers set (and what they do not) is in the table of `tests/test_launcher.py`, one row for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launcher:
    """What the launcher says about this process.

    `local_rank` and `local_world_size` are None where it does not say: the runtime then counts hosts.
    """

    name: str
    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None
    uses_mpi: bool

    @property
    def is_none(self) -> bool:
        """No launcher started this process."""
        return self.name == "none"


NO_LAUNCHER = Launcher("none", 0, 1, 0, 1, uses_mpi=False)

# Name, then the variables of rank, world size, local rank, local world size.
_TORCHRUN = ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_PALS = ("PALS mpiexec", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PMI_LOCAL_SIZE")
_OPEN_MPI = (
    "Open MPI mpiexec",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_MPICH = ("MPICH mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_SLURM = ("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", None)  # no plain number of local tasks


def detect_launcher(environ: Mapping[str, str]) -> Launcher:
    """The launcher of the process whose environment this is.

    Raises `ValueError` when a number is malformed, or when two launchers disagree about the rank or the
    world size (for example RANK and WORLD_SIZE left over from an earlier run).
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return _read(environ, *_TORCHRUN, uses_mpi=False)
    found = _mpi_or_slurm(environ)
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environ.keys():
        return found
    exported = _read(environ, *_TORCHRUN, uses_mpi=False)
    if not found.is_none and (exported.rank, exported.world_size) != (found.rank, found.world_size):
        raise ValueError(
            f"{found.name} says rank {found.rank} of {found.world_size}, but RANK and WORLD_SIZE say "
            f"{exported.rank} of {exported.world_size}: unset RANK, WORLD_SIZE and LOCAL_RANK"
        )
    return exported if found.is_none else found


def _mpi_or_slurm(environ: Mapping[str, str]) -> Launcher:
    # sbatch's own shell sees SLURM_PROCID too, but it is in no step.
    in_step = {"SLURM_PROCID", "SLURM_NTASKS"} <= environ.keys() and (
        "SLURM_STEP_ID" in environ or "SLURM_JOB_ID" not in environ
    )
    for variables in (_PALS, _OPEN_MPI, _MPICH):
        if variables is _MPICH and in_step and "MPI_LOCALRANKID" not in environ:
            continue  # these PMI_* are srun's
        if variables[1] in environ and variables[2] in environ:
            return _read(environ, *variables, uses_mpi=True)
    return _read(environ, *_SLURM, uses_mpi=False) if in_step else NO_LAUNCHER


def _read(
    environ: Mapping[str, str],
    name: str,
    rank: str,
    world_size: str,
    local_rank: str,
    local_world_size: str | None,
    *,
    uses_mpi: bool,
) -> Launcher:
    def number(variable: str) -> int:
        text = environ.get(variable, "")
        if not text.isdigit():
            raise ValueError(f"{name} started this process, but {variable} is {text!r}: it must be a number")
        return int(text)

    def number_if_set(variable: str | None) -> int | None:
        return number(variable) if variable in environ else None  # type: ignore[arg-type]

    if number(rank) >= number(world_size):
        raise ValueError(f"{name} says rank {number(rank)} of {number(world_size)}: unset {rank} and {world_size}")
    return Launcher(
        name=name,
        rank=number(rank),
        world_size=number(world_size),
        local_rank=number_if_set(local_rank),
        local_world_size=number_if_set(local_world_size),
        uses_mpi=uses_mpi,
    )
