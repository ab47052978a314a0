"""`torchreg verify`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torchreg.cli import EXIT_FAILED
from torchreg.cli.options import parse
from torchreg.runs.config import TrainConfig

if TYPE_CHECKING:
    from torchreg.verification.checks import Check


@dataclass(frozen=True)
class VerifyOptions:
    """Check, with known answers, whether this launcher, MPI, backend and torch train correctly across all ranks.

    Start it as the training would be. Exit code 0 if nothing fails.
    """

    json: bool = False  # Print the result as one JSON object on stdout, and nothing else there.
    quick: bool = False  # Skip long messages and some combinations.
    # Break the stack on purpose, to see the checks fail.
    inject: Literal["wrong-average", "duplicate-shard", "skewed-start", "stale-rank"] | None = None
    # Where checkpoints are tested and the record is written, verify-<date>-<time>.json: a folder that all nodes share.
    runs_dir: str = "runs"
    # A record of an earlier `verify` on the same ranks: fail if collectives have become slower. Default: none.
    baseline: str | None = None
    junit: str | None = None  # A file to write for continuous integration, in JUnit's XML. Default: none.
    distributed: Literal["auto", "ezpz", "torch"] = "auto"  # Who sets up several ranks, as for `train`.
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = "auto"  # Where to train, as for `train`.
    timeout_s: float = 300.0  # How long a collective operation waits for other ranks, in seconds.


def run(argv: list[str]) -> int:
    """Check, and print the table."""
    options = parse(VerifyOptions, "torchreg verify", argv)
    config = TrainConfig.of(distributed=options.distributed, device=options.device, timeout_s=options.timeout_s)

    from torchreg.cli.ranks import on_all_ranks, open_ranks
    from torchreg.console import show_lines, show_table
    from torchreg.core.checkpoint import write_atomically
    from torchreg.runs.record import to_json, utc_now
    from torchreg.verification.checks import table
    from torchreg.verification.network import capture_nccl_log
    from torchreg.verification.verify import verify
    from torchreg.verification.verify_record import compare, junit, make_record, read_timings, write_record

    started = utc_now()
    capture_nccl_log(os.environ)
    communicator = open_ranks(config)
    if options.inject and communicator.world_size == 1:
        raise ValueError(f"inject is {options.inject}, which needs other ranks: start several, as by mpiexec -n 2")

    def check() -> tuple[list[Check], dict[str, Any]]:
        baseline: list[dict[str, Any]] = []
        if path := options.baseline:
            baseline = communicator.from_main(lambda: read_timings(path, communicator))
        checks = list(verify(communicator, options.runs_dir, quick=options.quick, defect=options.inject))
        checks += compare(checks, baseline)

        def write() -> dict[str, Any]:
            if options.junit:
                write_atomically(Path(options.junit), junit(checks))
            record = make_record(communicator, options.distributed, checks, started)
            return {**record, "record": str(write_record(Path(options.runs_dir), record))}

        return checks, communicator.from_main(write)

    checks, record = on_all_ranks(communicator, check)
    if communicator.is_main and options.json:
        print(to_json(record))
    elif communicator.is_main:
        show_lines([communicator.describe()])
        show_table(*table(checks))
        show_lines([f"verdict      {record['verdict']}", f"record       {record['record']}"])
    return 0 if record["passed"] else EXIT_FAILED
