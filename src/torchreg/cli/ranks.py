"""Ranks that start and end together, whatever goes wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

from torchreg.cli.options import EXIT_BAD_INPUT, EXIT_FAILED
from torchreg.distributed.communicator import Communicator
from torchreg.distributed.devices import why_not_a_gpu
from torchreg.distributed.failure import FORWARDED_WITHIN_S, one_line
from torchreg.distributed.init import init_distributed
from torchreg.distributed.launcher import detect_launcher
from torchreg.distributed.rendezvous import AgreedError
from torchreg.runs.config import TrainConfig
from torchreg.runs.stopping import ignore_signals

T = TypeVar("T")

_ECHO_DELAY_S = 2.0


def open_ranks(config: TrainConfig) -> Communicator:
    """Bring up the ranks. What goes wrong here may be seen by all ranks or by one: it is told once, and ends all."""
    try:
        communicator = init_distributed(
            distributed=config.distributed,
            device=config.device,
            sync=config.effective_sync,
            dtype=config.dtype,
            timeout_s=config.timeout_s,
            run=asdict(config),
        )
        if (
            communicator.is_main
            and (warning := why_not_a_gpu(config.device, os.environ))
            and communicator.device.type == "cpu"
        ):
            print(f"torchreg: warning: {warning}", file=sys.stderr)
        return communicator
    except AgreedError:
        raise
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        rank = 0
        with contextlib.suppress(ValueError):
            rank = detect_launcher(os.environ).rank
        code = EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))  # of srun, when another rank has left
        if rank > 0:
            time.sleep(_ECHO_DELAY_S)  # the main rank most likely tells the same, and the launcher ends this one
        told = f"torchreg: error: {' '.join(str(error).split())}"
        if not isinstance(error, ValueError):
            who = f"on rank {rank} ({socket.gethostname()})"
            told = f"torchreg: error {who}: the ranks did not come together: {one_line(error)}"
        print(told, file=sys.stderr, flush=True)
        time.sleep(FORWARDED_WITHIN_S)
        # Without MPI_Finalize and process group clean-up, which would wait for ranks that are not there.
        os._exit(code)


def on_all_ranks(communicator: Communicator, work: Callable[[], T]) -> T:
    """What `work` returns, on ranks that end together: bad input is told by an `AgreedError`, and nothing else is."""
    try:
        with communicator:
            result = work()
            if communicator.world_size > 1:
                # The first rank that leaves with a code other than 0 makes srun signal those that are still leaving:
                # the job's exit code would be 143 instead of the one on which all ranks agree.
                ignore_signals()
                communicator.barrier()
            return result
    except AgreedError:
        raise
    except ValueError as error:
        raise RuntimeError("a defect of torchreg: please report it with the traceback above") from error
