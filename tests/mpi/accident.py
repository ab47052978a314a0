"""`torchreg` with an accident: python accident.py WHAT RANK,… STEP [torchreg's arguments].

WHAT befalls the ranks when they have taken so many steps: the name of a signal, `SIGTERMs` for one every few
milliseconds until the process is gone, or `remove` for the run's folder.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from torchreg.cli import command
from torchreg.runs.logger import Logger

what, ranks, num_steps = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3])
is_hit = os.environ.get("PMI_RANK", os.environ.get("RANK")) in ranks
log = Logger.__call__


def log_and_suffer(self, batch, squared_error):
    if is_hit and batch.step == num_steps:
        if what == "remove":
            shutil.rmtree(Path("runs"))
        elif what == "SIGTERMs":
            again = f"while kill -TERM {os.getpid()}; do sleep 0.003; done"
            subprocess.Popen(["sh", "-c", again], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        else:
            os.kill(os.getpid(), signal.Signals[what])
    return log(self, batch, squared_error)


Logger.__call__ = log_and_suffer
sys.argv[1:] = sys.argv[4:]
sys.exit(command())
