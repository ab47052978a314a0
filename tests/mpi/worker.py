"""What each rank of `test_ranks.py` runs: many short trainings in one bring-up, their weights as JSON on rank 0."""

import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path

from torchreg.config import TrainConfig
from torchreg.runtime import open_runtime
from torchreg.train import train

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
    for optimizer, sync in (("sgd", "ddp"), ("sgd", "mpi"), ("hand", "allreduce"), ("hand", "mpi")):
        if sync != "mpi" or with_mpi:
            yield {"optimizer": optimizer, "sync": sync}
            if optimizer == "hand":
                yield {"optimizer": optimizer, "sync": sync, "update_order": "sequential"}


def configurations(runs_dir: str, *, with_mpi: bool):
    for combination, (name, variation) in itertools.product(combinations(with_mpi=with_mpi), VARIATIONS.items()):
        key = "-".join([*combination.values(), name])
        yield key, TrainConfig(**BASE | combination | variation, name=key, runs_dir=runs_dir)


def main() -> None:
    output, runs_dir, with_mpi = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "mpi"
    results = {}
    with open_runtime(sync="mpi" if with_mpi else "ddp", device="cpu", runtime="torch") as runtime:
        for key, config in configurations(runs_dir, with_mpi=with_mpi):
            results[key] = asdict(train(config, runtime))
        if runtime.is_main:
            output.write_text(json.dumps({"world_size": runtime.world_size, "results": results}))


if __name__ == "__main__":
    main()
