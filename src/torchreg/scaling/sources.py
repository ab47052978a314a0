"""The files in campaign directories: the launches' folders, each under one name.

The files may come from anybody: links are not followed, pipes are not opened, and a file of absurd size is not read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchreg.scaling.locks import LOCK_FILE

LAUNCHES_FOLDER = "launches"
LAUNCH_FILE = "launch.json"
LOGS = ("stderr.log", "stdout.log")

FAILED_ATTEMPT = re.compile(r"launch\.failed-\d+\.json")
SUFFIX = re.compile(r"(~\d+)+$")
"""What follows the id in a launch's name where several sources have that id."""

_MOST_BYTES = 64 * 2**20  # the placements of ten thousand ranks are one MiB


@dataclass(frozen=True)
class File:
    """A regular file's bytes, or the reason why they were not read."""

    path: Path
    content: bytes = b""
    error: str | None = None


@dataclass(frozen=True)
class Folder:
    """A launch's folder in one of the sources, and its attempts, the last one last."""

    source: Path
    path: Path
    files: tuple[File, ...]

    @property
    def digests(self) -> frozenset[str]:
        """Of the attempts: copies of a launch have the same, a launch that was repeated has one more."""
        contents = [file.content for file in self.files if file.error is None]
        return frozenset(hashlib.sha256(content).hexdigest() for content in contents) or frozenset([str(self.path)])


def distinct(folders: Sequence[Path]) -> list[Path]:
    """The directories, each once. Raises `ValueError`, with the command to run, for one without launches."""
    sources = list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]
    for source in sources:
        if not any(_launch_folders(source)):
            error = "has no launches" if source.is_dir() else "is no directory"
            raise ValueError(
                f"{source} {error}: give the directory of a campaign, or measure one with `torchreg scale run "
                f"CAMPAIGN.yaml --dir {source}`"
            )
    return sources


def name_folders(sources: Sequence[Path]) -> dict[str, Folder]:
    """The launches of all sources by name, which is the folder's name where only one source has it.

    A copy counts once, and of two states of a launch the later. Where a source has another launch of a name that is
    taken, all that is new in the source gets one suffix: the launches of a block then stay together, and those of two
    sources apart.
    """
    named: dict[str, Folder] = {}
    names_of: dict[str, list[str]] = defaultdict(list)  # by id
    for source in sources:
        new, suffix = [], ""
        for path in _launch_folders(source):
            folder = Folder(source, path, tuple(_attempts(path)))
            twins = (
                name
                for name in names_of[launch_id(path)]
                if named[name].digests <= folder.digests or folder.digests <= named[name].digests
            )
            twin = next(twins, None)
            if twin is None:
                new.append(folder)
                continue
            if named[twin].digests < folder.digests:
                named[twin] = folder
            if twin.startswith(path.name):
                suffix = twin.removeprefix(path.name)  # what an earlier merge gave to this source
        number = 1
        while any(folder.path.name + suffix in named for folder in new):
            number += 1
            suffix = f"~{number}"
        for folder in new:
            named[folder.path.name + suffix] = folder
            names_of[launch_id(folder.path)].append(folder.path.name + suffix)
    return named


def launch_id(path: Path) -> str:
    """The name of a launch's folder before it was merged with others."""
    return SUFFIX.sub("", path.name)


def _launch_folders(source: Path) -> Iterator[Path]:
    """The entries of `launches`, without hidden and unfinished copies."""
    try:
        names = sorted(os.listdir(source / LAUNCHES_FOLDER))
    except OSError:
        return
    yield from (source / LAUNCHES_FOLDER / name for name in names if not name.startswith("."))


def _attempts(folder: Path) -> Iterator[File]:
    if folder.is_symlink() or not folder.is_dir():
        yield File(folder, error=f"{_kind_of(folder)}, not a directory")
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        yield File(folder, error=f"unreadable: {error.strerror}")
        return
    yield from (read_file(folder / name) for name in names if FAILED_ATTEMPT.fullmatch(name))
    if LAUNCH_FILE in names:
        yield read_file(folder / LAUNCH_FILE)
    elif LOCK_FILE in names:
        yield File(folder, error="partial: locked and not finished: it still runs, or was killed")
    else:
        yield File(folder, error=f"partial: no {LAUNCH_FILE}")


def read_file(path: Path) -> File:
    """The bytes of a regular file of reasonable size; neither a link nor a pipe is opened."""
    if (kind := _kind_of(path)) != "a file":
        return File(path, error=f"{kind}, not a regular file")
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > _MOST_BYTES:
                return File(path, error=f"too large: {size} bytes, more than {_MOST_BYTES}")
            return File(path, file.read(_MOST_BYTES))
    except OSError as error:
        return File(path, error=f"unreadable: {error.strerror}")


def _kind_of(path: Path) -> str:
    if path.is_symlink():
        return "a link"
    return "a directory" if path.is_dir() else "a file" if path.is_file() else "a special file"


def has_text(path: Path) -> bool:
    """Whether it is a file, no link, and not empty."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size > 0
