"""If these fail, torchreg does not train what it says, or leaves no evidence of it."""

import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from torchreg.core import checkpoint
from torchreg.core.train import evaluate
from torchreg.distributed.rendezvous import AgreedError
from torchreg.runs.config import TrainConfig, from_json
from torchreg.runs.environment import provenance
from torchreg.runs.recipes import RECIPES
from torchreg.runs.record import read_metrics
from torchreg.runs.run import Seams, train
from torchreg.theory import Moments

from ..conftest import (
    BEST_BIAS,
    BEST_WEIGHT,
    LESSON_BIAS,
    LESSON_LOSS,
    LESSON_WEIGHT,
    ROOT,
    data_sources,
)


@pytest.mark.parametrize("source", data_sources())
def test_the_lesson_to_the_digit(source):
    result = train(RECIPES["lesson"].replace(data=source))
    assert result.weight[0] == pytest.approx(LESSON_WEIGHT, abs=5e-7)
    assert result.bias == pytest.approx(LESSON_BIAS, abs=5e-7)
    assert result.loss == pytest.approx(LESSON_LOSS, rel=1e-14)
    assert result.closed_form_weight[0] == pytest.approx(BEST_WEIGHT, abs=5e-7)
    assert result.closed_form_bias == pytest.approx(BEST_BIAS, abs=5e-7)
    assert result.num_steps == 30


def test_the_lessons_first_step_by_hand():
    # One row pair: x = (1, 3), y = (5, 4), from w = 2, b = 1, rates 0.1 and 0.1, sequential.
    # Gradient of w: 2·(1·(−2) + 3·3)/2 = 7, so w = 2 − 0.7 = 1.3. Residuals then 1.3+1−5 = −2.7 and 3.9+1−4 = 0.9;
    # gradient of b: 2·(−2.7 + 0.9)/2 = −1.8, so b = 1 + 0.18 = 1.18. (Simultaneous: b = 1 − 0.1·(−2+3) = 0.9.)
    Path("two.csv").write_text("GrLivArea,SalePrice\n1,5\n3,4\n")
    config = RECIPES["lesson"].replace(
        data="two.csv",
        base_learning_rate=(0.1, 0.1),
        initial_weight=2.0,
        initial_bias=1.0,
        max_steps=1,
        runs_dir="a",
    )
    result = train(config)
    assert (*result.weight, result.bias) == pytest.approx((1.3, 1.18), rel=1e-14)
    result = train(config.replace(update_order="simultaneous", runs_dir="b"))
    assert (*result.weight, result.bias) == pytest.approx((1.3, 0.9), rel=1e-14)


def test_hand_and_sgd_follow_the_same_trajectory():
    shared = {"global_batch_size": 100, "max_steps": 40, "warmup_steps": 5, "decay": "cosine"}
    results = [
        train(TrainConfig.of(optimizer=optimizer, micro_batch_size=micro, name=f"{optimizer}{micro}", **shared))
        for optimizer, micro in itertools.product(("sgd", "manual"), (None, 7))
    ]
    for result in results[1:]:
        np.testing.assert_allclose(result.weight, results[0].weight, rtol=1e-10)
        assert result.bias == pytest.approx(results[0].bias, rel=1e-10)


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_batches_come_close_to_the_optimum(sampling, dtype):
    result = train(TrainConfig.of(sampling=sampling, dtype=dtype))
    assert 0 <= result.excess < 0.02


def test_full_batches_reach_the_optimum_of_many_features():
    config = TrainConfig.of(
        sampling="full", optimizer="manual", num_features=5, num_rows=300, lr_scaling="none", max_steps=3000
    )
    result = train(config)
    assert result.excess < 1e-12
    np.testing.assert_allclose(result.weight, result.closed_form_weight, rtol=1e-6)


def test_target_excess_stops_at_the_first_checked_step_within_it():
    config = TrainConfig.of(sampling="full", target_excess=0.01, log_every=1, epochs=500)
    result = train(config)
    assert result.stopped_by == "target"
    assert result.num_steps < 500
    assert result.excess <= 0.01
    losses = [line["full_loss"] / result.closed_form_loss - 1 for line in read_metrics(Path(result.run_dir))]
    assert losses[-1] <= 0.01 < losses[-2]


@pytest.mark.parametrize("optimizer", ["sgd", "manual"])
@pytest.mark.parametrize("log_every", [1, 7, 1000])
def test_divergence_is_noticed_and_recorded(optimizer, log_every):
    config = TrainConfig.of(
        optimizer=optimizer, base_learning_rate=(2.0, 2.0), lr_scaling="none", log_every=log_every, max_steps=300
    )
    result = train(config)
    assert result.diverged
    assert result.excess is None
    record = json.loads((Path(result.run_dir) / "record.json").read_text())
    assert record["result"]["diverged_at_step"] == result.diverged_at_step
    # (1 − 2·2)² = 9 in the loss each step, from about 2e10 to a thousand times its largest sample: 4 to 8 steps.
    assert 3 <= result.diverged_at_step <= 10


def test_divergence_seen_first_on_all_rows_is_divergence_not_a_crash():
    # The first step's loss is finite; the update after it is not, and the check of the target meets it first.
    result = train(TrainConfig.of(base_learning_rate=(1e200, 1e200), target_excess=0.1, log_every=1))
    assert (result.stopped_by, result.diverged_at_step) == ("divergence", 0)


def test_runs_without_a_name_in_the_same_second_do_not_collide():
    runs = {train(TrainConfig.of(max_steps=1)).run_dir for _ in range(4)}
    assert len(runs) == 4


def test_divergence_in_the_very_last_update_is_noticed():
    result = train(TrainConfig.of(base_learning_rate=(1e9, 1e9), max_steps=1))
    assert result.diverged


def test_rates_above_the_limit_are_warned_of_with_limit_and_world_size():
    config = TrainConfig.of(
        standardize=False,
        base_learning_rate=(4e-7, 4e-1),
        sampling="random",
        max_steps=1,
        on_unstable="refuse",
    )
    # theory.md: 64 rows at (1e-7, 1e-1) are stable up to a factor of 3.14, so 4 is 4 / 3.14 = 1.27 limits.
    with pytest.raises(ValueError, match=r"1\.27 times the stability limit .* largest stable world size is 0"):
        train(config)
    result = train(config.replace(on_unstable="warn"))
    assert "expect divergence" in json.loads((Path(result.run_dir) / "record.json").read_text())["warnings"][0]


def test_capped_rates_converge():
    config = TrainConfig.of(base_learning_rate=(3.0, 3.0), lr_scaling="none", on_unstable="cap", epochs=30)
    assert not train(config).diverged


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_default_recipe_is_stable_at_any_world_size_that_the_data_allows(world_size):
    from torchreg.runs.setup import prepare

    for config in (TrainConfig(), TrainConfig.of(num_features=12, num_rows=64 * world_size)):
        state, _ = prepare(config, world_size)
        assert state.forecast.stability_limit >= 2 - 1e-6
        assert state.warnings == ()


def test_a_run_leaves_whole_records():
    result = train(TrainConfig.of(name="first", max_steps=9))
    run = Path("runs/first")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json", "metrics.jsonl", "record.json"]
    record = json.loads((run / "record.json").read_text())
    assert record["schema_version"] == 2
    assert record["result"]["weight"] == list(result.weight)
    assert record["distributed"]["placements"][0]["rank"] == 0
    assert from_json(json.loads((run / "config.json").read_text())) == TrainConfig.of(name="first", max_steps=9)
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(9))
    # 551 rows in steps of 64: eight of them and one of 39.
    assert lines[-1]["num_samples"] == 551
    assert lines[-1]["epoch"] == 1


def test_logged_losses_are_the_losses_before_each_update():
    Path("two.csv").write_text("GrLivArea,SalePrice\n1,5\n3,4\n")
    config = RECIPES["lesson"].replace(data="two.csv", initial_weight=2.0, initial_bias=1.0, max_steps=1)
    result = train(config)
    # Residuals −2 and 3: mean square 13/2.
    assert read_metrics(Path(result.run_dir))[0]["loss"] == pytest.approx(6.5)


def test_a_second_run_loses_nothing_of_the_first():
    train(TrainConfig.of(name="twice", max_steps=3))
    before = Path("runs/twice/record.json").read_text()
    with pytest.raises(AgreedError, match=r"'twice'.*exists already.*--overwrite"):
        train(TrainConfig.of(name="twice", max_steps=4))
    assert Path("runs/twice/record.json").read_text() == before
    train(TrainConfig.of(name="twice", max_steps=4, overwrite=True))
    assert json.loads(Path("runs/twice/record.json").read_text())["result"]["num_steps"] == 4


def test_bad_input_leaves_an_earlier_run_alone_even_with_overwrite():
    train(TrainConfig.of(name="kept", max_steps=3))
    with pytest.raises(AgreedError, match="600"):
        train(TrainConfig.of(name="kept", overwrite=True, global_batch_size=600))
    assert Path("runs/kept/record.json").is_file()


def test_secrets_of_the_environment_stay_out_of_the_record(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-the-user")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = train(TrainConfig.of(max_steps=1))
    text = (Path(result.run_dir) / "record.json").read_text()
    assert "secret-of-the-user" not in text
    assert json.loads(text)["provenance"]["environment"]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    "name",
    [
        "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK",
        "ZE_FLAT_DEVICE_HIERARCHY", "ZEX_NUMBER_OF_CCS", "OMP_PLACES", "KMP_AFFINITY", "SLURM_CPU_BIND",
        "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "UCX_TLS", "HSA_XNACK",
    ],
)  # fmt: skip
def test_variables_that_decide_a_number_are_in_the_provenance(name, monkeypatch):
    monkeypatch.setenv(name, "its value")
    assert provenance("now")["environment"][name] == "its value"


def test_the_record_has_what_decides_numbers_below_python(monkeypatch):
    # Provenance: two records that differ in one of these are not of one stack.
    read_text = Path.read_text

    def drivers(path, *args, **options):
        if path.parts[:3] == ("/", "sys", "module"):
            if path.parts[3] == "nvidia":
                return "580.159.04\n"
            raise FileNotFoundError(path)
        return read_text(path, *args, **options)

    def adapters(path, pattern):
        if path.parts[:3] == ("/", "sys", "class"):
            return [path / name for name in {"cxi": ("cxi0", "cxi1"), "infiniband": ("mlx5_0",)}[path.name]]
        return glob(path, pattern)

    glob = Path.glob
    monkeypatch.setattr(Path, "glob", adapters)
    monkeypatch.setattr(Path, "read_text", drivers)
    result = train(TrainConfig.of(max_steps=1))
    facts = json.loads((Path(result.run_dir) / "record.json").read_text())["machine_facts"]
    assert facts.keys() == {"driver", "cuda", "rocm", "oneccl", "libfabric", "fabric", "kernel", "tf32"}
    assert facts["driver"] == "nvidia 580.159.04"
    assert facts["fabric"] == "cxi0, cxi1, mlx5_0"
    assert (facts["cuda"], facts["rocm"]) == (torch.version.cuda, torch.version.hip)
    assert (facts["kernel"], facts["tf32"]) == (os.uname().release, "ieee")


@pytest.mark.parametrize("is_new", [False, True], ids=["allow_tf32", "fp32_precision"])
def test_tf32_is_told_however_it_was_switched_on(is_new, run, tmp_path):
    # In a process of its own: torch refuses to read its older settings once the newer ones were used.
    if is_new and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip(f"tests the setting fp32_precision of torch 2.9 and newer, and this is torch {torch.__version__}")
    switch = "fp32_precision = 'tf32'" if is_new else "allow_tf32 = True"
    code = f"import torch, torchreg.runs.environment as r; torch.backends.cuda.matmul.{switch}; "
    code += "print(r.machine_facts()['tf32'])"
    done = run(sys.executable, "-W", "error", "-c", code, cwd=tmp_path)
    assert done.stdout == "tf32\n", done.stderr


FORTY = """
import os
from torchreg.runs.record import create_run_folder
start, go = os.pipe()
runs = []
for _ in range(40):
    runs.append(os.fork())
    if not runs[-1]:
        os.close(go)
        os.read(start, 1)  # until the last one is there
        os._exit(0 if create_run_folder("runs", None, "train") else 1)
os.close(go)
print([os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]) for run in runs] == 40 * [0])
"""


def test_forty_runs_without_a_name_that_start_in_one_second_have_forty_names(run, tmp_path):
    # W6: an array of jobs begins at once.
    done = run(sys.executable, "-c", FORTY, cwd=tmp_path)
    assert done.stdout == "True\n", done.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 40


def test_results_are_in_the_datas_own_units_whatever_the_model_sees():
    raw = train(RECIPES["lesson"].replace(name="raw"))
    x = Moments.of(*_houses())
    assert raw.loss == pytest.approx(x.loss(np.array(raw.weight), raw.bias), rel=1e-12)
    standard = train(RECIPES["lesson"].replace(standardize=True, base_learning_rate=(0.1, 0.1), name="standard"))
    assert standard.loss == pytest.approx(x.loss(np.array(standard.weight), standard.bias), rel=1e-12)


def _houses():
    from torchreg.data.table import load_table

    table = load_table("synthetic")
    return table.features, table.target


@pytest.mark.parametrize("reduction", ["fast", "reproducible"])
@pytest.mark.parametrize("optimizer", ["sgd", "manual"])
def test_a_device_is_started_without_a_trace_in_the_parameters(optimizer, reduction, monkeypatch):
    # On a GPU two steps at a learning rate of 0 come before the clock: they must not be training.
    config = TrainConfig.of(optimizer=optimizer, reduction=reduction, device="cpu", max_steps=5, name="plain")
    plain = train(config)
    steps = []

    def recorded(step):
        return lambda batch, learning_rates: (steps.append(learning_rates), step(batch, learning_rates))[1]

    monkeypatch.setattr("torchreg.runs.run.STARTS_ON_FIRST_USE", {"cpu"})
    started = train(config.replace(name="started"), seams=Seams(step=recorded))
    assert steps[:2] == [(0.0, 0.0)] * 2
    assert len(steps) == 7
    assert (started.weight, started.bias, started.loss) == (plain.weight, plain.bias, plain.loss)


def test_neither_evaluation_nor_saving_counts_as_training(monkeypatch):
    # Throughput would be that of the file system, and of how often somebody wants to look.
    late_s, now_s = [0.0], time.perf_counter
    monkeypatch.setattr("torchreg.runs.logger.time.perf_counter", lambda: now_s() + late_s[0])

    def slow(work):
        def work_for_an_hour(*arguments):
            late_s[0] += 3600
            return work(*arguments)

        return work_for_an_hour

    monkeypatch.setattr("torchreg.runs.run.evaluate", slow(evaluate))
    monkeypatch.setattr("torchreg.core.checkpoint.save", slow(checkpoint.save))
    result = train(TrainConfig.of(max_steps=4, log_every=1, log_full_loss=True, checkpoint_every=2, name="slow"))
    assert late_s[0] >= 6 * 3600
    assert result.train_time_s < 3600
    lines = read_metrics(Path(result.run_dir))
    assert lines[-1]["time_s"] < 3600


def test_the_record_names_the_commit_that_was_run(run, tmp_path):
    # In a checkout made for it: the tests may run from an archive, and a commit beside them must change nothing.
    def git(*arguments):
        done = run("git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def source():
        code = "import json, torchreg.runs.environment as r; print(json.dumps(r.provenance('now')['source']))"
        done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "src"))
        return json.loads(done.stdout)

    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    git("init", "--quiet")
    git("add", "src", "pyproject.toml")
    git("commit", "--quiet", "--message", "all")
    (tmp_path / ".git/info/exclude").write_text("__pycache__\n")
    commit = git("rev-parse", "HEAD")
    assert source() == {"commit": commit, "dirty": False}
    with (tmp_path / "src/torchreg/core/train.py").open("a") as file:
        file.write("# another program\n")
    assert source() == {"commit": commit, "dirty": True}
    (tmp_path / "pyproject.toml").unlink()  # as where the package is installed inside of somebody else's repository
    assert source() == {"commit": None, "dirty": None}
