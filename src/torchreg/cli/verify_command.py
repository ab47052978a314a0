"""`torchreg verify`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from torchreg.cli.options import EXIT_FAILED, parse
from torchreg.runs.config import TrainConfig


@dataclass(frozen=True)
class VerifyArguments:
    """Check, with known answers, whether this launcher, MPI, backend and torch train correctly across all ranks.

    Start it as the training would be: `mpiexec -n 8 torchreg verify`. Exit code 0 if nothing fails.
    """

    quick: bool = False
    """Leave out long messages and some combinations."""

    json: bool = False
    """Print the checks as one JSON object on stdout, and nothing else there."""

    inject: Literal["wrong-average", "duplicate-shard", "skewed-start", "stale-rank"] | None = None
    """Break the stack on purpose, to see the checks fail."""

    runs_dir: str = "runs"
    """Where checkpoints are tried: a folder that all nodes share."""

    distributed: Literal["auto", "ezpz", "torch"] = "auto"
    """Who sets up several ranks, as for `train`."""

    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = "auto"
    """Where to train, as for `train`."""

    timeout_s: float = 300.0
    """How long a collective operation waits for other ranks, in seconds."""


def run(argv: list[str]) -> int:
    """Check, and print the table."""
    arguments = parse(VerifyArguments, "torchreg verify", argv)
    config = TrainConfig(distributed=arguments.distributed, device=arguments.device, timeout_s=arguments.timeout_s)

    from torchreg.cli.ranks import on_all_ranks, open_ranks
    from torchreg.console import show_lines, show_table
    from torchreg.runs.record import to_json
    from torchreg.verification.checks import lines, table
    from torchreg.verification.verify import verify

    communicator = open_ranks(config)
    if arguments.inject and communicator.world_size == 1:
        raise ValueError(f"inject is {arguments.inject}, which needs other ranks: start several, as by mpiexec -n 2")
    checks = on_all_ranks(
        communicator,
        lambda: list(verify(communicator, arguments.runs_dir, quick=arguments.quick, defect=arguments.inject)),
    )
    failed = any(check.status == "FAIL" for check in checks)
    if communicator.is_main and arguments.json:
        print(to_json({"passed": not failed, "checks": [asdict(check) for check in checks]}))
    elif communicator.is_main:
        show_lines([communicator.describe()])
        show_table(*table(checks))
        show_lines(lines(checks))
    return EXIT_FAILED if failed else 0
