"""Check torchreg on one accelerator, in less than eight minutes: is it right there, and where does a step's time go?

    python scripts/check_gpu.py                        # everything; each part is a process with a time limit of its own
    python scripts/check_gpu.py --parts steps nccl --output check_gpu.jsonl
    python scripts/check_gpu.py --device cpu           # what needs no GPU

Prints a table, and writes one JSON line a row. Exit code 1 if anything fails. Nothing is changed on the device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from torchreg.core.model import add_half_gradient, make_model, squared_error
from torchreg.distributed.init import init_distributed
from torchreg.runs.config import TrainConfig
from torchreg.runs.environment import versions
from torchreg.runs.recipes import RECIPES
from torchreg.runs.result import Result
from torchreg.runs.run import train
from torchreg.scaling.campaign import Setting
from torchreg.scaling.timed_training import TimedTraining

NUM_SAMPLES = 65_536
SIZES = ((1, 64), (1, 4_096), (512, 4_096))  # features, batch
LESSON = (88.890079, 32912.241402, 1478200827.641291)
WITHIN_S = 470.0


class Row(NamedTuple):
    """One line of the table. `ok` is None where there is nothing to judge."""

    check: str
    measured: str
    expected: str = ""
    ok: bool | None = None


def train_quietly(device: str, recipe: str = "default", **options: Any) -> Result:
    """A run whose records are thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        return train(
            RECIPES[recipe].replace(runs_dir=folder, name="run", distributed="torch", device=device, **options)
        )


def distance(one: Result, other: Result) -> float:
    """The largest relative difference of parameters and loss."""
    pairs = zip((*one.weight, one.bias, one.loss), (*other.weight, other.bias, other.loss), strict=True)
    return max(abs(a / b - 1) for a, b in pairs)


def make_training(device: str, optimizer: str, num_features: int, batch: int) -> TimedTraining:
    """Training on synthetic samples that are on the device."""
    communicator = init_distributed(device=device)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_SAMPLES, num_features, generator=generator)
    y = x.sum(1, keepdim=True) + torch.randn(NUM_SAMPLES, 1, generator=generator)
    setting = Setting(optimizer, "none", num_features, batch)  # type: ignore[arg-type]
    return TimedTraining(setting, x.to(device), y.to(device), 0.02 / (num_features + 5), communicator)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def time_us(device: str, work: Callable[[int], object], count: int = 500, repeats: int = 5) -> tuple[float, float]:
    """Median microseconds a call of `count` calls: until the device is done, and until the host is."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start_s = time.perf_counter()
        work(count)
        host_s = time.perf_counter() - start_s
        synchronize(device)
        times.append(((time.perf_counter() - start_s) / count * 1e6, host_s / count * 1e6))
    return sorted(times[1:])[repeats // 2]


def repeat(work: Callable[[], object], count: int) -> None:
    """Call `work` so many times."""
    for _ in range(count):
        work()


def environment(device: str) -> Iterator[Row]:
    """Versions, the device, and what decides its arithmetic."""
    for name, version in versions().items():
        yield Row(name, str(version))
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        driver = Path("/sys/module/nvidia/version")
        yield Row("device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        yield Row("driver", driver.read_text().strip() if driver.exists() else "unknown")
        yield Row("CUDA, NCCL", f"{torch.version.cuda}, {'.'.join(map(str, torch.cuda.nccl.version()))}")
    yield Row("CPUs", str(len(os.sched_getaffinity(0))))


def arithmetic(device: str) -> Iterator[Row]:
    """Has float32 its 24 bits, or the 11 of TF32? Is float64 real? Held against float64 on the CPU."""
    for dtype, limit in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        for num_features in (64, 512):
            a = torch.randn(4_096, num_features, generator=torch.Generator().manual_seed(1), dtype=dtype)
            exact = a.double().T @ a.double()
            moved = a.to(device)
            products = {"mm": moved.T @ moved, "linear": torch.nn.functional.linear(moved.T, moved.T.contiguous())}
            for name, product in products.items():
                error = ((product.cpu().double() - exact).norm() / exact.norm()).item()
                yield Row(
                    f"{name}, {num_features} features, {dtype}", f"{error:.1e}", f"at most {limit:.0e}", error < limit
                )


def training(device: str) -> Iterator[Row]:
    """Every way of training, in both precisions, against the CPU; and the lesson, to the digit."""
    for dtype, limit in (("float64", 1e-10), ("float32", 1e-4)):
        for optimizer, reduction in itertools.product(("manual", "sgd"), ("fast", "reproducible")):
            options = {"optimizer": optimizer, "reduction": reduction, "dtype": dtype}
            far = distance(train_quietly(device, **options), train_quietly("cpu", **options))
            yield Row(
                f"{optimizer}, {reduction}, {dtype}", f"{far:.1e} from the CPU", f"at most {limit:.0e}", far < limit
            )
    lesson = train_quietly(device, "lesson")
    measured = lesson.weight[0], lesson.bias, lesson.loss
    digits = all(abs(a / b - 1) < 1e-8 for a, b in zip(measured, LESSON, strict=True))
    yield Row(
        "recipe lesson", "{:.6f}, {:.6f}, {:.6f}".format(*measured), "{:.6f}, {:.6f}, {:.6f}".format(*LESSON), digits
    )
    # What starts when it is first used is no part of the time of a run.
    times = [train_quietly(device, optimizer="sgd", max_steps=30).train_time_s for _ in range(2)]
    yield Row("30 steps of sgd, again", f"{times[0] * 1e3:.1f} ms, {times[1] * 1e3:.1f} ms")


def reproducible(device: str) -> Iterator[Row]:
    """The same bits in three runs, and wherever samples lie in memory; an empty shard adds nothing."""
    for optimizer in ("manual", "sgd"):
        runs = [train_quietly(device, optimizer=optimizer, reduction="reproducible", dtype="float32") for _ in range(3)]
        ends = {(run.weight, run.bias, run.loss) for run in runs}
        yield Row(f"three runs of {optimizer}", f"{len(ends)} result(s)", "1", len(ends) == 1)
    for num_features in (1, 64, 512):
        a, y = torch.randn(69, num_features + 1, device=device), torch.randn(69, device=device)
        theta, results = torch.randn(num_features + 1, device=device), set()
        for shift in range(0, 27, 3):
            moved = torch.empty(shift + a.numel(), device=device)[shift:].view_as(a).copy_(a)
            gradient = torch.zeros_like(theta)
            error = add_half_gradient(theta, moved, y, gradient)
            results.add((error.item(), *gradient.tolist()))
        yield Row(f"9 alignments, {num_features} features", f"{len(results)} result(s)")
    gradient = torch.zeros(2, device=device)
    error = add_half_gradient(gradient + 1, torch.empty(0, 2, device=device), torch.empty(0, device=device), gradient)
    yield Row("an empty shard", f"{error.item():g}, {gradient.tolist()}", "0", not (error.item() or gradient.any()))


def steps(device: str) -> Iterator[Row]:
    """Time of a step, its kernels, and where the host waits for the device."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, *([activity.CUDA] if device == "cuda" else [])]
    for (num_features, batch), optimizer in itertools.product(
        SIZES if device != "cpu" else SIZES[:2], ("manual", "sgd")
    ):
        name = f"{optimizer}, {num_features} × {batch}"
        training = make_training(device, optimizer, num_features, batch)
        start_s = time.perf_counter()
        training.take_steps(1)
        synchronize(device)
        first_ms = (time.perf_counter() - start_s) * 1e3
        device_us, host_us = time_us(device, training.take_steps)
        rows_us, _ = time_us(device, training.take_samples)
        yield Row(f"{name}: first step", f"{first_ms:.1f} ms")
        yield Row(f"{name}: step", f"{device_us:.1f} µs, host {host_us:.1f} µs, its samples {rows_us:.1f} µs")
        if device != "cuda":
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            training.take_steps(200)
            torch.cuda.set_sync_debug_mode("default")
        waits = Counter(
            f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)
        )
        expected = "2, one for each 100 losses"
        yield Row(f"{name}: waits in 200 steps", str(dict(waits) or 0), expected, sum(waits.values()) <= 2)
        with torch.profiler.profile(activities=activities) as profile:
            training.take_steps(20)
            synchronize(device)
        kernels = [event for event in profile.events() if str(event.device_type).endswith("CUDA")]
        busy_us = sum(event.device_time_total for event in kernels) / 20
        yield Row(f"{name}: kernels of a step", f"{len(kernels) / 20:.1f}, busy {busy_us:.1f} µs")
    if device == "cuda":
        one, many = torch.zeros(1, device=device), 20
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(many):
                one.add_(1)
        eager_us, _ = time_us(device, partial(repeat, partial(one.add_, 1)))
        replayed_us, _ = time_us(device, partial(repeat, graph.replay))
        yield Row("launch of a kernel", f"eager {eager_us:.1f} µs, in a graph {replayed_us / many:.2f} µs")


def nccl(device: str) -> Iterator[Row]:
    """A group of one rank: its first all-reduce, one that is captured, DDP with a hook, and its end."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", 0))
    buffer = torch.ones(2, device=device)
    start_s = time.perf_counter()
    dist.all_reduce(buffer)
    synchronize(device)
    yield Row("first all-reduce", f"{(time.perf_counter() - start_s) * 1e3:.0f} ms")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        dist.all_reduce(buffer)
    replay = graph.replay
    eager_us, _ = time_us(device, partial(repeat, partial(dist.all_reduce, buffer)))
    replayed_us, _ = time_us(device, partial(repeat, replay))
    yield Row("all-reduce of two floats", f"eager {eager_us:.1f} µs, captured {replayed_us:.1f} µs")
    model = make_model([0.5], 0.1, device=device, dtype=torch.float32)
    ddp = torch.nn.parallel.DistributedDataParallel(model, [0])
    x, y = torch.randn(64, 1, device=device), torch.randn(64, 1, device=device)
    squared_error(ddp(x), y).backward()
    expected = torch.autograd.grad(squared_error(model(x), y), [model.weight])[0]
    gradient = model.weight.grad
    assert gradient is not None
    yield Row("DDP's gradient", str(gradient.tolist()), str(expected.tolist()), torch.equal(expected, gradient))
    del graph, replay, ddp
    start_s = time.perf_counter()
    dist.destroy_process_group()
    yield Row("end of the group", f"{time.perf_counter() - start_s:.2f} s")


def two_ranks(device: str) -> Iterator[Row]:
    """Two ranks on one device: gloo carries their gradients where NCCL refuses, which torchreg says beforehand."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*ranks, __file__, "--part", "one_of_two", "--device", device],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if done.returncode:
        yield Row("over gloo", done.stderr[-300:], "exit code 0", False)
    for line in done.stdout.splitlines():
        yield Row(*json.loads(line)[1:])
    if device == "cpu":
        return
    command = [*ranks, "-m", "torchreg", "train", "--device", device, "--distributed", "torch", "--max-steps", "5"]
    one_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    with tempfile.TemporaryDirectory() as folder:
        command += ["--runs-dir", folder]
        done = subprocess.run(command, env=one_gpu, capture_output=True, text=True, timeout=60, check=False)
    reasons = [line for line in done.stderr.splitlines() if line.startswith("torchreg: error")]
    refused = len(reasons) == 1 and "have one cuda device" in reasons[0]
    yield Row("torchreg train", " ".join(reasons) or done.stderr[-300:], "refused, once, with the device", refused)


def one_of_two(device: str) -> Iterator[Row]:
    """A rank of `two_ranks`: every way that devices have, against one rank."""
    from torchreg.distributed import init

    init._BACKENDS[device] = f"cpu:gloo,{device}:gloo" if device != "cpu" else "cpu:gloo"
    init._require_distinct_devices = lambda devices: [None] * len(devices)
    with (
        tempfile.TemporaryDirectory() as folder,
        init_distributed(device=device, distributed="torch", timeout_s=60) as communicator,  # type: ignore[arg-type]
    ):
        runs_dir = communicator.from_main(lambda: folder)
        for optimizer, reduction in itertools.product(("manual", "sgd"), ("fast", "reproducible")):
            options = {"optimizer": optimizer, "reduction": reduction, "micro_batch_size": 20, "runs_dir": runs_dir}
            name = f"{optimizer}-{reduction}"
            config = TrainConfig.of(**options, name=name, global_batch_size=275, max_steps=25, dtype="float32")
            together = train(config, communicator)
            alone = train(config.replace(name=f"{name}-{communicator.rank}"), communicator.alone())
            far, limit = distance(together, alone), 1e-5 if reduction == "fast" else 0.0
            if communicator.is_main:
                yield Row(f"{optimizer}, {reduction}", f"{far:.1e} from one rank", f"at most {limit:g}", far <= limit)


def stuck(device: str) -> Iterator[Row]:
    """A collective that takes longer than its time-out: how the process ends."""
    code = (
        "import torch, torch.distributed as dist, datetime, time, sys\n"
        "dist.init_process_group('cpu:gloo,cuda:nccl', timeout=datetime.timedelta(seconds=3))\n"
        "x = torch.ones(2, device='cuda'); dist.all_reduce(x); torch.cuda.synchronize()\n"
        "torch.cuda._sleep(int(1.5e10)); start = time.monotonic(); dist.all_reduce(x)\n"
        "try: x.cpu(); print(f'.cpu() returned after {time.monotonic() - start:.1f} s')\n"
        "except BaseException as error: print(f'{type(error).__name__} after {time.monotonic() - start:.1f} s')\n"
    )
    rank = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29556", "RANK": "0", "WORLD_SIZE": "1"}
    start_s = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **rank},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        said = (expired.stderr or b"").decode(errors="replace")
        yield Row("NCCL's time-out of 3 s", f"not over after 50 s; {said[-300:]}")
        return
    ended = (
        f"exit code {done.returncode} after {time.monotonic() - start_s:.0f} s, {len(done.stderr.splitlines())} lines"
    )
    yield Row("NCCL's time-out of 3 s", f"{ended}; {done.stdout.strip()}; {done.stderr[-200:]}")


# The limit of each part in seconds, and whether it needs a GPU.
PARTS: dict[Callable[[str], Iterator[Row]], tuple[int, bool]] = {
    environment: (30, False),
    arithmetic: (40, False),
    training: (100, False),
    reproducible: (40, False),
    steps: (120, False),
    nccl: (50, True),
    two_ranks: (120, False),
    stuck: (60, True),
}


def run_part(name: str, device: str, limit_s: float) -> list[Row]:
    """The rows of a part, from a process of its own: a fault of the device spares the other parts."""
    command = [sys.executable, __file__, "--part", name, "--device", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        output, problem = done.stdout, f"exit code {done.returncode}: {done.stderr[-500:]}" if done.returncode else ""
    except subprocess.TimeoutExpired as expired:
        output, problem = (expired.stdout or b"").decode(errors="replace"), f"not over after {limit_s:.0f} s"
    rows = [Row(*json.loads(line)[1:]) for line in output.splitlines() if line.startswith(f'["{name}"')]
    return [*rows, Row("the part", problem, "its end", False)] if problem else rows


def main() -> int:
    """Run the parts, show the table; 1 if anything fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=[part.__name__ for part in PARTS])
    parser.add_argument("--output", type=Path, default=Path("check_gpu.jsonl"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        for row in globals()[arguments.part](arguments.device):
            print(json.dumps([arguments.part, *row]), flush=True)
        return 0

    table = Table("part", "check", "measured", "expected", "", title=f"torchreg on {arguments.device}")
    failed, start_s = False, time.monotonic()
    with arguments.output.open("w", encoding="utf-8") as output:
        for part, (limit_s, needs_gpu) in PARTS.items():
            name, left_s = part.__name__, WITHIN_S - (time.monotonic() - start_s)
            if arguments.parts and name not in arguments.parts:
                continue
            if (needs_gpu and arguments.device != "cuda") or left_s < 10:
                rows = [Row("", "skipped: no GPU" if left_s >= 10 else "skipped: out of time")]
            else:
                rows = run_part(name, arguments.device, min(limit_s, left_s))
            for row in rows:
                output.write(json.dumps({"part": name, **row._asdict()}) + "\n")
                mark = {True: "ok", False: "FAIL", None: ""}[row.ok]
                table.add_row(name, row.check, re.sub(r"\s+", " ", row.measured), row.expected, mark)
                failed |= row.ok is False
            output.flush()
            print(f"{name}: {time.monotonic() - start_s:.0f} s", file=sys.stderr)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
