"""If this fails, a change of the code changes what is trained: numbers that users published are no longer reached."""

import json
import sys

import numpy as np
import pytest

from ..conftest import ROOT
from .golden import GOLDEN, WORLD_SIZES, configurations, machine

FROZEN = json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_way_of_training_gives_the_frozen_numbers(world_size, run, tmp_path):
    output = tmp_path / "numbers.json"
    command = [sys.executable, "-m", "tests.mpi.golden", str(output)]
    done = run("mpiexec", "-n", str(world_size), *command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found.keys() == configurations().keys()
    for name, frozen in FROZEN["runs"][str(world_size)].items():
        assert found[name]["ints"] == frozen["ints"], name
        if configurations()[name].batch.reduction == "reproducible" and machine() == FROZEN["machine"]:
            assert found[name]["floats"] == frozen["floats"], f"{name}: the bits changed"
        rtol = 1e-5 if configurations()[name].run.dtype == "float32" else 1e-12
        values, expected = ([float.fromhex(f) for f in each["floats"]] for each in (found[name], frozen))
        np.testing.assert_allclose(values, expected, rtol=rtol, err_msg=name)


def test_reproducible_runs_are_frozen_once_for_all_world_sizes():
    for name, config in configurations().items():
        if config.batch.reduction == "reproducible":
            bits = {tuple(runs[name]["floats"]) for runs in FROZEN["runs"].values()}
            assert len(bits) == 1, name
