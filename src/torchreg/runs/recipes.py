"""Configurations with a name."""

from __future__ import annotations

from torchreg.runs.config import TrainConfig

RECIPES: dict[str, TrainConfig] = {
    "default": TrainConfig(),
    "lesson": TrainConfig.of(
        standardize=False,
        optimizer="manual",
        update_order="sequential",
        sampling="full",
        base_learning_rate=(1e-7, 1e-1),
        lr_scaling="none",
        initial_weight=5.0,
        initial_bias=1000.0,
        epochs=30,
        dtype="float64",
    ),
}
RECIPES["homework"] = RECIPES["lesson"].replace(sampling="random", global_batch_size=64)
"""`default` is safe at any world size that the data allows; `lesson` is the original lesson to the digit, and
`homework` its exercise: batches of 64 rows that each step draws afresh."""


_HOMEWORK = RECIPES["homework"].replace(global_batch_size=None)
SWEEP_DEFAULTS: dict[str, TrainConfig] = {
    "batch": _HOMEWORK.replace(name="sweep-batch"),
    "lr-scaling": _HOMEWORK.replace(name="sweep-lr-scaling", epochs=None, max_steps=1_000),
}
"""The defaults of the runs of a sweep: the lesson's homework."""
