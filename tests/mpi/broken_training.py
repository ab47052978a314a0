"""Stacks that train wrongly in known ways. A rank checks each; the main rank prints the rows that fail, as JSON."""

import json
from itertools import count

import torch
import torch.distributed as dist

from torchreg.core.train import manual_step
from torchreg.distributed.communicator import Communicator
from torchreg.distributed.init import init_distributed
from torchreg.runs.run import Seams
from torchreg.verification.known_answers import training_checks


def hooked(hook_of):
    """A communicator that hooks `hook_of(parameter)` into the backward of each parameter of a DDP model."""

    class Hooked(Communicator):
        def wrap(self, model):
            for parameter in model.parameters():
                parameter.register_hook(hook_of(parameter))
            return super().wrap(model)

    return Hooked


def averaging(part_of):
    """A communicator whose DDP over torch.distributed averages the part of a bucket that `part_of(bucket)` names."""

    def average(_, bucket):
        gradient, part = bucket.buffer(), part_of(bucket)
        total = gradient[part].clone()
        dist.all_reduce(total)
        gradient[part] = total / dist.get_world_size()
        done = torch.futures.Future()
        done.set_result(gradient)
        return done

    class Averaging(Communicator):
        def wrap(self, model):
            wrapped = super().wrap(model)
            if not self.over_mpi:
                wrapped.register_comm_hook(None, average)
            return wrapped

    return Averaging


def enlarged_in_float32(parameter):
    return lambda gradient: gradient * (1.01 if parameter.dtype == torch.float32 else 1.0)


def enlarged_every_50th(_):
    calls = count(1)
    return lambda gradient: gradient * (1.5 if next(calls) % 50 == 0 else 1.0)


def through_bfloat16(_):
    return lambda gradient: gradient.bfloat16().to(gradient.dtype)


def with_batch(change):
    """Steps that get another batch."""
    return lambda step, rank: lambda batch, lr: step(change(batch, rank), lr)


def without_gradient_after_300(batch, rank):
    if rank == 0 or batch.step < 300:
        return batch
    return batch._replace(micro_batches=[(a[:0], y[:0]) for a, y in batch.micro_batches])


def with_last_micro_batch_only(batch, rank):
    return batch._replace(micro_batches=batch.micro_batches[-1:])


def as_mean_of_rank_means(batch, rank):
    own = sum(len(a) for a, _ in batch.micro_batches)
    return batch._replace(num_samples=max(1, own * dist.get_world_size()))


def with_parameters(factor_of):
    """Steps after which the parameters are multiplied."""

    def changed(step, rank):
        parameters = step.args[0]

        def take(batch, lr):
            error = step(batch, lr)
            parameters.flat.mul_(factor_of(rank))
            return error

        return take

    return changed


IN_DDP = {
    "averages 2 elements": averaging(lambda bucket: slice(2)),
    "every 50th average × 1.5": hooked(enlarged_every_50th),
    "averages × 1.01 in float32": hooked(enlarged_in_float32),
    "averages the first bucket": averaging(lambda bucket: slice(0 if bucket.index() else None)),
    "averages through bfloat16": hooked(through_bfloat16),
}
IN_MANUAL_STEPS = {
    "a rank without gradient after 300 steps": with_batch(without_gradient_after_300),
    "ranks that differ by 2e-13": with_parameters(lambda rank: 1 + 2e-13 * rank),
    "mean of rank means": with_batch(as_mean_of_rank_means),
    "weight decay of 1e-7": with_parameters(lambda rank: 1 - 1e-7),
    "last micro-batch only": with_batch(with_last_micro_batch_only),
}


def main():
    """Check stacks of two defects each: one in DDP, one in manual steps, which fail different rows."""
    failed = {}
    with init_distributed(sync="mpi", device="cpu", distributed="torch") as communicator:
        for (in_ddp, kind), (in_step, changed) in zip(IN_DDP.items(), IN_MANUAL_STEPS.items(), strict=True):

            def change(step, changed=changed):
                return changed(step, communicator.rank) if step.func is manual_step else step

            checks = list(training_checks(kind(**vars(communicator)), Seams(step=change), quick=True))
            rows = [(check.area, check.name) for check in checks if check.status == "FAIL"]
            failed[in_ddp] = [row for row in rows if "sgd" in row[1]]
            failed[in_step] = [row for row in rows if "sgd" not in row[1]]
        if communicator.is_main:
            print(json.dumps(failed))
