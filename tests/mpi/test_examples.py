"""If these fail, what people copy trains something else than what this package proves."""

import difflib
import errno
import os
import re
from functools import cache

import numpy as np
import pytest
import torch

from torchreg import TrainConfig, train

from ..conftest import ROOT
from .examples import run as run_example

CHAIN = ["01_single_process", "02_manual_allreduce", "03_ddp", "04_ezpz", "05_checkpoint_resume"]
ON_RANKS = CHAIN[1:]
OWN_MODEL = ["own_model", "--max-steps", "40", "--log-every", "20"]
MAKE_8_FEATURES = "torchreg data make --num-rows 200 --num-features 8 --output houses.csv"
FIT = re.compile(r"^(?:fit|SGD|manual) +SalePrice = (\S+) GrLivArea \+ (\S+)$", re.MULTILINE)


def program(*arguments, **more):
    return {"program": "tests.mpi.examples:run", "arguments": list(arguments), **more}


ON_TWO_RANKS = {name: program(name) for name in ON_RANKS} | {
    "own model": program(*OWN_MODEL, prepared=MAKE_8_FEATURES),
}
ON_THREE_RANKS = {
    "02 on 3": program("02_manual_allreduce"),
    "03 on 3": program("03_ddp", "--micro-batch-size", "10"),
    "rows without a rank": program("03_ddp", "--batch-size", "2", "--epochs", "1", "--log-every", "100"),
}
ON_TORCHRUN = {
    "05 on 8": program("05_checkpoint_resume", "--time-limit-s", "0", world_size=8, folder="examples"),
    "05 on 4": program("05_checkpoint_resume", world_size=4, folder="examples"),
    "02 on 4": program("02_manual_allreduce", world_size=4),
    "03 on 4": program("03_ddp", world_size=4),
}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The variables of the first example, on its own houses, and a file of these."""
    ends = run_example(CHAIN[0])
    path = tmp_path_factory.mktemp("examples") / "houses.csv"
    np.savetxt(path, np.c_[ends["price"], ends["area"]], "%.17g", ",", header="SalePrice,GrLivArea", comments="")
    return ends | {"path": str(path)}


@pytest.fixture(scope="module")
def package(single, tmp_path_factory):
    """Weight and bias, as the package finds them, by global batch size."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def fit(batch_size, epochs=30):
        options = {"global_batch_size": batch_size, "epochs": epochs, "name": str(batch_size), "device": "cpu"}
        result = train(TrainConfig.of(data=single["path"], runs_dir=str(folder), **options))
        return [*result.weight, result.bias]

    return fit


def fits(out):
    return [[float(number) for number in found] for found in FIT.findall(out)]


def test_the_gradient_from_paper_and_sgd_give_the_packages_line(package, single):
    for name in ("manual", "SGD"):
        np.testing.assert_allclose(single["fits"][name], package(64), rtol=1e-11)
    assert single["losses"][0] > single["losses"][-1], "the optimum is the lowest loss"


def test_a_file_is_read_as_the_package_reads_it(package, single, capsys):
    run_example(CHAIN[0], "--data", single["path"])
    assert fits(capsys.readouterr().out) == [pytest.approx(package(64), abs=1e-6)] * 2


@pytest.mark.parametrize("name", ON_RANKS)
def test_two_ranks_give_the_packages_digits(name, on_two_ranks, package):
    assert fits(on_two_ranks[name][0].out) == [pytest.approx(package(128), abs=1e-6)]
    assert on_two_ranks[name][1].out == "", "one rank prints"


@pytest.mark.parametrize("name", ["02 on 3", "03 on 3"])
def test_shards_and_micro_batches_of_unequal_size_give_them_too(name, on_three_ranks, package):
    assert fits(on_three_ranks[name][0].out) == [pytest.approx(package(192), abs=1e-6)]


def test_a_rank_without_samples_takes_part(on_three_ranks, package):
    assert fits(on_three_ranks["rows without a rank"][0].out) == [pytest.approx(package(2, 1), abs=1e-6)]


@pytest.mark.parametrize("name", ["02 on 4", "03 on 4"])
def test_torchrun_starts_them(name, on_torchrun, package):
    assert fits(on_torchrun[name][0].out) == [pytest.approx(package(256), abs=1e-6)]


def test_a_stopped_run_resumes_on_fewer_ranks_with_the_same_steps(on_torchrun, package):
    assert [rank.out.splitlines()[-1] for rank in on_torchrun["05 on 8"]] == ["exit code 75"] * 8
    assert fits(on_torchrun["05 on 8"][0].out) == []
    assert fits(on_torchrun["05 on 4"][0].out) == [pytest.approx(package(512), abs=1e-6)]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    # A full disk, or a kill, in the middle of the second save: the first, after 30 steps, must still be there.
    torch_save = torch.save

    def save_half(state, file):
        if state["step"] == 30:
            return torch_save(state, file)
        file.write(b"half of a checkpoint")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", save_half)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    try:
        with pytest.raises(OSError, match="No space left"):
            run_example("05_checkpoint_resume", "--checkpoint", str(tmp_path / "saved.pt"))
    finally:
        torch.distributed.destroy_process_group()
    assert torch.load(tmp_path / "saved.pt", weights_only=True)["step"] == 30


def test_a_model_of_your_own_trains_alike_on_one_rank_and_on_two(on_two_ranks, tmp_path, monkeypatch, capsys, run):
    monkeypatch.chdir(tmp_path)
    assert run("bash", "-c", MAKE_8_FEATURES, cwd=tmp_path).returncode == 0
    run_example(*OWN_MODEL, "--time-limit-s", "0")
    stopped = capsys.readouterr().out
    run_example(*OWN_MODEL)
    alone = stopped.splitlines()[:1] + capsys.readouterr().out.splitlines()
    assert "exit code 75" in stopped
    assert [line.split()[:2] for line in alone[:2]] == [["step", "20"], ["step", "40"]]
    together = re.findall(r"^step .*$", on_two_ranks["own model"][0].out, re.MULTILINE)
    assert together == alone[:2]
    assert "optimum" not in str(alone), "nobody knows the best loss of a perceptron"


@pytest.mark.parametrize(
    ("earlier", "later", "kept"), [*zip(CHAIN[:-1], CHAIN[1:], (0.65, 0.65, 0.95, 0.9), strict=True)]
)
def test_each_example_extends_the_one_before(earlier, later, kept):
    """The lesson is the difference: what is the same must read the same."""
    lines = [(ROOT / f"examples/{name}.py").read_text().splitlines() for name in (earlier, later)]
    same = sum(block.size for block in difflib.SequenceMatcher(None, *lines, autojunk=False).get_matching_blocks())
    assert same >= kept * len(lines[0])
    assert len(lines[1]) > len(lines[0])


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_one_page_and_stands_alone(path):
    text = path.read_text()
    is_own_model = path.stem == "own_model"
    assert len(text.splitlines()) <= (90 if is_own_model else 150)
    assert bool(re.search(r"^(from|import) torchreg", text, re.MULTILINE)) == is_own_model
