"""A launch measured with each of the given defects: its points, one JSON line a defect, on the main rank's stdout."""

import json
from pathlib import Path

from torchreg.distributed.init import init_distributed
from torchreg.scaling.campaign import Campaign, launches
from torchreg.scaling.measure import measure_launch
from torchreg.verification.verify import inject

CAMPAIGN = Campaign(
    ranks_per_node=(2,),
    global_batch_sizes=(64,),
    local_batch_sizes=(),
    num_features=(40,),
    repeats=1,
    window_s=0.02,
    distributed="torch",
)


def main(*defects: str) -> None:
    with init_distributed(sync="mpi", device="cpu", distributed="torch") as communicator:
        for defect in defects:
            broken, seams = inject(defect, communicator)
            measured = measure_launch(CAMPAIGN, launches(CAMPAIGN)[0], broken, Path("launch"), seams)
            if communicator.is_main:
                print(json.dumps(measured["points"]))
