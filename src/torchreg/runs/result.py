"""What a run ends with: the result that is printed, and the record with its provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from torchreg.console import digits, equation, number, percent
from torchreg.runs.environment import machine_facts, provenance
from torchreg.runs.record import SCHEMA_VERSION

if TYPE_CHECKING:  # a result is shown without torch
    from torch import nn

    from torchreg.distributed.communicator import Communicator
    from torchreg.runs.config import TrainConfig
    from torchreg.runs.logger import Logger
    from torchreg.runs.setup import RunState


@dataclass(frozen=True)
class Result:
    """The end of a run, in the data's own units; the same on every rank.

    `loss` is the mean squared error over all rows, `excess` how far it is above the closed form's as a fraction
    of it (None where that is 0, or after divergence). `train_time_s` is the slowest rank's, without set-up and
    evaluation; `throughput` is in samples/s over all ranks.
    """

    feature_names: tuple[str, ...]
    target_name: str
    weight: tuple[float, ...]
    bias: float
    loss: float
    closed_form_weight: tuple[float, ...]
    closed_form_bias: float
    closed_form_loss: float
    excess: float | None
    stopped_by: Literal["steps", "target", "divergence", "request"]
    diverged_at_step: int | None
    world_size: int
    global_batch_size: int
    scaled_learning_rate: tuple[float, float]
    num_steps: int
    num_samples: int
    train_time_s: float
    throughput: float
    run_dir: str

    @property
    def diverged(self) -> bool:
        """Whether the loss became non-finite or passed the divergence threshold."""
        return self.stopped_by == "divergence"

    def lines(self) -> list[str]:
        """The result, human-readable: the fitted line, the closed form, the losses."""
        if self.stopped_by == "request":
            return [f"stopped after {self.num_steps} steps, and saved: resume with --resume auto"]
        if self.diverged:
            return [f"diverged at step {self.diverged_at_step}: the loss is not finite or too large ({self.loss:.6g})"]
        excess = "" if self.excess is None else f" ({percent(self.excess)} above the optimum)"
        reached = " (target reached)" if self.stopped_by == "target" else ""
        names = (self.target_name, self.feature_names)
        return [
            f"fit          {equation(*names, self.weight, self.bias)}",
            f"closed form  {equation(*names, self.closed_form_weight, self.closed_form_bias)}",
            f"loss         {digits(self.loss)}{excess}",
            f"optimum      {digits(self.closed_form_loss)}",
            f"{self.num_steps} steps{reached}, {self.num_samples} samples in {number(self.train_time_s)} s "
            f"({self.throughput:,.0f} samples/s)",
        ]


def result_of_record(record: Mapping[str, Any]) -> Result:
    """The result that a record holds."""
    values: dict[str, Any] = dict(record["result"])
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Result(**values | lists | {"loss": math.nan if values["loss"] is None else values["loss"]})


def make_result(state: RunState, model: nn.Linear, logger: Logger) -> Result:
    """The result of a run that ended with this model."""
    weight, bias = state.standardizer.parameters_out(model.weight.detach().cpu().double().numpy()[0], model.bias.item())
    best = state.closed_form
    is_comparable = best.loss > 0 and logger.rule.stopped_by != "divergence"
    return Result(
        feature_names=state.feature_names,
        target_name=state.target_name,
        weight=tuple(weight.tolist()),
        bias=bias,
        loss=logger.loss,
        closed_form_weight=tuple(best.weight.tolist()),
        closed_form_bias=best.bias,
        closed_form_loss=best.loss,
        excess=state.moments.excess(weight, bias) / best.loss if is_comparable else None,
        stopped_by=logger.rule.stopped_by,
        diverged_at_step=logger.rule.diverged_at_step,
        world_size=state.plan.world_size,
        global_batch_size=state.plan.global_batch_size,
        scaled_learning_rate=state.schedule.scaled,
        num_steps=logger.num_steps,
        num_samples=logger.num_samples,
        train_time_s=logger.train_time_s,
        throughput=logger.num_samples / logger.train_time_s,
        run_dir=state.run_dir,
    )


def make_record(
    config: TrainConfig,
    state: RunState,
    num_dropped: int,
    communicator: Communicator,
    result: Result,
    sessions: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The record of a run: its result, what was derived before the first step, and its provenance.

    `num_dropped` rows had missing values. `sessions` are the run's processes, each with its first step, this one last.
    """
    of_plan = ("global_batch_size", "local_batch_size", "accumulation_steps", "steps_per_epoch")
    derived = {
        "num_rows": state.plan.num_rows,
        "num_dropped": num_dropped,
        "data_fingerprint": state.run_signature["data_fingerprint"],
        **{name: getattr(state.plan, name) for name in of_plan},
        "num_steps": state.schedule.num_steps,
        "log_every": state.log_every,
        "base_learning_rate": state.schedule.base,
        "scaled_learning_rate": state.schedule.scaled,
        "dtype": state.run_signature["dtype"],
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "train",
        "result": asdict(result),
        "config": asdict(config),
        "derived": derived,
        "forecast": asdict(state.forecast),
        "warnings": state.warnings,
        "run_signature": state.run_signature,
        "distributed": communicator.describe_environment(config.run.distributed),
        "sessions": list(sessions),
        "machine_facts": machine_facts(),
        "provenance": provenance(str(sessions[-1]["started_utc"])),
    }
