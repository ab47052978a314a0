"""What linear algebra says about this training: the best line, and the rates that reach it. NumPy only.

Notation (Wilkinson 1965, Higham 2002; Needell, Ward and Srebro 2014 for the second moments): n rows,
a_i = (x_i, 1) ∈ R^p, G = (1/n) Σ a_i a_iᵀ, θ = (weight, bias), loss L(θ) = (1/n) Σ (y_i − a_iᵀθ)²,
gradient 2(Gθ − c). P is the diagonal matrix of the learning rates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

MAX_SECOND_MOMENT_PARAMETERS = 16
"""The second moment of SGD costs p⁴: beyond this many parameters only the mean is predicted."""

_CHUNK_ROWS = 65_536
_SAMPLED_BATCHES = 256
_RANK_TOLERANCE = 1e-10


@dataclass(frozen=True)
class ClosedForm:
    """The least-squares optimum: `weight` (num_features,), `bias`, and the loss there (mean squared error)."""

    weight: Matrix
    bias: float
    loss: float


@dataclass(frozen=True)
class Moments:
    """First and second moments of rows (x, y), from which closed form and loss follow without the rows.

    `mean` is (p,) over features and target. `factor` is (p, p), upper triangular, RᵀR being the sum of centred
    outer products: the QR factor keeps the precision that squaring the rows would lose. Moments of parts
    `merge` exactly like the whole (Chan, Golub and LeVeque 1983; the QR form is TSQR), so a table can be reduced
    over chunks and ranks.
    """

    num_rows: int
    mean: Matrix
    factor: Matrix

    @classmethod
    def of(cls, features: Matrix, target: Matrix) -> Moments:
        """Moments of features (rows, num_features) and target (rows, 1), in one pass over chunks of rows."""
        chunks = (
            cls._of_chunk(np.hstack([features[i : i + _CHUNK_ROWS], target[i : i + _CHUNK_ROWS]]))
            for i in range(0, len(features), _CHUNK_ROWS)
        )
        return reduce(cls.merge, chunks)

    @classmethod
    def _of_chunk(cls, rows: Matrix) -> Moments:
        mean = rows.mean(axis=0)
        return cls(len(rows), mean, _triangle(rows - mean))

    def merge(self, other: Moments) -> Moments:
        """The moments of the rows of both."""
        num_rows = self.num_rows + other.num_rows
        difference = self.mean - other.mean
        between = np.sqrt(self.num_rows * other.num_rows / num_rows) * difference
        return Moments(
            num_rows,
            self.mean - difference * (other.num_rows / num_rows),
            _triangle(np.vstack([self.factor, other.factor, between])),
        )

    def closed_form(self) -> ClosedForm:
        """The least-squares optimum. Raises `ValueError` if the features do not determine it."""
        r_features, r_target, r_residual = self.factor[:-1, :-1], self.factor[:-1, -1], self.factor[-1, -1]
        lengths = np.linalg.norm(r_features, axis=0)
        dependent = np.flatnonzero(np.abs(np.diag(r_features)) <= _RANK_TOLERANCE * lengths)
        if len(dependent):
            raise ValueError(
                f"feature {dependent[0] + 1} of {len(lengths)} is a linear combination of those before it, so "
                "infinitely many lines fit equally well: leave it out"
            )
        weight = np.asarray(np.linalg.solve(r_features, r_target), dtype=np.float64)
        bias = self.mean[-1] - weight @ self.mean[:-1]
        return ClosedForm(weight, float(bias), float(r_residual**2 / self.num_rows))

    def excess(self, weight: Matrix, bias: float) -> float:
        """L(θ) − L*: how far a line is above the best possible mean squared error, without cancellation."""
        best = self.closed_form()
        off = weight - best.weight
        slope_part = self.factor[:-1, :-1] @ off
        return float(slope_part @ slope_part / self.num_rows + (bias - best.bias + off @ self.mean[:-1]) ** 2)

    def loss(self, weight: Matrix, bias: float) -> float:
        """Mean squared error of a line over all rows."""
        return self.closed_form().loss + self.excess(weight, bias)


def _triangle(rows: Matrix) -> Matrix:
    num_columns = rows.shape[1]
    if len(rows) < num_columns:
        rows = np.vstack([rows, np.zeros((num_columns - len(rows), num_columns))])
    return np.asarray(np.linalg.qr(rows, mode="r"))


@dataclass(frozen=True)
class Stability:
    """Whether rates k·(weight rate, bias rate) converge on these rows, as a question about k.

    The rows are scaled by the square roots of the rates, which turns P into the identity and the badly
    conditioned raw units into comparable ones. With mini-batches the test is the spectral radius of the
    transition of the second moment (`criterion` "mean square"); for a full batch, or beyond
    `MAX_SECOND_MOMENT_PARAMETERS`, that of the mean.

    `shuffle` is judged as if each step drew its rows afresh: close, not equal.
    """

    gram: Matrix
    """G in scaled rows, (p, p)."""
    fourth: Matrix | None
    """φ·(F − G⊗G) with F = E[(a aᵀ) ⊗ (a aᵀ)], (p², p²); None for the mean's criterion."""
    sampled_grams: Matrix | None
    """Gram matrices of sampled batches, (batches, p, p), for the sequential order on mini-batches."""
    sequential: bool

    @classmethod
    def of(
        cls,
        features: Matrix,
        rates: tuple[float, float],
        batch_size: int,
        order: Literal["simultaneous", "sequential"] = "simultaneous",
        seed: int = 0,
    ) -> Stability:
        """The stability of these rates (weight, bias) on features (rows, num_features) as the model sees them."""
        num_rows = len(features)
        rows = np.column_stack([features * np.sqrt(rates[0]), np.full(num_rows, np.sqrt(rates[1]))])
        gram = rows.T @ rows / num_rows
        sequential = order == "sequential"
        if batch_size >= num_rows or len(gram) > MAX_SECOND_MOMENT_PARAMETERS:
            return cls(gram, None, None, sequential)
        if sequential:
            generator = np.random.default_rng(seed)
            batches = (
                rows[generator.choice(num_rows, batch_size, replace=False, shuffle=False)]
                for _ in range(_SAMPLED_BATCHES)
            )
            return cls(gram, None, np.stack([batch.T @ batch / batch_size for batch in batches]), sequential)
        fourth = np.zeros((len(gram) ** 2, len(gram) ** 2))
        for i in range(0, num_rows, 4096):
            chunk = rows[i : i + 4096]
            outer = np.einsum("ni,nj->nij", chunk, chunk).reshape(len(chunk), -1)
            fourth += outer.T @ outer / num_rows
        # E[(aaᵀ)⊗(aaᵀ)] has the entry a_i a_k a_j a_l at row (i, j), column (k, l); the sum above has (i, k), (j, l).
        p = len(gram)
        fourth = fourth.reshape(p, p, p, p).transpose(0, 2, 1, 3).reshape(p * p, p * p)
        phi = (num_rows - batch_size) / (batch_size * (num_rows - 1))
        return cls(gram, phi * (fourth - np.kron(gram, gram)), None, sequential)

    @property
    def criterion(self) -> str:
        """What must shrink: the mean of the error, or its mean square."""
        return "mean" if self.fourth is None and self.sampled_grams is None else "mean square"

    def radius(self, k: float) -> float:
        """Spectral radius of one step with the rates times k; the step converges if and only if it is below 1."""
        if self.sampled_grams is not None:
            steps = _transition(self.sampled_grams, k, self.sequential)
            p = len(self.gram)
            matrix = np.einsum("nik,njl->ijkl", steps, steps).reshape(p * p, p * p) / len(steps)
        else:
            step = _transition(self.gram, k, self.sequential)
            matrix = step if self.fourth is None else np.kron(step, step) + 4 * k**2 * self.fourth
        return float(np.abs(np.linalg.eigvals(matrix)).max())

    def largest_multiplier(self) -> float:
        """The k at which the rates times k stop to converge, to one part in a million."""
        high = 1.0 / float(np.linalg.eigvalsh(self.gram)[-1])  # the simultaneous full-batch limit
        while self.radius(high) < 1:
            high *= 2
        return _bisect(lambda k: self.radius(k) < 1, 0.0, high)


def _transition(gram: Matrix, k: float, sequential: bool) -> Matrix:
    """I − 2kG, or (I − 2k P_b G)(I − 2k P_w G): the bias with the new weight. `gram` is (..., p, p)."""
    identity = np.eye(gram.shape[-1])
    if not sequential:
        return identity - 2 * k * gram
    bias_only = np.zeros(gram.shape[-1])
    bias_only[-1] = 1.0
    first = identity - 2 * k * (1 - bias_only)[:, None] * gram
    second = identity - 2 * k * bias_only[:, None] * gram
    return np.asarray(second @ first)


def _bisect(is_stable: Callable[[float], bool], low: float, high: float) -> float:
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if is_stable(middle) else (low, middle)
    return low


def largest_stable_world_size(
    features: Matrix,
    base_rates: tuple[float, float],
    local_batch_size: int,
    scale: Callable[[int], float],
    order: Literal["simultaneous", "sequential"] = "simultaneous",
) -> int:
    """The most ranks, at `local_batch_size` rows each, at which the scaled rates are stable; 0 if not even one is.

    `scale` gives the factor of the rates at a global batch size. Stability is monotone in the world size for
    the scaling rules of `optim`, so the answer is found by bisection.
    """

    def is_stable(world_size: int) -> bool:
        batch_size = world_size * local_batch_size
        return Stability.of(features, base_rates, batch_size, order).radius(scale(batch_size)) < 1

    low, high = 0, max(1, len(features) // local_batch_size)
    if is_stable(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_stable(middle) else (low, middle)
    return low
