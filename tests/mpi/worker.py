"""What ranks of `test_golden.py` run: many short trainings in one bring-up; rank 0 prints their weights as JSON."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

from torchreg.distributed.init import init_distributed
from torchreg.runs.config import TrainConfig
from torchreg.runs.record import read_metrics
from torchreg.runs.result import Result
from torchreg.runs.run import train

GLOBAL_BATCH_SIZES = (3, 64, 100, 512, 551)
BASE = {"max_steps": 20, "base_learning_rate": (0.02, 0.03), "lr_scaling": "none", "dtype": "float64"}
VARIATIONS = {
    **{str(size): {"global_batch_size": size} for size in GLOBAL_BATCH_SIZES},
    "micro": {"global_batch_size": 100, "micro_batch_size": 9},
    "random": {"global_batch_size": 100, "sampling": "random"},
    "full": {"sampling": "full"},
    "schedule": {"global_batch_size": 64, "warmup_steps": 5, "decay": "cosine", "lr_scaling": "linear"},
}


def combinations(*, with_mpi: bool):
    for optimizer, sync in (("sgd", "ddp"), ("sgd", "mpi"), ("manual", "allreduce"), ("manual", "mpi")):
        if sync != "mpi" or with_mpi:
            yield {"optimizer": optimizer, "sync": sync}
            if optimizer == "manual":
                yield {"optimizer": optimizer, "sync": sync, "update_order": "sequential"}


def configurations(runs_dir: str, *, with_mpi: bool):
    for combination, (name, variation) in itertools.product(combinations(with_mpi=with_mpi), VARIATIONS.items()):
        key = "-".join([*combination.values(), name])
        yield key, TrainConfig.of(**BASE | combination | variation, name=key, runs_dir=runs_dir)


def ordered_configurations(runs_dir: str, *, with_mpi: bool):
    raw = {"standardize": False, "base_learning_rate": (1e-7, 0.1), "log_full_loss": True}
    variations = {
        "shuffle": {"global_batch_size": 100, "micro_batch_size": 7, "num_features": 5},
        "random": {"global_batch_size": 64, "sampling": "random", **raw},
        "full": {"sampling": "full", "micro_batch_size": 60, "dtype": "float32"},
    }
    for combination, (name, variation) in itertools.product(combinations(with_mpi=with_mpi), variations.items()):
        key = "-".join(["reproducible", *combination.values(), name])
        config = BASE | {"reduction": "reproducible", "log_every": 3} | combination | variation
        yield key, TrainConfig.of(**config, name=key, runs_dir=runs_dir)


def bits(result: Result) -> list[str]:
    """Every number of a run that torchreg promises to keep: parameters, loss, logged losses."""
    lines = read_metrics(Path(result.run_dir))
    logged = [line[name] for line in lines for name in ("loss", "full_loss") if name in line]
    return [float(number).hex() for number in (*result.weight, result.bias, result.loss, *logged)]


def main(sync: str, *, is_reproducible: bool = False) -> None:
    results = {}
    with init_distributed(sync=sync, device="cpu", distributed="torch") as communicator:
        for key, config in (ordered_configurations if is_reproducible else configurations)(
            "runs", with_mpi=sync == "mpi"
        ):
            result = train(config, communicator)
            results[key] = (bits(result) if communicator.is_main else []) if is_reproducible else asdict(result)
        if communicator.is_main:
            print(json.dumps({"world_size": communicator.world_size, "results": results}))


def reproducible(sync: str) -> None:
    main(sync, is_reproducible=True)
