"""`python -m torchreg` is the `torchreg` command."""

import sys

from torchreg.cli import main

if __name__ == "__main__":
    sys.exit(main())
