"""`torchreg verify`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from torchreg.cli import EXIT_FAILED
from torchreg.cli.options import parse
from torchreg.runs.config import TrainConfig


@dataclass(frozen=True)
class VerifyOptions:
    """Check, with known answers, whether this launcher, MPI, backend and torch train correctly across all ranks.

    Start it as the training would be. Exit code 0 if nothing fails.
    """

    json: bool = False  # Print the result as one JSON object on stdout, and nothing else there.
    quick: bool = False  # Skip long messages and some combinations.
    # Break the stack on purpose, to see the checks fail.
    inject: Literal["wrong-average", "duplicate-shard", "skewed-start", "stale-rank"] | None = None
    runs_dir: str = "runs"  # Where checkpoints are tested: a folder that all nodes share.
    distributed: Literal["auto", "ezpz", "torch"] = "auto"  # Who sets up several ranks, as for `train`.
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = "auto"  # Where to train, as for `train`.
    timeout_s: float = 300.0  # How long a collective operation waits for other ranks, in seconds.


def run(argv: list[str]) -> int:
    """Check, and print the table."""
    options = parse(VerifyOptions, "torchreg verify", argv)
    config = TrainConfig.of(distributed=options.distributed, device=options.device, timeout_s=options.timeout_s)

    from torchreg.cli.ranks import on_all_ranks, open_ranks
    from torchreg.console import show_lines, show_table
    from torchreg.runs.record import to_json
    from torchreg.verification.checks import table, verdict
    from torchreg.verification.verify import verify

    communicator = open_ranks(config)
    if options.inject and communicator.world_size == 1:
        raise ValueError(f"inject is {options.inject}, which needs other ranks: start several, as by mpiexec -n 2")
    rows = verify(communicator, options.runs_dir, quick=options.quick, defect=options.inject)
    checks = on_all_ranks(communicator, lambda: list(rows))
    failed = any(check.status == "FAIL" for check in checks)
    if communicator.is_main and options.json:
        print(to_json({"passed": not failed, "checks": [asdict(check) for check in checks]}))
    elif communicator.is_main:
        show_lines([communicator.describe()])
        show_table(*table(checks))
        show_lines([verdict(checks)])
    return EXIT_FAILED if failed else 0
