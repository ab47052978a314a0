"""Who am I, which device, how gradients are averaged: the only home of ezpz, torch.distributed and mpi4py.

- `rendezvous`: how ranks find each other and become a process group;
- `ezpz`: everything that torchreg knows about ezpz;
- `devices`: which device a rank computes on;
- `watchdog`, `failure`: what ends a wait for ranks that are gone, and all ranks when one fails;
- `reproducible`: sums whose bits do not depend on the number of ranks;
- `ranks`: the `Communicator` that the rest of the package sees, and `init_distributed()`.
"""
