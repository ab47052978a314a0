"""If a launcher is misread, N ranks train N copies of a one-rank run and nobody notices."""

import os

import pytest

from torchreg.distributed.launcher import NO_LAUNCHER, Launcher, detect_launcher

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
    "srun --mpi=cray_shasta": {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "PALS_RANKID": "3",
        "PALS_LOCAL_RANKID": "1",
    },
    "MVAPICH mpirun": {
        "MV2_COMM_WORLD_RANK": "3",
        "MV2_COMM_WORLD_SIZE": "4",
        "MV2_COMM_WORLD_LOCAL_RANK": "1",
        "MV2_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "jsrun": {
        "JSM_NAMESPACE_RANK": "3",
        "JSM_NAMESPACE_SIZE": "4",
        "JSM_NAMESPACE_LOCAL_RANK": "1",
        "JSM_NAMESPACE_LOCAL_SIZE": "2",
    },
    "flux": {
        "FLUX_TASK_RANK": "3",
        "FLUX_JOB_SIZE": "4",
        "FLUX_TASK_LOCAL_ID": "1",
        "FLUX_JOB_NNODES": "2",
        "PMI_RANK": "3",
        "PMI_SIZE": "4",
    },
    "RANK and WORLD_SIZE": {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
}


@pytest.fixture(autouse=True)
def started_by_nobody(monkeypatch):
    for environment in ENVIRONMENTS.values():
        for name in environment:
            monkeypatch.delenv(name, raising=False)


@pytest.fixture
def detected(monkeypatch):
    """The launcher of a process with these variables: os.environ refuses what a dict takes (case L2)."""

    def detect(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return detect_launcher(os.environ)

    return detect


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_each_launcher_gives_its_rank_local_rank_and_world_size(name, detected):
    found = detected(ENVIRONMENTS[name])
    local_world_size = None if name.startswith(("srun", "flux")) else 2
    uses_mpi = name.endswith(("mpiexec", "mpirun", "jsrun"))
    assert found == Launcher(name.split(" --")[0], 3, 4, 1, local_world_size, uses_mpi=uses_mpi)


def test_the_four_numbers_that_torch_asks_for_are_enough(detected):
    # Case L4: Kubernetes operators and hand-written loops set no LOCAL_RANK; these were N silent copies of one rank.
    assert detected({"RANK": "1", "WORLD_SIZE": "2"}) == Launcher("RANK and WORLD_SIZE", 1, 2, None, None, False)


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE"),
        ({"MV2_COMM_WORLD_RANK": "1"}, "MV2_COMM_WORLD_SIZE"),
        ({"JSM_NAMESPACE_RANK": "1"}, "JSM_NAMESPACE_SIZE"),
        ({"FLUX_TASK_RANK": "1"}, "FLUX_JOB_SIZE"),
        ({"HOROVOD_RANK": "1"}, "HOROVOD_SIZE"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}, "SLURM_NTASKS"),
    ],
)
def test_a_rank_without_a_world_size_is_refused_by_the_name_of_what_is_missing(environment, missing, detected):
    with pytest.raises(ValueError, match=rf"{missing} is not set"):
        detected(environment)


def test_without_a_launcher_there_is_one_rank():
    assert detect_launcher({"PATH": "/bin"}) == NO_LAUNCHER


def test_the_shell_of_a_slurm_batch_job_is_no_rank():
    # sbatch -n 4: the script itself sees these, and runs once.
    environment = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert detect_launcher(environment).is_none


def test_the_shell_of_salloc_is_no_rank(detected):
    # Case L3: salloc starts its shell as a step of a kind of its own, with the numbers of the whole job.
    shell = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert detected({**shell, "SLURM_JOB_ID": "7"}).is_none


def test_a_step_has_as_many_ranks_as_it_says_not_as_its_job(detected):
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}
    assert detected({**step, "SLURM_JOB_ID": "7"}).world_size == 2


def test_mpiexec_of_mpich_inside_a_slurm_step_is_mpich():
    environment = {**ENVIRONMENTS["srun"], **ENVIRONMENTS["MPICH mpiexec"], "SLURM_PROCID": "0"}
    assert detect_launcher(environment).name == "MPICH mpiexec"


def test_pals_without_its_own_local_rank_leaves_it_open():
    environment = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_LOCAL_RANK": "1"}
    assert detect_launcher(environment).local_rank is None


@pytest.mark.parametrize("name", ["PALS mpiexec", "Open MPI mpiexec", "MPICH mpiexec", "srun"])
def test_variables_left_over_from_another_launcher_are_refused(name):
    stale = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with pytest.raises(ValueError, match=r"started rank 3 of 4, but RANK is 0 and WORLD_SIZE is 1"):
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
