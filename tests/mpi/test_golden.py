"""If these fail, a change of the code or the number of ranks changes what is learned: published numbers are lost."""

import json

import numpy as np
import pytest

from torchreg.distributed.init import init_distributed
from torchreg.runs.run import train

from .golden import GOLDEN, WORLD_SIZES, configurations, machine
from .worker import bits, ordered_configurations
from .worker import configurations as unordered_configurations

FROZEN = json.loads(GOLDEN.read_text())
RTOL = 1e-10

NUMBERS = {"golden": {"program": "tests.mpi.golden:main"}}
ON_TWO_RANKS = NUMBERS
ON_THREE_RANKS = NUMBERS | {"weights": {"program": "tests.mpi.worker:main", "arguments": ["mpi"]}}
ON_TORCHRUN = {
    "weights on 4": {"program": "tests.mpi.worker:main", "arguments": ["ddp"], "world_size": 4},
    "weights on 8": {"program": "tests.mpi.worker:main", "arguments": ["ddp"], "world_size": 8},
    "bits on 6": {"program": "tests.mpi.worker:reproducible", "arguments": ["ddp"], "world_size": 6},
}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_way_of_training_gives_the_frozen_numbers(world_size, launch_commands, request):
    if world_size == 1:
        launched = launch_commands(["mpiexec", "-n", "1"], NUMBERS)
    else:
        launched = request.getfixturevalue({2: "on_two_ranks", 3: "on_three_ranks"}[world_size])
    found = json.loads(launched["golden"][0].out)
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


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """The weights of one process, to which every world size is held."""
    runs_dir = str(tmp_path_factory.mktemp("one"))
    with init_distributed(device="cpu") as communicator:
        return {key: train(config, communicator) for key, config in unordered_configurations(runs_dir, with_mpi=True)}


@pytest.mark.parametrize(("launcher", "num_ranks"), [("mpiexec", 3), ("torchrun", 4), ("torchrun", 8)])
def test_the_same_global_batch_gives_the_same_weights_at_every_world_size(launcher, num_ranks, one_rank, request):
    if launcher == "mpiexec":
        ends = request.getfixturevalue("on_three_ranks")["weights"]
    else:
        ends = request.getfixturevalue("on_torchrun")[f"weights on {num_ranks}"]
    answer = json.loads(ends[0].out)
    assert answer["world_size"] == num_ranks
    assert len(answer["results"]) == len([*unordered_configurations("", with_mpi=launcher == "mpiexec")])
    for key, result in answer["results"].items():
        expected = one_rank[key]
        np.testing.assert_allclose(result["weight"], expected.weight, rtol=RTOL, err_msg=key)
        np.testing.assert_allclose(result["bias"], expected.bias, rtol=RTOL, err_msg=key)
        np.testing.assert_allclose(result["loss"], expected.loss, rtol=RTOL, err_msg=key)
        assert result["num_samples"] == expected.num_samples


@pytest.fixture(scope="module")
def one_rank_bits(tmp_path_factory):
    runs_dir = str(tmp_path_factory.mktemp("reproducible"))
    with init_distributed(device="cpu") as communicator:
        return {
            key: bits(train(config, communicator)) for key, config in ordered_configurations(runs_dir, with_mpi=True)
        }


def test_ordered_reduction_gives_the_same_bits_at_every_world_size(one_rank_bits, on_torchrun):
    # 1 to 3 ranks under mpiexec: the frozen numbers.
    answer = json.loads(on_torchrun["bits on 6"][0].out)
    assert answer["world_size"] == 6
    assert len(answer["results"]) == len([*ordered_configurations("", with_mpi=False)])
    for key, numbers in answer["results"].items():
        assert numbers == one_rank_bits[key], key


def test_ordered_reduction_of_all_combinations_agrees_to_rounding(one_rank_bits):
    for name in ("shuffle", "random"):
        ends = [
            [float.fromhex(number) for number in numbers]
            for key, numbers in one_rank_bits.items()
            if key.endswith(name) and "sequential" not in key
        ]
        assert len(ends) == 4
        for end in ends:
            np.testing.assert_allclose(end, ends[0], rtol=1e-9)
