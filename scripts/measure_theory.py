"""Does training do what theory says? Predictions beside measurements, as Markdown tables.

    python scripts/measure_theory.py [--data synthetic|FILE] [--quick]

Stability limits and learning curves are measured with `torchreg train` itself, noise floors with many runs of plain
NumPy, written from the algorithm and not from the theory. All use the lesson's learning rates and start. The exit code
is 1 if an exact prediction is not met. `shuffle` sampling is an approximation: its tables only show its accuracy.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro

from torchreg.distributed.communicator import Communicator
from torchreg.distributed.init import init_distributed
from torchreg.runs.config import Sampling, TrainConfig, UpdateOrder
from torchreg.runs.recipes import RECIPES
from torchreg.runs.record import read_metrics
from torchreg.runs.run import train
from torchreg.runs.setup import LeastSquares, base_learning_rates, prepare
from torchreg.theory import Dynamics, Matrix, learning_curve

ORDERS: tuple[UpdateOrder, ...] = ("simultaneous", "sequential")
BATCH_SIZES = (16, 32, 64, 128, 256, 512)
TOLERANCE = 0.03  # of the noise floor
SMALLEST_BATCH_AT_3 = 64
STEPS_AT_LIMIT = 1_000  # 3 % beyond it a step multiplies the loss by about 1.1
FORGET_STEPS = 500  # until nothing is left of the start
RUNS_AT_ONCE = 1_000
POINTS_WITHIN = 0.95
SETS = 60  # of plain runs, to see what chance does


@dataclass(frozen=True)
class Options:
    """Compare predictions with measurements."""

    data: str = "synthetic"
    """`synthetic`, or a CSV or Parquet file."""

    quick: bool = False
    """Fewer runs: half a minute, with larger errors."""

    @property
    def num_seeds(self) -> int:
        """Runs of a learning curve."""
        return 50 if self.quick else 200

    @property
    def most_error(self) -> float:
        """The standard error at which a noise floor is known well enough, as a fraction of it."""
        return 0.02 if self.quick else 0.007


@dataclass(frozen=True)
class Measured:
    """A mean over independent runs, and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, runs: Matrix) -> Measured:
        """From one number a run."""
        return cls(float(runs.mean()), float(runs.std(ddof=1) / math.sqrt(len(runs))))


class Report:
    """Prints tables, and records whether all predictions were met."""

    def __init__(self) -> None:
        self.all_met = True

    def begin(self, title: str, columns: Sequence[str]) -> None:
        """A heading and the head of a table."""
        print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

    def row(self, *entries: str, met: bool | None = None) -> None:
        """One line; `met` is whether it is as predicted, None where no accuracy is stated."""
        marks = [] if met is None else ["yes" if met else "**NO**"]
        print(f"| {' | '.join([*entries, *marks])} |", flush=True)
        if met is not None and not met:  # also NumPy's own False
            self.all_met = False


def lesson_config(options: Options, order: UpdateOrder, sampling: Sampling, batch_size: int | None) -> TrainConfig:
    """A run from the lesson's start with its learning rates, whatever the batch size."""
    return RECIPES["homework"].replace(
        data=options.data,
        optimizer="manual" if order == "sequential" else "sgd",
        update_order=order,
        sampling=sampling,
        global_batch_size=batch_size,
        overwrite=True,
        name="measured",
    )


def measure_limits(options: Options, communicator: Communicator, report: Report, runs_dir: str) -> None:
    """Train 3 % below and 3 % above each predicted limit of the multiplier.

    `shuffle` is an approximation; and beyond the limit of small batches the mean square grows by rare, large
    excursions, which few runs of a thousand steps see.
    """
    report.begin(
        "Stability: the largest stable multiple of the lesson's learning rates",
        ["order", "sampling", "rows", "predicted limit", "diverged at 0.97 of it", "at 1.03 of it", "met"],
    )
    cases: list[tuple[Sampling, int | None]] = [("full", None), ("random", 64), ("random", 16), ("shuffle", 64)]
    for order, (sampling, batch_size) in itertools.product(ORDERS, cases):
        config = lesson_config(options, order, sampling, batch_size).replace(epochs=None, max_steps=STEPS_AT_LIMIT)
        config = config.replace(runs_dir=runs_dir, log_every=100)
        least_squares = LeastSquares.of(config)
        learning_rates = base_learning_rates(config, least_squares)
        rows = batch_size or least_squares.table.num_rows
        dynamics = Dynamics.of(least_squares.rows, learning_rates, rows, order, sampling)
        limit, error = dynamics.largest_multiplier(), dynamics.sampling_error(Dynamics.largest_multiplier)
        num_seeds = 1 if sampling == "full" else 3 if options.quick else 20
        diverged = []
        for side in (0.97, 1.03):
            multiplied = config.replace(
                base_learning_rate=(learning_rates[0] * limit * side, learning_rates[1] * limit * side)
            )
            results = [train(multiplied.replace(seed=seed), communicator) for seed in range(num_seeds)]
            diverged.append(sum(result.diverged for result in results))
        limit_text = f"{limit:.4f}" + (f" ± {error:.4f}" if error else "")
        counts = [f"{count} of {num_seeds}" for count in diverged]
        met = diverged == [0, num_seeds]
        entries = [order, sampling, str(rows), limit_text, *counts]
        if sampling == "shuffle" or rows < SMALLEST_BATCH_AT_3:
            report.row(*entries, "not stated")
        else:
            report.row(*entries, met=met)


def batch_sums(terms: Matrix, batch_size: int, num_runs: int, seed: int) -> Iterator[Matrix]:
    """Sums of `terms` (num_rows, m) over the rows of fresh batches, (num_runs, m), step after step.

    Rows are drawn without replacement: those whose random keys are the `batch_size` smallest.
    """
    generator = np.random.default_rng(seed)
    while True:
        keys = generator.integers(0, 2**32, (num_runs, len(terms)), dtype=np.uint32)
        threshold = np.partition(keys, batch_size - 1, axis=1)[:, batch_size - 1 : batch_size]
        yield (keys <= threshold).astype(np.float64) @ terms


class Runs:
    """Many runs of SGD at once: parameters `theta` (settings, num_runs, p), for orders and learning rates."""

    def __init__(
        self, least_squares: LeastSquares, settings: Sequence[tuple[UpdateOrder, tuple[float, float]]], num_runs: int
    ):
        x = least_squares.standardizer.apply(least_squares.table.features)
        a, y = np.hstack([x, np.ones((len(x), 1))]), least_squares.table.target
        self.size = a.shape[1]
        self.terms = np.hstack([(a[:, :, None] * a[:, None, :]).reshape(len(a), -1), a * y])
        self.gram = a.T @ a / len(a)
        self.start = np.append(*least_squares.start)
        self.optimum = self.start - least_squares.start_error
        self.best_loss = least_squares.closed_form.loss
        self.learning_rates = np.array([[weight] * (self.size - 1) + [bias] for _, (weight, bias) in settings])[:, None]
        self.sequential = np.array([order == "sequential" for order, _ in settings])
        self.theta = np.tile(self.start, (len(settings), num_runs, 1))

    def step(self, sums: Matrix, num_rows: int) -> None:
        """One update of every run from the `sums` (num_runs, m) of `terms` over its batch."""
        aa = sums[:, : self.size**2].reshape(-1, self.size, self.size) / num_rows
        ay = sums[:, self.size**2 :] / num_rows

        def gradient() -> Matrix:
            return np.asarray(2 * (np.einsum("rpq,srq->srp", aa, self.theta) - ay))

        first = self.learning_rates * gradient()
        self.theta[..., :-1] -= first[..., :-1]
        second = (self.learning_rates * gradient())[..., -1]  # at the new weight
        self.theta[..., -1] -= np.where(self.sequential[:, None], second, first[..., -1])

    def excess(self) -> Matrix:
        """Loss above the best, as a fraction of it, (settings, num_runs)."""
        off = self.theta - self.optimum
        return np.asarray(np.einsum("srp,pq,srq->sr", off, self.gram, off) / self.best_loss)


def measure_noise_floors(options: Options, report: Report) -> None:
    """Let many runs level off, and average the excess loss until its standard error is small enough."""
    report.begin(
        "Noise floors of `random` sampling, in % above the best loss",
        ["order", "rows", "learning rates ×", "predicted", "measured ± standard error", "measured / predicted", "met"],
    )
    for batch_size in BATCH_SIZES:
        config = lesson_config(options, "sequential", "random", batch_size)
        least_squares = LeastSquares.of(config)
        weight, bias = base_learning_rates(config, least_squares)
        multipliers = (1, 2, 3) if batch_size >= SMALLEST_BATCH_AT_3 else (1, 2)
        cases = list(itertools.product(ORDERS, multipliers))
        runs = Runs(least_squares, [(order, (k * weight, k * bias)) for order, k in cases], RUNS_AT_ONCE)
        total = np.zeros(runs.theta.shape[:2])
        for step, sums in enumerate(batch_sums(runs.terms, batch_size, RUNS_AT_ONCE, seed=batch_size)):
            runs.step(sums, batch_size)
            num_steps = step + 1 - FORGET_STEPS
            if num_steps > 0:
                total += runs.excess()
            if num_steps > 0 and num_steps % 100 == 0:
                measured = [Measured.of(run / num_steps) for run in total]
                if all(m.error < options.most_error * m.mean for m in measured):
                    break
        for (order, k), m in zip(cases, measured, strict=True):
            dynamics = Dynamics.of(least_squares.rows, (weight, bias), batch_size, order)
            noise_floor = dynamics.noise_floor(k) / runs.best_loss
            error = dynamics.sampling_error(partial(Dynamics.noise_floor, k=k)) / runs.best_loss
            ratio = m.mean / noise_floor
            report.row(
                order, str(batch_size), str(k), f"{100 * noise_floor:.4g}" + (f" ± {100 * error:.2g}" if error else ""),
                f"{100 * m.mean:.4g} ± {100 * m.error:.2g}",
                f"{ratio:.3f}", met=abs(ratio - 1) <= TOLERANCE,
            )  # fmt: skip


def measure_curves(options: Options, communicator: Communicator, report: Report, runs_dir: str) -> None:
    """Train with many seeds; compare the mean curve with the predicted one, and single runs with the band.

    Met is what was asked for: 95 % of the points within two standard errors. Beside it stands what chance does: excess
    losses are skewed, so even the truth has fewer points than that in many sets of seeds. That is found from sets of
    plain NumPy runs, each held against the mean of all of them; no theory has a part in it.
    """
    report.begin(
        f"Learning curves, {options.num_seeds} seeds of 64 rows a step, `random` sampling, loss on all rows",
        ["order", "steps", "points within 2 standard errors", "the same for the truth (95 % of sets)",
         "sets of the truth with 95 %", "NumPy's mean / predicted",
         "runs within the 95 % band", "met"],
    )  # fmt: skip
    for order in ORDERS:
        config = lesson_config(options, order, "random", 64).replace(log_full_loss=True, log_every=1)
        config = config.replace(runs_dir=runs_dir)
        least_squares = LeastSquares.of(config)
        best = least_squares.closed_form.loss
        curves = []
        for seed in range(options.num_seeds):
            result = train(config.replace(seed=seed), communicator)
            curves.append([line["full_loss"] / best - 1 for line in read_metrics(Path(result.run_dir))])
        trained = np.array(curves)
        num_steps = trained.shape[1]
        learning_rates = base_learning_rates(config, least_squares)
        curve = learning_curve(
            Dynamics.of(least_squares.rows, learning_rates, 64, order), least_squares.start_error, [1.0] * num_steps
        )
        predicted, low, high = (values[1:] / best for values in (curve.excess, curve.low, curve.high))
        within = points_within(trained, predicted)
        inside = float(np.mean((trained >= low) & (trained <= high)))
        simulated = simulated_curves(least_squares, order, learning_rates, num_steps, SETS * options.num_seeds)
        truth = simulated.mean(axis=0)
        by_chance = [points_within(part, truth) for part in np.split(simulated, SETS)]
        least, most = np.quantile(by_chance, [0.025, 0.975])
        report.row(
            order, str(num_steps), f"{100 * within:.1f} %", f"{100 * least:.1f} to {100 * most:.1f} %",
            f"{sum(part >= POINTS_WITHIN for part in by_chance)} of {SETS}",
            f"{float(np.mean(truth / predicted)):.3f}", f"{100 * inside:.1f} %", met=within >= POINTS_WITHIN,
        )  # fmt: skip


def points_within(runs: Matrix, curve: Matrix) -> float:
    """The fraction of the points of a curve that are within two standard errors of the runs' mean (runs, points)."""
    error = runs.std(axis=0, ddof=1) / math.sqrt(len(runs))
    return float(np.mean(np.abs(runs.mean(axis=0) - curve) <= 2 * error))


def simulated_curves(
    least_squares: LeastSquares, order: UpdateOrder, learning_rates: tuple[float, float], num_steps: int, num_runs: int
) -> Matrix:
    """Excess loss after each step of plain NumPy runs with 64 rows a step, (num_runs, num_steps)."""
    runs = Runs(least_squares, [(order, learning_rates)], num_runs)
    excess = np.empty((num_steps, num_runs))
    for step, sums in enumerate(itertools.islice(batch_sums(runs.terms, 64, num_runs, seed=1), num_steps)):
        runs.step(sums, 64)
        excess[step] = runs.excess()[0]
    return excess.T


def measure_shuffle(options: Options, report: Report) -> None:
    """How far the end of a run with `shuffle` sampling, the default, is from its approximation."""
    report.begin(
        "`shuffle` sampling and its forecast, which is an approximation: excess at the end of 30 epochs, in %",
        ["run", "rows", "short last batch", "predicted", "measured ± standard error", "measured / predicted"],
    )
    default = RECIPES["default"].replace(data=options.data)
    lesson = lesson_config(options, "simultaneous", "shuffle", None)
    cases = [
        *((f"default recipe, {ranks} rank{'s' * (ranks > 1)}", default, ranks * 64) for ranks in (1, 2, 4, 8)),
        *(("lesson's learning rates", lesson, batch_size) for batch_size in (16, 29, 64, 256)),
    ]
    num_runs = 1_000 if options.quick else 4_000
    for name, config, batch_size in cases:
        state, _ = prepare(config.replace(global_batch_size=batch_size), 1)
        assert state.forecast.curve
        least_squares = LeastSquares.of(config)
        num_rows = least_squares.table.num_rows
        runs = Runs(least_squares, [("simultaneous", state.schedule.scaled)], num_runs)
        generator = np.random.default_rng(batch_size)
        for _ in range(30):
            order = generator.integers(0, 2**32, (num_runs, num_rows), dtype=np.uint32).argsort(axis=1)
            for start in range(0, num_rows, batch_size):
                rows = order[:, start : start + batch_size]
                # The short last batch has learning rates in proportion to its size: a sum over a whole batch's.
                runs.step(np.sum(runs.terms[rows], axis=1), batch_size)
        m = Measured.of(runs.excess()[0])
        predicted = state.forecast.curve.excess[-1]
        report.row(
            name, str(batch_size), str(num_rows % batch_size or "none"), f"{100 * predicted:.4g}",
            f"{100 * m.mean:.4g} ± {100 * m.error:.2g}", f"{m.mean / predicted:.3f}",
        )  # fmt: skip


def heavy_tailed(path: Path, num_rows: int, num_features: int) -> str:
    """Write features and errors of a t distribution with 3 degrees of freedom as CSV; returns the path."""
    generator = np.random.default_rng(num_rows + num_features)
    x = generator.standard_t(3, (num_rows, num_features))
    columns = np.column_stack([x, x.sum(axis=1) + generator.standard_t(3, num_rows)])
    names = [*(f"x{i}" for i in range(num_features)), "y"]
    np.savetxt(path, columns, "%.17g", ",", header=",".join(names), comments="")
    return str(path)


def simulated_ends(config: TrainConfig, num_runs: int) -> Matrix:
    """Excess loss at the end of plain NumPy runs of the simultaneous order, as a fraction of the best loss."""
    state, _ = prepare(config, 1)
    data, size = LeastSquares.of(config), state.plan.global_batch_size
    a = np.hstack([data.standardizer.apply(data.table.features), np.ones((data.table.num_rows, 1))])
    start = np.append(*data.start)
    error = data.table.target[:, 0] - a @ (start - data.start_error)
    off, generator = np.tile(data.start_error, (num_runs, 1)), np.random.default_rng(size)
    rates = np.array([state.schedule.scaled[0]] * (a.shape[1] - 1) + [state.schedule.scaled[1]])
    for step in range(state.schedule.num_steps):
        position = step % state.plan.steps_per_epoch if config.batch.sampling == "shuffle" else 0
        if position == 0:
            order = generator.random((num_runs, len(a))).argsort(axis=1)
        rows = order[:, position * size : (position + 1) * size]
        part = rows.shape[1] / size if config.optimizer.last_batch_lr == "scaled" else 1.0
        batch = a[rows]
        residual = (batch @ off[:, :, None])[:, :, 0] - error[rows]
        off -= 2 * part * rates * (residual[:, None] @ batch)[:, 0] / rows.shape[1]
    return np.asarray(np.mean((off @ a.T) ** 2, axis=1) / data.closed_form.loss)


def measure_many(options: Options, report: Report, folder: Path) -> None:
    """Forecasts beside simulated runs for many features, both samplings, heavy tails and a last batch of one row."""
    report.begin(
        "Many features, heavy tails, a last batch of one row: excess at the end, in %",
        ["data", "features", "sampling", "last batch", "lr / limit", "predicted", "measured ± standard error",
         "measured / predicted", "runs within the band"],
    )  # fmt: skip
    cases = [(p, heavy, 551) for p in (3, 6, 8, 20, 64) for heavy in (False, True)] + [(3, True, 513), (20, True, 513)]
    for (p, heavy, num_rows), sampling in itertools.product(cases, ("shuffle", "random")):
        config = TrainConfig.of(sampling=sampling, base_learning_rate=(0.2 / p, 0.2), global_batch_size=64, epochs=20)
        if heavy:
            data = heavy_tailed(folder / f"{num_rows}-{p}.csv", num_rows, p)
            config = config.replace(data=data, features=tuple(f"x{i}" for i in range(p)), target="y")
        else:
            config = config.replace(num_features=p, num_rows=num_rows)
        rules = ("scaled", "full") if sampling == "shuffle" and num_rows == 513 else ("scaled",)
        for rule in rules:
            each = config.replace(last_batch_lr=rule)
            forecast = prepare(each, 1)[0].forecast
            ends = simulated_ends(each, (200 if options.quick else 2_000) // (1 + 4 * (p > 20)))
            m = Measured.of(ends)
            last = f"{num_rows % 64} rows, {rule}" if sampling == "shuffle" else ""
            entries = ["heavy-tailed" if heavy else "synthetic", str(p), sampling, last]
            measured = f"{100 * m.mean:.4g} ± {100 * m.error:.2g}"
            if forecast.curve is None:
                report.row(
                    *entries, f"{1 / forecast.stability_limit:.2f}", "diverges in the mean square", measured, "", ""
                )
                continue
            end, low, high = (values[-1] for values in (forecast.curve.excess, forecast.curve.low, forecast.curve.high))
            inside = np.mean((ends >= low) & (ends <= high))
            report.row(
                *entries, f"{1 / forecast.stability_limit:.2f}", f"{100 * end:.4g}", measured, f"{m.mean / end:.3f}",
                f"{100 * inside:.0f} %",
            )  # fmt: skip


def main() -> int:
    """Measure and print; returns the exit code."""
    options = tyro.cli(Options, description=__doc__)
    report = Report()
    print(f"## Theory and measurement: {Path(options.data).name}")
    with tempfile.TemporaryDirectory() as runs_dir, init_distributed(device="cpu") as communicator:
        measure_limits(options, communicator, report, runs_dir)
        measure_curves(options, communicator, report, runs_dir)
        measure_many(options, report, Path(runs_dir))
    measure_noise_floors(options, report)
    measure_shuffle(options, report)
    print(f"\n{'All exact predictions are met.' if report.all_met else '**An exact prediction is not met.**'}")
    return 0 if report.all_met else 1


if __name__ == "__main__":
    sys.exit(main())
