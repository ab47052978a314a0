"""Learning rates as pure functions of the global batch size and of the step. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


def lr_scale(rule: Literal["linear", "sqrt", "none"], global_batch_size: int, reference_batch_size: int) -> float:
    """The factor of `base_learning_rate` at a global batch size (linear: Goyal et al. 2017)."""
    ratio = global_batch_size / reference_batch_size
    return {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[rule]


@dataclass(frozen=True)
class Schedule:
    """The learning rates (weight, bias) of each step: warm-up from base to scaled, then decay.

    `linear` and `cosine` decay end at the fraction `decay_to` of the scaled learning rates, on the last of `num_steps`;
    `step` multiplies by `decay_factor` every `decay_every` steps after the warm-up. The last of every `steps_per_epoch`
    steps takes `last_factor` times that: its batch may be short, and the mean over few samples is noisy.
    """

    base: tuple[float, float]
    scale: float
    num_steps: int
    warmup_steps: int = 0
    decay: Literal["constant", "linear", "cosine", "step"] = "constant"
    decay_to: float = 0.0
    decay_factor: float = 0.1
    decay_every: int | None = None
    steps_per_epoch: int = 1
    last_factor: float = 1.0

    def __call__(self, step: int) -> tuple[float, float]:
        """The learning rates of step 0, 1, …, `num_steps` − 1."""
        factor = self.factor(step) * (1.0 if (step + 1) % self.steps_per_epoch else self.last_factor)
        weight, bias = self.base
        return weight * factor, bias * factor

    @property
    def scaled(self) -> tuple[float, float]:
        """The learning rates between warm-up and decay."""
        return self.base[0] * self.scale, self.base[1] * self.scale

    @property
    def steps_per_drop(self) -> int:
        """Steps between two drops of `step` decay: by default a third of the run."""
        return self.decay_every or max(1, math.ceil(self.num_steps / 3))

    def factor(self, step: int) -> float:
        """The factor of `base` in a step with a whole batch."""
        if step < self.warmup_steps:
            return 1 + (self.scale - 1) * step / self.warmup_steps
        if self.decay == "constant":
            return self.scale
        if self.decay == "step":
            return float(self.scale * self.decay_factor ** ((step - self.warmup_steps) // self.steps_per_drop))
        steps_left = self.num_steps - 1 - self.warmup_steps
        done = (step - self.warmup_steps) / steps_left if steps_left > 0 else 0.0
        if self.decay == "linear":
            return self.scale * (1 - (1 - self.decay_to) * done)
        return self.scale * (self.decay_to + (1 - self.decay_to) * (1 + math.cos(math.pi * done)) / 2)
