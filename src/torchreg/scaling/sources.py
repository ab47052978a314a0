"""The files in campaign directories: the launches' folders, each under one name, and merging them into one directory.

The files may come from anybody: links are not followed, pipes are not opened, and a file of absurd size is not read.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchreg.core.checkpoint import PARTIAL, read_regular
from torchreg.scaling.campaign import CAMPAIGN_FILE
from torchreg.scaling.locks import LOCK_FILE

LAUNCHES_FOLDER = "launches"
LAUNCH_FILE = "launch.json"

_ATTEMPT = re.compile(r"launch(\.failed-\d+)?\.json")
_LOGS = ("stderr.log", "stdout.log")
_MOST_BYTES = 64 * 2**20  # the placements of ten thousand ranks are one MiB


@dataclass(frozen=True)
class Folder:
    """A launch's folder in one of the sources: its attempts, the last one last, and its logs that are not empty.

    An attempt has the bytes of its file, or the reason why they were not read.
    """

    source: Path
    path: Path
    attempts: dict[Path, bytes | str]
    logs: list[Path]

    @property
    def id(self) -> str:
        """Its name before it was merged with others."""
        return re.sub(r"(~\d+)+$", "", self.path.name)

    @property
    def contents(self) -> set[bytes]:
        """Of the attempts: copies of a launch have the same, a launch that was repeated has one more."""
        return {each for each in self.attempts.values() if isinstance(each, bytes)} or {os.fsencode(self.path)}


def name_folders(folders: Sequence[Path]) -> dict[str, Folder]:
    """The launches of all directories by name, which is the folder's name where only one of them has it.

    A copy counts once, and of two states of a launch the later. Where a directory has another launch of a name that is
    taken, all that is new in it gets one suffix, such as `~2`: the launches of a block then stay together, and those of
    two directories apart.
    """
    named: dict[str, Folder] = {}
    names_of: dict[str, list[str]] = defaultdict(list)  # by id
    for source in folders:
        new, suffix = [], ""
        for path in _launch_folders(source):
            logs = [log for name in _LOGS if _kind_of(log := path / name) == "a file" and log.stat().st_size]
            folder = Folder(source, path, _attempts(path), logs)
            for twin in names_of[folder.id]:
                known = named[twin].contents
                if known <= folder.contents or folder.contents <= known:
                    if known < folder.contents:
                        named[twin] = folder
                    if twin.startswith(path.name):
                        suffix = twin.removeprefix(path.name)  # what an earlier merge gave to this source
                    break
            else:
                new.append(folder)
        suffixes = itertools.chain([suffix], map("~{}".format, itertools.count(2)))
        suffix = next(one for one in suffixes if named.keys().isdisjoint(folder.path.name + one for folder in new))
        for folder in new:
            named[folder.path.name + suffix] = folder
            names_of[folder.id].append(folder.path.name + suffix)
    return named


def distinct(folders: Sequence[Path]) -> list[Path]:
    """The directories, each once. Raises `ValueError`, with the command to run, for one without launches."""
    sources = list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]
    for source in sources:
        if not _launch_folders(source):
            error = "has no launches" if source.is_dir() else "is no directory"
            raise ValueError(
                f"{source} {error}: give the directory of a campaign, or measure one with `torchreg scale run "
                f"CAMPAIGN.yaml --dir {source}`"
            )
    return sources


def _launch_folders(source: Path) -> list[Path]:
    """The entries of `launches`, without hidden and unfinished copies."""
    return sorted(source.glob(f"{LAUNCHES_FOLDER}/[!.]*"))


def _attempts(folder: Path) -> dict[Path, bytes | str]:
    if (kind := _kind_of(folder)) != "a directory":
        return {folder: f"{kind}, not a directory"}
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return {folder: f"unreadable: {error.strerror}"}
    attempts = {folder / name: _read(folder / name) for name in names if _ATTEMPT.fullmatch(name)}
    if LAUNCH_FILE not in names:
        locked = "locked and not finished: it still runs, or was killed"
        attempts[folder] = f"partial: {locked if LOCK_FILE in names else f'no {LAUNCH_FILE}'}"
    return attempts


def _read(path: Path) -> bytes | str:
    """The bytes of a regular file of reasonable size, or why not; neither a link nor a pipe is opened."""
    if (kind := _kind_of(path)) != "a file":
        return f"{kind}, not a regular file"
    try:
        content = read_regular(path, _MOST_BYTES + 1)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    if len(content) <= _MOST_BYTES:
        return content
    return f"too large: {path.stat().st_size} bytes, more than {_MOST_BYTES}"


def _kind_of(path: Path) -> str:
    if path.is_symlink():
        return "a link"
    return "a directory" if path.is_dir() else "a file" if path.is_file() else "a special file"


def merge(out: Path, folders: Sequence[Path]) -> list[str]:
    """Copy the launches of campaign directories into one, by the names of `name_folders`; lines on what was done.

    Unfinished launches and links are not copied. Merging again adds what is new. Raises `ValueError` if `out` is not a
    campaign directory, or that of another campaign.
    """
    sources = [source for source in distinct(folders) if source.resolve() != out.resolve()]
    campaigns = {_read(source / CAMPAIGN_FILE) for source in sources}
    campaign = campaigns.pop() if len(campaigns) == 1 else None  # of all sources, if they have the same
    if out.exists():
        names = {path.name for path in out.iterdir()} if out.is_dir() else {""}
        if names and names.isdisjoint((LAUNCHES_FOLDER, CAMPAIGN_FILE)):
            raise ValueError(f"out is {out}, which is not the directory of a campaign: give a new name")
        if CAMPAIGN_FILE in names and _read(out / CAMPAIGN_FILE) != campaign:
            raise ValueError(
                f"out is {out}, where another campaign is measured ({CAMPAIGN_FILE} differs): give a new name, and "
                "merge all directories into it"
            )
    (out / LAUNCHES_FOLDER).mkdir(parents=True, exist_ok=True)
    lines, num_copied = [], dict.fromkeys(sources, 0)
    for name, folder in name_folders([out, *sources]).items():
        if folder.source == out:
            continue
        errors = [attempt for attempt in folder.attempts.values() if isinstance(attempt, str)]
        if len(errors) == len(folder.attempts):
            lines.append(f"not copied   {folder.path}: {errors[-1]}")
            continue
        _copy_launch(folder, out / LAUNCHES_FOLDER / name)
        num_copied[folder.source] += 1
        if name != folder.path.name:
            lines.append(f"renamed      {folder.path} is {name}, because another launch has its name")
    if isinstance(campaign, bytes) and not (out / CAMPAIGN_FILE).exists():
        (out / CAMPAIGN_FILE).write_bytes(campaign)
    lines += [f"merged       {source}: {number} launches copied into {out}" for source, number in num_copied.items()]
    return lines


def _copy_launch(folder: Folder, target: Path) -> None:
    """Copy a launch atomically, or, if it is a later state of one that is there, record by record."""
    building = target.with_name(f".{target.name}{PARTIAL}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    for path, attempt in folder.attempts.items():
        if isinstance(attempt, bytes):
            (building / path.name).write_bytes(attempt)
    for log in folder.logs:
        shutil.copyfile(log, building / log.name)
    if not target.exists():
        building.replace(target)
        return
    for path in building.iterdir():
        path.replace(target / path.name)
    building.rmdir()
