"""If these fail, a forecast of nearly dependent features dies or is silently wrong, where training is not."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from torchreg import TrainConfig, plan
from torchreg.theory import MAX_FEATURES, Dynamics, RowGradients, learning_curve

TARGET = [5, 1, 9, 4, 8, 2, 7, 3]
LEARNING_RATES = (2.0**-10, 2.0**-4)


def dependent_table(bits, num_rows=8):
    """Features of which the second is the first plus multiples of 2^-bits, without any rounding; condition ~ 2^bits."""
    first = np.array([3, 7, 12, 4, 9, 15, 6, 10], dtype=float)[:num_rows]
    noise = np.array([1, -2, 2, 3, -3, 1, -1, 2], dtype=float)[:num_rows]
    return np.column_stack([first, first + noise * 2.0**-bits])


class Exact:
    """The same table in rational arithmetic: matrices are lists of rows."""

    def __init__(self, x, learning_rates=LEARNING_RATES):
        self.a = [[*map(Fraction, row), Fraction(1)] for row in x.tolist()]
        self.gram = mean_outer(self.a, self.a)
        self.learning_rates = [Fraction(learning_rates[0])] * x.shape[1] + [Fraction(learning_rates[1])]
        target = list(map(Fraction, TARGET[: len(x)]))
        moment = [
            sum(row[i] * t for row, t in zip(self.a, target, strict=True)) / len(x) for i in range(x.shape[1] + 1)
        ]
        theta = solve(self.gram, moment)
        self.residual = [t - dot(row, theta) for row, t in zip(self.a, target, strict=True)]
        self.start = np.array([-float(value) for value in theta])  # δ of parameters 0; rounded, and taken as it is

    def maps(self, batch_size, order):
        """A(k = 1) of every batch for z = (δ, 1)."""
        p = len(self.gram)
        for batch in itertools.combinations(range(len(self.a)), batch_size):
            b = [[*self.a[i], -self.residual[i]] for i in batch]
            q = mean_outer([self.a[i] for i in batch], b)
            q = [[2 * lr * value for value in row] for lr, row in zip(self.learning_rates, q, strict=True)]
            q.append([Fraction(0)] * (p + 1))
            first = range(p - 1) if order == "sequential" else range(p)
            of_part = minus(identity(p + 1), [q[i] if i in first else q[-1] for i in range(p + 1)])
            if order == "sequential":
                of_part = product(
                    minus(identity(p + 1), [q[i] if i == p - 1 else q[-1] for i in range(p + 1)]), of_part
                )
            yield of_part

    def curve(self, num_steps, batch_size, order="simultaneous"):
        """The expected excess after each step, all batches one by one."""
        maps = list(self.maps(batch_size, order))
        z = [*map(Fraction, self.start.tolist()), Fraction(1)]
        second = [[u * v for v in z] for u in z]
        yield self.excess(second)
        for _ in range(num_steps):
            moved = [product(product(m, second), transposed(m)) for m in maps]
            second = [
                [sum(values) / len(maps) for values in zip(*rows, strict=True)] for rows in zip(*moved, strict=True)
            ]
            yield self.excess(second)

    def excess(self, second):
        return float(
            sum(g * s for row, other in zip(self.gram, second, strict=False) for g, s in zip(row, other, strict=False))
        )

    def dynamics(self, x, batch_size, order="simultaneous"):
        residual = np.array(list(map(float, self.residual)))[:, None]
        return Dynamics.of(RowGradients.of(x, residual), LEARNING_RATES, batch_size, order)


def dot(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True))


def transposed(matrix):
    return [list(column) for column in zip(*matrix, strict=True)]


def product(left, right):
    return [[dot(row, column) for column in zip(*right, strict=True)] for row in left]


def minus(left, right):
    return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]


def identity(size):
    return [[Fraction(i == j) for j in range(size)] for i in range(size)]


def mean_outer(left, right):
    return [[value / len(left) for value in row] for row in product(transposed(left), right)]


def determinant(matrix):
    """By elimination of a matrix whose leading minors are not 0."""
    rows, value = [list(row) for row in matrix], Fraction(1)
    for i, row in enumerate(rows):
        value *= row[i]
        for below in rows[i + 1 :]:
            factor = below[i] / row[i]
            below[i:] = [a - factor * b for a, b in zip(below[i:], row[i:], strict=True)]
    return value


def solve(matrix, right):
    """By Cramer's rule."""
    whole = determinant(matrix)
    replaced = (
        [[*row[:i], r, *row[i + 1 :]] for row, r in zip(matrix, right, strict=True)] for i in range(len(matrix))
    )
    return [determinant(changed) / whole for changed in replaced]


# A relative error of about 1e-16 times the condition number comes from the rounding of the factor.
@pytest.mark.parametrize(("bits", "accuracy"), [(4, 1e-11), (20, 1e-9), (30, 1e-6), (40, 2e-3)])
@pytest.mark.parametrize(("batch_size", "order"), [(8, "simultaneous"), (8, "sequential"), (7, "simultaneous")])
def test_the_curve_is_that_of_rational_arithmetic(bits, accuracy, batch_size, order):
    x = dependent_table(bits)
    exact = Exact(x)
    curve = learning_curve(exact.dynamics(x, batch_size, order), exact.start, [1.0] * 12)
    np.testing.assert_allclose(curve.excess, list(exact.curve(12, batch_size, order)), rtol=accuracy)
    assert np.isfinite([curve.low, curve.high]).all()


@pytest.mark.parametrize(("bits", "accuracy"), [(4, 1e-11), (20, 1e-8), (30, 1e-5), (40, 1e-2)])
def test_limit_and_curvature_are_those_of_rational_arithmetic(bits, accuracy):
    x = dependent_table(bits)
    exact = Exact(x)
    dynamics = exact.dynamics(x, 8)
    scaled = [[lr * value for value in row] for lr, row in zip(exact.learning_rates, exact.gram, strict=True)]

    def characteristic(inverse):
        value = 1 / Fraction(inverse)
        return determinant(minus([[value * one for one in row] for row in identity(3)], scaled))

    # The largest eigenvalue is the last change of sign, and the others are far below it.
    limit = dynamics.largest_multiplier()
    assert characteristic(limit * (1 - 1e-12)) > 0 > characteristic(limit * (1 + 1e-12))
    # The product of the curvatures is the determinant of 2G, which the smallest one decides.
    curvature = RowGradients.of(x, np.ones((8, 1))).curvature()
    assert np.prod(curvature) == pytest.approx(float(8 * determinant(exact.gram)), rel=accuracy)


@pytest.mark.parametrize("sampling", ["full", "random", "shuffle"])
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_limit_and_noise_floor_are_those_without_the_dependent_feature(sampling, order):
    # A direction with a curvature of 1e-24 does not move, so it adds nothing but its excess at the start.
    x = dependent_table(40)
    exact = Exact(x)
    residual = np.array(list(map(float, exact.residual)))[:, None]
    batch_size = 8 if sampling == "full" else 3
    # One feature, doubled: the same loss of the sum of both weights.
    one, two = (
        Dynamics.of(RowGradients.of(table, residual), rates, batch_size, order, sampling)
        for table, rates in ((x[:, :1], (2 * LEARNING_RATES[0], LEARNING_RATES[1])), (x, LEARNING_RATES))
    )
    for predicted in (Dynamics.largest_multiplier, Dynamics.noise_floor):
        error = max(*(4 * d.sampling_error(predicted) for d in (one, two)), 1e-6 * np.mean(residual**2))
        assert predicted(two) == pytest.approx(predicted(one), rel=1e-5, abs=error)


@pytest.mark.parametrize("num_features", [2, MAX_FEATURES + 2])
@pytest.mark.parametrize("sampling", ["full", "random", "shuffle"])
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("likeness", [1e-5, 1e-8, 1e-12])
def test_plan_warns_and_predicts_what_gradient_descent_does(tmp_path, num_features, sampling, standardize, likeness):
    generator = np.random.default_rng(0)
    first = 100 + 10 * generator.normal(size=(60, 1))
    x = np.hstack([first, first * (1 + likeness * generator.normal(size=(60, num_features - 1)))])
    y = 3 * first + 20 * generator.normal(size=(60, 1))
    names = [f"x{i}" for i in range(num_features)]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(",".join(map(str, row)) for row in [[*names, "y"], *np.hstack([x, y]).tolist()]))
    options = {"features": tuple(names), "target": "y", "local_batch_size": None if sampling == "full" else 20}
    planned = plan(TrainConfig.of(data=str(path), sampling=sampling, standardize=standardize, **options), [1])
    assert "nearly dependent" in "\n".join(planned.conclusion())
    forecast = planned.rows[0].forecast
    assert forecast.is_stable
    assert np.isfinite(forecast.curve.excess).all()
    if sampling == "full":  # gradient descent itself does not square the condition number
        model = (x - x.mean(axis=0)) / x.std(axis=0) if standardize else x
        a = np.hstack([model, np.ones_like(y)])
        weight, bias = planned.rows[0].scaled_learning_rate
        learning_rates = np.array([weight] * num_features + [bias])
        theta = np.zeros(num_features + 1)
        for _ in range(forecast.curve.steps[-1]):
            theta -= 2 * learning_rates * (a.T @ (a @ theta - y[:, 0])) / len(a)
        excess = np.sum((np.linalg.qr(a)[0].T @ (a @ theta - y[:, 0])) ** 2) / len(a) / planned.best_loss
        assert forecast.curve.excess[-1] == pytest.approx(excess, rel=max(1e-9, 1e-14 / likeness))
