"""A rank that sees the GPUs of FAKE_GPUS (their UUIDs, separated by commas), and tells which one it takes."""

import os
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

uuids = [uuid for uuid in os.environ.get("FAKE_GPUS", "").split(",") if uuid]
make_group = dist.init_process_group
current = [0]

torch.cuda.is_available = lambda: bool(uuids)
torch.cuda.device_count = lambda: len(uuids)
torch.cuda.set_device = lambda index: current.__setitem__(0, index)
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=uuids[device.index])
torch.cuda.get_device_name = lambda device: "Fake GPU"
dist.init_process_group = lambda backend, **options: make_group(backend.replace(",cuda:nccl", ""), **options)

from torchreg.distributed.init import init_distributed  # noqa: E402
from torchreg.distributed.rendezvous import AgreedError  # noqa: E402

try:
    with init_distributed(distributed="torch", device=os.environ.get("DEVICE", "auto"), timeout_s=20) as communicator:
        print(
            communicator.device,
            uuids[current[0]] if uuids else "none",
            *(p.device_name for p in communicator.placements),
            sep="|",
        )
except AgreedError as error:
    print(error)
    sys.exit(2)
