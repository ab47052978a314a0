"""A rank that meets the others once for each scenario of SCENARIOS, and prints a line for each: a device, or a reason.

SCENARIOS is JSON: for each scenario a list of the ranks' environment variables. FAKE_GPUS are the UUIDs of the GPUs
that a rank sees, OPTION is an option of its run, DEVICE its device, NCCL means a torch that is compiled with it.
"""

import json
import os
from types import SimpleNamespace

import torch
import torch.distributed as dist

from torchreg.distributed.init import init_distributed
from torchreg.distributed.rendezvous import AgreedError

make_group = dist.init_process_group
current, rank, port = [0], int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])


def uuids():
    return [uuid for uuid in os.environ.get("FAKE_GPUS", "").split(",") if uuid]


torch.cuda.is_available = lambda: bool(uuids())
torch.cuda.device_count = lambda: len(uuids())
torch.cuda.set_device = lambda index: current.__setitem__(0, index)
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=uuids()[device.index])
torch.cuda.get_device_name = lambda device: "Fake GPU"
dist.init_process_group = lambda backend, **options: make_group(backend.replace(",cuda:nccl", ""), **options)
is_compiled = dist.is_backend_available


def meet():
    dist.is_backend_available = dist.is_nccl_available = (lambda *_: True) if "NCCL" in os.environ else is_compiled
    try:
        with init_distributed(
            distributed="torch",
            device=os.environ.get("DEVICE", "auto"),
            timeout_s=20,
            run={"option": os.environ.get("OPTION")},
        ) as communicator:
            names = [placement.device_name for placement in communicator.placements]
            return "|".join([str(communicator.device), uuids()[current[0]], *names] if uuids() else [
                str(communicator.device), dist.get_backend_config()
            ])  # fmt: skip
    except AgreedError as error:
        return str(error)


for number, ranks in enumerate(json.loads(os.environ["SCENARIOS"])):
    os.environ["MASTER_PORT"] = str(port + number)
    os.environ.update(ranks[rank])
    print(meet(), flush=True)
    for name in ranks[rank]:
        del os.environ[name]
