"""Detect the launcher of this process from the environment variables that it sets. Pure functions.

`LAUNCHERS` has one row per launcher; `tests/distributed/test_launcher.py` shows what each of them sets, and what not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

FORWARDED_WITHIN_S = 0.3  # a launcher drops a rank's output that it has not forwarded when that rank ends all others


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
    """The environment variables of a launcher. The row counts only where those of `required` are set too."""

    name: str
    rank: str
    world_size: str
    local_rank: str = ""
    local_world_size: str = ""
    uses_mpi: bool = False
    required: tuple[str, ...] = ()


def _prefixed(name: str, prefix: str, *, uses_mpi: bool = True) -> Variables:
    local_rank, local_size = f"{prefix}LOCAL_RANK", f"{prefix}LOCAL_SIZE"
    return Variables(name, f"{prefix}RANK", f"{prefix}SIZE", local_rank, local_size, uses_mpi)


_EXPORTED = Variables("RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SRUN = Variables("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")  # no plain number of the ranks of a host

# An inner launcher precedes the outer one that may have started it. srun --mpi=cray_shasta sets PALS_RANKID, and some
# launchers PMI_RANK, without a size: another row has the size.
LAUNCHERS = (
    _EXPORTED._replace(name="torchrun", required=("TORCHELASTIC_RUN_ID",)),
    Variables("PALS mpiexec", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PMI_LOCAL_SIZE", True, ("PMI_SIZE",)),
    _prefixed("Open MPI mpiexec", "OMPI_COMM_WORLD_"),
    _prefixed("MVAPICH mpirun", "MV2_COMM_WORLD_"),
    _prefixed("MVAPICH mpirun", "MVP_COMM_WORLD_"),  # since 3.0
    _prefixed("jsrun", "JSM_NAMESPACE_"),
    _prefixed("horovodrun", "HOROVOD_", uses_mpi=False),
    Variables(
        *("MPICH mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        uses_mpi=True,
        required=("PMI_SIZE", "MPI_LOCALRANKID"),  # Flux and Slurm set PMI_SIZE too; the other is hydra's own
    ),
    Variables("flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    _SRUN._replace(world_size="SLURM_STEP_NUM_TASKS", required=("SLURM_STEP_NUM_TASKS",)),  # SLURM_NTASKS: of the job
    _SRUN,
    Variables("PMI launcher", "PMI_RANK", "PMI_SIZE", uses_mpi=True, required=("PMI_SIZE",)),
)

_FIRST_SPECIAL_SLURM_STEP = 0xFFFFFFF0  # the batch script, salloc's shell and others: not started by srun
_SIGNS_OF_MPI = "PALS_RANKID", "PMI_RANK", "PMI_FD", "PMIX_RANK", "ALPS_APP_PE", "MPI_RANKID"


def detect_launcher(environ: Mapping[str, str]) -> Launcher:
    """The launcher of an environment. Raises `ValueError` for numbers that are malformed, missing or contradictory."""
    rows = [row for row in LAUNCHERS if row.name != _SRUN.name or _is_slurm_step(environ)]
    present = (row for row in rows if all(name in environ for name in (row.rank, *row.required)))
    found = next((_read(environ, row) for row in present), NO_LAUNCHER)
    if found.name == "torchrun" or "RANK" not in environ:
        if found.is_none and environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError(f"WORLD_SIZE is {environ['WORLD_SIZE']!r} and RANK is not set: set both, or unset it")
        return found
    exported = _read(environ, _EXPORTED)
    if not found.is_none and (exported.rank, exported.world_size) != (found.rank, found.world_size):
        started = f"{found.name} started rank {found.rank} of {found.world_size}"
        variables = f"but RANK is {exported.rank} and WORLD_SIZE is {exported.world_size}"
        raise ValueError(f"{started}, {variables}: unset RANK, WORLD_SIZE and LOCAL_RANK")
    return exported if found.is_none else found


def sign_of_mpi(environ: Mapping[str, str]) -> str | None:
    """A variable that an MPI launcher without a row in `LAUNCHERS` sets for each rank, if this process has one."""
    if not _is_slurm_step(environ) and "SLURM_STEP_ID" in environ:
        return None  # salloc's shell
    return next((name for name in _SIGNS_OF_MPI if name in environ), None)


def _is_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process. The shells of sbatch and salloc have SLURM_PROCID too."""
    step = environ.get("SLURM_STEP_ID", "")
    return int(step) < _FIRST_SPECIAL_SLURM_STEP if step.isdecimal() else "SLURM_JOB_ID" not in environ


def _read(environ: Mapping[str, str], row: Variables) -> Launcher:
    names = (row.rank, row.world_size, row.local_rank, row.local_world_size)
    for name in names:
        if name in environ and not environ[name].isdecimal():
            raise ValueError(f"{row.name} started this process, but {name} is {environ[name]!r}: it must be a number")
    rank, world_size, local_rank, local_world_size = (int(environ[name]) if name in environ else None for name in names)
    if rank is None or world_size is None:
        raise ValueError(f"{row.rank} is {environ[row.rank]}, {row.world_size} is not set: set it, or unset {row.rank}")
    if rank >= world_size:
        raise ValueError(f"{row.name} started rank {rank} of {world_size}: unset {row.rank} and {row.world_size}")
    return Launcher(row.name, rank, world_size, local_rank, local_world_size, row.uses_mpi)
