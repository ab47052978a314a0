"""If these fail, logged losses are of other steps than they claim, or a signal that was given once stays for ever."""

import torch

from torchreg.core.batches import Batch
from torchreg.distributed.init import init_distributed
from torchreg.runs.logger import LossBuffer


def batch_of(num_samples):
    return Batch(step=0, micro_batches=[], num_samples=num_samples, first_micro_batch=0)


def test_errors_keep_their_order_and_a_signal_is_heard_once():
    with init_distributed(device="cpu") as communicator:
        buffer = LossBuffer(communicator, num_signals=2)
        buffer.restore([1.0, 2.0], [64, 64])  # of an earlier process
        buffer.append(batch_of(39), torch.tensor(3.0))
        errors, signals = buffer.all_reduce((False, True))
        assert (errors, signals, buffer.num_samples) == ([1, 2, 3], [0, 1], [64, 64, 39])
        buffer.clear()
        buffer.append(batch_of(64), torch.tensor(4.0))
        errors, signals = buffer.all_reduce((False, False))
        assert (errors, signals) == ([4], [0, 0])
