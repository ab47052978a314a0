"""Make the notebooks, with their outputs, from the one source notebooks/linear_regression.py.

    python scripts/make_notebook.py

Edit the .py, run this, commit all three files. A cell without a tag is in the lesson, one with the tag `solution` in
the solutions, one with the tag `both` in both. The owner's name on GitHub comes from pyproject.toml.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import jupytext
import nbclient
import nbformat

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "notebooks" / "linear_regression.py"
TAGS = {"linear_regression.ipynb": {"", "both"}, "solutions.ipynb": {"solution", "both"}}
_REPOSITORY = re.compile(r'^Repository = "https://github\.com/([\w.-]+/[\w.-]+)"', re.MULTILINE)


def make(name: str) -> nbformat.NotebookNode:
    """The notebook of this file name, without outputs. Cell ids are the cells' positions."""
    text = SOURCE.read_text(encoding="utf-8")
    if repository := _REPOSITORY.search((ROOT / "pyproject.toml").read_text(encoding="utf-8")):
        text = text.replace("OWNER/torchreg", repository[1])
    notebook = jupytext.reads(text, fmt="py:percent")
    del notebook.metadata["jupytext"]
    notebook.cells = [cell for cell in notebook.cells if cell.metadata.pop("tags", [""])[0] in TAGS[name]]
    for position, cell in enumerate(notebook.cells):
        cell.id = f"cell-{position:03d}"
    return notebook


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run all cells in an empty folder; the notebook with its outputs, without times and versions."""
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            timeout=300,
            record_timing=False,
            coalesce_streams=True,  # one box of text for what a loop prints
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    notebook.metadata["language_info"] = {"name": "python"}  # without the version
    return notebook


if __name__ == "__main__":
    for name in TAGS:
        jupytext.write(execute(make(name)), SOURCE.with_name(name))
