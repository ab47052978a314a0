"""Linear regression in one process: the gradient from paper beside torch.optim.SGD, and the optimum both approach.

`python examples/01_single_process.py [--data houses.csv]`
"""

import argparse

import numpy as np
import torch
from torch import nn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--data", help="CSV file with the columns GrLivArea and SalePrice; default: 551 made houses")
parser.add_argument("--batch-size", type=int, default=64, help="samples of a step")
parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--log-every", type=int, default=30, help="steps between two lines")
args = parser.parse_args()

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


# The model, twice: by hand, and for autograd. In float64, so that digits can be compared.
weight = bias = 0.0
model = nn.Linear(1, 1, dtype=torch.float64)
nn.init.zeros_(model.weight)
nn.init.zeros_(model.bias)
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)

squared_error, num_samples = torch.zeros((), dtype=torch.float64), 0
for step, samples in enumerate(batches(args.batch_size), start=1):
    inputs, targets = x[samples], y[samples]
    # On paper: the loss is the mean of r², where r = weight · x + bias - y. Its derivative is the mean of 2 r x by the
    # weight, and the mean of 2 r by the bias. In the short last batch batch_size makes each sample count as in others.
    residual = weight * inputs + bias - targets
    sums = torch.stack([(residual * inputs).sum(), residual.sum()])
    weight_gradient, bias_gradient = (2 * sums / args.batch_size).tolist()
    weight, bias = weight - args.lr * weight_gradient, bias - args.lr * bias_gradient
    squared_error += residual.square().sum()

    optimizer.zero_grad()
    (nn.functional.mse_loss(model(inputs), targets, reduction="sum") / args.batch_size).backward()
    optimizer.step()

    num_samples += len(samples)
    if step % args.log_every == 0:  # the mean over many batches: the loss of one is mostly noise
        print(f"step {step}  loss {squared_error.item() / num_samples:.5e}")
        squared_error, num_samples = torch.zeros_like(squared_error), 0

fits = {"manual": (weight, bias), "SGD": (model.weight.item(), model.bias.item())}
fits = {name: (weight / deviation, bias - weight * mean / deviation) for name, (weight, bias) in fits.items()}
fits["closed form"] = np.polyfit(area, price, 1)
losses = [np.square(weight * area + bias - price).mean() for weight, bias in fits.values()]
for name, (weight, bias) in fits.items():
    print(f"{name:<12} SalePrice = {weight:.6f} GrLivArea + {bias:.6f}")
print(f"{'loss':<12} {losses[0]:.6f} ({losses[0] / losses[-1] - 1:.4%} above the optimum)")
