"""All checks, in order: each builds on those before it."""

from __future__ import annotations

from collections.abc import Iterator

from torchreg.runtime import Runtime
from torchreg.verify.checks import Check
from torchreg.verify.collectives import collective_checks
from torchreg.verify.files import file_checks
from torchreg.verify.inject import Defect, injected
from torchreg.verify.topology import topology_checks
from torchreg.verify.training import training_checks


def verify(runtime: Runtime, runs_dir: str, *, quick: bool = False, defect: Defect | None = None) -> Iterator[Check]:
    """Check a stack, on all ranks together; every rank gets the same rows.

    Checkpoints are tried in `runs_dir`. `quick` leaves out long messages and some combinations. With a `defect` the
    stack is broken on purpose.
    """
    with injected(defect, runtime):
        yield from topology_checks(runtime)
        yield from collective_checks(runtime, quick=quick)
        yield from training_checks(runtime, quick=quick)
        yield from file_checks(runtime, runs_dir)
