"""Train one linear layer across many ranks, with the right answer known beforehand.

Importing this package imports neither torch nor pandas: each name below is loaded when it is first used. The program
is `torchreg.core`, the predictions are `torchreg.theory`; everything else is private.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchreg.data.table import load_table
    from torchreg.planning.plan import plan
    from torchreg.runs.config import TrainConfig
    from torchreg.runs.recipes import RECIPES
    from torchreg.runs.result import Result
    from torchreg.runs.run import train
    from torchreg.verification.verify import verify

__version__ = "0.1.0"

__all__ = ["RECIPES", "Result", "TrainConfig", "load_table", "plan", "train", "verify"]

_LOCATIONS = {
    "RECIPES": ("runs.recipes", "RECIPES"),
    "Result": ("runs.result", "Result"),
    "TrainConfig": ("runs.config", "TrainConfig"),
    "load_table": ("data.table", "load_table"),
    "plan": ("planning.plan", "plan"),
    "train": ("runs.run", "train"),
    "verify": ("verification.verify", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LOCATIONS[name]
    return getattr(import_module(f"torchreg.{module}"), attribute)
