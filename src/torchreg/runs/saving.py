"""The checkpoints of a run: when they are saved, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchreg.core import checkpoint
from torchreg.core.checkpoint import Checkpoint
from torchreg.runs.environment import versions
from torchreg.runs.logger import Logger
from torchreg.runs.record import CHECKPOINTS_FOLDER


@dataclass(frozen=True)
class RunCheckpoints:
    """Saves a run every so many steps, and when its `logger` asks for it. All ranks call it; the main rank writes."""

    logger: Logger
    model: nn.Linear
    optimizer: torch.optim.Optimizer | None
    sessions: Sequence[Mapping[str, Any]]  # the run's processes so far, this one last

    def due(self, num_steps: int) -> bool:
        """Whether to save after `num_steps` steps: the same on every rank."""
        every = self.logger.config.checkpoint_every
        return (every is not None and num_steps % every == 0) or self.logger.checkpoint_is_due

    def save(self, num_steps: int) -> None:
        """Save the state after `num_steps` steps. Raises `OSError` where it cannot be written."""
        directory, signature = self.logger.directory, self.logger.state.run_signature
        with self.logger.saving() as progress:
            if not directory:
                return
            num_bytes, sha256 = directory.sync()
            metrics = {"metrics_bytes": num_bytes, "metrics_sha256": sha256, "sessions": list(self.sessions)}
            tensors = {
                "model": {name: value.cpu().clone() for name, value in self.model.state_dict().items()},
                "optimizer": self.optimizer.state_dict() if self.optimizer else {},
            }
            saved = Checkpoint(num_steps, signature, progress | metrics, versions(), tensors)
            checkpoint.save(directory.path / CHECKPOINTS_FOLDER, saved, self.logger.config.keep_checkpoints)

    def save_last(self) -> None:
        """Save the end of a run that was asked to stop, or that may be given more steps later."""
        stopped_by = self.logger.rule.stopped_by
        try:
            if stopped_by in ("request", "steps"):
                self.save(self.logger.num_steps)
        except OSError as error:
            if stopped_by == "request":
                raise
            reason = f"its last state cannot be saved ({error.strerror})"
            self.logger.reporter.warn(f"the run cannot be given more steps: {reason}")
