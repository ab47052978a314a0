"""The checkpoints of a run: when they are saved, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchreg.console import Reporter
from torchreg.core import checkpoint
from torchreg.core.checkpoint import Checkpoint
from torchreg.runs.config import RunConfig
from torchreg.runs.environment import versions
from torchreg.runs.logger import Logger
from torchreg.runs.record import CHECKPOINTS_FOLDER, RunDirectory
from torchreg.runs.result import Result
from torchreg.runs.setup import RunState


@dataclass(frozen=True)
class RunCheckpoints:
    """Saves a run every so many steps, and when the `logger` asks for it. All ranks call it; the main rank writes.

    `sessions` describes the processes that the run has had so far, this one last.
    """

    config: RunConfig
    state: RunState
    directory: RunDirectory | None
    model: nn.Linear
    optimizer: torch.optim.Optimizer | None
    logger: Logger
    sessions: Sequence[Mapping[str, Any]]

    def due(self, num_steps: int) -> bool:
        """Whether to save after `num_steps` steps: the same on every rank."""
        every = self.config.checkpoint_every
        return (every is not None and num_steps % every == 0) or self.logger.checkpoint_is_due

    def save(self, num_steps: int) -> None:
        """Save the state after `num_steps` steps. Raises `OSError` where it cannot be written."""
        with self.logger.saving() as progress:
            if not self.directory:
                return
            num_bytes, sha256 = self.directory.sync()
            metrics = {"metrics_bytes": num_bytes, "metrics_sha256": sha256, "sessions": list(self.sessions)}
            tensors = {
                "model": {name: value.cpu().clone() for name, value in self.model.state_dict().items()},
                "optimizer": self.optimizer.state_dict() if self.optimizer else {},
            }
            saved = Checkpoint(num_steps, self.state.run_signature, progress | metrics, versions(), tensors)
            checkpoint.save(self.directory.path / CHECKPOINTS_FOLDER, saved, self.config.keep_checkpoints)

    def save_last(self, result: Result, reporter: Reporter) -> None:
        """Save the end of a run that was asked to stop, or that may be given more steps later."""
        if result.stopped_by not in ("request", "steps"):
            return
        try:
            self.save(result.num_steps)
        except OSError as error:
            if result.stopped_by == "request":
                raise
            reporter.warn(f"the run cannot be given more steps: its last state cannot be saved ({error.strerror})")
