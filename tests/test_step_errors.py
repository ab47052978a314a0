"""If these fail, logged losses are of other steps than they say, or a signal that was given once stays for ever."""

import torch
from torchreg.runs.step_errors import StepErrors

from torchreg.distributed.communicator import init_distributed


def test_errors_are_told_in_their_order_and_a_signal_once():
    with init_distributed(device="cpu") as communicator:
        waiting = StepErrors(communicator, num_signals=2)
        waiting.settled = [1.0, 2.0]  # by an earlier process
        waiting.errors = [torch.tensor(3.0)]
        waiting.num_samples = [64, 64, 39]
        errors, signals = waiting.add_up((False, True))
        assert (errors.tolist(), signals.tolist()) == ([1, 2, 3], [0, 1])
        waiting.clear()
        waiting.errors, waiting.num_samples = [torch.tensor(4.0)], [64]
        errors, signals = waiting.add_up((False, False))
        assert (errors.tolist(), signals.tolist()) == ([4], [0, 0])
