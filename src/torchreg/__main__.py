"""`python -m torchreg` is the `torchreg` command."""

import sys

from torchreg.cli import command

if __name__ == "__main__":
    sys.exit(command())
