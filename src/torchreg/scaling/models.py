"""Models of scaling, fitted to launches: which parameters the points determine, and how well.

Every model is a sum of known shapes with unknown coefficients, fitted by `regression`, which says what is assumed. A
model is refused as not identifiable, with the reason in words, rather than told with numbers that the points do not
determine. Where a curve is extrapolated is the report's to mark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from torchreg.scaling.identify import Fit, Model, Quantity
from torchreg.scaling.regression import (
    Array,
    observe,
)
from torchreg.scaling.statistics import Block, Vector

Collective: TypeAlias = Literal["recursive doubling", "Rabenseifner", "ring"]

_MORE = "measure more world sizes or more launches"


class Work(NamedTuple):
    """What each rank does in a step: take and compute `rows_per_rank`, then average `message_bytes` with the others."""

    world_size: int
    rows_per_rank: float
    message_bytes: int


def fit_allreduce(times: Mapping[Block, Mapping[int, float]]) -> Fit:
    """T(m) = α + β m, latency and time a byte of one collective; `times` is {launch: {message_bytes: seconds}}.

    Hockney, "The communication challenge for MPP", Parallel Computing 20, 1994. Both are asked for in their own right:
    refused where the messages hide one of them. Raises ValueError for sizes or times that are not positive.
    """
    observations, sizes = observe(times, "message_bytes", _check_whole("message_bytes"))
    least, most = f"{sizes[0]} bytes", f"{sizes[-1]} bytes"
    model = Model(
        "α–β",
        "T(m) = α + β m",
        "Hockney 1994",
        "message sizes",
        (
            Quantity(0, "latency", "α", "s", f"messages of {least} and more hide it, measure smaller ones"),
            Quantity(1, "time a byte", "β", "s/byte", f"latency hides it up to {most}, measure larger messages"),
        ),
        lambda messages: np.stack([np.ones_like(messages), messages], axis=1),
    )
    return model.fitted(observations, np.array(sizes, dtype=np.float64))


def fit_amdahl(times: Mapping[Block, Mapping[int, float]]) -> Fit:
    """T(p) = T₁ (s + (1 − s)/p), strong scaling; `times` is {block: {world_size: seconds a step}}.

    Amdahl, "Validity of the single processor approach to achieving large scale computing capabilities", AFIPS 1967.
    Needs no time of one rank: T₁ is then a prediction. Contradicted (s above 1) where more ranks are slower. Raises
    ValueError for world sizes or times that are not positive.
    """
    observations, sizes = observe(times, "world size", _check_whole("world size"))
    model = Model(
        "Amdahl",
        "T(p) = T₁ (s + (1 − s)/p)",
        "Amdahl 1967",
        "world sizes",
        (
            Quantity(0, "time of one rank", "T₁", "s", _MORE),
            Quantity(1, "serial fraction", "s", "", _MORE, kind="relative", is_fraction=True),
        ),
        lambda ranks: np.stack([1 / ranks, 1 - 1 / ranks], axis=1),
    )
    return model.fitted(observations, np.array(sizes, dtype=np.float64))


def fit_usl(
    times: Mapping[Block, Mapping[int, float]],
    *,
    global_batch_size: int | None = None,
    local_batch_size: int | None = None,
) -> Fit:
    """X(p) = λ p / (1 + σ(p − 1) + κ p(p − 1)), the universal scalability law; `times` as for Amdahl.

    Gunther, "Guerrilla capacity planning", 2007, chapter 4: λ is the rows a second of one rank, σ contention, κ what it
    costs that each agrees with each. X = rows a step / T: `global_batch_size` rows (strong scaling), or
    `local_batch_size` × p (weak); give one. Its inverse is a sum of three shapes, and is fitted as one.
    """
    if (global_batch_size is None) == (local_batch_size is None):
        raise ValueError(
            "fit_usl takes global_batch_size (strong scaling) or local_batch_size (weak): give one of them"
        )

    def rows(ranks: Vector) -> Vector:
        return np.full_like(ranks, global_batch_size) if local_batch_size is None else local_batch_size * ranks

    for name, size in (("global_batch_size", global_batch_size), ("local_batch_size", local_batch_size)):
        if size is not None:
            _check_whole(name)(size)
    observations, sizes = observe(times, "world size", _check_whole("world size"))
    model = Model(
        "USL",
        "X(p) = λ p / (1 + σ(p − 1) + κ p(p − 1))",
        "Gunther 2007",
        "world sizes",
        (
            Quantity(0, "throughput of one rank", "λ", "rows/s", _MORE, kind="inverse"),
            Quantity(1, "contention", "σ", "", _MORE, kind="relative", is_fraction=True),
            Quantity(2, "coherence", "κ", "", _MORE, kind="relative", can_vanish=True),
        ),
        lambda ranks: rows(ranks)[:, None] * np.stack([1 / ranks, 1 - 1 / ranks, ranks - 1], axis=1),
    )
    return model.fitted(observations, np.array(sizes, dtype=np.float64))


def fit_mechanistic(times: Mapping[Block, Mapping[Work, float]], collective: Collective = "recursive doubling") -> Fit:
    """T = c₀ + c₁·rows + communication; `times` is {block: {work: seconds a step}}, of strong and weak points alike.

    The communication of p ranks that average m bytes (Thakur, Rabenseifner and Gropp, "Optimization of collective
    communication operations in MPICH", International Journal of High Performance Computing Applications 19, 2005, in
    Hockney's α and β; log₂ p is also taken where p is no power of two):

    - recursive doubling, for short messages: log₂ p · (α + β m)
    - Rabenseifner, for long ones: 2 log₂ p · α + 2 (p − 1)/p · β m
    - ring: 2 (p − 1) · α + 2 (p − 1)/p · β m

    What no points of such a design could tell apart is one parameter: c = c₀ + c₁·rows where every rank always has as
    many rows (weak scaling), and τ = α + β m, the time of one round, under recursive doubling of one message size.
    `predict` takes works, (n, 3); of a strong or a weak series of one message size it also takes world sizes, (n,).
    """
    observations, works = observe(times, "work", _check_work)
    measured = np.array(works, dtype=np.float64)
    ranks, rows, messages = measured.T
    is_weak, is_one_size = bool(np.ptp(rows) == 0), bool(np.ptp(messages) == 0)
    if is_weak:
        quantities, told = [Quantity(0, "compute", "c", "s", _MORE, can_vanish=True)], "c"
    else:
        quantities, told = (
            [
                Quantity(0, "fixed time", "c₀", "s", _MORE, can_vanish=True),
                Quantity(1, "time a row", "c₁", "s/row", _MORE, can_vanish=True),
            ],
            "c₀ + c₁·rows",
        )
    in_one = is_one_size and collective == "recursive doubling"
    if in_one:
        name = f"one round of {works[0].message_bytes} bytes"
        quantities.append(Quantity(len(quantities), name, "τ", "s", _MORE, can_vanish=True))
        told += " + τ log₂ p"
    else:
        for name, symbol, unit in (("latency of a round", "α", "s"), ("time a byte", "β", "s/byte")):
            quantities.append(Quantity(len(quantities), name, symbol, unit, _MORE, can_vanish=True))
        told += _COMMUNICATION[collective]

    def columns(at: Array) -> Array:
        ranks, rows, messages = at.T
        doublings, part = np.log2(ranks), 2 * (ranks - 1) / ranks
        if collective == "recursive doubling":
            rounds, moved = doublings, doublings
        else:
            rounds, moved = 2 * doublings if collective == "Rabenseifner" else 2 * (ranks - 1), part
        compute = [np.ones_like(ranks)] if is_weak else [np.ones_like(ranks), rows]
        return np.stack([*compute, rounds] if in_one else [*compute, rounds, moved * messages], axis=1)

    def to_works(at: npt.ArrayLike) -> Array:
        """World sizes (n,) as works (n, 3), of the series that was measured."""
        found = np.asarray(at, dtype=np.float64)
        if found.ndim == 2:
            return found
        is_strong = bool(np.ptp(ranks * rows) == 0)
        if not (is_one_size and (is_weak or is_strong)):
            raise ValueError("the points are of several series: give predict rows of world_size, rows_per_rank, bytes")
        local = np.full_like(found, rows[0]) if is_weak else ranks[0] * rows[0] / found
        return np.stack([found, local, np.full_like(found, messages[0])], axis=1)

    model = Model(
        "mechanistic",
        f"T(p) = {told} ({collective})",
        "Thakur, Rabenseifner and Gropp 2005; Hockney 1994",
        "points",
        tuple(quantities),
        columns,
    )
    fit = model.fitted(observations, measured, np.unique(ranks, return_inverse=True)[1])
    return replace(fit, predict=lambda at: fit.predict(to_works(at)))


_COMMUNICATION: dict[Collective, str] = {
    "recursive doubling": " + log₂ p (α + β m)",
    "Rabenseifner": " + 2 log₂ p α + 2 (p − 1)/p β m",
    "ring": " + 2 (p − 1) α + 2 (p − 1)/p β m",
}


def _check_whole(what: str) -> Callable[[int], None]:
    def check(size: int) -> None:
        if isinstance(size, bool) or size != int(size) or size < 1:
            raise ValueError(f"{what} is {size}: give a whole number from 1 on")

    return check


def _check_work(work: Work) -> None:
    _check_whole("world_size")(work.world_size)
    _check_whole("message_bytes")(work.message_bytes)
    if not (math.isfinite(work.rows_per_rank) and work.rows_per_rank > 0):
        raise ValueError(f"rows_per_rank is {work.rows_per_rank}: give a positive number")
