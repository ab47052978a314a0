"""Run an example in this process, as `python examples/NAME.py ARGUMENTS` would be run."""

import os
import runpy
import signal
import sys
from unittest.mock import patch

from torchreg.distributed.stopping import SIGNALS

from ..conftest import ROOT


def run(name: str, *arguments: str) -> dict:
    """Its variables. It prints `exit code N` where it exits before its end."""
    path = str(ROOT / f"examples/{name}.py")
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with patch.dict(os.environ), patch.object(sys, "argv", [path, *arguments]):
            return runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        print(f"exit code {end.code}")
        return {}
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
