"""Higher moments of a batch, which the sequential update order needs, estimated from sampled batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from torchreg.theory.maps import on_symmetric
from torchreg.theory.moments import Matrix

_SAMPLE_GROUPS = 8
_GROUP_BATCHES = 256
_MOST_DRAWN_ROWS = 512


def sampled_deviations(rows: Matrix, root: Matrix, global_batch_size: int, seed: int) -> Iterator[Matrix]:
    """Groups of mean_B(Q) − Q̄ of batches B drawn without replacement, (batches, p(p + 1)), from rows b_i.

    Beyond 512 rows they are drawn from the normal distribution that they approach, whose covariance has this `root`.
    """
    generator = np.random.default_rng(seed)
    for _ in range(_SAMPLE_GROUPS):
        if global_batch_size >= len(rows):
            yield np.zeros((1, len(root)))
            return
        if global_batch_size > _MOST_DRAWN_ROWS:
            sampled = generator.standard_normal((_GROUP_BATCHES, len(root))) @ root
        else:
            draws = [
                generator.choice(len(rows), global_batch_size, replace=False, shuffle=False)
                for _ in range(_GROUP_BATCHES)
            ]
            b = rows[np.array(draws)]
            sampled = (2 * b[:, :, :-1].swapaxes(1, 2) @ b / b.shape[1]).reshape(len(b), -1)
        yield sampled - sampled.mean(axis=0)


def higher_maps(deviations: Matrix, mean: Matrix, root: Matrix) -> tuple[Matrix, Matrix]:
    """The k³ and k⁴ terms of E[A⊗A] in the sequential order, from `sampled_deviations`.

    They are adjusted to the exact `mean` (p, p + 1) and covariance, whose root is `root` (p(p + 1), p(p + 1)). With the
    exact terms in k and k² the map is then that of one distribution, so it stays positive; and the sampling error
    becomes small.
    """
    num, (p, q) = len(deviations), mean.shape
    adjusted = deviations @ covariance_root(deviations.T @ deviations / num, -0.5) @ root
    gradients = np.zeros((num, q, q))
    gradients[:, :-1] = (mean.ravel() + adjusted).reshape(num, p, q)
    twice = np.zeros_like(gradients)
    twice[:, -2] = np.einsum("nj,njc->nc", gradients[:, -2, :-2], gradients[:, :-2])
    crossed, squared = (np.einsum("nib,njc->ijbc", left, twice, optimize=True) / num for left in (gradients, twice))
    return -on_symmetric(crossed + crossed.transpose(1, 0, 3, 2)), on_symmetric(squared)


def covariance_root(covariance: Matrix, power: float) -> Matrix:
    """A power of a positive semidefinite matrix on its range."""
    values, vectors = np.linalg.eigh(covariance)
    in_range = values > 1e-10 * max(values[-1], 0.0)
    return np.asarray((vectors[:, in_range] * values[in_range] ** power) @ vectors[:, in_range].T)
