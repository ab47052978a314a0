"""The known-answer test of a distributed stack: does it train correctly, and if not, what is wrong?

- `checks`: what a check is, how ranks agree on its outcome, and the table;
- `topology`, `collectives`, `training`, `files`: the checks;
- `inject`: defects, to prove that the checks can fail;
- `run`: all of them, in order.
"""

from torchreg.verification.checks import Check, lines, table
from torchreg.verification.defects import DEFECTS, Defect
from torchreg.verification.verify import verify

__all__ = ["DEFECTS", "Check", "Defect", "lines", "table", "verify"]
