"""One step of SGD as polynomials in the rates: the matrices that `Dynamics` asks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from torchreg.theory.maps import both_ways, on_symmetric, pairs
from torchreg.theory.moments import Matrix
from torchreg.theory.row_gradients import RowGradients
from torchreg.theory.sequential import covariance_root, higher_maps, sampled_deviations

Order = Literal["simultaneous", "sequential"]

MAX_SEQUENTIAL = 128
"""The sequential order has no symmetric matrix: beyond this many features it is predicted as the simultaneous one."""

_NARROWEST = 1e-50  # of the widest direction: its fourth power is still a number
_EXTREME = 1e305  # rates beyond which the stability limit would not be a number


@dataclass(frozen=True)
class StepMaps:
    """What a step does to the error in units in which every rate is 1, see `Dynamics`, and what it is made of.

    `mean_q` (p + 1, p + 1) is the mean over rows of Q_i, `covariance` (p, p + 1, p, p + 1) that of its upper rows, None
    where there are too many features for it; then there are no `square_maps`. `groups` are `square_maps` of each group
    of sampled batches.
    """

    rate_unit: float
    scale: Matrix
    mean_q: Matrix
    covariance: Matrix | None = None
    mean_maps: tuple[Matrix, ...] = ()
    square_maps: tuple[Matrix, ...] = ()
    groups: tuple[tuple[Matrix, ...], ...] = ()


def step_maps(
    rows: RowGradients, learning_rates: tuple[float, float], global_batch_size: int, order: Order, seed: int
) -> StepMaps:
    """The maps of a step with these rates of the weight and of the bias at k = 1.

    Raises `ValueError` for rates so far apart that one of them vanishes beside the other, and for rates too extreme to
    have a stability limit in float64.
    """
    num_rows, q = rows.num_rows, rows.mean.shape[1]
    sqrt_learning_rates = np.sqrt(np.array([learning_rates[0]] * (q - 2) + [learning_rates[1]]))
    lengths = np.append(rows.feature_unit, 1.0) * sqrt_learning_rates
    unit = float(lengths.max())
    given = f"base_learning_rate is {learning_rates[0]:.4g} (weight) and {learning_rates[1]:.4g} (bias)"
    if lengths.min() < _NARROWEST * unit:
        raise ValueError(
            f"{given}, too far apart to be computed with, for features of size {rows.feature_unit.max():.3g}: bring "
            "them closer"
        )
    rate_unit = unit * unit
    if not 1 / _EXTREME < rate_unit < _EXTREME:
        small = unit < 1
        raise ValueError(
            f"{given}, too {'small' if small else 'large'} to be computed with, for features of size "
            f"{rows.feature_unit.max():.3g}: give {'larger' if small else 'smaller'} ones"
        )
    factor = np.append(lengths / unit, 1.0)  # what turns the rows' units into those of δ̃
    mean_q = np.zeros((q, q))
    scaling = np.outer(factor[:-1], factor, out=mean_q[:-1])
    scaling *= 2
    scaling *= rows.mean
    maps = StepMaps(rate_unit, unit / (sqrt_learning_rates * rows.error_unit), mean_q)
    # A = (I − kBQ)(I − kWQ) in the sequential order, W and B keeping the weight's rows and the bias's:
    # I − kQ + k² BQWQ.
    twice = np.zeros((q, q) if order == "sequential" else (0, 0))
    if rows.rows is None or rows.covariance is None:
        if order == "sequential" and q - 2 <= MAX_SEQUENTIAL:
            twice[-2] = mean_q[-2, :-2] @ mean_q[:-2]
            return replace(maps, mean_maps=(-mean_q, twice))
        return maps
    scaling = 2 * np.outer(factor[:-1], factor)
    phi = max(0.0, (num_rows - global_batch_size) / (global_batch_size * (num_rows - 1)))
    of_samples = rows.covariance * scaling.ravel() * scaling.reshape(-1, 1)
    of_batch = phi * of_samples
    squares = pairs(mean_q, mean_q)
    squares[:-1, :-1] += of_batch.reshape(q - 1, q, q - 1, q).transpose(0, 2, 1, 3)
    mean_maps, square_maps = [-mean_q], [-on_symmetric(both_ways(mean_q, np.eye(q))), on_symmetric(squares)]
    groups: list[tuple[Matrix, ...]] = []
    if order == "sequential":
        twice[-2] = np.einsum("jjc->c", squares[-2, :-2, :-2])
        mean_maps.append(twice)
        square_maps[1] = square_maps[1] + on_symmetric(both_ways(twice, np.eye(q)))
        exact = tuple(square_maps)
        root = covariance_root(of_batch, 0.5)
        sampled = sampled_deviations(rows.rows * factor, root, global_batch_size, seed)
        groups = [(*exact, *higher_maps(deviations, mean_q[:-1], root)) for deviations in sampled]
        square_maps += [np.mean([group[j] for group in groups], axis=0) for j in (2, 3)]
    return replace(
        maps,
        covariance=of_samples.reshape(q - 1, q, q - 1, q),
        mean_maps=tuple(mean_maps),
        square_maps=tuple(square_maps),
        groups=tuple(groups),
    )
