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


# What one worker of xdist runs is a file, or all files that share launches. The longest come first, so that no worker
# is left with one at the end.
SHARE_LAUNCHES = "golden", "ranks", "resume", "scale", "sweeps", "verify"
LONGEST = (
    "mpi", "test_readme.py", "test_jobs.py", "mpi/test_faults.py", "mpi/test_meeting.py", "test_setup.py",
    "hosts/test_hosts.py", "test_notebook.py",
)  # fmt: skip


def group_of(item: pytest.Item) -> str:
    path = item.path.relative_to(ROOT / "tests").as_posix()
    return "mpi" if path in {f"mpi/test_{name}.py" for name in SHARE_LAUNCHES} else path


@pytest.hookimpl(tryfirst=True)  # xdist adds the group to the test's name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    items.sort(key=lambda item: LONGEST.index(group) if (group := group_of(item)) in LONGEST else len(LONGEST))


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
