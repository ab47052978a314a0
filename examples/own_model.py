"""Your own model on torchreg.core and torchreg.distributed: a perceptron of 3 layers, Huber loss, AdamW, 8 features.

`torchreg data make --num-rows 2000 --num-features 8 --output houses.csv`, then under any launcher
`mpiexec -n 2 python examples/own_model.py --data houses.csv --time-limit-s 3300`. Out of time, or on SIGTERM or Ctrl-C,
it saves and exits with 75; started again, on any number of ranks, it resumes.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from torchreg import load_table
from torchreg.core import checkpoint
from torchreg.core.batches import BatchLoader, BatchPlan
from torchreg.core.train import ddp_gradient, fit, sgd_step
from torchreg.distributed.init import init_distributed
from torchreg.distributed.stopping import StopRequest

FEATURES = "GrLivArea", *(f"Feature{number}" for number in range(2, 9))


def huber_loss(prediction, target):
    """A sum over samples: `ddp_gradient` makes of it the mean over the samples of all ranks."""
    return nn.functional.huber_loss(prediction, target, reduction="sum")


def train(args, communicator, stop):
    """Train to the end, or until a rank has to stop. Returns whether it was the end."""
    table = communicator.from_main(lambda: load_table(args.data, features=FEATURES))  # one rank reads, all get it
    columns = torch.from_numpy(table.features), torch.from_numpy(table.target)
    x, y = (((column - column.mean(0)) / column.std(0)).to(communicator.device) for column in columns)
    plan = BatchPlan.derive(len(x), communicator.world_size, global_batch_size=args.batch_size)
    batches = BatchLoader(plan, communicator.rank, x, y)

    torch.manual_seed(0)
    layers = nn.Linear(len(FEATURES), 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    model = nn.Sequential(*layers).to(x)
    optimizer = torch.optim.AdamW(model.parameters())
    gradient = partial(ddp_gradient, communicator.wrap(model), communicator.world_size, loss=huber_loss)

    signature = {"data": table.fingerprint(), "batch_size": args.batch_size}

    def reason_against(old):
        return None if old.run_signature == signature else f"it is of {old.run_signature}"

    saved, refused = communicator.from_main(lambda: checkpoint.newest(args.checkpoints, reason_against))
    if refused and communicator.is_main:
        print(*refused, sep="\n")
    if saved:
        model.load_state_dict(saved.tensors["model"])
        optimizer.load_state_dict(saved.tensors["optimizer"])
    num_steps, is_stopped, total = saved.step if saved else 0, False, x.new_zeros(1)

    def log(batch, own_loss):
        nonlocal num_steps, is_stopped
        num_steps, total[:] = batch.step + 1, total + own_loss
        if num_steps % args.log_every == 0:
            communicator.all_reduce(total)
            if communicator.is_main:
                print(f"step {num_steps}  loss {total.item() / args.log_every / args.batch_size:.6f}")
            total.zero_()
            is_stopped = communicator.largest(stop.is_due()) > 0  # all ranks stop after the same step
        return is_stopped

    step = partial(sgd_step, optimizer, gradient)
    fit(batches.iterate(num_steps, args.max_steps), step, lambda step: (args.lr,), log)
    if communicator.is_main:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.save(args.checkpoints, checkpoint.Checkpoint(num_steps, signature, {}, {}, state), keep=2)
    return not is_stopped


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="houses.csv")
    parser.add_argument("--batch-size", type=int, default=64, help="samples of a step over all ranks")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--log-every", type=int, default=50, help="steps between two lines")
    parser.add_argument("--checkpoints", type=Path, default="checkpoints")
    parser.add_argument("--time-limit-s", type=float)
    args = parser.parse_args()
    with StopRequest(args.time_limit_s) as stop, init_distributed() as communicator:
        is_done = train(args, communicator, stop)
    sys.exit(0 if is_done else 75)
