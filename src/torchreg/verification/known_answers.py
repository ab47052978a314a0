"""Do all ranks start from the same state, follow the exact trajectory, and end at the closed-form solution?

The samples of each step are known, so the parameters after it are too: to rounding, for any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torchreg.console import percent
from torchreg.core.batches import Batch, BatchPlan
from torchreg.core.model import make_model
from torchreg.core.train import ddp_gradient, fit, make_sgd, manual_samples, sgd_step
from torchreg.distributed.communicator import AnySync, Communicator
from torchreg.runs.config import TrainConfig
from torchreg.runs.environment import versions
from torchreg.runs.run import Seams, make_step, single_thread, to_device, train
from torchreg.runs.setup import prepare
from torchreg.theory import Matrix
from torchreg.verification.checks import Check, agree

Sync = AnySync | Literal["fsdp"]

_TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}  # of the largest parameter; TF32 is off by 7e-5 or more
_MANY_STEPS, _FEW_STEPS = 330, 6
_LONG_WHEN_QUICK = ("sgd", "ddp"), ("manual", "allreduce"), ("manual", "mpi")  # and in float64
_WIDTHS = (1, 64, 4_096)  # features
_MOST_VALUES = 1 << 22  # of a table
_BUCKETS_BYTES = 32 << 20  # beyond the 25 MiB of a bucket of DistributedDataParallel
_QUICK_BUCKETS_BYTES = 3 << 20  # beyond the 1 MiB of its first bucket
_BUCKET_TOLERANCE = 1e-6  # relative, of an average in float32


class KnownTraining(NamedTuple):
    """A training whose parameters are known after each step.

    `x` (num_rows, num_features) and `y` (num_rows, 1) are exact in float32, and the initial parameters are 0.
    """

    x: Matrix
    y: Matrix
    plan: BatchPlan
    learning_rates: tuple[float, float]

    @classmethod
    def of(cls, num_features: int, world_size: int, *, reproducible: bool = False) -> KnownTraining:
        """Two large batches and one of a single sample are an epoch.

        So shards are uneven, in the short last batch all but one are empty, and gradients accumulate. With these
        learning rates a step of a single sample enlarges no error by more than 1.4.
        """
        num_rows = max(550, min(4 * world_size, _MOST_VALUES // num_features)) + 1  # odd
        generator = np.random.default_rng(num_features)
        x = generator.uniform(-(3**0.5), 3**0.5, (num_rows, num_features)).astype(np.float32)
        y = x @ generator.uniform(-1, 1, (num_features, 1)) + 2 + generator.standard_normal((num_rows, 1))
        batch_size = num_rows // 2
        micro_batch_size = max(1, batch_size // (2 * world_size))
        plan = BatchPlan(num_rows, world_size, batch_size, micro_batch_size, "shuffle", 0, reproducible)
        learning_rates = 0.4 / (num_features + 1), 0.3 / (num_features + 1)
        return cls(x.astype(np.float64), y.astype(np.float32).astype(np.float64), plan, learning_rates)

    def exact_path(self, num_steps: int) -> Matrix:
        """The exact (weight, bias) after each step, (num_steps, num_features + 1)."""
        theta = np.zeros(self.x.shape[1] + 1)
        learning_rates = np.full_like(theta, self.learning_rates[0])
        learning_rates[-1] = self.learning_rates[1]
        path = []
        for step in range(num_steps):
            samples = self.plan.samples_of_step(step)
            x = self.x[samples]
            residual = x @ theta[:-1] + theta[-1] - self.y[samples, 0]
            theta = theta - learning_rates * 2 / len(samples) * np.append(residual @ x, residual.sum())
            path.append(theta)
        return np.array(path)

    def path(
        self, communicator: Communicator, seams: Seams, optimizer: str, sync: Sync, dtype: torch.dtype, num_steps: int
    ) -> Matrix:
        """The same as this rank trains it, together with the others."""
        device = communicator.device
        x, y = (torch.from_numpy(values).to(dtype).to(device) for values in (self.x, self.y))
        model = seams.model(make_model(np.zeros(x.shape[1]), 0.0, device=device, dtype=dtype))
        if sync == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=init_device_mesh(device.type, (communicator.world_size,)))
        sgd = make_sgd(model, self.learning_rates) if optimizer == "sgd" else None
        if sync != "fsdp":
            step = make_step(model, sgd, self.plan, communicator.using(sync))
        elif sgd:
            step = partial(sgd_step, sgd, partial(ddp_gradient, model, communicator.world_size))
        loader = seams.loader(self.plan, communicator.rank, *((x, y) if sgd else manual_samples(x, y)))
        path = x.new_empty(num_steps, x.shape[1] + 1)

        def log(batch: Batch, own_error: Tensor) -> bool:
            path[batch.step] = torch.cat([_whole(each.detach()).view(-1) for each in model.parameters()])
            return False

        fit(loader.iterate(0, num_steps), seams.step(step), lambda step: self.learning_rates, log)
        return path.double().cpu().numpy()


def _whole(parameter: Tensor) -> Tensor:
    """A parameter on this rank alone, also where FSDP shards it over ranks."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


class _WithGradients(nn.Module):
    """A model of several parameters whose gradients are what it is called with."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self.values = nn.ParameterList([torch.zeros(size, device=device) for size in sizes])

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.dot(*pair) for pair in zip(self.values, gradients, strict=True)]).sum()


def training_checks(communicator: Communicator, seams: Seams, *, quick: bool) -> Iterator[Check]:
    """The initial state, the paths of short trainings, large gradients, and the end of a whole run.

    The run's records are written to a temporary folder.
    """
    kind, several = communicator.device.type, communicator.world_size > 1
    by_ddp: list[AnySync] = ["ddp", "mpi"] if communicator.over_mpi else ["ddp"]
    in_steps: list[AnySync] = ["allreduce", "mpi"] if communicator.over_mpi else ["allreduce"]
    combinations: list[tuple[str, Sync]] = [*product(["sgd"], by_ddp), *product(["manual"], in_steps)]
    sharded: list[tuple[str, Sync]] = [("sgd", "fsdp")] if several and not quick and kind != "mps" else []
    dtypes = [torch.float32] if kind == "mps" else [torch.float64, torch.float32]
    with tempfile.TemporaryDirectory(prefix="torchreg-verify-") as runs_dir:
        config = TrainConfig.of(
            num_rows=551, sampling="full", base_learning_rate=(0.3, 0.3), lr_scaling="none", max_steps=60,
            dtype="float64" if kind == "cpu" else "float32", runs_dir=runs_dir, name="verify",
        )  # fmt: skip
        yield from _initial_state(communicator, seams, config)
        for dtype, (optimizer, sync) in product(dtypes, combinations + sharded):
            yield _exact_path(communicator, seams, optimizer, sync, dtype, quick=quick)
        for optimizer, sync in combinations:
            yield _bits_of_one_process(communicator, seams, optimizer, sync, dtypes[0])
        for each in by_ddp if several else []:
            yield _average_of_buckets(communicator, each, _QUICK_BUCKETS_BYTES if quick else _BUCKETS_BYTES)
        yield _closed_form(communicator, seams, config)


def _initial_state(communicator: Communicator, seams: Seams, config: TrainConfig) -> Iterator[Check]:
    state, table = communicator.from_main(partial(prepare, config, communicator.world_size))
    x, y = to_device(table if communicator.is_main else None, state, communicator)
    model = seams.model(make_model(*state.start, device=communicator.device, dtype=x.dtype))
    configuration = json.dumps([asdict(config.replace(runs_dir="")), state.run_signature])
    contents = {
        "data": [x.cpu().numpy().tobytes(), y.cpu().numpy().tobytes()],
        "parameters": [parameter.detach().cpu().numpy().tobytes() for parameter in model.parameters()],
        "configuration": [configuration.encode()],
    }
    own = {name: hashlib.sha256(b"".join(parts)).hexdigest()[:12] for name, parts in contents.items()}
    own["versions"] = json.dumps(versions())
    main = communicator.gather(own)[0]
    for name, value in own.items():
        error = None if value == main[name] else f"{value} here and {main[name]} on rank 0"
        measured = f"equal on {communicator.world_size}"
        yield agree(communicator, "initial state", name, error, measured, "equal on all")


@cache
def _known(num_features: int, world_size: int, num_steps: int) -> tuple[KnownTraining, Matrix]:
    known = KnownTraining.of(num_features, world_size)
    return known, known.exact_path(num_steps)


def _exact_path(
    communicator: Communicator, seams: Seams, optimizer: str, sync: Sync, dtype: torch.dtype, *, quick: bool
) -> Check:
    """The parameters after each step are exact to rounding, and the same bits on all ranks."""
    tolerance, digest, error, total, worst = _TOLERANCES[dtype], hashlib.sha256(), None, 0, 0.0
    for num_features in _WIDTHS:
        in_quick = (optimizer, sync) in _LONG_WHEN_QUICK and dtype == torch.float64
        is_long = num_features == 1 and sync != "fsdp" and (in_quick or not quick)
        num_steps = _MANY_STEPS if is_long else _FEW_STEPS
        known, exact = _known(num_features, communicator.world_size, num_steps)
        path = known.path(communicator, seams, optimizer, sync, dtype, num_steps)
        off = np.abs(path - exact).max(axis=1) / np.abs(exact).max()
        wrong = np.flatnonzero(~(off <= tolerance))  # NaN too
        if len(wrong) and error is None:
            error = f"off by {off[wrong[0]]:.2g} in step {wrong[0] + 1}, num_features {num_features}"
        digest.update(path.tobytes())
        total, worst = total + num_steps, max(worst, off.max())
    if digest.digest() != communicator.gather(digest.digest())[0] and error is None:
        error = "other bits than rank 0"
    name = f"{optimizer} × {sync}, {str(dtype).removeprefix('torch.')}"
    measured, expected = f"{total} steps, off by {worst:.1e}", f"within {tolerance:.0e}"
    return replace(agree(communicator, "exact path", name, error, measured, expected), num_steps=total)


def _bits_of_one_process(
    communicator: Communicator, seams: Seams, optimizer: str, sync: Sync, dtype: torch.dtype
) -> Check:
    """Reproducible reduction gives the bits of one process."""
    error = None
    with single_thread(True):
        for num_features in _WIDTHS[:2]:
            known = KnownTraining.of(num_features, communicator.world_size, reproducible=True)
            together = known.path(communicator, seams, optimizer, sync, dtype, _FEW_STEPS)
            known = known._replace(plan=replace(known.plan, world_size=1))
            alone = known.path(communicator.alone(), Seams(), optimizer, sync, dtype, _FEW_STEPS)
            if error is None and together.tobytes() != alone.tobytes():
                difference = np.abs(together - alone).max()
                error = f"differs from one process by {difference:.2g}, num_features {num_features}"
    return agree(
        communicator, "bit for bit", f"{optimizer} × {sync}", error, "the bits of one process", "the same bits"
    )


def _average_of_buckets(communicator: Communicator, sync: AnySync, num_bytes: int) -> Check:
    """A gradient of several buckets of DistributedDataParallel, in float32, averaged over ranks."""
    sizes = [num_bytes // 16, num_bytes // 8, num_bytes // 16]
    generator = torch.Generator().manual_seed(0)
    patterns = [torch.rand(size, generator=generator).to(communicator.device) for size in sizes]
    model = _WithGradients(sizes, communicator.device)
    wrapped = communicator.using(sync).wrap(model)
    error = None
    for buckets in ("one bucket", "several buckets"):  # DistributedDataParallel cuts them after its first backward
        model.zero_grad()
        wrapped([(communicator.rank + 1) * pattern for pattern in patterns]).backward()
        gradient = torch.cat([value.grad for value in model.values])
        average = (communicator.world_size + 1) / 2 * torch.cat(patterns)
        wrong = (~torch.isclose(gradient, average, rtol=_BUCKET_TOLERANCE, atol=0.0)).nonzero()
        if len(wrong) and error is None:
            index = int(wrong[0])
            error = f"{gradient[index]:.6g} in place of {average[index]:.6g} at {index}, in {buckets}"
    measured, expected = f"{sum(sizes)} elements averaged", f"within {_BUCKET_TOLERANCE:.0e}"
    name = f"sgd × {sync}, {num_bytes >> 20} MiB"
    return replace(agree(communicator, "large gradient", name, error, measured, expected), message_bytes=num_bytes)


def _closed_form(communicator: Communicator, seams: Seams, config: TrainConfig) -> Check:
    """A whole run on all samples ends at the closed form."""
    config = config.replace(optimizer="manual", sync="mpi" if communicator.over_mpi else "allreduce")
    curve = communicator.from_main(partial(prepare, config, 1))[0].forecast.curve
    assert curve
    most = curve.high[-1] + (1e-12 if config.run.dtype == "float64" else 1e-5)
    excess = train(config, communicator, seams=seams).excess
    measured = "diverged" if excess is None else f"{percent(excess)} above"
    error = None if excess is not None and excess <= most else measured
    return agree(communicator, "closed form", "full batch", error, measured, f"at most {percent(most)}")
