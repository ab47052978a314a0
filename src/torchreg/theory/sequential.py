"""What the sequential update order adds: moments of a batch that have no short formula, from sampled batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from torchreg.theory.maps import on_symmetric
from torchreg.theory.moments import Matrix

_SAMPLED_BATCHES = 2_048
_SAMPLE_GROUPS = 8


def sampled_batches(rows: Matrix, global_batch_size: int, seed: int) -> Iterator[Matrix]:
    """Groups of batches drawn without replacement, (batches, rows, p + 1); all rows once for a full batch."""
    if global_batch_size >= len(rows):
        yield rows[None]
        return
    generator = np.random.default_rng(seed)
    for _ in range(_SAMPLE_GROUPS):
        draws = [
            generator.choice(len(rows), global_batch_size, replace=False, shuffle=False)
            for _ in range(_SAMPLED_BATCHES // _SAMPLE_GROUPS)
        ]
        yield rows[np.array(draws)]


def higher_maps(batches: Matrix, factor: Matrix, mean: Matrix, covariance: Matrix) -> tuple[Matrix, Matrix]:
    """The k³ and k⁴ terms of E[A⊗A] in the sequential order, from batches (batches, rows, p + 1).

    The sampled mean_B(Q) are adjusted to the exact `mean` (p, p + 1) and `covariance` (p(p + 1), p(p + 1)): with the
    exact terms in k and k² the map is then that of one distribution, which keeps it positive, and little of the
    sampling error is left.
    """
    b = batches * factor
    q = b.shape[-1]
    sampled = (2 * b[:, :, :-1].swapaxes(1, 2) @ b / b.shape[1]).reshape(len(b), -1)
    deviations = sampled - sampled.mean(axis=0)
    adjusted = deviations @ _root(deviations.T @ deviations / len(b), -0.5) @ _root(covariance, 0.5)
    gradients = np.zeros((len(b), q, q))
    gradients[:, :-1] = (mean.ravel() + adjusted).reshape(len(b), q - 1, q)
    twice = np.zeros_like(gradients)
    twice[:, -2] = np.einsum("nj,njc->nc", gradients[:, -2, :-2], gradients[:, :-2])
    crossed = np.einsum("nib,njc->ijbc", gradients, twice) / len(b)
    third = crossed + crossed.transpose(1, 0, 3, 2)
    return -on_symmetric(third), on_symmetric(np.einsum("nib,njc->ijbc", twice, twice) / len(b))


def _root(covariance: Matrix, power: float) -> Matrix:
    """A power of a positive semidefinite matrix on its range."""
    values, vectors = np.linalg.eigh(covariance)
    in_range = values > 1e-10 * max(values[-1], 0.0)
    return np.asarray((vectors[:, in_range] * values[in_range] ** power) @ vectors[:, in_range].T)
