"""Synthetic records: tests compare intervals with the same truth as `scripts/measure_statistics.py`."""

import importlib.util
import sys

from ..conftest import ROOT

_spec = importlib.util.spec_from_file_location("measure_statistics", ROOT / "scripts/measure_statistics.py")
measure_statistics = importlib.util.module_from_spec(_spec)
sys.modules["measure_statistics"] = measure_statistics  # dataclasses look up their module
_spec.loader.exec_module(measure_statistics)
