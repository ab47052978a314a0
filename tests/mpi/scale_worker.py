"""A launch's own work on a stack with a defect: its points as JSON on the main rank's stdout."""

import json
import sys
from pathlib import Path

from torchreg.distributed.communicator import init_distributed
from torchreg.runs.run import Seams
from torchreg.scaling.campaign import Campaign, launches
from torchreg.scaling.measure import measure_launch

CAMPAIGN = Campaign(
    ranks_per_node=(2,),
    global_batch_sizes=(64,),
    local_batch_sizes=(),
    num_features=(40,),
    repeats=1,
    window_s=0.02,
    distributed="torch",
)


def wrong_average(step):
    """Every update is a thousandth too large, as with a wrong sum over ranks."""
    return lambda batch, learning_rates: step(batch, tuple(1.001 * one for one in learning_rates))


def stale(step):
    """The third update is missing."""
    calls = iter(range(sys.maxsize))
    return lambda batch, learning_rates: step(batch, (0.0, 0.0) if next(calls) == 2 else learning_rates)


with init_distributed(sync="mpi", device="cpu", distributed="torch") as communicator:
    defect = wrong_average if sys.argv[1] == "wrong-average" else stale if communicator.rank == 1 else lambda step: step
    measured = measure_launch(CAMPAIGN, launches(CAMPAIGN)[0], communicator, Path("launch"), Seams(step=defect))
    if communicator.is_main:
        print(json.dumps(measured["points"]))
