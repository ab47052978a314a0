"""Synthetic campaigns and their reports; the only import of the module that makes launch records."""

import shutil
from pathlib import Path

from torchreg.reporting.analysis import analyse
from torchreg.scaling.records import read_records

from ..scaling.synthetic_records import Machine, without_noise, write_launch
from ..scaling.synthetic_records import SyntheticCampaign as Campaign

__all__ = ["Campaign", "Machine", "report_of", "set_check", "without_noise", "write_launch"]


def report_of(*campaigns, change=None, folder=Path()):
    """The report of campaigns; `change` may alter each record, or return another one or None instead."""
    folders = []
    for number, campaign in enumerate(campaigns):
        folders.append(folder / f"campaign-{number}")
        shutil.rmtree(folders[-1], ignore_errors=True)
        for record in campaign.records():
            found = record if change is None else change(record)
            if found is not None:
                write_launch(folders[-1], found)
    return analyse(read_records(folders))


def set_check(point, message, difference=0.5):
    """Let the check of a point fail with this message."""
    point |= {"check_passed": False, "check_difference": difference, "check_message": message}
