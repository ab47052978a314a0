"""The README is what a new user types. If a command in it fails, the project is broken for them."""

import re
import shlex
import sys
from importlib.metadata import packages_distributions, requires
from itertools import groupby

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = (ROOT / "scripts/demo.sh").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


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
import shlex, sys
from torchreg.cli import main
for line in sys.argv[1:]:
    if code := main(shlex.split(line, comments=True)[1:]):
        sys.exit(f"{line}: exit code {code}")
"""


def in_one_process(block):
    """The block, in which one process runs lines of plain `torchreg` that follow each other: torch is imported once."""
    lines = []
    for is_plain, group in groupby(block.splitlines(), lambda line: bool(re.fullmatch(r"torchreg [^$|&;<>]*", line))):
        group = list(group)
        lines += [shlex.join(["python", "-c", IN_TURN, *group])] if is_plain and len(group) > 1 else group
    return "\n".join(lines)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.split("\n")[0][:30] for block in BLOCKS])
def test_commands_run_as_they_stand(block, run, tmp_path, after_the_demo):
    """T6's start-up: a newcomer has run the demo and activated .venv, and types the next line."""
    done = run(
        "bash", "-euo", "pipefail", "-c", in_one_process(block), cwd=tmp_path, timeout_s=240, PYTHONPATH=after_the_demo
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_that_start_ranks_name_their_device():
    """L5: else, on a workstation with one GPU, two ranks are refused for want of a second one."""
    lines = [line for text in (*BLOCKS, DEMO) for line in text.splitlines()]
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


def test_the_table_of_options_is_the_configurations(run, tmp_path):
    done = run(sys.executable, str(ROOT / "scripts/options_table.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in README, "python scripts/options_table.py prints the new table"
