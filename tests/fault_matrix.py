"""`scripts/fault_matrix.py` as a module, for the tests of one node and of several."""

import importlib.util
import sys
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location("fault_matrix", Path(__file__).parents[1] / "scripts/fault_matrix.py")
matrix = sys.modules["fault_matrix"] = importlib.util.module_from_spec(_SPEC)  # its dataclasses look it up there
_SPEC.loader.exec_module(matrix)

TIMEOUT_S = 8.0  # importing what DistributedDataParallel needs takes seconds where ranks outnumber cores
GRACE_S = 10.0  # a silent store, the ranks' turns, a busy machine
