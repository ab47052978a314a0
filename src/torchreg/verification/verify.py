"""All checks, in order: each builds on those before it."""

from __future__ import annotations

from collections.abc import Iterator

from torchreg.distributed.communicator import Communicator
from torchreg.verification.checks import Check
from torchreg.verification.collectives import collective_checks
from torchreg.verification.defects import Defect, inject
from torchreg.verification.file_checks import file_checks
from torchreg.verification.known_answers import training_checks
from torchreg.verification.topology import topology_checks


def verify(
    communicator: Communicator, runs_dir: str, *, quick: bool = False, defect: Defect | None = None
) -> Iterator[Check]:
    """Check a stack, on all ranks together; every rank gets the same rows.

    Checkpoints are written in `runs_dir`. `quick` skips long messages and some combinations. A `defect` is injected.
    """
    communicator, seams = inject(defect, communicator)
    yield from topology_checks(communicator)
    yield from collective_checks(communicator, quick=quick)
    yield from training_checks(communicator, seams, quick=quick)
    yield from file_checks(communicator, runs_dir)
