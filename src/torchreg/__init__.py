"""Train one linear layer across many ranks, with the right answer known beforehand.

The program is `torchreg.runs.run.train`. Importing this package imports neither torch nor pandas: each name
below is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchreg.core.batches import BatchPlan
    from torchreg.data.table import Table, load_table
    from torchreg.distributed.communicator import Communicator
    from torchreg.distributed.init import init_distributed
    from torchreg.runs.config import RECIPES, TrainConfig, with_recipe
    from torchreg.runs.result import Result
    from torchreg.runs.setup import LeastSquares
    from torchreg.theory import ClosedForm, Dynamics, Moments, RowGradients

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "BatchPlan",
    "ClosedForm",
    "Communicator",
    "Dynamics",
    "LeastSquares",
    "Moments",
    "Result",
    "RowGradients",
    "Table",
    "TrainConfig",
    "init_distributed",
    "load_table",
    "with_recipe",
]

_MODULE_OF = {
    "RECIPES": "runs.config",
    "BatchPlan": "core.batches",
    "ClosedForm": "theory",
    "Dynamics": "theory",
    "Moments": "theory",
    "LeastSquares": "runs.setup",
    "Result": "runs.result",
    "RowGradients": "theory",
    "Communicator": "distributed.communicator",
    "Table": "data.table",
    "TrainConfig": "runs.config",
    "load_table": "data.table",
    "init_distributed": "distributed.init",
    "with_recipe": "runs.config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"torchreg.{_MODULE_OF[name]}"), name)
