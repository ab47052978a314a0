"""What one launch does: measure every setting on its ranks, check that each one computes the right thing, and tell.

All ranks call `measure_launch`; what it returns is the same on all of them.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from torchreg.batches import BatchPlan
from torchreg.config import TrainConfig
from torchreg.data import Standardizer, load_table
from torchreg.model import make_model
from torchreg.optim import make_sgd
from torchreg.ordered import MicroBatches
from torchreg.prepare import prepare
from torchreg.record import read_metrics
from torchreg.rows import hand_rows, rows_of_steps
from torchreg.runtime import AnySync, Runtime
from torchreg.scaling.campaign import MOST_SOLVED_FEATURES, Campaign, Launch, Setting, settings
from torchreg.theory import Matrix, Moments
from torchreg.timing import elapsed_on_ranks, steps_for, time_all_reduce, time_window, warm_up
from torchreg.train import TakeStep, make_step, train

ALL_REDUCE_BYTES = (8, 64, 512, 4_096, 32_768, 262_144, 2_097_152)
_ALL_REDUCE_S = 0.05  # of repetitions at each size, about
_MOST_REPEATS = 50

_MOST_TARGET_FEATURES = 16  # beyond, theory predicts no noise and so no steps to a target
_EARLY_STEPS = 3
_CHECK_STEPS = (10, 100)
_SOLVED = 1e-8  # the excess that a check's steps are to reach
_NEAR = 1e-6  # an excess up to which one may say that the closed form is reached
_REFERENCE_BATCH_SIZE = 64
_TARGET_LINES = 40  # of metrics on the way to the target
_MOST_TARGET_STEPS = 20_000
_SAFE = 0.1  # of the rate at which a single row could make a step unstable


@dataclass(frozen=True)
class Rows:
    """Rows to measure on, and what full-batch gradient descent on them does.

    `x` (num_rows, num_features) and `y` (num_rows, 1) are on the device. `safe_rate` is stable for any batch.
    From zeros, as NumPy reckons, full-batch steps are at `early` (num_features + 1,) after the first few at half of
    `check_rate`, where a wrong size of the gradient shows, and at `end` after `check_steps` more at `check_rate`.
    `moments` know the closed form; None where it costs too much.
    """

    x: Tensor
    y: Tensor
    safe_rate: float
    check_rate: float
    check_steps: int
    early: Matrix
    end: Matrix
    moments: Moments | None

    def excess(self, theta: Matrix) -> float | None:
        """How far the loss at parameters (num_features + 1,) is above the closed form's, as a fraction of it."""
        if self.moments is None:
            return None
        return self.moments.excess(theta[:-1], float(theta[-1])) / self.moments.closed_form().loss


def measure_launch(campaign: Campaign, launch: Launch, runtime: Runtime, folder: Path) -> dict[str, Any]:
    """Measure every setting of a launch, in an order drawn from its seed; `folder` takes the runs to the target.

    Raises `AgreedError`, on every rank, for what cannot be measured here.
    """
    dtype = torch_dtype(campaign.dtype, runtime.device)
    by_mpi = runtime.mpi_comm is not None and runtime.device.type == "cpu"
    chosen = settings(campaign, runtime.world_size, by_mpi=by_mpi)
    runtime.from_main(lambda: _refuse(campaign, launch, runtime, by_mpi=by_mpi))
    rows = {count: make_rows(campaign.effective_num_rows, count, runtime, dtype) for count in campaign.num_features}
    order = np.random.default_rng(launch.seed).permutation(len(chosen)).tolist()
    points: list[dict[str, Any]] = []
    for place, number in enumerate(order):
        setting = chosen[number]
        point = {**asdict(setting), "order": place} | _measure_point(campaign, setting, rows, runtime, dtype)
        target = None
        if setting.num_features <= _MOST_TARGET_FEATURES:
            target = _run_to_target(campaign, launch, setting, runtime, folder)
        points.append(point | {"target": target})
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "points": points,
        "allreduce": _all_reduce(runtime, dtype, by_mpi=by_mpi),
        "runtime": runtime.evidence(campaign.runtime),
    }


def torch_dtype(choice: Literal["auto", "float32", "float64"], device: torch.device) -> torch.dtype:
    """The precision that a choice means on a device."""
    if choice == "auto":
        return torch.float64 if device.type == "cpu" else torch.float32
    return torch.float32 if choice == "float32" else torch.float64


def _refuse(campaign: Campaign, launch: Launch, runtime: Runtime, *, by_mpi: bool) -> None:
    found = (runtime.num_nodes, runtime.world_size)
    if found != (launch.num_nodes, launch.world_size):
        raise ValueError(
            f"launch is {launch.id}, and what the launcher started are {found[1]} ranks on {found[0]} nodes: see "
            "launcher and launcher_args"
        )
    wanted = [combination for combination in campaign.combinations if combination.endswith("/mpi")]
    if wanted and not by_mpi and runtime.world_size > 1:
        raise ValueError(
            f"combinations has {wanted[0]}, and these ranks have no MPI for CPU tensors: start them with mpiexec on "
            "the CPU, or leave it out"
        )


def make_rows(num_rows: int, num_features: int, runtime: Runtime, dtype: torch.dtype) -> Rows:
    """The rows for a number of features, made on the main rank.

    For one feature the built-in houses, standardised; for more, rows of normal noise, which are quick to make and well
    conditioned.
    """
    made: list[tuple[Matrix, Matrix]] = []

    def reckon() -> tuple[float, float, int, Matrix, Matrix, Moments | None]:
        made.append(_houses(num_rows) if num_features == 1 else _noise(num_rows, num_features))
        return _reckon(*made[0])

    reckoned = runtime.from_main(reckon)
    both = torch.empty(num_rows, num_features + 1, dtype=torch.float64)
    if made:
        both[:, :-1], both[:, -1] = (torch.from_numpy(part) for part in made[0])
    both = runtime.broadcast(both.to(dtype).to(runtime.device))
    return Rows(both[:, :-1].contiguous(), both[:, -1:].contiguous(), *reckoned)


def _houses(num_rows: int) -> tuple[Matrix, Matrix]:
    table = load_table("builtin", num_rows=num_rows)
    price = table.target[:, 0]
    return Standardizer.of(table.features, standardize=True).apply(table.features), price / price.std()


def _noise(num_rows: int, num_features: int) -> tuple[Matrix, Matrix]:
    stream = np.random.RandomState(0)  # NumPy's frozen stream: the same rows in every release (NEP 19)
    features = stream.standard_normal((num_rows, num_features))
    return features, features.sum(axis=1) / math.sqrt(num_features) + stream.standard_normal(num_rows)


def _reckon(features: Matrix, target: Matrix) -> tuple[float, float, int, Matrix, Matrix, Moments | None]:
    """`Rows` from `safe_rate` on: the trajectory of full-batch gradient descent, in NumPy, without torch."""
    num_rows, num_features = features.shape
    a = np.column_stack([features, np.ones(num_rows)])
    safe_rate = _SAFE / float(np.square(a).sum(axis=1).max())
    if num_features <= min(MOST_SOLVED_FEATURES, num_rows // 4):
        moments = Moments.of(features, target[:, None])
        curvature = np.linalg.eigvalsh(a.T @ a / num_rows)
        rate = 1 / float(curvature[0] + curvature[-1])  # the quickest constant one
        contraction = float((curvature[-1] - curvature[0]) / (curvature[-1] + curvature[0]))
        fewest, most = _CHECK_STEPS
        # The excess shrinks by contraction² a step.
        needed = math.log(_SOLVED) / (2 * math.log(max(contraction, 1e-9)))
        num_steps = min(most, max(fewest, math.ceil(needed)))
    else:
        moments, rate, num_steps = None, 0.5 / _largest_curvature(a), _CHECK_STEPS[0]

    def descend(theta: Matrix, count: int, rate: float) -> Matrix:
        for _ in range(count):
            theta = theta - 2 * rate / num_rows * (a.T @ (a @ theta - target))
        return theta

    early = descend(np.zeros(num_features + 1), _EARLY_STEPS, rate / 2)
    return safe_rate, rate, num_steps, early, descend(early, num_steps, rate), moments


def _largest_curvature(a: Matrix) -> float:
    """An upper bound of the largest eigenvalue of aᵀa/n: power iteration from below, with room above."""
    vector = np.ones(a.shape[1])
    for _ in range(30):
        vector = a.T @ (a @ (vector / np.linalg.norm(vector))) / len(a)
    return 1.2 * float(np.linalg.norm(vector))


def _measure_point(
    campaign: Campaign, setting: Setting, all_rows: dict[int, Rows], runtime: Runtime, dtype: torch.dtype
) -> dict[str, Any]:
    """Warm up; half a window without averaging, a window with it, half a window without; then check the step itself.

    What drifts between the halves is the same for both. The step is that of `train`, its rows taken as there.
    """
    rows = all_rows[setting.num_features]
    loop = StepLoop.of(setting, rows, runtime, dtype)
    num_warmup_steps, step_time_s = warm_up(runtime, loop.take_steps, campaign.window_s)
    alone = StepLoop.of(setting, rows, runtime, dtype, averaged=False) if runtime.world_size > 1 else None
    local_times_s: list[list[float]] = []
    half = 0
    if alone:
        _, local_step_time_s = warm_up(runtime, alone.take_steps, campaign.window_s / 2)
        half = steps_for(campaign.window_s / 4, local_step_time_s)
        local_times_s.append(elapsed_on_ranks(runtime, partial(alone.take_steps, half)))
    gc.collect()
    num_steps, times_s = time_window(runtime, loop.take_steps, campaign.window_s, step_time_s)
    if alone:
        local_times_s.append(elapsed_on_ranks(runtime, partial(alone.take_steps, half)))
    rows_steps = min(num_steps, 2_000)
    rows_time_s = max(elapsed_on_ranks(runtime, partial(loop.take_rows, rows_steps))) / rows_steps
    slowest = int(np.argmax(times_s))
    return {
        "local_batch_size": loop.plan.local_batch_size,
        "message_bytes": (setting.num_features + 1) * dtype.itemsize,
        "num_warmup_steps": num_warmup_steps,
        "num_steps": num_steps,
        "window_s": max(times_s),
        "step_time_s": max(times_s) / num_steps,
        "rank_step_time_s": {
            "min": min(times_s) / num_steps,
            "median": float(np.median(times_s)) / num_steps,
            "max": max(times_s) / num_steps,
            "slowest_rank": slowest,
            "slowest_host": runtime.places[slowest].host,
        },
        "local_step_time_s": sum(map(max, local_times_s)) / (2 * half) if alone else None,
        "rows_time_s": rows_time_s,
        "throughput": setting.global_batch_size * num_steps / max(times_s),
        "check": _check(loop, rows, runtime, dtype),
    }


@dataclass
class StepLoop:
    """The training loop of `train` without its metrics: rows, rates, step, as often as asked.

    Steps go on where the last call ended. `x` and `y` are as `take_step` wants them, see `hand_rows`.
    """

    plan: BatchPlan
    rank: int
    x: Tensor
    y: Tensor
    model: torch.nn.Linear
    take_step: TakeStep
    rate: float
    by_hand: bool
    num_steps: int = 0

    @classmethod
    def of(
        cls, setting: Setting, rows: Rows, runtime: Runtime, dtype: torch.dtype, *, averaged: bool = True
    ) -> StepLoop:
        """The loop of a setting, from zeros. Without averaging, ranks train alone, on the same rows as with it."""
        plan = BatchPlan.derive(len(rows.x), runtime.world_size, global_batch_size=setting.global_batch_size)
        model = make_model([0.0] * setting.num_features, 0.0, device=runtime.device, dtype=dtype)
        by_hand = setting.optimizer == "hand"
        sgd = None if by_hand else make_sgd(model, (rows.safe_rate, rows.safe_rate))
        sync: AnySync = ("allreduce" if by_hand else "ddp") if setting.sync == "none" else setting.sync
        take_step = make_step(sgd, sync, model, runtime if averaged else runtime.alone())
        x, y = hand_rows(rows.x, rows.y) if by_hand else (rows.x, rows.y)
        return cls(plan, runtime.rank, x, y, model, take_step, rows.safe_rate, by_hand)

    def take_steps(self, count: int) -> None:
        """Take so many steps; their losses stay on the device."""
        self._run(count, self.take_step)

    def take_rows(self, count: int) -> None:
        """Take the rows of so many steps, and do nothing with them."""
        nothing = torch.zeros((), device=self.x.device)
        self._run(count, lambda rates, micro_batches, step_rows: nothing)

    def _run(self, count: int, take_step: TakeStep) -> None:
        rates = (self.rate, self.rate)
        losses = []
        with torch.inference_mode() if self.by_hand else nullcontext():
            for block in self.plan.blocks(self.rank, self.num_steps, self.num_steps + count):
                for _, micro_batches, step_rows in rows_of_steps(block, self.x, self.y, copied=self.plan.ordered):
                    losses.append(take_step(rates, micro_batches, step_rows))
        self.num_steps += count

    def parameters(self) -> Matrix:
        """Weight and bias (num_features + 1,)."""
        both = torch.cat([self.model.weight.detach()[0], self.model.bias.detach()])
        parameters: Matrix = both.cpu().double().numpy()
        return parameters

    def begin_at_zero(self) -> None:
        """Set all parameters to zero."""
        with torch.no_grad():
            self.model.weight.zero_()
            self.model.bias.zero_()

    def descend(self, num_steps: int, rate: float) -> Matrix:
        """Full-batch gradient descent by the same step; the parameters at its end."""
        share = self.plan.share(len(self.x), self.rank)
        rows: MicroBatches = [(self.x[share], self.y[share])]
        with torch.inference_mode() if self.by_hand else nullcontext():
            for _ in range(num_steps):
                self.take_step((rate, rate), rows, len(self.x))
        return self.parameters()


def _check(loop: StepLoop, rows: Rows, runtime: Runtime, dtype: torch.dtype) -> dict[str, Any]:
    """Did the step that was timed compute the right thing on every rank?

    All ranks must have the same parameters after the window; then full-batch descent with the same step must be where
    NumPy's is, on its way and at its end.
    """
    replica = loop.parameters()
    loop.begin_at_zero()
    early = loop.descend(_EARLY_STEPS, rows.check_rate / 2)
    end = loop.descend(rows.check_steps, rows.check_rate)
    pairs = ((replica, runtime.from_main(lambda: replica)), (early, rows.early), (end, rows.end))
    worst = max(max(runtime.gather(_difference(own, right))) for own, right in pairs)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    predicted, excess = rows.excess(rows.end), rows.excess(end)
    solves = predicted is not None and predicted <= _NEAR
    passed = worst <= tolerance and not (solves and excess is not None and excess > _NEAR + tolerance)
    what = "end at the closed form" if solves else "follow gradient descent"
    return {
        "passed": passed,
        "difference": worst if math.isfinite(worst) else None,
        "tolerance": tolerance,
        "excess": excess,
        "told": f"{_EARLY_STEPS + rows.check_steps} full-batch steps {what if passed else f'do not {what}'}",
    }


def _difference(own: Matrix, right: Matrix) -> float:
    """The largest difference of parameters, as a fraction of the largest parameter; infinite if one is not finite."""
    difference = float(np.abs(own - right).max() / np.abs(right).max())
    return difference if math.isfinite(difference) else math.inf


def _run_to_target(
    campaign: Campaign, launch: Launch, setting: Setting, runtime: Runtime, folder: Path
) -> dict[str, Any]:
    """Train, as a user would, until the loss is within the target; beside it what theory predicts of that."""
    config = TrainConfig(
        num_rows=campaign.effective_num_rows,
        num_features=setting.num_features,
        optimizer=setting.optimizer,
        sync="auto" if setting.sync == "none" else setting.sync,
        sampling="random",
        global_batch_size=setting.global_batch_size,
        base_learning_rate=(campaign.base_learning_rate, campaign.base_learning_rate),
        reference_batch_size=_REFERENCE_BATCH_SIZE,
        target_excess=campaign.target_excess,
        max_steps=1,
        seed=launch.seed,
        dtype=campaign.dtype,
        device=campaign.device,
        name=setting.name,
        runs_dir=str(folder / "runs"),
        overwrite=True,
    )
    forecast = runtime.from_main(lambda: prepare(config, runtime.world_size)[0].forecast)
    predicted = forecast.steps_to_target
    answer: dict[str, Any] = {
        "target_excess": campaign.target_excess,
        "predicted_steps": predicted,
        "measured_steps": None,
        "measured_time_s": None,
        "stability_limit": forecast.stability_limit,
        "noise_floor": forecast.noise_floor,
    }
    if predicted is None or predicted > _MOST_TARGET_STEPS:
        return answer
    # Half as long again, so that a run that is late gets there too.
    config = replace(config, max_steps=math.ceil(1.5 * predicted) + 10, log_every=max(1, predicted // _TARGET_LINES))
    result = train(config, runtime)
    crossing: Callable[[], tuple[float, float] | None] = partial(
        _crossing, Path(result.run_dir), result.closed_form_loss, campaign.target_excess
    )
    reached = runtime.from_main(crossing) if result.stopped_by == "target" else None
    if reached:
        answer["measured_steps"], answer["measured_time_s"] = reached
    return answer


def _crossing(run: Path, best_loss: float, target_excess: float) -> tuple[float, float] | None:
    """Steps and seconds at which a run's loss on all rows came within the target: between two lines, where the
    logarithm of the excess is interpolated."""
    lines = [line for line in read_metrics(run) if line.get("full_loss")]
    if len(lines) < 2:
        return None
    before, after = (math.log(line["full_loss"] / best_loss - 1) for line in lines[-2:])
    share = (before - math.log(target_excess)) / (before - after)
    steps = [line["step"] + 1 for line in lines[-2:]]
    times = [line["time_s"] for line in lines[-2:]]
    return steps[0] + share * (steps[1] - steps[0]), times[0] + share * (times[1] - times[0])


def _all_reduce(runtime: Runtime, dtype: torch.dtype, *, by_mpi: bool) -> list[dict[str, Any]]:
    """The time to add up messages of many sizes over ranks, by each way that there is."""
    if runtime.world_size == 1:
        return []
    ways: list[AnySync] = ["allreduce", "mpi"] if by_mpi else ["allreduce"]
    measured = []
    for sync in ways:
        for num_bytes in ALL_REDUCE_BYTES:
            once_s = time_all_reduce(runtime, sync, num_bytes, 3, dtype)
            num_repeats = max(10, min(_MOST_REPEATS, int(_ALL_REDUCE_S / once_s)))
            measured.append(
                {
                    "way": "MPI" if sync == "mpi" else runtime.backend,
                    "sync": sync,
                    "message_bytes": num_bytes,
                    "time_s": time_all_reduce(runtime, sync, num_bytes, num_repeats, dtype),
                    "num_repeats": num_repeats,
                }
            )
    return measured
