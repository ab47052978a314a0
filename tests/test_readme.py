"""The README is what a new user types. If a command in it fails, the project is broken for them."""

import re
import sys

import pytest

from .conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.split("\n")[0][:30] for block in BLOCKS])
def test_commands_run_as_they_stand(block, run, tmp_path):
    done = run("bash", "-euo", "pipefail", "-c", block, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_demo_ends_as_promised(run, tmp_path):
    command = (ROOT / "scripts/demo.sh").read_text().splitlines()[-1].split()
    assert command[:3] == ["mpiexec", "-n", "2"]
    done = run(*command, "--runtime", "torch", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (promised,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    times = re.compile(r"in [\d.e-]+ s \([\d,]+ samples/s\)")
    digits = re.compile(r"(loss +\d+\.\d{3})\d*")  # the last digits are the machine's rounding

    def comparable(text):
        return digits.sub(r"\1", times.sub("", text))

    assert comparable(done.stdout) == comparable(promised)


def test_the_table_of_options_is_the_configurations(run, tmp_path):
    done = run(sys.executable, str(ROOT / "scripts/options_table.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in README, "python scripts/options_table.py prints the new table"
