"""What tests share: a folder for runs, a small table on disk, the real table where it is at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("torchreg", deadline=None, derandomize=True)  # the first example imports half of torch
settings.load_profile("torchreg")

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the known digits are those of float64 on the CPU

ROOT = Path(__file__).parents[1]
REAL_TABLE = Path(
    os.environ.get("TORCHREG_REAL_TABLE", ROOT.parent / "shared" / "data" / "slimmed_realestate_data.csv")
)

LESSON_WEIGHT, LESSON_BIAS, LESSON_LOSS = 88.890079, 32912.241402, 1478200827.641291
BEST_WEIGHT, BEST_BIAS, BEST_LOSS = 87.688145, 34754.077892, 1477781671.3558


# One worker of xdist runs all tests of a file, or of the files that share launches. The longest come first, so that no
# worker is left with one at the end.
SHARE_LAUNCHES = "examples", "golden", "ranks", "resume", "scale", "sweeps", "verify"
LONGEST = (
    "mpi", "test_readme.py", "test_jobs.py", "mpi/test_faults.py", "mpi/test_meeting.py", "test_setup.py",
    "hosts/test_hosts.py", "test_notebook.py",
)  # fmt: skip


def group_of(file: str) -> str:
    name = file.removeprefix("tests/")
    return "mpi" if name in {f"mpi/test_{one}.py" for one in SHARE_LAUNCHES} else name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(group_of(item.nodeid.split("::")[0]), len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    # `--dist loadgroup` groups nothing with pytest 9.2 and xdist 3.8, and says nothing: each file ran on both workers.
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.split("::")[0])

    return ByGroup(config, log)


def data_sources() -> list[str]:
    """The built-in data, and the real table where a copy lies beside the checkout."""
    return ["synthetic", *([str(REAL_TABLE)] if REAL_TABLE.is_file() else [])]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def run():
    """Run a command and return its completed process; its PATH begins with this Python's scripts."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def run_command(*command: str, cwd: Path, timeout_s: float = 120, **variables: str):
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables}
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    return run_command
