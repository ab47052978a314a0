"""Tests with the real thing; scripts/test_real.sh runs each part where it can be had."""

import os

import pytest

STARTS = {
    "MPICH": ("mpiexec", "-n", "2"),
    "torchrun": ("torchrun", "--nproc-per-node", "2", "--no-python"),
}


def only_in(part, needs):
    """A mark for the tests of a part, which the tests of the checkout's own venv leave out."""
    reason = f"needs {needs}, in a venv that `bash scripts/test_real.sh {part}` makes and runs this in"
    return pytest.mark.skipif(os.environ.get("TORCHREG_REAL") != part, reason=reason)
