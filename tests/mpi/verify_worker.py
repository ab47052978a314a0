"""A rank that verifies its stack once with each defect: the checks of each, as JSON on the main rank's stdout."""

import json
from dataclasses import asdict
from typing import get_args

from torchreg.distributed.init import init_distributed
from torchreg.verification import collectives
from torchreg.verification.verify import Defect, verify


def main() -> None:
    collectives._QUICK_CALLS_WITHIN_S = 0.1  # for each defect
    with init_distributed(sync="mpi", device="cpu", distributed="torch") as communicator:
        checks = {defect: list(verify(communicator, "runs", quick=True, defect=defect)) for defect in get_args(Defect)}
        if communicator.is_main:
            print(json.dumps({defect: [asdict(check) for check in found] for defect, found in checks.items()}))
