"""A rank that fails, while the others wait for it."""

from torchreg.distributed.init import init_distributed


def main() -> None:
    with init_distributed(sync="ddp", device="cpu", distributed="torch") as communicator:
        if communicator.rank == 1:
            raise OSError("the disk of rank 1 is gone")
        communicator.barrier()
        communicator.barrier()
