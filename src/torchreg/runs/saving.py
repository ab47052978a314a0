"""The checkpoints of a run: when they are saved, and what they hold."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchreg.core import checkpoint
from torchreg.core.checkpoint import Checkpoint
from torchreg.runs.config import TrainConfig
from torchreg.runs.environment import versions
from torchreg.runs.logger import Logger
from torchreg.runs.record import CHECKPOINTS_FOLDER, RunDirectory
from torchreg.runs.setup import RunState


class RunCheckpoints:
    """Saves a run every so many steps or seconds, and on request. All ranks call it; the main rank writes.

    `sessions` describes the processes that the run has had so far, this one last.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: RunState,
        directory: RunDirectory | None,
        model: nn.Linear,
        optimizer: torch.optim.Optimizer | None,
        logger: Logger,
        sessions: Sequence[Mapping[str, Any]],
    ) -> None:
        self._every, self._every_s = config.run.checkpoint_every, config.run.checkpoint_every_s
        self._keep = config.run.keep_checkpoints
        self._run_signature = state.run_signature
        self._directory = directory
        self._model = model
        self._optimizer = optimizer
        self._logger = logger
        self._sessions = sessions
        self._saved_s = time.perf_counter()
        logger.wants_checkpoint = self._time_is_over

    def _time_is_over(self) -> bool:
        """Whether the seconds between two checkpoints have passed on the main rank."""
        is_over = self._every_s is not None and time.perf_counter() - self._saved_s >= self._every_s
        return is_over and self._directory is not None

    def due(self, num_steps: int) -> bool:
        """Whether to save after `num_steps` steps: the same on every rank."""
        return (self._every is not None and num_steps % self._every == 0) or self._logger.checkpoint_is_due

    def save(self, num_steps: int) -> Path | None:
        """Save the state after `num_steps` steps; the checkpoint's path on the main rank.

        Raises `OSError` where it cannot be written.
        """
        with self._logger.clock.paused():
            progress = self._logger.progress()
            path = self._write(num_steps, progress) if self._directory else None
        self._logger.checkpoint_is_due, self._saved_s = False, time.perf_counter()
        return path

    def _write(self, num_steps: int, progress: Mapping[str, Any]) -> Path:
        assert self._directory
        num_bytes, sha256 = self._directory.sync()
        metrics = {"metrics_bytes": num_bytes, "metrics_sha256": sha256, "sessions": list(self._sessions)}
        tensors = {
            "model": {name: value.cpu().clone() for name, value in self._model.state_dict().items()},
            "optimizer": self._optimizer.state_dict() if self._optimizer else {},
        }
        saved = Checkpoint(num_steps, self._run_signature, {**progress, **metrics}, versions(), tensors)
        return checkpoint.save(self._directory.path / CHECKPOINTS_FOLDER, saved, self._keep)
