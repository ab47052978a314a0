"""Fixed runs whose numbers are frozen in golden.json; `mpiexec -n N python -m tests.mpi.golden numbers` prints them.

`python -m tests.mpi.golden` alone runs them at 1, 2 and 3 ranks and writes golden.json anew: only for a change that is
meant to change numbers, and that the changelog names.
"""

import json
import platform
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import torch

from torchreg.distributed.init import init_distributed
from torchreg.runs.config import TrainConfig
from torchreg.runs.record import read_metrics
from torchreg.runs.run import train

GOLDEN = Path(__file__).with_name("golden.json")
WORLD_SIZES = (1, 2, 3)
NUM_ROWS = 211  # a prime: every shard is uneven, and every last batch is short
RESUMED_AFTER = 11

BASE = TrainConfig.of(
    data="table.csv",
    features=("Area", "Rooms"),
    target="Price",
    global_batch_size=50,
    micro_batch_size=7,
    base_learning_rate=(0.02, 0.03),
    lr_scaling="none",
    max_steps=23,
    log_every=4,
    dtype="float64",
)


def write_table(path: Path) -> None:
    """Whole numbers alone: every machine has the same bits, whatever its linear algebra."""
    rows = np.arange(NUM_ROWS)
    area, rooms = 600 + rows * 7919 % 2003, 1 + rows * 31 % 9
    price = 30_000 + 90 * area + 2_500 * rooms + rows * 104_729 % 40_009
    lines = (f"{a},{r},{p}" for a, r, p in zip(area, rooms, price, strict=True))
    path.write_text("\n".join(["Area,Rooms,Price", *lines, ""]))


def configurations() -> dict[str, TrainConfig]:
    runs = {}
    for (optimizer, sync), reduction in product(
        (("sgd", "ddp"), ("sgd", "mpi"), ("manual", "allreduce"), ("manual", "mpi")), ("fast", "reproducible")
    ):
        run = BASE.replace(optimizer=optimizer, sync=sync, reduction=reduction)
        runs[f"{optimizer}-{sync}-{reduction}"] = run
        if optimizer == "manual":
            runs[f"{optimizer}-{sync}-{reduction}-sequential"] = run.replace(update_order="sequential")
    return runs | {
        "cosine": BASE.replace(decay="cosine", warmup_steps=5, lr_scaling="linear"),
        "random-float32": BASE.replace(reduction="reproducible", sampling="random", dtype="float32"),
        "full": BASE.replace(sampling="full", global_batch_size=None, micro_batch_size=None),
        "divergence": BASE.replace(base_learning_rate=(1.5, 1.5), max_steps=200),
        "resumed": BASE.replace(optimizer="manual", reduction="reproducible", checkpoint_every=RESUMED_AFTER),
    }


def machine() -> list[str]:
    """What the last bits of a run depend on, beside the run itself."""
    return [platform.machine(), torch.__version__.split("+")[0], torch.backends.cpu.get_cpu_capability()]


def numbers_of_runs(folder: Path, communicator) -> dict[str, dict]:
    """Every number that a run promises, floats in hexadecimal, by the run's name."""
    found = {}
    for name, config in configurations().items():
        run = config.replace(data=str(folder / "table.csv"), name=name, runs_dir=str(folder))
        result = train(run, communicator)
        if name == "resumed" and communicator.is_main:
            (folder / name / "record.json").unlink()
            for checkpoint in sorted((folder / name / "checkpoints").iterdir())[1:]:
                checkpoint.unlink()
        if name == "resumed":
            result = train(run.replace(resume="auto"), communicator)
        if not communicator.is_main:
            continue
        logged = [line["loss"] for line in read_metrics(folder / name)]
        floats = [*result.weight, result.bias, result.loss, *(loss for loss in logged if loss is not None)]
        found[name] = {
            "floats": [float(number).hex() for number in floats],
            "ints": [result.num_steps, result.num_samples, result.diverged_at_step],
        }
    return found


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as own,
        init_distributed(sync="mpi", device="cpu", distributed="torch") as communicator,
    ):
        folder = Path(communicator.from_main(lambda: own))
        if communicator.is_main:
            write_table(folder / "table.csv")
        found = numbers_of_runs(folder, communicator)
        if communicator.is_main:
            print(json.dumps(found))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main()
    else:
        frozen = {"machine": machine(), "runs": {}}
        for world_size in WORLD_SIZES:
            command = ["mpiexec", "-n", str(world_size), sys.executable, "-m", "tests.mpi.golden", "numbers"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            frozen["runs"][str(world_size)] = json.loads(done.stdout)
        GOLDEN.write_text(json.dumps(frozen, indent=1) + "\n")
