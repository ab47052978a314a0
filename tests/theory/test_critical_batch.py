"""If these fail, a user asks for a world size at which training cannot converge, or leaves one unused."""

import numpy as np
import pytest

from torchreg.core.schedule import lr_scale
from torchreg.theory import Dynamics, critical_batch_size, largest_stable_world_size, steps_to

from .simulation import Houses

LESSON_RATES = (1e-7, 1e-1)


@pytest.mark.parametrize(
    ("rule", "order", "expected"),
    [
        # The limit is 3.14 times the learning rates (7.03 sequential): linear scaling gives k = ranks, sqrt k = √ranks.
        ("linear", "simultaneous", 3),
        ("linear", "sequential", 7),
        ("sqrt", "simultaneous", 8),  # √8 = 2.8; the data has rows for no more than 8 ranks
        ("none", "simultaneous", 8),
    ],
)
def test_largest_stable_world_size_of_the_lessons_learning_rates(rule, order, expected):
    def scale(global_batch_size):
        return lr_scale(rule, global_batch_size, 64)

    assert largest_stable_world_size(Houses().rows, LESSON_RATES, 64, scale, order) == expected


def test_no_world_size_is_stable_where_one_rank_is_not():
    assert largest_stable_world_size(Houses().rows, (1e-6, 1.0), 64, lambda size: size / 64) == 0


def test_steps_halve_below_the_critical_batch_size_and_not_above():
    houses = Houses(standardize=True, num_features=6)
    rates, target = (0.01, 0.05), 0.1 * houses.best_loss
    found = critical_batch_size(houses.rows, rates, -houses.optimum, target)
    assert found.batch_sizes[:3] == (1, 2, 4)
    assert found.batch_sizes[-1] == 512

    def fewest_steps(size):  # among many more learning rates
        dynamics = Dynamics.of(houses.rows, rates, size)
        tried = dynamics.largest_multiplier() * np.geomspace(0.95, 1e-3, 80)
        return min(filter(None, (steps_to(dynamics, target, -houses.optimum, [k]) for k in tried)))

    # At one row a step the noise is below the target only at a small part of the stability limit.
    assert found.steps[0] == pytest.approx(fewest_steps(1), rel=0.02)
    assert found.steps[4] == pytest.approx(fewest_steps(16), rel=0.03)
    assert fewest_steps(2 * found.critical) > 0.75 * fewest_steps(found.critical)
    before = found.critical - 1  # to one row, not to a power of two
    assert fewest_steps(2 * before) <= 0.75 * fewest_steps(before)
    # Each of these numbers of steps is that of the dynamics at the learning rates given with it.
    size, steps, k = found.batch_sizes[4], found.steps[4], found.multipliers[4]
    dynamics = Dynamics.of(houses.rows, rates, size)
    assert steps_to(dynamics, target, -houses.optimum, [k]) == steps
    assert k < dynamics.largest_multiplier()
