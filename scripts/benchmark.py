"""How fast is one step? torchreg's four combinations against the ways people write this loop.

    python scripts/benchmark.py

For each world size a child process (or `mpiexec -n N` of them) sets every contender up, then times them in
interleaved rounds: all ranks meet at a barrier, take a block of steps, and the slowest rank's time counts. Reported
are medians over rounds, and ratios between contenders of the same run; a time alone says little about another machine.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

LOCAL_BATCH_SIZE = 64
RATES = (0.01, 0.01)
FULL_RUN_STEPS = {"manual": 5_000, "sgd": 500}  # a run of a few tenths of a second
LESSON_RATES = (1e-7, 1e-1)

ANSWER_VARIABLE = "TORCHREG_BENCHMARK_ANSWER"  # set in a child: where its main rank writes what it measured

TakeSteps = Callable[[int], None]


@dataclass(frozen=True)
class Target:
    """`contender` is to be at least `at_least` times as fast as `baseline`, at this world size."""

    world_size: int
    contender: str
    baseline: str
    at_least: float


TARGETS = (
    Target(1, "manual", "lesson loop", 7.0),
    Target(1, "manual", "NumPy floor", 1 / 2.5),
    Target(1, "sgd", "tutorial loop", 2.5),
    Target(2, "manual/mpi", "tutorial loop", 30.0),
    Target(2, "sgd/mpi", "sgd/ddp", 1.8),
    Target(2, "sgd/ddp", "tutorial loop", 1.0),
    Target(2, "reproducible manual/mpi", "manual/mpi", 1 / 3),
    Target(2, "reproducible sgd/mpi", "sgd/mpi", 1 / 1.5),
    Target(2, "reproducible sgd/ddp", "sgd/ddp", 1 / 1.5),
    Target(1, "full run manual", "manual", 1 / 1.1),
    Target(1, "full run sgd", "sgd", 1 / 1.1),
    Target(2, "full run manual/mpi", "manual/mpi", 1 / 1.1),
    Target(2, "full run sgd/ddp", "sgd/ddp", 1 / 1.1),
)


@dataclass
class Options:
    """Measure the time of a step, and print and write the table."""

    ranks: tuple[int, ...] = (1, 2)
    """World sizes."""

    dtypes: tuple[Literal["float32", "float64"], ...] = ("float32", "float64")
    """Precisions of the tensors; the lesson's loop is always float64."""

    rounds: int = 15
    """Interleaved rounds; the median over them is reported."""

    block_s: float = 0.05
    """How long one block of steps of one contender lasts, about, in seconds."""

    output: Path = field(default=Path("benchmark.json"))
    """Where the measurements are written."""


def lesson_loop(x: Any, y: Any) -> TakeSteps:
    """The lesson's way: pandas draws the rows, NumPy functions give the update."""
    import numpy as np
    import pandas as pd

    table = pd.DataFrame({"GrLivArea": x[:, 0], "SalePrice": y[:, 0]})
    state = {"w": 5.0, "b": 1000.0}
    history: list[float] = []

    def predict(area: Any) -> Any:
        return state["w"] * area + state["b"]

    def take_steps(count: int) -> None:
        for _ in range(count):
            rows = table.sample(LOCAL_BATCH_SIZE)
            area, price = rows["GrLivArea"].to_numpy(), rows["SalePrice"].to_numpy()
            state["w"] -= LESSON_RATES[0] * np.mean(-2 * area * (price - predict(area)))
            state["b"] -= LESSON_RATES[1] * np.mean(-2 * (price - predict(area)))
            history.append(float(np.mean(np.power(price - predict(area), 2))))

    return take_steps


def numpy_floor(x: Any, y: Any, comm: Any) -> TakeSteps:
    """As little as a correct step can be: gather rows, residual, gradient, one Allreduce, update."""
    import numpy as np

    rank, world_size = comm.Get_rank(), comm.Get_size()
    num_samples = LOCAL_BATCH_SIZE * world_size
    theta, gradient = np.zeros(2, x.dtype), np.empty(2, x.dtype)
    x, y = x[:, 0].copy(), y[:, 0].copy()
    learning_rate = x.dtype.type(2 * RATES[0] / num_samples)
    losses = []

    def rows_of_steps() -> Iterator[Any]:
        generator = np.random.default_rng(0)
        while True:
            order = generator.permutation(len(x))
            for start in range(0, len(x), num_samples):
                yield order[start : start + num_samples][rank * LOCAL_BATCH_SIZE : (rank + 1) * LOCAL_BATCH_SIZE]

    steps = rows_of_steps()
    from mpi4py import MPI

    def take_steps(count: int) -> None:
        for _ in range(count):
            rows = next(steps)
            area = x[rows]
            residual = theta[0] * area
            residual += theta[1]
            residual -= y[rows]
            gradient[0] = area @ residual
            gradient[1] = residual.sum()
            losses.append(residual @ residual)
            if world_size > 1:
                comm.Allreduce(MPI.IN_PLACE, gradient)
            gradient.__imul__(learning_rate)
            theta.__isub__(gradient)

    return take_steps


def tutorial_parts(x: Any, y: Any, world_size: int, rank: int, *, sharded: bool) -> tuple[Any, Any, Any, Any]:
    """Model, optimizer, loader and loss as tutorials make them."""
    import torch
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    data = TensorDataset(x, y)
    if sharded:
        sampler: Any = DistributedSampler(data, num_replicas=world_size, rank=rank, shuffle=True)
        loader: Any = DataLoader(data, batch_size=LOCAL_BATCH_SIZE, sampler=sampler)
    else:
        loader = DataLoader(data, batch_size=LOCAL_BATCH_SIZE, shuffle=True)
    model = torch.nn.Linear(x.shape[1], 1, dtype=x.dtype)
    return model, torch.optim.SGD(model.parameters(), lr=RATES[0]), loader, torch.nn.MSELoss()


def loader_loop(
    model: Any, optimizer: Any, loader: Any, loss_of: Any, backward: Callable[[Any], Any], sampler: Any = None
) -> TakeSteps:
    """The loop around a loader that tutorials, Accelerate and Fabric share."""
    running = {"loss": 0.0}

    def batches() -> Iterator[Any]:
        epoch = 0
        while True:
            if sampler is not None:
                sampler.set_epoch(epoch)
            yield from loader
            epoch += 1

    stream = batches()

    def take_steps(count: int) -> None:
        for _ in range(count):
            features, target = next(stream)
            optimizer.zero_grad()
            loss = loss_of(model(features), target)
            backward(loss)
            optimizer.step()
            running["loss"] += loss.item()

    return take_steps


def tutorial_loop(x: Any, y: Any, communicator: Any) -> TakeSteps:
    """DataLoader, DistributedSampler, DistributedDataParallel and SGD, as tutorials write it."""
    from torch.nn.parallel import DistributedDataParallel

    model, optimizer, loader, loss_of = tutorial_parts(x, y, communicator.world_size, communicator.rank, sharded=True)
    return loader_loop(
        DistributedDataParallel(model), optimizer, loader, loss_of, lambda loss: loss.backward(), loader.sampler
    )


def accelerate_loop(x: Any, y: Any, communicator: Any) -> TakeSteps:
    """Hugging Face Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, loss_of = tutorial_parts(x, y, communicator.world_size, communicator.rank, sharded=False)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return loader_loop(model, optimizer, loader, loss_of, accelerator.backward)


def fabric_loop(x: Any, y: Any, communicator: Any) -> TakeSteps:
    """Lightning Fabric."""
    from lightning_fabric import Fabric

    fabric = Fabric(
        accelerator="cpu", devices=communicator.world_size, strategy="ddp" if communicator.world_size > 1 else "auto"
    )
    fabric.launch()
    model, optimizer, loader, loss_of = tutorial_parts(x, y, communicator.world_size, communicator.rank, sharded=False)
    model, optimizer = fabric.setup(model, optimizer)
    return loader_loop(model, optimizer, fabric.setup_dataloaders(loader), loss_of, fabric.backward)


def torchreg_loop(
    x: Any, y: Any, communicator: Any, optimizer: Any, sync: Any, *, reproducible: bool = False
) -> TakeSteps:
    """torchreg's bare loop: samples, learning rates, step; no metrics. `reproducible` has one micro-batch a rank."""
    import torch

    from torchreg.core.batches import BatchLoader, BatchPlan
    from torchreg.core.model import make_model
    from torchreg.core.schedule import Schedule
    from torchreg.core.train import fit, make_sgd, manual_samples
    from torchreg.runs.run import make_step

    plan = BatchPlan.derive(
        len(x),
        communicator.world_size,
        local_batch_size=LOCAL_BATCH_SIZE,
        micro_batch_size=LOCAL_BATCH_SIZE if reproducible else None,
        reproducible=reproducible,
    )
    model = make_model([0.0] * x.shape[1], 0.0, dtype=x.dtype)
    sgd = make_sgd(model, RATES) if optimizer == "sgd" else None
    step = make_step(model, sgd, plan, communicator.using(sync))
    loader = BatchLoader(plan, communicator.rank, *((x, y) if sgd else manual_samples(x, y)))
    schedule = Schedule(RATES, 1.0, num_steps=1)
    num_steps = 0

    def take_steps(count: int) -> None:
        nonlocal num_steps
        with nullcontext() if sgd else torch.inference_mode():
            fit(loader.iterate(num_steps, num_steps + count), step, schedule, lambda batch, squared_error: False)
        num_steps += count

    return take_steps


def full_run(communicator: Any, optimizer: Any, sync: Any, dtype: Any, runs_dir: str) -> Callable[[int], float]:
    """torchreg's whole training with its records: a function of the steps that returns the loop's time."""
    from torchreg.runs.config import TrainConfig
    from torchreg.runs.run import train

    def take_steps(count: int) -> float:
        config = TrainConfig.of(
            optimizer=optimizer,
            sync=sync,
            dtype=dtype,
            max_steps=count,
            base_learning_rate=RATES,
            lr_scaling="none",
            runs_dir=runs_dir,
            name="full-run",
            overwrite=True,
        )
        return train(config, communicator).train_time_s

    return take_steps


def set_up(communicator: Any, dtype: str, excluded: dict[str, str]) -> dict[str, TakeSteps]:
    """Every contender at this world size and precision, ready to take steps."""
    import numpy as np
    import torch

    from torchreg.data.table import Standardizer, load_table

    table = load_table("synthetic")
    features = Standardizer.of(table.features, standardize=True).apply(table.features).astype(dtype)
    target = table.target.astype(dtype)
    x, y = torch.from_numpy(features), torch.from_numpy(np.ascontiguousarray(target))
    contenders: dict[str, TakeSteps] = {}
    if communicator.world_size == 1:
        contenders["lesson loop"] = lesson_loop(table.features, table.target)
        contenders["manual"] = torchreg_loop(x, y, communicator, "manual", "allreduce")
        contenders["sgd"] = torchreg_loop(x, y, communicator, "sgd", "ddp")
    else:
        for optimizer, sync in (("manual", "allreduce"), ("manual", "mpi"), ("sgd", "ddp"), ("sgd", "mpi")):
            contenders[f"{optimizer}/{sync}"] = torchreg_loop(x, y, communicator, optimizer, sync)
            contenders[f"reproducible {optimizer}/{sync}"] = torchreg_loop(
                x, y, communicator, optimizer, sync, reproducible=True
            )
    contenders["NumPy floor"] = numpy_floor(features, target, communicator.mpi_comm)
    contenders["tutorial loop"] = tutorial_loop(x, y, communicator)
    for name, package, make in (
        ("Accelerate", "accelerate", accelerate_loop),
        ("Lightning Fabric", "lightning-fabric", fabric_loop),
    ):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            excluded[name] = f"{package} is not installed"
        else:
            contenders[name] = make(x, y, communicator)
    return contenders


def measure(communicator: Any, dtype: str, options: Options, excluded: dict[str, str]) -> dict[str, list[float]]:
    """Seconds a step of every contender in every round."""
    import numpy as np

    comm = communicator.mpi_comm
    from mpi4py import MPI

    contenders = set_up(communicator, dtype, excluded)

    def timed(take_steps: TakeSteps, count: int) -> float:
        comm.Barrier()
        start_s = time.perf_counter()
        take_steps(count)
        slowest: float = comm.allreduce(time.perf_counter() - start_s, MPI.MAX)
        return slowest

    counts = {}
    for name, take_steps in contenders.items():
        timed(take_steps, 20)
        counts[name] = max(20, int(20 * options.block_s / timed(take_steps, 20)))
    full = {"manual/mpi": ("manual", "mpi"), "sgd/ddp": ("sgd", "ddp")}
    if communicator.world_size == 1:
        full = {"manual": ("manual", "allreduce"), "sgd": ("sgd", "ddp")}
    with tempfile.TemporaryDirectory() as folder:
        runs_dir = comm.bcast(folder)
        full_runs = {}
        for bare, (optimizer, sync) in full.items():
            counts[bare] = max(FULL_RUN_STEPS[optimizer], counts[bare])  # a run and its bare loop take as many steps
            full_runs[f"full run {bare}"] = (full_run(communicator, optimizer, sync, dtype, runs_dir), counts[bare])
        seconds: dict[str, list[float]] = {name: [] for name in (*contenders, *full_runs)}
        order = np.random.default_rng(0)
        for _ in range(options.rounds):
            for name in order.permutation(list(seconds)).tolist():
                if name in full_runs:
                    run, count = full_runs[name]
                    seconds[name].append(run(count) / count)
                else:
                    seconds[name].append(timed(contenders[name], counts[name]) / counts[name])
        comm.Barrier()
    return seconds


def work(options: Options, answer: Path) -> None:
    """A child's part: measure at this world size, write what was measured."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from torchreg.distributed.init import init_distributed

    torch.set_num_threads(1)
    with init_distributed(distributed="torch", device="cpu", sync="mpi") as communicator:
        os.environ.update(
            RANK=str(communicator.rank),
            WORLD_SIZE=str(communicator.world_size),
            LOCAL_RANK=str(communicator.rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="29511",
        )
        if communicator.world_size == 1:  # DistributedDataParallel needs a group even there
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        excluded: dict[str, str] = {}
        seconds = {dtype: measure(communicator, dtype, options, excluded) for dtype in options.dtypes}
        if communicator.is_main:
            mpi = communicator.describe_environment("torch")["mpi_library"]
            answer.write_text(json.dumps({"seconds_a_step": seconds, "excluded": excluded, "mpi": mpi}))
        if communicator.world_size == 1:
            dist.destroy_process_group()


def launch(world_size: int, options: Options) -> dict[str, Any]:
    """Run a child of this world size, and return what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        own = Path(sys.executable).with_name("mpiexec")
        mpiexec = str(own) if own.is_file() else shutil.which("mpiexec")
        if world_size > 1 and mpiexec is None:
            raise ValueError(f"ranks has {world_size}, and there is no mpiexec: pip install mpich")
        command = [
            *([str(mpiexec), "-n", str(world_size)] if world_size > 1 else []),
            *(sys.executable, __file__, "--dtypes", *options.dtypes),
            *("--rounds", str(options.rounds), "--block-s", str(options.block_s)),
        ]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", ANSWER_VARIABLE: str(answer)})
        result: dict[str, Any] = json.loads(answer.read_text())
        return result


def summarise(world_size: int, seconds: dict[str, list[float]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Median seconds a step of each contender, and how each target of this world size is met."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    targets = []
    for target in TARGETS:
        if target.world_size == world_size and {target.contender, target.baseline} <= medians.keys():
            # Rounds share the machine's moods, so the ratio is taken in each round before the median.
            pairs = zip(seconds[target.baseline], seconds[target.contender], strict=True)
            ratio = statistics.median(baseline / own for baseline, own in pairs)
            targets.append({**asdict(target), "times_as_fast": ratio, "met": ratio >= target.at_least})
    return medians, targets


def show(world_size: int, dtype: str, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Print one world size and precision; return its targets."""
    from rich.console import Console
    from rich.table import Table

    medians, targets = summarise(world_size, seconds)
    ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    table = Table(title=f"{ranks}, {dtype}, {LOCAL_BATCH_SIZE} rows a rank", title_justify="left")
    for column in ("contender", "median µs/step", "quartiles", "times as fast as the tutorial loop"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        low, _, high = statistics.quantiles(seconds[name], n=4) if len(seconds[name]) > 1 else (median,) * 3
        speedup = medians["tutorial loop"] / median
        table.add_row(name, f"{1e6 * median:.1f}", f"{1e6 * low:.1f}–{1e6 * high:.1f}", f"{speedup:.2f}")
    console = Console(width=100)
    console.print(table)
    for target in targets:
        mark = "met   " if target["met"] else "MISSED"
        console.print(
            f"{mark} {target['contender']} is {target['times_as_fast']:.2f} times as fast as {target['baseline']} "
            f"(target {target['at_least']:.2f})",
            highlight=False,
        )
    return targets


def main() -> int:
    """Measure, print, write; returns the exit code."""
    from torchreg.runs.environment import versions

    options = tyro.cli(Options, description=__doc__)
    if ANSWER_VARIABLE in os.environ:
        work(options, Path(os.environ[ANSWER_VARIABLE]))
        return 0
    if min(options.ranks, default=0) < 1 or options.rounds < 1 or options.block_s <= 0:
        print("benchmark: error: ranks, rounds and block_s must be above 0", file=sys.stderr)
        return 2
    measured = []
    for world_size in options.ranks:
        answer = launch(world_size, options)
        for dtype, seconds in answer["seconds_a_step"].items():
            targets = show(world_size, dtype, seconds)
            measured.append(
                {"world_size": world_size, "dtype": dtype, "seconds_a_step": seconds, "targets": targets}
                | {"excluded": answer["excluded"], "mpi": answer["mpi"]}
            )
    machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
    report = {"schema_version": 1, "machine": machine, "libraries": versions(), "measured": measured}
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"measurements  {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
