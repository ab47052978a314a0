"""The lesson is what a student opens first, in Colab or on a JupyterHub, where nobody is there to help."""

import os
import re
import runpy
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from .conftest import ROOT

NOTEBOOKS = ROOT / "notebooks"
NAMES = "linear_regression.ipynb", "solutions.ipynb"
NUM_PICTURES = {"linear_regression.ipynb": 11, "solutions.ipynb": 6}
MADE_BY = "run python scripts/make_notebook.py and commit the notebooks"

# Homework that the checkers must accept or refuse: which batches a student draws in `epochs` epochs.
HOMEWORK = """
def check(batches):
    global homework_training

    def homework_training(size, epochs=30, weight_lr=WEIGHT_LR, bias_lr=BIAS_LR):
        weight, bias, losses = START_WEIGHT, START_BIAS, []
        for batch in batches(size, epochs):
            x, y = batch["GrLivArea"].to_numpy(), batch["SalePrice"].to_numpy()
            gradient = gradient_of_weight(x, y, weight, bias), gradient_of_bias(x, y, weight, bias)
            weight, bias = weight - weight_lr * gradient[0], bias - bias_lr * gradient[1]
            losses.append(squared_error(x, y, weight, bias).mean())
        return weight, bias, losses

    return check_homework_1()


n = len(houses)
print("full batches:", check(lambda size, epochs: (houses.sample(size) for _ in range(epochs * (n // size)))))
print("shuffled:", check(lambda size, epochs: (
    shuffled[i : i + size] for _ in range(epochs) for shuffled in [houses.sample(n)] for i in range(0, n, size)
)))
print("no batches:", check(lambda size, epochs: (houses.sample(n) for _ in range(epochs * n // size))))
print("too few:", check(lambda size, epochs: (houses.sample(size) for _ in range(epochs))))
print("as in the hint:", check(lambda size, epochs: (houses.sample(size) for _ in range(epochs * n // size))))
print("other order:", check_homework_2(4))
print("too small a factor:", check_homework_2(2))
print("too large a factor:", check_homework_2(8))
"""


@pytest.fixture(scope="module", params=NAMES)
def shipped(request):
    """The name of a notebook, and the notebook as committed."""
    return request.param, nbformat.read(NOTEBOOKS / request.param, as_version=4)


@pytest.fixture(scope="module")
def executed(shipped, tmp_path_factory):
    """The notebook, run from top to bottom in an empty folder, by this Python, with every way to a network barred."""
    name, notebook = shipped[0], nbformat.from_dict(shipped[1])
    if name == "solutions.ipynb":
        notebook.cells.append(nbformat.v4.new_code_cell(HOMEWORK))
    folder = tmp_path_factory.mktemp("lesson")
    environment = {
        **os.environ,
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
        "PIP_NO_INDEX": "1",
        "JUPYTER_NO_CONFIG": "1",
        "JUPYTER_DATA_DIR": str(folder / "jupyter"),  # no kernel of this user's under the same name
        "IPYTHONDIR": str(folder / "ipython"),
    }
    work = folder / "work"
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        client = nbclient.NotebookClient(
            notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": str(work)}}
        )
        client.execute()
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def num_pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def assert_names_no_machine(notebook):
    text = nbformat.writes(notebook)
    for path in (ROOT, Path.home(), Path(sys.prefix), Path(sys.base_prefix)):
        assert len(path.parts) < 2 or str(path) not in text
    assert not re.findall(r"(?<![\w.:/>])/(?:home|root|Users|tmp|var|work|opt|usr|mnt)/\w+", text)


def test_the_notebooks_are_made_from_the_source_beside_them(shipped):
    """Else a student opens an old lesson, and the next edit of the source silently undoes what was fixed in it."""
    name, notebook = shipped
    made = runpy.run_path(str(ROOT / "scripts" / "make_notebook.py"))["make"](name)
    nbformat.validate(notebook)
    assert [(cell.id, cell.source) for cell in notebook.cells] == [(cell.id, cell.source) for cell in made.cells], (
        MADE_BY
    )


def test_they_ship_with_outputs(shipped):
    """Else a reader of the code host's page sees no picture; or one of a megabyte that the page refuses to show."""
    name, notebook = shipped
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), MADE_BY
    assert num_pictures(notebook) == NUM_PICTURES[name]
    assert not [
        output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert_names_no_machine(notebook)
    assert (NOTEBOOKS / name).stat().st_size < 1_500_000


def test_the_lesson_does_not_contain_the_solutions():
    """Else a student reads the solution before having tried."""
    lesson, solutions = (nbformat.read(NOTEBOOKS / name, as_version=4) for name in NAMES)
    assert "houses.sample(" in "".join(cell.source for cell in solutions.cells if cell.cell_type == "code")
    assert ".sample(" not in "".join(cell.source for cell in lesson.cells)


@pytest.mark.timeout(600)
def test_they_run_from_top_to_bottom_without_a_network(shipped, executed):
    """Else a student is stuck at the failing cell, and all below it; or reads outputs of another version."""
    name, notebook = shipped
    assert num_pictures(executed) == NUM_PICTURES[name]
    words = [re.sub(r"[\s\d.,+−-]|e(?=[+-])", "", printed(each)) for each in (notebook, executed)]
    assert words[1].startswith(words[0]), f"the shipped outputs are old: {MADE_BY}"
    if name == "linear_regression.ipynb":
        assert len(re.findall(r"^step +\d+: price = ", printed(executed), re.MULTILINE)) == 30
        assert "1 rank and 4 ranks: the same line" in printed(executed)


@pytest.mark.timeout(600)
def test_they_warn_of_nothing(executed):
    """Else a student reads a red box of another library's warning, and looks for a mistake of their own."""
    assert not [output.text for output in outputs(executed) if output.get("name") == "stderr"]
    assert_names_no_machine(executed)


@pytest.mark.timeout(600)
def test_the_checkers_accept_what_is_right(shipped, executed):
    """Else a student who uses the lesson's own number of steps is refused, or one who draws no batches is not."""
    verdicts = dict(re.findall(r"^([\w ]+): (.*)$", printed(executed), re.MULTILINE))
    if shipped[0] == "linear_regression.ipynb":
        assert verdicts["homework 1"].startswith("not yet: 30 epochs in batches of 64 take 240 to 270 steps")
        assert verdicts["homework 2"].startswith("not yet: set diverges_at")
        return
    assert verdicts["homework 1"] == "correct"
    assert verdicts["homework 2"] == "correct: training converges at × 4 and diverges at × 8"
    assert verdicts["as in the hint"] == verdicts["full batches"] == verdicts["shuffled"] == "correct"
    assert verdicts["no batches"].startswith("not yet: two trainings had the same losses")
    assert verdicts["too few"].startswith("not yet: 30 epochs in batches of 64 take 240 to 270 steps")
    # The simultaneous order of updates, which a student may as well take, diverges at × 4.
    assert verdicts["other order"] == "correct: training converges at × 2 and diverges at × 4"
    assert verdicts["too small a factor"] == "not yet: training still converges at × 2"
    assert verdicts["too large a factor"] == "not yet: training diverges at × 4 already"
