"""What a fit tells, and when it is refused: a model's parameters are told only where the points determine them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from torchreg.scaling.regression import (
    FEWEST_BLOCKS,
    Array,
    Coefficients,
    Interval,
    Observations,
    Regression,
    fit_from_zero,
    regress,
)
from torchreg.scaling.statistics import Vector

_LARGEST_FACTOR = 10.0  # between the ends of an interval that still says how large a parameter is
_LITTLE = 0.2  # of a time, or of a fraction's range: an interval from 0 to less than that says that it is small


@dataclass(frozen=True)
class Parameter:
    """A model's parameter with its 95 % interval, cut at its bounds; None where the model is not identifiable."""

    name: str
    symbol: str
    unit: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Fit:
    """A fitted model.

    `why` says in words why it is not identifiable. `parameters` is empty if not even values can be told.
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
    predict: Callable[[npt.ArrayLike], Vector]


@dataclass(frozen=True)
class Quantity:
    """A parameter: a coefficient, one over the first coefficient, or the inverse of one; never negative.

    `can_vanish`: an interval tells enough if it says that the parameter's part of every time is little.
    """

    column: int
    name: str
    symbol: str
    unit: str
    advice: str
    kind: Literal["coefficient", "relative", "inverse"] = "coefficient"
    is_fraction: bool = False
    can_vanish: bool = False

    def of(self, coefficients: Coefficients) -> Coefficients:
        """From coefficients (..., p)."""
        own = coefficients[..., self.column]
        if self.kind == "relative":
            return np.asarray(own / coefficients[..., 0])
        return np.asarray(1 / own) if self.kind == "inverse" else own

    def problem(self, interval: Interval, largest_part: float) -> str | None:
        """Why an interval does not tell the parameter; times one of it, `largest_part` is its part of a time."""
        name, unit = f"{self.name} {self.symbol}", f" {self.unit}" if self.unit else ""
        told = f"{name} would be {interval.value:.2g}{unit} (95 %: {interval.low:.2g} to {interval.high:.2g})"
        if interval.high < 0:
            return f"the points contradict the model: {told}, and it cannot be below 0"
        if self.is_fraction and interval.low > 1:
            return f"the points contradict the model: {told}, and it cannot be above 1"
        low, high = max(interval.low, 0.0), min(interval.high, self._most)
        is_resolved = 0 < high <= _LARGEST_FACTOR * low
        is_little = self.can_vanish and high * largest_part <= _LITTLE
        is_narrow = self.is_fraction and high - low <= _LITTLE
        if is_resolved or is_little or is_narrow:
            return None
        return f"{name} may be anything from {low:.2g} to {high:.2g}{unit}: {self.advice}"

    def parameter(self, coefficients: Vector, interval: Interval | None) -> Parameter:
        """As it is told, within its bounds."""
        value = min(float(self.of(coefficients.astype(complex)).real), self._most)
        low, high = (None, None) if interval is None else (max(interval.low, 0.0), min(interval.high, self._most))
        return Parameter(self.name, self.symbol, self.unit, value, low, high)

    @property
    def _most(self) -> float:
        return 1.0 if self.is_fraction else math.inf


@dataclass(frozen=True)
class Model:
    """What a model is, apart from its data; `columns` maps sizes (n,) or works (n, 3) to shapes (n, p), all >= 0."""

    name: str
    formula: str
    source: str
    sizes: str
    quantities: tuple[Quantity, ...]
    columns: Callable[[Array], Array]

    def fitted(self, observations: Observations, at: Array, together: npt.NDArray[np.int64] | None = None) -> Fit:
        """Fit the sizes `at`, (num_places, …); those of one number in `together` are held out as one."""
        columns = self.columns(at)
        found = regress(observations, columns, np.arange(len(at)) if together is None else together)
        within = fit_from_zero(observations, columns)
        why = self._too_few(observations, len(at)) or self._undetermined(found, within)
        intervals = [] if why else [found.interval(quantity.of) for quantity in self.quantities]
        if intervals:
            why = self._untold(found, columns, intervals)
        parameters: tuple[Parameter, ...] = ()
        if np.isfinite(found.coefficients).all() and self._has_values(within):
            parameters = tuple(
                quantity.parameter(within, None if why else intervals[index])
                for index, quantity in enumerate(self.quantities)
            )
        coefficients = within if parameters else np.full_like(within, np.nan)
        return Fit(
            self.name, self.formula, self.source, why is None, why, parameters, found.held_out_error,
            lambda at: np.asarray(self.columns(np.asarray(at, dtype=np.float64)) @ coefficients),
        )  # fmt: skip

    def _has_values(self, coefficients: Array) -> bool:
        """Whether all parameters are finite, for each of the coefficients (..., p)."""
        is_relative = any(quantity.kind != "coefficient" for quantity in self.quantities)
        return bool(np.isfinite(coefficients).all() and not (is_relative and coefficients[..., 0].min() <= 0))

    def _undetermined(self, found: Regression, within: Vector) -> str | None:
        if not np.isfinite(found.coefficients).all():
            return f"at these {self.sizes} its terms have the same shape, or times are too scattered for any to be seen"
        if not np.isfinite(found.without_block).all():
            return "it rests on one block of launches alone: repeat the launches that failed in the others"
        if not all(map(self._has_values, (found.coefficients, found.without_block, within))):
            return f"the points contradict the model: {self.quantities[0].name} would not be positive"
        return None

    def _too_few(self, observations: Observations, num_places: int) -> str | None:
        needed = len(self.quantities) + 1
        if num_places < needed:
            told = f"{num_places} {self.sizes if num_places > 1 else self.sizes.removesuffix('s')}"
            return f"{told} for {needed - 1} parameters: from {needed} on, the points can contradict the model"
        if observations.num_blocks < FEWEST_BLOCKS:
            told = f"{observations.num_blocks} block{'s' * (observations.num_blocks > 1)} of launches"
            return f"{told}: from {FEWEST_BLOCKS} on, their spread can be told"
        return None

    def _untold(self, found: Regression, columns: Array, intervals: list[Interval]) -> str | None:
        fitted = columns @ found.coefficients
        problems = []
        for quantity, interval in zip(self.quantities, intervals, strict=True):
            one = found.coefficients[0] if quantity.kind == "relative" else 1
            problems.append(quantity.problem(interval, float(np.max(one * columns[:, quantity.column] / fitted))))
        told = [problem for problem in problems if problem]
        return min(told, key=lambda problem: "contradict" not in problem, default=None)  # a contradiction comes first
