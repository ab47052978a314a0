"""If these fail, a reader of the documentation meets a dead link, a stale table, or an address of another project."""

import re
import sys

import pytest

from torchreg.cli import COMMANDS
from torchreg.runs.config import TrainConfig

from .conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(run, tmp_path_factory):
    """The text of each page of the site, by its path."""
    pytest.importorskip("material", reason="the extra docs is not installed: mkdocs-material builds the site")
    folder = tmp_path_factory.mktemp("site")
    done = run(sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return {str(page.relative_to(folder)): page.read_text(encoding="utf-8") for page in folder.rglob("*.html")}


def test_the_site_builds_without_a_warning_and_its_reference_is_the_codes(site):
    """Else a link leads nowhere, or an option or a command is missing where readers look it up."""
    options = site["reference/configuration/index.html"]
    missing = [name for name in TrainConfig().options() if f"--{name.replace('_', '-')}<" not in options]
    assert not missing
    commands = site["reference/commands/index.html"]
    assert not [name for name in COMMANDS if f'id="torchreg-{name}"' not in commands]
    assert 'id="torchreg-scale-run"' in commands
    files = site["reference/files/index.html"]
    assert "step_time_s" in files
    assert "scaled_learning_rate" in files
    assert not [page for page, text in site.items() if "<!-- generated" in text]


def test_a_page_fetches_nothing_from_elsewhere(site):
    """Else a reader on a compute node or behind a proxy waits, and a third party learns what they read."""
    fetched = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//[^>]*|<link[^>]*stylesheet[^>]*//[^>]*"
    )
    assert not {page: found for page, text in site.items() if (found := fetched.findall(text))}


def test_the_repository_has_one_address():
    """Else a clone, the badge or pip leads to another project."""
    (address,) = re.findall(
        r'^Repository = "https://(.*?)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    host, owner, name = address.split("/")
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CITATION.cff", "mkdocs.yml")]
    files += [file for folder in ("docs", "notebooks", "examples", "jobs") for file in (ROOT / folder).rglob("*.*")]
    found = {}
    for file in files:
        if file.suffix in (".md", ".cff", ".yml", ".py", ".ipynb", ".sh"):
            for other in re.findall(
                rf"{host.split('.')[0]}(?:\.com)?/([\w.-]+)/{name}\b", file.read_text(encoding="utf-8")
            ):
                found.setdefault(other, []).append(file.name)
    assert set(found) == {owner}
    assert {"README.md", "CITATION.cff", "mkdocs.yml", "install.md"} <= set(found[owner])


def test_readme_is_short_and_its_links_lead_somewhere():
    """Else nobody reads it to the end, or its first link is dead."""
    lines = README.splitlines()
    assert len(lines) <= 130
    assert any(line.startswith("qsub ") for line in lines[:42]), "Polaris belongs on the first screen"
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", README)
    assert len(targets) > 10
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_what_readme_reports_of_the_tutorial_is_true():
    """Else the first reason that the project gives for itself is false."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(20, 1)
    loss = torch.nn.functional.cross_entropy(model(torch.rand(32, 20)), torch.rand(32, 1))
    loss.backward()
    assert loss.item() == 0
    assert not model.weight.grad.any()
    assert not model.bias.grad.any()
