"""Predictions of linear least squares and of SGD on it, before training. NumPy only, in float64.

- `moments`: the closed-form solution, from sums that chunks and ranks can merge; the moments of row gradients;
- `dynamics`: the mean and the mean square of the error under SGD: stability limit and noise floor. Its parts: `steps`
  (one step), `epochs` (in which each row counts once) and `maps` (of second moments);
- `curves`: the learning curve, the band of single runs, and the steps to a target;
- `critical_batch`: the largest stable world size and the critical batch size.

Notation: n rows, a_i = (x_i, 1) ∈ R^p, G = (1/n) Σ a_i a_iᵀ, θ = (weight, bias), θ* the optimum, δ = θ − θ*,
residuals e_i = y_i − a_iᵀθ*, loss L(θ) = (1/n) Σ (y_i − a_iᵀθ)² = L* + δᵀGδ, gradient 2Gδ; P is the diagonal matrix
of the learning rates.
"""

from torchreg.theory.critical_batch import CriticalBatch, critical_batch_size, largest_stable_world_size
from torchreg.theory.curves import LearningCurve, learning_curve, steps_to
from torchreg.theory.dynamics import Dynamics
from torchreg.theory.moments import MAX_FEATURES, ClosedForm, Matrix, Moments, RowGradients
from torchreg.theory.steps import MAX_SEQUENTIAL, MOST_STEPS, Order

__all__ = [
    "MAX_FEATURES", "MAX_SEQUENTIAL", "MOST_STEPS", "ClosedForm", "CriticalBatch", "Dynamics", "LearningCurve",
    "Matrix", "Moments", "Order", "RowGradients", "critical_batch_size", "largest_stable_world_size", "learning_curve",
    "steps_to",
]  # fmt: skip
