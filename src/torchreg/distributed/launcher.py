"""Detect the launcher of this process from the environment variables that it sets. Pure functions.

`LAUNCHERS` has one row per launcher; `tests/distributed/test_launcher.py` shows what each of them sets, and what not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Launcher:
    """The launcher of this process, and the numbers that it gives.

    `local_rank` and `local_world_size` are None where the launcher sets none: the ranks of a host are then counted.
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


class Variables(NamedTuple):
    """The environment variables of a launcher. Of several for one number, the first that is set counts."""

    name: str
    rank: str
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_world_size: tuple[str, ...] = ()
    uses_mpi: bool = False
    required: str | None = None
    """A variable without which the others are not this launcher's."""


def _prefixed(name: str, prefix: str, *, uses_mpi: bool = True) -> Variables:
    """The row of a launcher whose variables differ from others' in their prefix alone."""
    rank, size, local_rank, local_size = (prefix + end for end in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    return Variables(name, rank, (size,), (local_rank,), (local_size,), uses_mpi)


_EXPORTED = Variables("RANK and WORLD_SIZE", "RANK", ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",))
_SRUN = "srun"

# An inner launcher precedes the outer one that may have started it.
LAUNCHERS = (
    _EXPORTED._replace(name="torchrun", required="TORCHELASTIC_RUN_ID"),
    Variables("PALS mpiexec", "PALS_RANKID", ("PMI_SIZE",), ("PALS_LOCAL_RANKID",), ("PMI_LOCAL_SIZE",), True),
    _prefixed("Open MPI mpiexec", "OMPI_COMM_WORLD_"),
    _prefixed("MVAPICH mpirun", "MV2_COMM_WORLD_"),
    _prefixed("MVAPICH mpirun", "MVP_COMM_WORLD_"),  # since 3.0
    _prefixed("jsrun", "JSM_NAMESPACE_"),
    _prefixed("horovodrun", "HOROVOD_", uses_mpi=False),
    # Flux and Slurm set PMI_RANK and PMI_SIZE too; MPI_LOCALRANKID is hydra's own.
    Variables(
        "MPICH mpiexec", "PMI_RANK", ("PMI_SIZE",), ("MPI_LOCALRANKID",), ("MPI_LOCALNRANKS",), True, "MPI_LOCALRANKID"
    ),
    Variables("flux", "FLUX_TASK_RANK", ("FLUX_JOB_SIZE",), ("FLUX_TASK_LOCAL_ID",)),
    # srun sets no plain number of the ranks of a host.
    Variables(_SRUN, "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",)),
    Variables("PMI launcher", "PMI_RANK", ("PMI_SIZE",), uses_mpi=True),
)

_FIRST_SPECIAL_SLURM_STEP = 0xFFFFFFF0  # the batch script, salloc's shell and others: not started by srun
_SIGNS_OF_MPI = "PALS_RANKID", "PMI_RANK", "PMI_FD", "PMIX_RANK", "ALPS_APP_PE", "MPI_RANKID"


def detect_launcher(environ: Mapping[str, str]) -> Launcher:
    """The launcher of the process with this environment.

    Raises `ValueError` when a number is malformed or missing, and when RANK and WORLD_SIZE, left from an earlier run,
    contradict the launcher.
    """
    found = next((_read(environ, row) for row in LAUNCHERS if _is_present(environ, row)), NO_LAUNCHER)
    if found.name == "torchrun" or "RANK" not in environ:
        if found.is_none and environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError(f"WORLD_SIZE is {environ['WORLD_SIZE']!r} and RANK is not set: set both, or unset it")
        return found
    exported = _read(environ, _EXPORTED)
    if found.is_none:
        return exported
    if (exported.rank, exported.world_size) != (found.rank, found.world_size):
        raise ValueError(
            f"{found.name} started rank {found.rank} of {found.world_size}, but RANK is {exported.rank} and WORLD_SIZE "
            f"is {exported.world_size}: unset RANK, WORLD_SIZE and LOCAL_RANK"
        )
    return found


def sign_of_mpi(environ: Mapping[str, str]) -> str | None:
    """A variable that an MPI launcher without a row in `LAUNCHERS` sets for each rank, if this process has one."""
    if not _is_slurm_step(environ) and "SLURM_STEP_ID" in environ:
        return None  # salloc's shell
    return next((name for name in _SIGNS_OF_MPI if name in environ), None)


def _is_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process. The shells of sbatch and salloc have SLURM_PROCID too."""
    step = environ.get("SLURM_STEP_ID", "")
    return int(step) < _FIRST_SPECIAL_SLURM_STEP if step.isdecimal() else "SLURM_JOB_ID" not in environ


def _is_present(environ: Mapping[str, str], row: Variables) -> bool:
    if row.rank not in environ or (row.required is not None and row.required not in environ):
        return False
    if row.name == _SRUN:
        return _is_slurm_step(environ)
    # srun --mpi=cray_shasta sets PALS_RANKID, and some launchers PMI_RANK, without a size: another row has the size.
    return row.rank not in ("PALS_RANKID", "PMI_RANK") or row.world_size[0] in environ


def _read(environ: Mapping[str, str], row: Variables) -> Launcher:
    def number(variables: tuple[str, ...]) -> int | None:
        variable = next((name for name in variables if name in environ), None)
        if variable is None:
            return None
        if not environ[variable].isdecimal():
            raise ValueError(
                f"{row.name} started this process, but {variable} is {environ[variable]!r}: it must be a number"
            )
        return int(environ[variable])

    rank, world_size = number((row.rank,)), number(row.world_size)
    size_variable = row.world_size[-1]
    if rank is None or world_size is None:
        raise ValueError(
            f"{row.rank} is {environ[row.rank]} and {size_variable} is not set, so that the number of ranks is not "
            f"known: set {size_variable}, or unset {row.rank}"
        )
    if rank >= world_size:
        raise ValueError(f"{row.name} started rank {rank} of {world_size}: unset {row.rank} and {size_variable}")
    return Launcher(row.name, rank, world_size, number(row.local_rank), number(row.local_world_size), row.uses_mpi)
