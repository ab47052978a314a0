"""Ranks that start and end together, whatever fails."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from torchreg.cli import EXIT_BAD_INPUT, EXIT_FAILED, own_rank
from torchreg.distributed.communicator import Communicator
from torchreg.distributed.devices import why_not_a_gpu
from torchreg.distributed.failure import one_line
from torchreg.distributed.launcher import FORWARDED_WITHIN_S
from torchreg.distributed.rendezvous import AgreedError
from torchreg.distributed.stopping import ignore_signals
from torchreg.runs.config import TrainConfig
from torchreg.runs.run import init_ranks

T = TypeVar("T")


def open_ranks(config: TrainConfig) -> Communicator:
    """Initialise this rank among the others. An error here, of all ranks or of one, is reported once and ends all."""
    try:
        communicator = init_ranks(config)
    except AgreedError:
        raise
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        # This rank ends without MPI_Finalize, which would wait for ranks that are not there.
        code, where, what = EXIT_BAD_INPUT, "", ""
        if not isinstance(error, ValueError):
            code, where = EXIT_FAILED, f" on rank {own_rank()} ({socket.gethostname()})"
            what = "the ranks did not connect: "
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))  # srun sends it when another rank has left
        if own_rank() > 0:
            time.sleep(2)  # the main rank most likely reports the same, and the launcher then ends this rank
        print(f"torchreg: error{where}: {what}{one_line(error)}", file=sys.stderr, flush=True)
        time.sleep(FORWARDED_WITHIN_S)
        os._exit(code)
    warning = why_not_a_gpu(config.run.device, os.environ)
    if warning and communicator.is_main and communicator.device.type == "cpu":
        print(f"torchreg: warning: {warning}", file=sys.stderr)
    return communicator


def on_all_ranks(communicator: Communicator, work: Callable[[], T]) -> T:
    """What `work` returns, on ranks that end together. Bad input has to be raised as an `AgreedError`."""
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
