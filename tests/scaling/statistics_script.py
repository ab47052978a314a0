"""`scripts/measure_statistics.py` as a module: tests compare intervals with the same truth as the script."""

import importlib.util
import sys

from ..conftest import ROOT

_spec = importlib.util.spec_from_file_location("measure_statistics", ROOT / "scripts/measure_statistics.py")
measure_statistics = importlib.util.module_from_spec(_spec)
sys.modules["measure_statistics"] = measure_statistics  # its dataclasses look themselves up
_spec.loader.exec_module(measure_statistics)
