"""README and docs are what a new user types. If a command in them fails, the project is broken for them."""

import re
import shlex
import sys
import textwrap
from importlib.metadata import packages_distributions, requires
from itertools import groupby

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = (ROOT / "scripts/demo.sh").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```bash\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
# What the reader of a page types, from its first block to its last.
COMMANDS = {
    str(page.relative_to(ROOT)): "".join(
        textwrap.dedent(block) for _, block in BLOCK.findall(page.read_text(encoding="utf-8"))
    )
    for page in PAGES
}
COMMANDS = {page: commands for page, commands in COMMANDS.items() if commands}
PLAIN = re.compile(r"torchreg [^$|&;<>\\\n]*")
IN_ONE_PROCESS = [page for page, text in COMMANDS.items() if all(map(PLAIN.fullmatch, text.splitlines()))]
IN_A_SHELL = [page for page in COMMANDS if page not in IN_ONE_PROCESS]


def installed_by_the_demo():
    """The distributions that torchreg with the demo's extras requires here."""
    (extras,) = re.findall(r"^bash scripts/setup\.sh (\S+)$", DEMO, re.MULTILINE)
    found, to_do = set(), [Requirement(f"torchreg-hpc[{extras}]")]
    while to_do:
        one = to_do.pop()
        key = (canonicalize_name(one.name), frozenset(one.extras))
        if key in found:
            continue
        found.add(key)
        for need in map(Requirement, requires(one.name) or []):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *one.extras)):
                to_do.append(need)
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory):
    """A PYTHONPATH under which Python has only what `scripts/demo.sh` has installed."""
    kept = installed_by_the_demo()
    assert {"torch", "mpi4py", "matplotlib"} <= kept
    absent = {
        module
        for module, owners in packages_distributions().items()
        if not kept & {canonicalize_name(owner) for owner in owners}
    }
    assert "pytest" in absent
    folder = tmp_path_factory.mktemp("path")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({sorted(absent)!r}))\n")
    return str(folder)


IN_TURN = """
import os, shlex, sys
from torchreg.cli import main
top = os.getcwd()
for line in sys.argv[1:]:
    if not line.startswith("torchreg "):  # a page: its own folder
        folder = os.path.join(top, line)
        os.makedirs(folder), os.chdir(folder)
    elif code := main(shlex.split(line, comments=True)[1:]):
        sys.exit(f"{os.getcwd()}: {line}: exit code {code}")
"""


def in_one_process(text):
    """The text, in which one process runs lines of plain `torchreg` that follow each other: torch is imported once."""
    lines = []
    for is_plain, group in groupby(text.splitlines(), lambda line: bool(PLAIN.fullmatch(line))):
        group = list(group)
        lines += [shlex.join(["python", "-c", IN_TURN, *group])] if is_plain and len(group) > 1 else group
    return "\n".join(lines)


@pytest.mark.timeout(520)  # beside two other workers
@pytest.mark.parametrize("page", IN_A_SHELL)
def test_commands_run_as_they_stand(page, run, tmp_path, after_the_demo):
    """T6's start-up: a newcomer has run the demo and activated .venv, and types the next line."""
    script = in_one_process(COMMANDS[page])
    done = run("bash", "-euvo", "pipefail", "-c", script, cwd=tmp_path, timeout_s=500, PYTHONPATH=after_the_demo)
    assert done.returncode == 0, done.stdout + done.stderr


def test_plain_commands_run_as_they_stand(run, tmp_path, after_the_demo):
    """The same for pages that have lines of plain `torchreg` alone: one process runs them all, each in its folder."""
    assert IN_ONE_PROCESS
    lines = [line for page in IN_ONE_PROCESS for line in (page, *COMMANDS[page].splitlines())]
    done = run(sys.executable, "-c", IN_TURN, *lines, cwd=tmp_path, timeout_s=280, PYTHONPATH=after_the_demo)
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_that_start_ranks_name_their_device():
    """L5: else, on a workstation with one GPU, two ranks are refused for want of a second one."""
    lines = [line for text in (*COMMANDS.values(), DEMO) for line in text.splitlines()]
    starts = [line for line in lines if re.match(r"mpiexec|torchrun|torchreg scale run", line)]
    assert len(starts) >= 6
    for line in starts:
        assert "--device cpu" in line or "$run" in line, line
    assert re.search(r'^run=".*--device cpu', "\n".join(lines), re.MULTILINE)


def test_the_demo_ends_as_promised(run, tmp_path, after_the_demo):
    """The part of the demo that follows the installation; its last line is the next thing to type."""
    _, training = DEMO.split('export PATH="$PWD/.venv/bin:$PATH"\n')
    done = run("bash", "-euo", "pipefail", "-c", training, cwd=tmp_path, PYTHONPATH=after_the_demo)
    assert done.returncode == 0, done.stderr
    (promised,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    times = re.compile(r"in [\d.e-]+ s \([\d,]+ samples/s\)")
    digits = re.compile(r"(loss +\d+\.\d{3})\d*")  # the last digits are the machine's rounding

    def comparable(text):
        return digits.sub(r"\1", times.sub("", text))

    assert comparable(done.stdout) == comparable(promised)
    assert "source .venv/bin/activate" in done.stdout.splitlines()[-1]
    assert README.index("source .venv/bin/activate") < README.index("```bash")
