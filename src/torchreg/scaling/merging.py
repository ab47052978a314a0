"""Merging campaign directories: of jobs that measured parts of a campaign, or of several machines."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torchreg.core.checkpoint import PARTIAL
from torchreg.scaling.campaign import CAMPAIGN_FILE
from torchreg.scaling.sources import LAUNCHES_FOLDER, LOGS, Folder, distinct, has_text, name_folders, read_file


def merge(out: Path, folders: Sequence[Path]) -> list[str]:
    """Copy the launches of campaign directories into one; returns lines that describe what was done.

    A launch that `out` has already is copied once; of different launches with one name both are kept, the second with
    `~2` appended. Unfinished launches and links are not copied. Merging again adds what is new. Raises `ValueError` if
    `out` is not a campaign directory, or that of another campaign.
    """
    sources = [source for source in distinct(folders) if source.resolve() != out.resolve()]
    campaign = _one_campaign(sources)
    _refuse_other_data(out, campaign)
    (out / LAUNCHES_FOLDER).mkdir(parents=True, exist_ok=True)
    placed = {name: folder for name, folder in name_folders([out, *sources]).items() if folder.source != out}
    lines = []
    copied: dict[Path, int] = dict.fromkeys(sources, 0)
    for name, folder in placed.items():
        if all(file.error is not None for file in folder.files):
            lines.append(f"not copied   {folder.path}: {folder.files[-1].error}")
            continue
        _copy_launch(folder, out / LAUNCHES_FOLDER / name)
        copied[folder.source] += 1
        if name != folder.path.name:
            lines.append(f"renamed      {folder.path} is {name}, because another launch has its name")
    if campaign is not None and not (out / CAMPAIGN_FILE).exists():
        shutil.copyfile(sources[0] / CAMPAIGN_FILE, out / CAMPAIGN_FILE)
    for source, number in copied.items():
        lines.append(f"merged       {source}: {number} launches copied into {out}")
    return lines


def _one_campaign(sources: Sequence[Path]) -> bytes | None:
    """The content of the campaign file of all sources; None if they differ or one has none."""
    held = {read_file(source / CAMPAIGN_FILE) for source in sources}
    contents = {None if file.error else file.content for file in held}
    return contents.pop() if len(contents) == 1 else None


def _refuse_other_data(out: Path, campaign: bytes | None) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"out is {out}, which is not a directory: give a new name")
    names = {path.name for path in out.iterdir()}
    if names and LAUNCHES_FOLDER not in names and CAMPAIGN_FILE not in names:
        raise ValueError(f"out is {out}, which holds other files than a campaign's: give a new name")
    if CAMPAIGN_FILE in names and read_file(out / CAMPAIGN_FILE).content != campaign:
        raise ValueError(
            f"out is {out}, where another campaign is measured ({CAMPAIGN_FILE} differs): give a new name, and merge "
            "all directories into it"
        )


def _copy_launch(folder: Folder, target: Path) -> None:
    """Copy a launch atomically, or, if it is a later state of one that is there, record by record."""
    building = target.with_name(f".{target.name}{PARTIAL}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    for file in folder.files:
        if file.error is None:
            (building / file.path.name).write_bytes(file.content)
    for log in LOGS:
        if has_text(folder.path / log):
            shutil.copyfile(folder.path / log, building / log)
    if target.exists():
        for path in building.iterdir():
            path.replace(target / path.name)
        building.rmdir()
    else:
        building.replace(target)
