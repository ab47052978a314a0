"""If a launcher is misread, N ranks train N copies of a one-rank run and nobody notices."""

import pytest

from torchreg.launcher import NO_LAUNCHER, Launcher, detect_launcher

# What each launcher leaves in the environment of local rank 1 on the second of two nodes, 4 ranks.
ENVIRONMENTS = {
    "torchrun": {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "nid1",
        "MASTER_PORT": "29500",
    },
    "PALS mpiexec": {
        "PMI_RANK": "3",
        "PMI_SIZE": "4",
        "PMI_LOCAL_RANK": "1",
        "PMI_LOCAL_SIZE": "2",
        "PALS_RANKID": "3",
        "PALS_LOCAL_RANKID": "1",
        "PALS_NODEID": "1",
    },
    "Open MPI mpiexec": {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "MPICH mpiexec": {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
    "srun": {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "PMI_RANK": "3",
        "PMI_SIZE": "4",
    },
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_each_launcher_gives_its_rank_local_rank_and_world_size(name):
    found = detect_launcher({"PATH": "/bin", **ENVIRONMENTS[name]})
    local_world_size = None if name == "srun" else 2
    assert found == Launcher(name, 3, 4, 1, local_world_size, uses_mpi="mpiexec" in name)


def test_without_a_launcher_there_is_one_rank():
    assert detect_launcher({"PATH": "/bin"}) == NO_LAUNCHER


def test_the_shell_of_a_slurm_batch_job_is_no_rank():
    # sbatch -n 4: the script itself sees these, and runs once.
    environment = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert detect_launcher(environment).is_none


def test_mpiexec_of_mpich_inside_a_slurm_step_is_mpich():
    environment = {**ENVIRONMENTS["srun"], **ENVIRONMENTS["MPICH mpiexec"], "SLURM_PROCID": "0"}
    assert detect_launcher(environment).name == "MPICH mpiexec"


def test_pals_without_its_own_local_rank_leaves_it_open():
    environment = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_LOCAL_RANK": "1"}
    assert detect_launcher(environment).local_rank is None


@pytest.mark.parametrize("name", ["PALS mpiexec", "Open MPI mpiexec", "MPICH mpiexec", "srun"])
def test_variables_left_over_from_another_launcher_are_refused(name):
    stale = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with pytest.raises(ValueError, match=r"says rank 3 of 4, but RANK and WORLD_SIZE say 0 of 1"):
        detect_launcher({**ENVIRONMENTS[name], **stale})


def test_agreeing_variables_of_two_launchers_are_fine():
    exported = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert detect_launcher({**ENVIRONMENTS["MPICH mpiexec"], **exported}).name == "MPICH mpiexec"


@pytest.mark.parametrize("text", ["", "one", "-1"])
def test_a_malformed_number_names_its_variable(text):
    with pytest.raises(ValueError, match="PMI_SIZE"):
        detect_launcher({**ENVIRONMENTS["MPICH mpiexec"], "PMI_SIZE": text})


def test_a_rank_beyond_the_world_is_refused():
    with pytest.raises(ValueError, match="rank 3 of 2"):
        detect_launcher({**ENVIRONMENTS["MPICH mpiexec"], "PMI_SIZE": "2"})
