"""`torchreg` as each rank of `test_sweeps.py` runs it; every run of a trial adds a line to RUN_LOG."""

import os
import sys

from torchreg.cli import main
from torchreg.sweeps import sweep

really_train = sweep.train


def train(config, communicator, *others, **options):
    if communicator.is_main:  # of the ranks that run the trial together
        log = os.open(os.environ["RUN_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log, f"{config.run.name}\n".encode())
        os.close(log)
    return really_train(config, communicator, *others, **options)


sweep.train = train
sys.modules["matplotlib"] = None  # pictures take longer than the runs
sys.exit(main())
