"""Models of scaling, fitted to launches: which parameters the points determine, and how well.

Every model is a sum of known shapes with unknown coefficients, fitted by `regression`, which states the assumptions. A
model whose parameters the points do not determine, or which the points contradict, is refused as not identifiable, with
the reason. Sizes and times that are not positive raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from torchreg.scaling.regression import FEWEST_BLOCKS, Array, Observations, observe, regress
from torchreg.scaling.statistics import Block

_LARGEST_FACTOR = 10.0  # between the ends of an interval that still determines the parameter's magnitude
_REJECTED = 0.01  # probability of residuals below which a model is rejected: a true one is in one of 100 series
_SMALL = 0.2  # of a time, or of a fraction's range: an interval from 0 to less than that means that it is small


@dataclass(frozen=True)
class Fit:
    """A fitted model.

    `why` is the reason why it is not identifiable. `parameters` is empty if not even values are determined; each has
    `name`, `symbol`, `unit`, `value`, and a 95 % interval `low` to `high`, None where the model is not identifiable.
    `held_out_error` is the largest relative error of the median time at a size that is predicted from the other sizes,
    None where they do not determine the model. `predict` takes world sizes or bytes, (n,), and returns seconds, (n,);
    NaN if there are no parameters.
    """

    model: str
    formula: str
    source: str
    identifiable: bool
    why: str | None
    parameters: tuple[dict[str, Any], ...]
    held_out_error: float | None
    predict: Callable[[npt.ArrayLike], Array]


class Quantity(NamedTuple):
    """A parameter: a coefficient, one over the first coefficient, or the inverse of one; never negative.

    `can_vanish`: an interval is also accepted if the parameter's part of every time is small.
    """

    column: int
    name: str
    symbol: str
    unit: str
    advice: str = "measure more world sizes or more launches"
    kind: Literal["coefficient", "relative", "inverse"] = "coefficient"
    is_fraction: bool = False
    can_vanish: bool = False

    def of(self, coefficients: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Its values (...) for real or complex coefficients (..., p)."""
        own = coefficients[..., self.column]
        if self.kind == "relative":
            return np.asarray(own / coefficients[..., 0])
        return np.asarray(1 / own if self.kind == "inverse" else own)

    def clip(self, value: float) -> float:
        """The nearest value within the parameter's bounds."""
        return min(max(value, 0.0), 1.0 if self.is_fraction else math.inf)

    def reason(self, value: float, low: float, high: float, largest_part: float) -> str | None:
        """Why an interval does not determine the parameter; its part of a time is at most it times `largest_part`."""
        name, unit = f"{self.name} {self.symbol}", f" {self.unit}" if self.unit else ""
        if high < 0 or (self.is_fraction and low > 1):
            found, bound = f"{value:.2g}{unit} (95 %: {low:.2g} to {high:.2g})", "below 0" if high < 0 else "above 1"
            return f"the points contradict the model: {name} would be {found}, and it cannot be {bound}"
        low, high = self.clip(low), self.clip(high)
        is_resolved = 0 < high <= _LARGEST_FACTOR * low
        is_small = self.can_vanish and high * largest_part <= _SMALL
        if is_resolved or is_small or (self.is_fraction and high - low <= _SMALL):
            return None
        return f"{name} may be anything from {low:.2g} to {high:.2g}{unit}: {self.advice}"


def fit_model(
    model: tuple[str, str, str],
    quantities: Sequence[Quantity],
    columns: Callable[[Array], Array],
    observations: Observations,
    at: Array,
    sizes: str,
) -> Fit:
    """Fit a model, its name, formula and source, to the `sizes` at which it was measured, (num_sizes, …).

    `columns` maps sizes (n,) or works (n, 3) to shapes (n, p), all >= 0. Works of one world size are held out together.
    """
    shapes, needed = columns(at), len(quantities) + 1
    found = regress(observations, shapes, np.unique(at.reshape(len(at), -1)[:, 0], return_inverse=True)[1])
    num_blocks = len(found.without_block)
    is_divided = any(quantity.kind != "coefficient" for quantity in quantities)

    def has_values(coefficients: Array) -> bool:
        """Whether all parameters are finite, for each of the coefficients (..., p)."""
        return bool(np.isfinite(coefficients).all() and not (is_divided and coefficients[..., 0].min() <= 0))

    why: str | None = None
    if len(at) < needed:
        few = f"{len(at)} {sizes if len(at) > 1 else sizes.removesuffix('s')}"
        why = f"{few} for {needed - 1} parameters: from {needed} on, the points can contradict the model"
    elif num_blocks < FEWEST_BLOCKS:
        few = f"{num_blocks} block{'s' * (num_blocks > 1)} of launches"
        why = f"{few}: from {FEWEST_BLOCKS} on, their spread can be estimated"
    elif not np.isfinite(found.coefficients).all():
        why = f"at these {sizes} its terms have the same shape, or times are too scattered for any to be seen"
    elif not np.isfinite(found.without_block).all():
        why = "it rests on one block of launches alone: repeat the launches that failed in the others"
    elif not all(map(has_values, (found.coefficients, found.without_block, found.nonnegative))):
        why = f"the points contradict the model: {quantities[0].name} would not be positive"
    intervals = [] if why else found.intervals([one.of for one in quantities])
    if intervals:
        parts, reasons = shapes / (shapes @ found.coefficients)[:, None], []
        for one, interval in zip(quantities, intervals, strict=True):
            unit = found.coefficients[0] if one.kind == "relative" else 1
            reasons.append(one.reason(*interval, float(np.max(unit * parts[:, one.column]))))
        if found.lack_of_fit < _REJECTED:
            misfit = f"they differ from it by more than noise (p = {found.lack_of_fit:.1g})"
            reasons.append(f"the points contradict the model: {misfit}")
        why = min(filter(None, reasons), key=lambda reason: "contradict" not in reason, default=None)
    parameters, coefficients = [], np.full(len(quantities), np.nan)
    if has_values(found.nonnegative):
        coefficients = found.nonnegative
        for index, one in enumerate(quantities):
            low, high = (None, None) if why else map(one.clip, intervals[index][1:])
            numbers = {"value": one.clip(float(one.of(coefficients))), "low": low, "high": high}
            parameters.append({"name": one.name, "symbol": one.symbol, "unit": one.unit, **numbers})

    def predict(at: npt.ArrayLike) -> Array:
        return np.asarray(columns(np.asarray(at, dtype=np.float64)) @ coefficients)

    return Fit(*model, why is None, why, tuple(parameters), found.held_out_error, predict)


class Work(NamedTuple):
    """A rank's work in a step: load and compute `samples_per_rank`, then all-reduce `message_bytes`."""

    world_size: int
    samples_per_rank: float
    message_bytes: int


def fit_allreduce(times: Mapping[Block, Mapping[int, float]]) -> Fit:
    """T(m) = α + β m, latency and time per byte of one collective; `times` is {launch: {message_bytes: seconds}}.

    Hockney, "The communication challenge for MPP", Parallel Computing 20, 1994.
    """
    observations, sizes = _observe_whole(times, "message_bytes")
    smaller = f"messages of {sizes[0]:.0f} bytes and more hide it, measure smaller ones"
    larger = f"latency hides it up to {sizes[-1]:.0f} bytes, measure larger ones"
    quantities = Quantity(0, "latency", "α", "s", smaller), Quantity(1, "time per byte", "β", "s/byte", larger)
    model = "α–β", "T(m) = α + β m", "Hockney 1994"
    return fit_model(model, quantities, lambda m: np.column_stack([m**0, m]), observations, sizes, "message sizes")


def fit_amdahl(times: Mapping[Block, Mapping[int, float]]) -> Fit:
    """T(p) = T₁ (s + (1 − s)/p), strong scaling; `times` is {block: {world_size: seconds per step}}.

    Amdahl, "Validity of the single processor approach to achieving large scale computing capabilities", AFIPS 1967.
    Needs no time of one rank: T₁ is then a prediction. Contradicted (s above 1) where more ranks are slower.
    """
    quantities = (
        Quantity(0, "time of one rank", "T₁", "s"),
        Quantity(1, "serial fraction", "s", "", kind="relative", is_fraction=True),
    )
    model = "Amdahl", "T(p) = T₁ (s + (1 − s)/p)", "Amdahl 1967"
    observed = _observe_whole(times, "world size")
    return fit_model(model, quantities, lambda p: np.column_stack([1 / p, 1 - 1 / p]), *observed, "world sizes")


def fit_usl(
    times: Mapping[Block, Mapping[int, float]],
    *,
    global_batch_size: int | None = None,
    local_batch_size: int | None = None,
) -> Fit:
    """X(p) = λ p / (1 + σ(p − 1) + κ p(p − 1)), the universal scalability law; `times` as for Amdahl.

    Gunther, "Guerrilla capacity planning", 2007, chapter 4: λ is the throughput of one rank in samples per second, σ
    contention, κ coherence (the cost of pairwise agreement). X is the samples of a step over its time: give
    `global_batch_size` (strong scaling) or `local_batch_size` (weak). 1/X is a sum of three shapes, and is fitted so.
    """
    if (global_batch_size is None) == (local_batch_size is None):
        raise ValueError(
            "fit_usl takes global_batch_size (strong scaling) or local_batch_size (weak): give one of them"
        )
    for name, size in (("global_batch_size", global_batch_size), ("local_batch_size", local_batch_size)):
        if size is not None:
            _check_whole(name, size)
    quantities = (
        Quantity(0, "throughput of one rank", "λ", "samples/s", kind="inverse"),
        Quantity(1, "contention", "σ", "", kind="relative", is_fraction=True),
        Quantity(2, "coherence", "κ", "", kind="relative", can_vanish=True),
    )

    def columns(ranks: Array) -> Array:
        samples = np.full_like(ranks, global_batch_size) if local_batch_size is None else local_batch_size * ranks
        return samples[:, None] * np.column_stack([1 / ranks, 1 - 1 / ranks, ranks - 1])

    model = "USL", "X(p) = λ p / (1 + σ(p − 1) + κ p(p − 1))", "Gunther 2007"
    return fit_model(model, quantities, columns, *_observe_whole(times, "world size"), "world sizes")


def fit_mechanistic(times: Mapping[Block, Mapping[Work, float]]) -> Fit:
    """T = c₀ + c₁·samples + log₂ p (α + β m), of strong and weak points alike; `times` is {block: {work: seconds}}.

    The last term is an all-reduce of m bytes among p ranks by recursive doubling (Thakur, Rabenseifner and Gropp,
    "Optimization of collective communication operations in MPICH", International Journal of High Performance Computing
    Applications 19, 2005), in Hockney's α and β. log₂ p is also used where p is no power of two.

    What no points of such a design can distinguish is one parameter: c = c₀ + c₁·samples where every rank always has as
    many samples (weak scaling), and τ = α + β m, a round of one message size. `predict` takes works, (n, 3).
    """
    observations, works = observe(times, "work")
    for work in works:
        _check_whole("world_size", work.world_size)
        _check_whole("message_bytes", work.message_bytes)
        if not (math.isfinite(work.samples_per_rank) and work.samples_per_rank > 0):
            raise ValueError(f"samples_per_rank is {work.samples_per_rank}: give a positive number")
    measured = np.array(works, dtype=np.float64)
    is_weak, is_one_size = np.ptp(measured[:, 1:], axis=0) == 0
    compute, communication = "c₀ + c₁·samples", "log₂ p (α + β m)"
    named = [("fixed time", "c₀", "s"), ("time per sample", "c₁", "s/sample")]
    if is_weak:
        compute, named = "c", [("compute", "c", "s")]
    if is_one_size:
        communication = "τ log₂ p"
        named.append((f"one round of {works[0].message_bytes} bytes", "τ", "s"))
    else:
        named += [("latency of a round", "α", "s"), ("time per byte", "β", "s/byte")]

    def columns(at: Array) -> Array:
        ranks, samples, message_bytes = at.T
        rounds = np.log2(ranks)
        found = [np.ones_like(ranks)] if is_weak else [np.ones_like(ranks), samples]
        found += [rounds] if is_one_size else [rounds, rounds * message_bytes]
        return np.column_stack(found)

    formula = f"T(p) = {compute} + {communication} (recursive doubling)"
    model = "mechanistic", formula, "Thakur, Rabenseifner and Gropp 2005; Hockney 1994"
    quantities = [Quantity(column, *name, can_vanish=True) for column, name in enumerate(named)]
    return fit_model(model, quantities, columns, observations, measured, "points")


def _observe_whole(times: Mapping[Block, Mapping[int, float]], what: str) -> tuple[Observations, Array]:
    observations, sizes = observe(times, what)
    _check_whole(what, *sizes)
    return observations, np.array(sizes, dtype=np.float64)


def _check_whole(name: str, *values: int) -> None:
    for value in values:
        if isinstance(value, bool) or value != int(value) or value < 1:
            raise ValueError(f"{name} is {value}: give a whole number from 1 on")
