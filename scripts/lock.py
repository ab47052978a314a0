"""Make scripts/requirements.lock: what scripts/constraints.txt pins, with the hashes of all its files on PyPI.

    python -m pip install uv && python scripts/lock.py

Over each package stand the extras that need it (`base`: torchreg itself, and what builds it); `scripts/setup.sh` takes
those that it was asked for, and pip checks every file that it downloads. Left out are torch and what only its CUDA
build brings, since a machine takes the build that fits it, and ezpz, which is a commit of a git repository.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
LOCK = ROOT / "scripts" / "requirements.lock"
LEFT_OUT = re.compile(r"torch==|triton==|nvidia-|cuda-|[^\n]*== '(win32|emscripten|pypy)'")


def stanzas(*extras: str) -> list[str]:
    """The packages that torchreg with these extras needs on any machine, each with its hashes."""
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.10", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--constraint", str(CONSTRAINTS), str(ROOT / "pyproject.toml"), "-"]
    command += [argument for extra in extras for argument in ("--extra", extra)]
    text = subprocess.run(command, input="hatchling\neditables", stdout=subprocess.PIPE, check=True, text=True).stdout
    return [one for one in re.split(r"\n(?=\S)", text.strip()) if not LEFT_OUT.match(one)]


def main() -> None:
    """Write the lock."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = [extra for extra in re.findall(r"^([a-z]+) = ", section, re.MULTILINE) if extra != "ezpz"]
    needed_by: dict[str, list[str]] = {one: ["base"] for one in stanzas()}
    for extra in extras:
        for one in stanzas(extra):
            if needed_by.get(one) != ["base"]:
                needed_by.setdefault(one, []).append(extra)
    written = [f"# for {' '.join(needed_by[one])}\n{one}\n" for one in sorted(needed_by)]
    LOCK.write_text("# Made by scripts/lock.py.\n" + "".join(written), encoding="utf-8")


if __name__ == "__main__":
    main()
