"""Timing across ranks: they start together, devices finish their work, and the slowest rank's time counts.

Hoefler & Belli (2015), "Scientific Benchmarking of Parallel Computing Systems", rules 8 to 10.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from torchreg.distributed.communicator import AnySync, Communicator

TakeSteps = Callable[[int], None]

_FIRST_STEPS = 5
_SETTLED = 0.1  # relative difference of the step times of two chunks, at most
_LEAST_WARMUP = 0.1  # of the window
_MOST_WARMUP = 0.5
_CHUNKS = 4  # of a window, about
_LEAST_CHUNK = 50  # of a window, one part


def elapsed_on_ranks(communicator: Communicator, work: Callable[[], None]) -> list[float]:
    """Each rank's seconds for `work`, which all start after a barrier; the same list on every rank."""
    communicator.synchronize()
    communicator.barrier()
    start_s = time.perf_counter()
    work()
    communicator.synchronize()
    return communicator.gather(time.perf_counter() - start_s)


def warm_up(communicator: Communicator, take_steps: TakeSteps, window_s: float) -> tuple[int, float]:
    """Take steps until their time has settled: the number of steps, and the last chunk's seconds per step.

    Chunks double until two in a row differ by less than a tenth, after a tenth of a window at least and half at most.
    """
    count, num_steps, total_s, before_s = _FIRST_STEPS, 0, 0.0, math.inf
    while True:
        chunk_s = max(elapsed_on_ranks(communicator, partial(take_steps, count)))
        num_steps, total_s, step_time_s = num_steps + count, total_s + chunk_s, chunk_s / count
        settled = abs(step_time_s - before_s) < _SETTLED * before_s and total_s >= _LEAST_WARMUP * window_s
        if settled or total_s + 2 * chunk_s > _MOST_WARMUP * window_s:
            return num_steps, step_time_s
        count, before_s = 2 * count, step_time_s


def steps_for(duration_s: float, step_time_s: float) -> int:
    """The number of steps that last about `duration_s`."""
    return max(1, math.ceil(duration_s / step_time_s))


def time_window(
    communicator: Communicator, take_steps: TakeSteps, window_s: float, step_time_s: float
) -> tuple[int, list[float]]:
    """Time at least `window_s` of steps: the number of steps, and each rank's seconds.

    Steps are taken about a quarter of a window at a time, and then what is missing; after each chunk the ranks agree on
    the time so far. These reductions are included in the time: a few per second.
    """
    num_steps, own_s = 0, 0.0
    communicator.synchronize()
    communicator.barrier()
    start_s = time.perf_counter()
    while (slowest_s := communicator.largest(own_s)) < window_s:
        missing_s = max(window_s - slowest_s, window_s / _LEAST_CHUNK)
        chunk = steps_for(min(window_s / _CHUNKS, missing_s), slowest_s / num_steps if num_steps else step_time_s)
        take_steps(chunk)
        communicator.synchronize()
        num_steps, own_s = num_steps + chunk, time.perf_counter() - start_s
    return num_steps, communicator.gather(own_s)


def time_all_reduce(
    communicator: Communicator, sync: AnySync, num_bytes: int, num_repeats: int, dtype: torch.dtype = torch.float32
) -> float:
    """The median over repetitions of the slowest rank's seconds to all-reduce `num_bytes`."""
    buffer = torch.zeros(max(1, num_bytes // dtype.itemsize), dtype=dtype, device=communicator.device)
    communicator = communicator.using(sync)
    return statistics.median(time_repeats(communicator, lambda: communicator.all_reduce(buffer), num_repeats))


def time_repeats(communicator: Communicator, work: Callable[[], object], num_repeats: int) -> list[float]:
    """The slowest rank's seconds of each repetition; the same list on every rank."""
    times = []
    for _ in range(num_repeats + 2):  # the first two set up connections and buffers
        communicator.barrier()
        communicator.synchronize()
        start_s = time.perf_counter()
        work()
        communicator.synchronize()
        times.append(time.perf_counter() - start_s)
    return [max(each) for each in zip(*communicator.gather(times[2:]), strict=True)]
