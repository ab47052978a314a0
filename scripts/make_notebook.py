"""Make notebooks/linear_regression.ipynb from the .py beside it; the same source gives the same bytes.

    python scripts/make_notebook.py [OUTPUT.ipynb]

Edit the .py, run this, commit both. Cell ids are the cells' positions, and there are no outputs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext

SOURCE = Path(__file__).parents[1] / "notebooks" / "linear_regression.py"


def main(output: Path) -> None:
    """Write the notebook."""
    notebook = jupytext.read(SOURCE)
    del notebook.metadata["jupytext"]
    for position, cell in enumerate(notebook.cells):
        cell.id = f"cell-{position:03d}"
    jupytext.write(notebook, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE.with_suffix(".ipynb"))
