"""Many runs of SGD at once in plain NumPy, written from the algorithm, to check theory against."""

import numpy as np

from torchreg.data.table import Standardizer, load_table
from torchreg.theory import Moments, RowGradients


class Houses:
    """A table, its optimum in the model's units, and what theory needs of it."""

    def __init__(self, source="synthetic", *, standardize=False, **options):
        table = load_table(source, **options)
        self.solve(table.features, table.target, standardize)

    @classmethod
    def with_outliers(cls, num_rows, num_features, seed=0):
        """Standardised, with features and errors from a t distribution of 3 degrees of freedom."""
        generator, houses = np.random.default_rng(seed), cls.__new__(cls)
        x = generator.standard_t(3, (num_rows, num_features))
        houses.solve(x, x.sum(axis=1, keepdims=True) + generator.standard_t(3, (num_rows, 1)), standardize=True)
        return houses

    def solve(self, features, target, standardize):
        best = Moments.of(features, target).closed_form()
        standardizer = Standardizer.of(features, standardize=standardize)
        self.best_loss = best.loss
        self.x, self.y = standardizer.apply(features), target
        self.optimum = np.append(*standardizer.parameters_in(best.weight, best.bias))
        self.a = np.hstack([self.x, np.ones_like(self.y)])
        self.rows = RowGradients.of(self.x, self.y - self.a @ self.optimum[:, None])

    def excess(self, theta):
        """L(θ) − L* of parameters (..., p)."""
        off = theta - self.optimum
        return np.mean((off @ self.a.T) ** 2, axis=-1)


def simulate(
    houses,
    start,
    learning_rates,
    batch_size,
    factors,
    num_runs,
    *,
    order="simultaneous",
    shuffle=False,
    scale_last_batch=True,
    seed=0,
):
    """Yield θ (num_runs, p) after each step of `num_runs` runs that draw their rows without replacement.

    They draw afresh in each step, or with `shuffle` take the next batch of the permutation of each epoch, the last of
    which is short and has learning rates in proportion to its size, unless `scale_last_batch` is False.
    """
    generator = np.random.default_rng(seed)
    num_rows = len(houses.a)
    theta = np.tile(np.asarray(start, dtype=float), (num_runs, 1))
    learning_rate = np.array([learning_rates[0]] * (len(start) - 1) + [learning_rates[1]])
    steps_per_epoch = -(-num_rows // batch_size)
    assert num_rows <= 1024, "a key is 22 random bits and the 10 bits of its row"
    for step, factor in enumerate(factors):
        position = step % steps_per_epoch if shuffle else 0
        if position == 0:
            random = generator.integers(1 << 22, size=(num_runs, num_rows), dtype=np.uint32)
            keys = random << 10 | np.arange(num_rows, dtype=np.uint32)
            drawn = np.sort(keys) if shuffle else np.partition(keys, batch_size - 1)
        rows = drawn[:, position * batch_size : (position + 1) * batch_size] & 1023
        a, y = houses.a[rows], houses.y[rows, 0]
        factor *= rows.shape[1] / batch_size if scale_last_batch else 1.0
        if order == "sequential":
            theta[:, :-1] -= factor * (learning_rate * _gradient(theta, a, y))[:, :-1]
            theta[:, -1] -= factor * (learning_rate * _gradient(theta, a, y))[:, -1]
        else:
            theta = theta - factor * learning_rate * _gradient(theta, a, y)
        yield theta


def _gradient(theta, a, y):
    residual = (a @ theta[:, :, None])[:, :, 0] - y
    return 2 * (residual[:, None] @ a)[:, 0] / y.shape[1]
