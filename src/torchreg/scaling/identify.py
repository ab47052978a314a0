"""Which parameters of a model the points determine; a fit is refused, with the reason, where they do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from torchreg.scaling.regression import FEWEST_BLOCKS, Array, Indices, Interval, Observations, regress

_LARGEST_FACTOR = 10.0  # between the ends of an interval that still determines the parameter's magnitude
_SMALL = 0.2  # of a time, or of a fraction's range: an interval from 0 to less than that means that it is small


@dataclass(frozen=True)
class Parameter:
    """A model's parameter with its 95 % interval, clipped to its bounds; None where the model is not identifiable."""

    name: str
    symbol: str
    unit: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Fit:
    """A fitted model.

    `why` is the reason why it is not identifiable. `parameters` is empty if not even values are determined.
    `held_out_error` is the largest relative error of the median time at a size that is predicted from the other sizes,
    None where they do not determine the model. `predict` takes world sizes or bytes, (n,), and returns seconds, (n,);
    NaN if there are no parameters.
    """

    model: str
    formula: str
    source: str
    identifiable: bool
    why: str | None
    parameters: tuple[Parameter, ...]
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

    def reason(self, interval: Interval, largest_part: float) -> str | None:
        """Why an interval does not determine the parameter; its part of a time is at most it times `largest_part`."""
        name, unit = f"{self.name} {self.symbol}", f" {self.unit}" if self.unit else ""
        if interval.high < 0 or (self.is_fraction and interval.low > 1):
            found = f"{interval.value:.2g}{unit} (95 %: {interval.low:.2g} to {interval.high:.2g})"
            bound = "below 0" if interval.high < 0 else "above 1"
            return f"the points contradict the model: {name} would be {found}, and it cannot be {bound}"
        low, high = self.clip(interval.low), self.clip(interval.high)
        is_resolved = 0 < high <= _LARGEST_FACTOR * low
        is_small = self.can_vanish and high * largest_part <= _SMALL
        if is_resolved or is_small or (self.is_fraction and high - low <= _SMALL):
            return None
        return f"{name} may be anything from {low:.2g} to {high:.2g}{unit}: {self.advice}"

    def clip(self, value: float) -> float:
        """The nearest value within the parameter's bounds."""
        return min(max(value, 0.0), 1.0 if self.is_fraction else math.inf)


def fit_model(
    model: tuple[str, str, str],
    quantities: Sequence[Quantity],
    columns: Callable[[Array], Array],
    observations: Observations,
    at: Array,
    sizes: str,
    together: Indices | None = None,
) -> Fit:
    """Fit a model, its name, formula and source, to the `sizes` at which it was measured, (num_sizes, …).

    `columns` maps sizes (n,) or works (n, 3) to shapes (n, p), all >= 0. Sizes of one number in `together` are held out
    as one.
    """
    shapes, needed, num_blocks = columns(at), len(quantities) + 1, observations.num_blocks
    found = regress(observations, shapes, np.arange(len(at)) if together is None else together)
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
            reasons.append(one.reason(interval, float(np.max(unit * parts[:, one.column]))))
        why = min(filter(None, reasons), key=lambda reason: "contradict" not in reason, default=None)
    parameters, coefficients = [], np.full(len(quantities), np.nan)
    if has_values(found.nonnegative):
        coefficients = found.nonnegative
        for index, one in enumerate(quantities):
            low, high = (None, None) if why else map(one.clip, intervals[index][1:])
            parameters.append(Parameter(*one[1:4], one.clip(float(one.of(coefficients))), low, high))

    def predict(at: npt.ArrayLike) -> Array:
        return np.asarray(columns(np.asarray(at, dtype=np.float64)) @ coefficients)

    return Fit(*model, why is None, why, tuple(parameters), found.held_out_error, predict)
