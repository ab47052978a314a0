"""The lesson is what a student opens first, in Colab or on a JupyterHub, where nobody stands by to help."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from .conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "linear_regression.ipynb"
MAKER = ROOT / "scripts" / "make_notebook.py"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook, run from top to bottom in an empty folder, by this Python, with every way to a network barred."""
    folder = tmp_path_factory.mktemp("lesson")
    nowhere = "http://127.0.0.1:9"
    environment = {
        **os.environ,
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere),
        "PIP_NO_INDEX": "1",
        "JUPYTER_NO_CONFIG": "1",
        "JUPYTER_DATA_DIR": str(folder / "jupyter"),  # no kernel of this user's under the same name
        "IPYTHONDIR": str(folder / "ipython"),
    }
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    work = folder / "work"
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        client = nbclient.NotebookClient(
            notebook,
            timeout=180,
            kernel_name="python3",
            resources={"metadata": {"path": str(work)}},
        )
        client.execute()
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_the_notebook_is_made_from_the_source_beside_it(tmp_path):
    """Else a student opens an old lesson, and the next edit of the source silently undoes what was fixed in it."""
    made = tmp_path / "made.ipynb"
    subprocess.run([sys.executable, str(MAKER), str(made)], check=True)
    assert made.read_bytes() == NOTEBOOK.read_bytes(), "run python scripts/make_notebook.py and commit both files"


def test_it_is_committed_without_outputs():
    """Else every run of the lesson shows up as a change, and the file grows by megabytes of pictures."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not outputs(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@pytest.mark.timeout(600)
def test_it_runs_from_top_to_bottom_without_a_network(executed):
    """Else a student is stuck at the failing cell, and all below it."""
    shown = [kind for output in outputs(executed) for kind in output.get("data", {})]
    assert shown.count("image/png") >= 17, "pictures are missing"
    told = "".join(output.text for output in outputs(executed) if output.output_type == "stream")
    assert "the same digits, on this machine too" in told
    assert "1, 2 and 4 ranks: the same line" in told
    assert "16 runs: each diverged, or did not, as predicted" in told
    assert "raw-4: exit code 1, stopped by divergence" in told


@pytest.mark.timeout(600)
def test_it_warns_of_nothing(executed):
    """Else a student reads a red box of somebody else's warning, and wonders what they did wrong."""
    complaints = [output.text for output in outputs(executed) if output.get("name") == "stderr"]
    assert not complaints


@pytest.mark.timeout(600)
def test_it_shows_no_path_of_the_machine_that_wrote_it(executed):
    """Else it tells strangers about the author's machine, and students copy paths that they do not have."""
    text = nbformat.writes(executed)
    for place in (ROOT, Path.home(), Path(sys.prefix), Path(sys.base_prefix)):
        assert len(place.parts) < 2 or str(place) not in text
    assert not re.findall(r"(?<![\w.:/>])/(?:home|root|Users|tmp|var|work|opt|usr|mnt)/\w+", text)
