"""If these fail, a user asks for a world size at which training cannot converge, or leaves one unused."""

import pytest

from torchreg.core.schedule import lr_scale
from torchreg.theory import Dynamics, critical_batch_size, largest_stable_world_size

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
    houses = Houses(standardize=True)
    found = critical_batch_size(houses.rows, (0.05, 0.05), -houses.optimum, 0.01 * houses.best_loss)
    assert found.batch_sizes[:3] == (1, 2, 4)
    assert found.batch_sizes[-1] == 512
    ratios = [later / now for now, later in zip(found.steps, found.steps[1:], strict=False)]
    index = found.batch_sizes.index(found.critical)
    assert max(ratios[:index]) <= 0.75 < ratios[index]
    # Each of these numbers of steps is that of the dynamics at the learning rates given with it.
    size, steps, k = found.batch_sizes[4], found.steps[4], found.multipliers[4]
    dynamics = Dynamics.of(houses.rows, (0.05, 0.05), size)
    assert dynamics.steps_to(0.01 * houses.best_loss, -houses.optimum, [k]) == steps
    assert k < dynamics.largest_multiplier()
