"""Linear regression by DistributedDataParallel, on GPUs or CPUs.

`torchrun --standalone --nproc-per-node 4 examples/03_ddp.py`, `mpiexec -n 8 --ppn 4 python examples/03_ddp.py`, or
`srun -n 8 --ntasks-per-node 4 --gpus-per-node 4 python examples/03_ddp.py`.
"""

import argparse
import os
import socket
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--data", help="CSV file with the columns GrLivArea and SalePrice; default: 551 made houses")
parser.add_argument("--batch-size", type=int, help="samples of a step over all ranks; default: 64 for each rank")
parser.add_argument("--micro-batch-size", type=int, default=8192, help="most samples of a forward and backward")
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
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    # Not always localhost, which is another host on each node: ranks would wait for each other for ever.
    address = world.bcast("127.0.0.1" if node.size == world.size else socket.gethostname())
    with socket.create_server(("", 0)) as server:  # a fixed port may belong to another job
        port = world.bcast(server.getsockname()[1])
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(node.rank)}
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)  # before the group: else each rank takes memory on GPU 0 too
    dist.init_process_group("nccl", device_id=device)
else:
    device = torch.device("cpu")
    dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()

# Data, on the device. In square feet the loss is two million times as curved along the weight as along the bias, and
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
x, y = (torch.from_numpy(column)[:, None].to(device) for column in ((area - mean) / deviation, price))


def batches(batch_size):
    """The samples of each step. Every row counts once an epoch: the last batch is short, not dropped, not padded."""
    for epoch in range(args.epochs):
        order = torch.from_numpy(np.random.default_rng([0, epoch]).permutation(len(x)))
        yield from order.to(device).split(batch_size)  # one copy to the device an epoch, none a step


# The model, in float64 so that digits can be compared.
model = nn.Linear(1, 1, dtype=torch.float64, device=device)
nn.init.zeros_(model.weight)
nn.init.zeros_(model.bias)
batch_size = args.batch_size or 64 * world_size
lr = args.lr * batch_size / 64  # linear scaling (Goyal et al. 2017): fewer steps an epoch, each as much longer
optimizer = torch.optim.SGD(model.parameters(), lr=lr)
ddp_model = DistributedDataParallel(model)

squared_error, num_samples = torch.zeros((), dtype=torch.float64, device=device), 0
for step, samples in enumerate(batches(batch_size), start=1):
    # The samples of a step do not depend on the number of ranks. Shards differ by one sample, and may be empty.
    shard = samples.tensor_split(world_size)[rank]
    micro_batches = list(zip(x[shard].split(args.micro_batch_size), y[shard].split(args.micro_batch_size), strict=True))
    optimizer.zero_grad()
    for number, (inputs, targets) in enumerate(micro_batches, start=1):
        # Without no_sync each micro-batch is all-reduced. DDP decides in the forward, which therefore is inside.
        with nullcontext() if number == len(micro_batches) else ddp_model.no_sync():
            error = nn.functional.mse_loss(ddp_model(inputs), targets, reduction="sum")
            # DDP averages over ranks; this makes it a mean of all samples. Those of a short last batch count alike.
            (error * world_size / batch_size).backward()
        squared_error += error.detach()  # .item() would wait for the device in every step
    optimizer.step()

    num_samples += len(samples)
    if step % args.log_every == 0:  # the mean over many batches: the loss of one is mostly noise
        dist.all_reduce(squared_error)  # only for a line: it costs as much as the gradient's
        if rank == 0:
            print(f"step {step}  loss {squared_error.item() / num_samples:.5e}")
        squared_error, num_samples = torch.zeros_like(squared_error), 0

if rank == 0:
    weight, bias = model.weight.item(), model.bias.item()
    fits = {"fit": (weight / deviation, bias - weight * mean / deviation), "closed form": np.polyfit(area, price, 1)}
    losses = [np.square(weight * area + bias - price).mean() for weight, bias in fits.values()]
    for name, (weight, bias) in fits.items():
        print(f"{name:<12} SalePrice = {weight:.6f} GrLivArea + {bias:.6f}")
    print(f"{'loss':<12} {losses[0]:.6f} ({losses[0] / losses[-1] - 1:.4%} above the optimum)")
dist.destroy_process_group()
