"""When and what a run saves, so that another process can go on from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchreg.core import checkpoint
from torchreg.core.checkpoint import Checkpoint
from torchreg.runs.config import TrainConfig
from torchreg.runs.logger import Metrics
from torchreg.runs.record import CHECKPOINTS_FOLDER, RunDirectory, versions


class Saver:
    """Saves a run every so many steps or seconds, and when asked. Every rank calls it; the main rank writes."""

    def __init__(
        self,
        config: TrainConfig,
        run_signature: Mapping[str, Any],
        directory: RunDirectory | None,
        model: nn.Linear,
        optimizer: torch.optim.Optimizer | None,
        metrics: Metrics,
        sessions: Sequence[Mapping[str, Any]],
    ) -> None:
        """`sessions` are the processes that the run has had so far, this one last, as the record tells them."""
        self._every = config.checkpoint_every
        self._keep = config.keep_checkpoints
        self._run_signature = run_signature
        self._directory = directory
        self._model = model
        self._optimizer = optimizer
        self._metrics = metrics
        self._sessions = sessions

    def is_due(self, num_steps: int) -> bool:
        """Whether to save after `num_steps` steps: the same answer on every rank."""
        return (self._every is not None and num_steps % self._every == 0) or self._metrics.save_is_due

    def save(self, num_steps: int) -> Path | None:
        """Save the state after `num_steps` steps; the checkpoint's path on the main rank.

        Raises `OSError` where it cannot be written.
        """
        with self._metrics.clock_stopped():
            progress = self._metrics.settle()
            path = self._write(num_steps, progress) if self._directory else None
        self._metrics.saved()
        return path

    def _write(self, num_steps: int, progress: Mapping[str, Any]) -> Path:
        assert self._directory
        tensors = {
            "model": {name: value.cpu().clone() for name, value in self._model.state_dict().items()},
            "optimizer": self._optimizer.state_dict() if self._optimizer else {},
        }
        num_bytes, sha256 = self._directory.sync()
        there = {"metrics_bytes": num_bytes, "metrics_sha256": sha256, "sessions": list(self._sessions)}
        saved = Checkpoint(
            step=num_steps,
            run_signature=self._run_signature,
            progress={**progress, **there},
            versions=versions(),
            tensors=tensors,
        )
        return checkpoint.save(self._directory.path / CHECKPOINTS_FOLDER, saved, self._keep)
