"""If these fail, ezpz makes no DistributedDataParallel, and the runs that ask for it end.

scripts/test_real.sh ezpz runs them, in a venv with the checkout that TORCHREG_EZPZ names.
"""

import os
import sys

import pytest

from ..conftest import ROOT
from . import STARTS, only_in

pytestmark = [
    only_in("ezpz", "the real ezpz, from a checkout that TORCHREG_EZPZ names (PyPI has another package of that name)"),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize("start", STARTS)
def test_ranks_are_set_up_by_ezpz(start, run, tmp_path):
    command = (*STARTS[start], "torchreg", "train", "--distributed", "ezpz", "--max-steps", "20", "--device", "cpu")
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "distributed ezpz" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"], "ezpz left nothing behind"


def test_the_stack_is_verified(run, tmp_path):
    done = run(
        *STARTS["MPICH"], "torchreg", "verify", "--quick", "--distributed", "ezpz", "--device", "cpu", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this stack trains this model correctly" in done.stdout


def test_an_sbatch_on_the_path_is_no_slurm_job(run, tmp_path):
    """S8: a login node."""
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    command = (*STARTS["MPICH"], "env", f"PATH={os.environ['PATH']}:{tmp_path}", "torchreg", "train")
    done = run(*command, "--distributed", "ezpz", "--max-steps", "3", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["04_ezpz", "05_checkpoint_resume"])
def test_the_examples_train_on_ranks_that_ezpz_set_up(name, start, run, tmp_path):
    done = run(*STARTS[start], sys.executable, str(ROOT / f"examples/{name}.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fit          SalePrice = 77.983322 GrLivArea + 45649.863344" in done.stdout  # as without ezpz
    assert 'available "cpu" devices' in done.stderr, "a line of ezpz's"
