"""scripts/setup.sh is what a newcomer runs first: where it leaves something broken, nothing else can be tried.

The cases are row T6's. The project that is installed here is a stand-in with nothing to download; bash, venv and pip
are the real ones.
"""

import hashlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

from .conftest import ROOT

PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "torchreg-hpc"

[project.optional-dependencies]
mpi = []
plot = []
rare = ["of-which-there-is-none"]
dev = [
    "torchreg-hpc[mpi,plot]",
]

[project.scripts]
"""

BACKEND = """
import pathlib, sys, time
sys.path.insert(0, str(pathlib.Path(__file__).parent))
from wheel_of import write_wheel

def build_editable(folder, config_settings=None, metadata_directory=None):
    with open("built.log", "a") as log:
        print("built", file=log)
    while pathlib.Path("hold").exists():
        time.sleep(0.02)
    needs = ["Requires-Dist: torch", "Requires-Dist: of-which-there-is-none; extra == 'rare'"]
    needs += ["Requires-Dist: torchreg-hpc[mpi,plot]; extra == 'dev'"]
    extras = [f"Provides-Extra: {extra}" for extra in ("mpi", "plot", "rare", "dev")]
    command = "[console_scripts]\\ntorchreg = torchreg_hpc:main\\n"
    return write_wheel(folder, "torchreg_hpc", "1", extras + needs, command)
"""

WHEEL_OF = '''
import pathlib, zipfile

def write_wheel(folder, name, version, headers=(), entry_points=""):
    """A wheel with one module; its file name."""
    file = f"{name}-{version}-py3-none-any.whl"
    files = {
        f"{name}.py": "def main(): pass",
        f"{name}-{version}.dist-info/METADATA": "\\n".join(
            ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *headers, ""]
        ),
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        f"{name}-{version}.dist-info/entry_points.txt": entry_points,
    }
    files[f"{name}-{version}.dist-info/RECORD"] = "".join(f"{path},,\\n" for path in files)
    with zipfile.ZipFile(pathlib.Path(folder, file), "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return file
'''


class Checkout:
    """A folder with the real setup.sh, and a project that needs torch and nothing else."""

    def __init__(self, folder):
        self.folder = folder / "a checkout"
        (self.folder / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts/setup.sh", self.folder / "scripts")
        (self.folder / "scripts/constraints.txt").write_text("torch==2.13.0\n")
        (self.folder / "pyproject.toml").write_text(PROJECT)
        (self.folder / "backend.py").write_text(BACKEND)
        (self.folder / "wheel_of.py").write_text(WHEEL_OF)
        index = folder / "index" / "torch"
        index.mkdir(parents=True)
        write_wheel = runpy.run_path(str(self.folder / "wheel_of.py"))["write_wheel"]
        wheel = write_wheel(index, "torch", "2.13.0+cpu")
        (index / "index.html").write_text(f'<a href="{wheel}">{wheel}</a>')
        self.pinned = folder / write_wheel(folder, "pinned", "1")
        self.lock(hashlib.sha256(self.pinned.read_bytes()).hexdigest())
        self.variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PIP_")},
            "PYTHON": sys.executable,
            "TORCH_INDEX": index.parent.as_uri(),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": "http://127.0.0.1:9/simple",  # where nobody answers
            "PIP_RETRIES": "1",
        }

    def lock(self, sha256):
        (self.folder / "scripts/requirements.lock").write_text(
            f"# Made.\n# for base\npinned @ {self.pinned.as_uri()} \\\n    --hash=sha256:{sha256}\n"
            "# for rare\nof-which-there-is-none==1 \\\n    --hash=sha256:0\n"
        )

    def start(self, extras, **variables):
        return subprocess.Popen(
            ["bash", "scripts/setup.sh", extras],
            cwd=self.folder,
            env={**self.variables, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def set_up(self, extras, **variables):
        """Exit code and messages of one call."""
        process = self.start(extras, **variables)
        out, err = process.communicate(timeout=240)
        assert not out
        return process.returncode, err

    def refused(self, extras="mpi", **variables):
        """The one line of a call that ends with exit code 2, before there is a .venv."""
        code, err = self.set_up(extras, **variables)
        assert code == 2, err
        (line,) = err.splitlines()
        assert line.startswith("setup.sh: error: ")
        return line

    @property
    def num_builds(self):
        log = self.folder / "built.log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def wait_for(self, condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def works(self):
        torchreg = subprocess.run([self.folder / ".venv/bin/torchreg"], check=False)
        left = [path.name for path in (self.folder / ".venv").glob("torchreg*")]
        return torchreg.returncode == 0 and left == ["torchreg.stamp"]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.mark.timeout(600)
def test_an_interrupted_set_up_is_made_anew_two_at_once_wait_and_what_is_there_stays(checkout):
    """Else `No module named pip` for ever after, or a package of which half the files are there.

    Or one of two first starts dies in pip; or each start takes minutes, or loses what an earlier one installed.
    """
    venv = checkout.folder / ".venv"
    half = checkout.start("mpi")
    checkout.wait_for(lambda: (venv / "bin/python").exists())
    os.killpg(half.pid, signal.SIGKILL)
    half.communicate()
    assert not (venv / "bin/torchreg").exists()

    (checkout.folder / "hold").touch()
    in_pip = checkout.start("mpi")
    checkout.wait_for(lambda: checkout.num_builds)
    os.killpg(in_pip.pid, signal.SIGINT)  # as a terminal's Ctrl-C
    _, err = in_pip.communicate()
    assert "the last set-up of .venv was interrupted: making it anew" in err
    assert in_pip.returncode == 130, err
    assert err.splitlines()[-1] == "setup.sh: error: interrupted; start it again"
    assert "Traceback" not in err
    assert not venv.exists()

    num_builds = checkout.num_builds
    first = checkout.start("mpi")
    checkout.wait_for(lambda: checkout.num_builds > num_builds)
    second = checkout.start("mpi")
    assert second.stderr.readline() == "another set-up of .venv is running; waiting for it\n"
    (checkout.folder / "hold").unlink()
    _, err = first.communicate()
    assert first.returncode == 0, err
    assert second.wait() == 0
    assert second.stderr.read() == ""
    second.stdout.close(), second.stderr.close()
    assert checkout.num_builds == num_builds + 1
    assert checkout.works()

    assert checkout.set_up("mpi") == (0, "")
    assert checkout.num_builds == num_builds + 1, "installed without need"
    assert checkout.set_up("dev")[0] == 0
    assert checkout.num_builds == num_builds + 2
    assert checkout.set_up("plot,mpi") == (0, ""), "both are in dev"
    (checkout.folder / "scripts/constraints.txt").write_text("torch<3\n")
    assert checkout.set_up("mpi")[0] == 0
    assert checkout.num_builds == num_builds + 3, "other versions are wanted"
    assert checkout.set_up("dev") == (0, ""), "dev has been lost"

    code, err = checkout.set_up("rare")
    assert code == 1
    assert err.splitlines()[-1].startswith("setup.sh: error: ")
    assert checkout.works(), "an extra that cannot be had took the others along"
    assert checkout.set_up("dev") == (0, "")


def test_no_network_is_one_line_and_leaves_nothing(checkout):
    """Else the reader finds pip's `No matching distribution` below a page of retries, and looks for it on PyPI."""
    code, err = checkout.set_up("mpi", TORCH_INDEX="", HTTPS_PROXY="", HTTP_PROXY="", https_proxy="", http_proxy="")
    assert code == 1
    assert err.splitlines()[-1].startswith("setup.sh: error: pip reaches no package index")
    assert "WARNING" not in err
    assert not (checkout.folder / ".venv").exists()


def test_a_file_of_another_hash_is_not_installed(checkout):
    """Else what was tested is not what runs, whoever changed it on its way."""
    checkout.lock("0" * 64)
    code, err = checkout.set_up("mpi")
    assert code == 1
    assert "DO NOT MATCH THE HASHES" in err
    assert not (checkout.folder / ".venv").exists()


def test_the_lock_is_what_pyproject_and_the_constraints_ask_for():
    """Else an extra is installed without the check, or in other versions than the tested ones."""
    constraints = (ROOT / "scripts/constraints.txt").read_text()
    pinned = set(re.findall(r"^\w\S*==\S+", constraints, re.MULTILINE))
    stanzas = (ROOT / "scripts/requirements.lock").read_text().split("# for ")[1:]
    locked = {}
    for stanza in stanzas:
        extras, package, *hashes = stanza.strip().splitlines()
        assert hashes
        assert all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64}( \\)?", line) for line in hashes), package
        locked.setdefault(package.split()[0], set()).update(extras.split())
    assert set(locked) == pinned - {"torch==2.13.0"}, "run scripts/lock.py"

    needed_by = {}
    for pin, extras in locked.items():
        needed_by.setdefault(pin.split("==")[0], set()).update(extras)
    for need in map(Requirement, requires("torchreg-hpc")):
        extra = re.search(r"extra == ['\"](\w+)", str(need.marker))
        if need.name not in ("torch", "ezpz", "torchreg-hpc"):
            assert {"base", extra[1] if extra else "base"} & needed_by[need.name.lower()], need


def python_that(checkout, program):
    """A `python3` that runs this program first."""
    folder = checkout.folder / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(program)
    return {"PYTHONPATH": str(folder)}


def test_a_python_that_cannot_do_it_is_named(checkout):
    """Else pip says `ResolutionImpossible` after minutes, or venv fails half-way."""
    old = python_that(checkout, "import sys; sys.version_info = (3, 9, 18)")
    assert "torchreg needs Python 3.10 to 3.13, and " in checkout.refused(**old)
    assert "there is no working python-of-none" in checkout.refused(PYTHON="python-of-none")
    (checkout.folder / "site/sitecustomize.py").write_text("import sys; sys.modules['ensurepip'] = None")
    assert "-venv" in checkout.refused(**old)
    assert not (checkout.folder / ".venv").exists()


def test_an_unknown_extra_is_refused_by_name(checkout):
    """Else pip only warns, and the first command that needs it fails."""
    assert checkout.refused("mpi,polt").endswith("there is no extra 'polt'; there are mpi, plot, rare, dev")
    assert not (checkout.folder / ".venv").exists()


def test_a_folder_of_others_is_left_alone(checkout):
    """Else somebody's environment is emptied."""
    theirs = checkout.folder / ".venv/theirs"
    theirs.parent.mkdir()
    theirs.touch()
    assert ".venv was not made by this script" in checkout.refused()
    assert theirs.exists()
