"""What lies in the directories of campaigns: the launches' folders, each under one name, and their files.

Nothing is believed here: links are not followed, pipes are not opened, and a file of absurd size is not read.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchreg.scaling.locks import LOCK_FILE

LAUNCHES_FOLDER = "launches"
LAUNCH_FILE = "launch.json"
LOGS = ("stderr.log", "stdout.log")

FAILED_TRY = re.compile(r"launch\.failed-\d+\.json")
SUFFIX = re.compile(r"(~\d+)+$")
"""What a launch's name has behind its id where several sources have that id."""

_MOST_BYTES = 64 * 2**20  # the places of ten thousand ranks are one MiB


@dataclass(frozen=True)
class File:
    """A regular file's bytes, or the reason why they are not taken."""

    path: Path
    content: bytes = b""
    problem: str | None = None


@dataclass(frozen=True)
class Folder:
    """A launch's folder in one of the sources, and the tries in it, the last try last."""

    source: Path
    path: Path
    files: tuple[File, ...]

    @property
    def digests(self) -> frozenset[str]:
        """What the tries hold; copies of a launch have the same, a launch that was tried once more has one more."""
        held = [file.content for file in self.files if file.problem is None]
        return frozenset(hashlib.sha256(content).hexdigest() for content in held) or frozenset([str(self.path)])


def distinct(folders: Sequence[Path]) -> list[Path]:
    """The directories, each once. Raises `ValueError` for one without launches, and says what to run."""
    sources = list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]
    for source in sources:
        if not any(_launch_folders(source)):
            problem = "has no launches" if source.is_dir() else "is no directory"
            raise ValueError(
                f"{source} {problem}: give the directory of a campaign, or measure one with `torchreg scale run "
                f"CAMPAIGN.yaml --dir {source}`"
            )
    return sources


def place(sources: Sequence[Path]) -> dict[str, Folder]:
    """The launches of all sources by name, which is the folder's name where only one source has it.

    A copy counts once, and of two states of a launch the later. Where a source has another launch of a name that is
    taken, all that is new in the source gets one suffix, so that the launches of a block stay together and those of
    two sources apart.
    """
    placed: dict[str, Folder] = {}
    names_of: dict[str, list[str]] = defaultdict(list)  # by id
    for source in sources:
        new, suffix = [], ""
        for path in _launch_folders(source):
            folder = Folder(source, path, tuple(_tries(path)))
            twin = next((name for name in names_of[launch_id(path)] if _is_same(placed[name], folder)), None)
            if twin is None:
                new.append(folder)
                continue
            if placed[twin].digests < folder.digests:
                placed[twin] = folder
            if twin.startswith(path.name):
                suffix = twin.removeprefix(path.name)  # what an earlier merge gave to this source
        number = 1
        while any(folder.path.name + suffix in placed for folder in new):
            number += 1
            suffix = f"~{number}"
        for folder in new:
            placed[folder.path.name + suffix] = folder
            names_of[launch_id(folder.path)].append(folder.path.name + suffix)
    return placed


def launch_id(path: Path) -> str:
    """What a launch's folder was called before it was merged with others."""
    return SUFFIX.sub("", path.name)


def _is_same(one: Folder, other: Folder) -> bool:
    return one.digests <= other.digests or other.digests <= one.digests


def _launch_folders(source: Path) -> Iterator[Path]:
    """What lies in `launches`, hidden and unfinished copies aside."""
    try:
        names = sorted(os.listdir(source / LAUNCHES_FOLDER))
    except OSError:
        return
    yield from (source / LAUNCHES_FOLDER / name for name in names if not name.startswith("."))


def _tries(folder: Path) -> Iterator[File]:
    if folder.is_symlink() or not folder.is_dir():
        yield File(folder, problem=f"{_kind_of(folder)}, where a directory belongs: not followed")
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        yield File(folder, problem=f"unreadable: {error.strerror}")
        return
    for name in names:
        if FAILED_TRY.fullmatch(name):
            yield read_file(folder / name)
    if LAUNCH_FILE in names:
        yield read_file(folder / LAUNCH_FILE)
    elif LOCK_FILE in names:
        yield File(folder, problem="partial: claimed and not finished: it still runs, or was killed")
    else:
        yield File(folder, problem=f"partial: no {LAUNCH_FILE}")


def read_file(path: Path) -> File:
    """The bytes of a regular file of reasonable size; neither a link nor a pipe is opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        kind = _kind_of(path)
        return File(path, problem=f"{kind}: not followed" if kind == "a link" else f"unreadable: {error.strerror}")
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        return File(path, problem=f"{_kind_of(path)}, where a file belongs")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > _MOST_BYTES:
            return File(path, problem=f"too large: {status.st_size} bytes, more than {_MOST_BYTES}")
        try:
            return File(path, file.read(_MOST_BYTES))
        except OSError as error:
            return File(path, problem=f"unreadable: {error.strerror}")


def _kind_of(path: Path) -> str:
    if path.is_symlink():
        return "a link"
    return "a directory" if path.is_dir() else "a file" if path.is_file() else "no regular file"


def has_text(path: Path) -> bool:
    """Whether it is a file, no link, that holds something."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size > 0
