"""Ranks, devices and communication: the only package that uses ezpz, torch.distributed and mpi4py.

- `launcher`: which launcher started this process, and its rank;
- `rendezvous`: how ranks find each other; `devices`: the device of a rank; `init`: `init_distributed()`;
- `communicator`: the `Communicator` that the rest of the package uses; `mpi`, `ezpz`: what it needs of these packages;
- `watchdog`: time limits for calls that have none, and the end of all ranks when one fails; `failure`: its reason;
- `stopping`: signals and time limits; `timing`: clocks across ranks.
"""
