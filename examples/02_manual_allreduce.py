"""Linear regression on many ranks: the gradient from paper, summed over ranks by mpi4py or torch.distributed.

`mpiexec -n 2 python -m mpi4py examples/02_manual_allreduce.py` (without `-m mpi4py` a rank that fails leaves the others
waiting), or `torchrun --standalone --nproc-per-node 2 examples/02_manual_allreduce.py`.
"""

import argparse
import os

import numpy as np
import torch
import torch.distributed as dist

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--data", help="CSV file with the columns GrLivArea and SalePrice; default: 551 made houses")
parser.add_argument("--batch-size", type=int, help="samples of a step over all ranks; default: 64 for each rank")
parser.add_argument("--lr", type=float, default=0.05, help="learning rate at 64 samples")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--log-every", type=int, default=30, help="steps between two lines")
args = parser.parse_args()

# Ranks. torchrun describes them in the environment; under mpiexec and srun MPI knows them.
if "RANK" not in os.environ:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    sizes = map(os.environ.get, ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    started = max(int(size or 1) for size in sizes)
    if started != world.size:  # else each rank would train alone, and all would report success
        raise SystemExit(f"{started} ranks were started and MPI connects {world.size}: mpi4py has another MPI")
    rank, world_size = world.rank, world.size
else:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()


def all_reduce(tensor):
    """Replace a tensor, on every rank, by its sum over ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    else:
        world.Allreduce(MPI.IN_PLACE, tensor.numpy())


# Data. In square feet the loss is two million times as curved along the weight as along the bias, and
# no learning rate suits both; with standardized areas one does.
if args.data:
    table = np.genfromtxt(args.data, delimiter=",", names=True)
    area, price = table["GrLivArea"], table["SalePrice"]
else:
    generator = np.random.default_rng(0)
    area = generator.lognormal(7.2, 0.3, size=551).round()
    price = 35_000 + 88 * area + generator.normal(0, 25 * area)
if not np.isfinite([area, price]).all():  # one NaN makes every weight NaN
    raise SystemExit(f"{args.data}: a value is missing or is no finite number")
mean, deviation = area.mean(), area.std()
x, y = (torch.from_numpy(column)[:, None] for column in ((area - mean) / deviation, price))


def batches(batch_size):
    """The samples of each step. Every row counts once an epoch: the last batch is short, not dropped, not padded."""
    for epoch in range(args.epochs):
        order = torch.from_numpy(np.random.default_rng([0, epoch]).permutation(len(x)))
        yield from order.split(batch_size)


# The model, in float64 so that digits can be compared.
weight = bias = 0.0
batch_size = args.batch_size or 64 * world_size
lr = args.lr * batch_size / 64  # linear scaling (Goyal et al. 2017): fewer steps an epoch, each as much longer

squared_error, num_samples = torch.zeros((), dtype=torch.float64), 0
for step, samples in enumerate(batches(batch_size), start=1):
    # The samples of a step do not depend on the number of ranks. Shards differ by one sample, and may be empty.
    shard = samples.tensor_split(world_size)[rank]
    inputs, targets = x[shard], y[shard]
    # On paper: the loss is the mean of r², where r = weight · x + bias - y. Its derivative is the mean of 2 r x by the
    # weight, and the mean of 2 r by the bias. In the short last batch batch_size makes each sample count as in others.
    residual = weight * inputs + bias - targets
    sums = torch.stack([(residual * inputs).sum(), residual.sum()])
    all_reduce(sums)  # sums, and then a mean: a mean of the ranks' means would weigh samples unequally
    weight_gradient, bias_gradient = (2 * sums / batch_size).tolist()
    weight, bias = weight - lr * weight_gradient, bias - lr * bias_gradient
    squared_error += residual.square().sum()

    num_samples += len(samples)
    if step % args.log_every == 0:  # the mean over many batches: the loss of one is mostly noise
        all_reduce(squared_error)  # only for a line: it costs as much as the gradient's
        if rank == 0:
            print(f"step {step}  loss {squared_error.item() / num_samples:.5e}")
        squared_error, num_samples = torch.zeros_like(squared_error), 0

if rank == 0:
    fits = {"fit": (weight / deviation, bias - weight * mean / deviation), "closed form": np.polyfit(area, price, 1)}
    losses = [np.square(weight * area + bias - price).mean() for weight, bias in fits.values()]
    for name, (weight, bias) in fits.items():
        print(f"{name:<12} SalePrice = {weight:.6f} GrLivArea + {bias:.6f}")
    print(f"{'loss':<12} {losses[0]:.6f} ({losses[0] / losses[-1] - 1:.4%} above the optimum)")
if dist.is_initialized():
    dist.destroy_process_group()
