"""`torchreg` with an accident: python accident.py WHAT RANK,… STEP [torchreg's arguments].

WHAT happens to these ranks after STEP: the name of a signal, `SIGTERMs` for one every few milliseconds until the
process has ended, or `remove` for the run's folder.
"""

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from torchreg.cli import command
from torchreg.runs import run


def with_accident(what, ranks, accident_step):
    """What wraps the step of a run, so that it happens."""
    is_hit = os.environ.get("PMI_RANK", os.environ.get("RANK")) in ranks.split(",")

    def wrap(step):
        def step_with_accident(batch, learning_rates):
            squared_error = step(batch, learning_rates)
            if is_hit and batch.step == int(accident_step):
                if what == "remove":
                    shutil.rmtree(Path("runs"))
                elif what == "SIGTERMs":
                    again = f"while kill -TERM {os.getpid()}; do sleep 0.003; done"
                    subprocess.Popen(["sh", "-c", again], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                else:
                    os.kill(os.getpid(), signal.Signals[what])
            return squared_error

        return step_with_accident

    return wrap


if __name__ == "__main__":
    run.train = partial(run.train, seams=run.Seams(step=with_accident(*sys.argv[1:4])))
    sys.argv[1:] = sys.argv[4:]
    sys.exit(command())
