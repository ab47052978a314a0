"""Train one linear layer across many ranks, with the right answer known beforehand.

The program is `torchreg.train.train`. Importing this package imports neither torch nor pandas: each name
below is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchreg.batches import BatchPlan
    from torchreg.config import RECIPES, TrainConfig, with_recipe
    from torchreg.data import Table, load_table
    from torchreg.prepare import Problem
    from torchreg.result import Result
    from torchreg.runtime import Runtime, open_runtime
    from torchreg.theory import ClosedForm, Dynamics, Moments, RowGradients

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "BatchPlan",
    "ClosedForm",
    "Dynamics",
    "Moments",
    "Problem",
    "Result",
    "RowGradients",
    "Runtime",
    "Table",
    "TrainConfig",
    "load_table",
    "open_runtime",
    "with_recipe",
]

_MODULE_OF = {
    "RECIPES": "config",
    "BatchPlan": "batches",
    "ClosedForm": "theory",
    "Dynamics": "theory",
    "Moments": "theory",
    "Problem": "prepare",
    "Result": "result",
    "RowGradients": "theory",
    "Runtime": "runtime",
    "Table": "data",
    "TrainConfig": "config",
    "load_table": "data",
    "open_runtime": "runtime",
    "with_recipe": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"torchreg.{_MODULE_OF[name]}"), name)
