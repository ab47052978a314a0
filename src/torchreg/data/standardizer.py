"""Features and parameters in the data's units and in the model's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Standardizer:
    """Features shifted to mean 0 and scaled to variance 1: x ↦ (x − mean) / scale, both (num_features,).

    With mean 0 and scale 1 it is the identity. Parameters are mapped so that they describe the same line.
    """

    mean: Matrix
    scale: Matrix

    @classmethod
    def of(cls, features: Matrix, *, standardize: bool) -> Standardizer:
        """The standardizer of features (num_rows, num_features), or the identity."""
        if standardize:
            return cls(features.mean(axis=0), features.std(axis=0))
        return cls(np.zeros(features.shape[1]), np.ones(features.shape[1]))

    def apply(self, features: Matrix) -> Matrix:
        """Features (rows, num_features) in the model's units."""
        return (features - self.mean) / self.scale

    def parameters_in(self, weight: Matrix, bias: float) -> tuple[Matrix, float]:
        """Parameters in the model's units, from those in the data's units."""
        return weight * self.scale, float(bias + weight @ self.mean)

    def parameters_out(self, weight: Matrix, bias: float) -> tuple[Matrix, float]:
        """Parameters in the data's units, from those in the model's units."""
        with np.errstate(over="ignore", invalid="ignore"):  # after divergence
            return weight / self.scale, float(bias - (weight / self.scale) @ self.mean)
