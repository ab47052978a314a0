"""What linear algebra says about this training, before it happens. NumPy only, in float64.

- `moments`: the best line, from sums that chunks and ranks can merge;
- `rows`: what the gradients of rows are, and the curvature;
- `dynamics`: what one step of SGD does to the mean and the mean square of the error, and so stability, noise
  floor, learning curve and steps to a target (`curve`, `maps`, `modes`, `sequential` and `shuffle` are its parts);
- `scaling`: what that means for a world size or a batch size.

Notation: n rows, a_i = (x_i, 1) ∈ R^p, G = (1/n) Σ a_i a_iᵀ, θ = (weight, bias), θ* the optimum, δ = θ − θ*,
residuals e_i = y_i − a_iᵀθ*, loss L(θ) = (1/n) Σ (y_i − a_iᵀθ)² = L* + δᵀGδ, gradient 2Gδ; P is the diagonal matrix
of the learning rates.
"""

from torchreg.theory.critical_batch import CriticalBatch, critical_batch_size, largest_stable_world_size
from torchreg.theory.curve import LearningCurve
from torchreg.theory.dynamics import MOST_STEPS, Dynamics
from torchreg.theory.moments import ClosedForm, Matrix, Moments
from torchreg.theory.row_gradients import MAX_FEATURES, RowGradients
from torchreg.theory.steps import MAX_SEQUENTIAL, Order

__all__ = [
    "MAX_FEATURES",
    "MAX_SEQUENTIAL",
    "MOST_STEPS",
    "ClosedForm",
    "CriticalBatch",
    "Dynamics",
    "LearningCurve",
    "Matrix",
    "Moments",
    "Order",
    "RowGradients",
    "critical_batch_size",
    "largest_stable_world_size",
]
