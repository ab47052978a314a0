"""If these fail, nothing starts where most people start: PyPI's torch for Linux, on a machine without a GPU.

scripts/test_real.sh cuda-build runs them, in a venv with that torch. L1 of the cases table.
"""

import pytest
import torch

from ..conftest import LESSON_BIAS, LESSON_WEIGHT
from . import STARTS, only_in

pytestmark = [
    only_in("cuda-build", "PyPI's CUDA build of torch (a download of 3 GB)"),
    pytest.mark.timeout(900),
]


def test_it_is_the_cuda_build():
    assert torch.version.cuda is not None


@pytest.mark.parametrize("device", ["auto", "cpu"])
@pytest.mark.parametrize("start", STARTS)
def test_the_demo_ends_at_the_lessons_digits(start, device, run, tmp_path):
    command = (*STARTS[start], "torchreg", "train", "--recipe", "lesson", "--device", device, "--name", "demo")
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 ranks on 1 node" in done.stdout
    assert f"SalePrice = {LESSON_WEIGHT} GrLivArea + {LESSON_BIAS}" in done.stdout


@pytest.mark.parametrize("start", STARTS)
def test_the_stack_is_verified(start, run, tmp_path):
    done = run(*STARTS[start], "torchreg", "verify", "--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this stack trains this model correctly" in done.stdout
