"""If these fail, the documentation quotes code or messages that the program does not have."""

import ast
import re

import pytest

from .conftest import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
QUOTES = [
    (page, file, code)
    for page in PAGES
    for file, code in re.findall(r'^```python title="(src/.+?)"\n(.*?)^```', page.read_text(), re.DOTALL | re.MULTILINE)
]
TROUBLESHOOTING = ROOT / "docs/troubleshooting.md"
MESSAGES = re.findall(r"^- `([^`]+)`", TROUBLESHOOTING.read_text(), re.MULTILINE)


def normalised(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def printed():
    """Each string of the package, and the scripts that print errors; values that are filled in divide a string."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "src").rglob("*.py")]
    nodes = (node for tree in trees for node in ast.walk(tree))
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    shell = [(ROOT / file).read_text() for file in ("jobs/common.sh", "jobs/setup.sh", "scripts/setup.sh")]
    return "\0".join(map(normalised, [*strings, *shell]))


def test_the_tutorial_quotes_the_program():
    assert {file.split("/")[-1] for page, file, _ in QUOTES if page.name == "tutorial.md"} >= {
        "batches.py", "checkpoint.py", "model.py", "reduction.py", "schedule.py", "train.py",
    }  # fmt: skip


@pytest.mark.parametrize(("page", "file", "code"), QUOTES, ids=[f"{p.name}-{f}" for p, f, _ in QUOTES])
def test_a_quotation_is_the_code_that_runs(page, file, code):
    assert normalised(code) in normalised((ROOT / file).read_text())


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_can_appear(message, printed):
    parts = [part for part in map(normalised, message.split("…")) if part]
    assert parts
    assert [part for part in parts if part not in printed] == []
