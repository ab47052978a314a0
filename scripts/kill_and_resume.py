"""Kill a run at random moments, resume it, and see whether it ends with the bits of a run that nobody disturbed.

    python scripts/kill_and_resume.py --kills 100 --ranks 2

Run after run is started under mpiexec with `--reduction reproducible --resume auto`, and killed from its first
moment to its last, until so many kills are done and the last run has ended. Prints a summary in Markdown; the
exit code is 1 if anything differs. For Linux and MPICH's mpiexec: it finds the ranks in
/proc, by their PMI_RANK.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

RANK = """
import functools, os, sys
import torchreg.runs.run as run
from torchreg.cli import main

reached = os.open("reached", os.O_WRONLY | os.O_CREAT) if os.environ["PMI_RANK"] == "0" else None

def counting(step):
    def counted(batch, learning_rates):
        error = step(batch, learning_rates)
        if reached is not None:
            os.pwrite(reached, b"%9d" % (batch.step + 1), 0)
        return error
    return counted

run.train = functools.partial(run.train, seams=run.Seams(step=counting))
sys.exit(main(sys.argv[1:]))
"""
COMBINATIONS = (
    ["--optimizer", "sgd", "--sync", "ddp", "--sampling", "shuffle"],
    ["--optimizer", "manual", "--sync", "mpi", "--sampling", "random"],
    ["--optimizer", "manual", "--sync", "allreduce", "--update-order", "sequential"],
    ["--optimizer", "sgd", "--sync", "mpi", "--log-full-loss"],
)
WAYS = (
    "SIGKILL to one rank",
    "SIGKILL to all ranks",
    "SIGKILL to all and mpiexec",
    "SIGTERM to all ranks",
    "SIGHUP to one rank",
    "SIGINT to all and mpiexec",
)
DEADLINE_S = 120.0


@dataclass
class Tally:
    """What has happened so far."""

    phases: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    num_launches: int = 0
    num_too_late: int = 0
    tracebacks: Counter[str] = field(default_factory=Counter)
    lost_steps: list[int] = field(default_factory=list)


class Launch:
    """One `mpiexec` and everything that it started, known by a mark in their environment."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._mark = f"KILL_AND_RESUME={uuid.uuid4()}"
        self._folder = folder
        self.began_s = time.monotonic()
        (folder / "reached").write_bytes(b"")
        name, _, value = self._mark.partition("=")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", name: value}
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err)

    def reached(self) -> int:
        """Steps that the main rank has taken; 0 before the first."""
        return int((self._folder / "reached").read_bytes() or b"0")

    def wait_for(self, num_steps: int) -> bool:
        """Wait until so many steps are taken; False where the launch ends before."""
        while self.reached() < num_steps:
            if self.process.poll() is not None:
                return False
            self._check_deadline()
            time.sleep(0.002)
        return True

    def processes(self, *, only_ranks: bool = False) -> list[int]:
        """Who is alive of this launch."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = path.read_bytes()
            except OSError:
                continue
            if self._mark.encode() in environment and (not only_ranks or b"\0PMI_RANK=" in b"\0" + environment):
                found.append(int(path.parent.name))
        return sorted(found)

    def kill(self, way: str, chance: random.Random) -> None:
        """End ranks; the whole launch where there are no ranks yet."""
        ranks = self.processes(only_ranks=True)
        if "one rank" in way and ranks:
            ranks = [chance.choice(ranks)]
        if "mpiexec" in way or not ranks:
            ranks = self.processes()
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[way.split()[0]])

    def end(self) -> int:
        """Wait until nothing of it is alive; its exit code."""
        while self.process.poll() is None or self.processes():
            self._check_deadline()
            time.sleep(0.03)
        return self.process.wait()

    def text(self, stream: str) -> str:
        """What it wrote to `out` or `err`."""
        return (self._folder / stream).read_text(errors="replace")

    def _check_deadline(self) -> None:
        if time.monotonic() - self.began_s > DEADLINE_S:
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"a launch hangs for {DEADLINE_S:.0f} s:\n{self.text('out')}{self.text('err')}")


def ending(run: Path) -> list[str]:
    """Every number that must be equal, exactly as it was written."""
    result = json.loads((run / "record.json").read_text())["result"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [*result["weight"], result["bias"], result["loss"]]
    return [
        *(float(number).hex() for number in numbers),
        *(json.dumps({name: value for name, value in line.items() if name != "time_s"}) for line in lines),
    ]


def main() -> int:
    """Kill, resume, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2500, help="of one run")
    parser.add_argument("--checkpoint-every", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)

    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as name:
        folder = Path(name)
        (folder / "rank.py").write_text(RANK)
        tally, equal, expected = Tally(), [], {}
        startup_s, training_s = 2.0, 2.0
        for number in itertools.count():
            combination = number % len(COMBINATIONS)
            train = [
                "train",
                "--reduction",
                "reproducible",
                "--global-batch-size",
                "64",
                "--max-steps",
                str(options.steps),
            ]
            train += ["--log-every", "70", "--distributed", "torch", *COMBINATIONS[combination]]
            rank = ["mpiexec", "-n", str(options.ranks), sys.executable, str(folder / "rank.py"), *train]
            if combination not in expected:  # nobody disturbs this one, which saves nothing
                launch = Launch([*rank, "--name", f"whole-{combination}"], folder)
                launch.wait_for(1)
                startup_s = time.monotonic() - launch.began_s
                if launch.end() != 0:
                    raise SystemExit(launch.text("err"))
                training_s = time.monotonic() - launch.began_s - startup_s
                expected[combination] = ending(folder / "runs" / f"whole-{combination}")
            run = folder / "runs" / f"run-{number}"
            resume = ["--name", run.name, "--resume", "auto", "--checkpoint-every", str(options.checkpoint_every)]
            run_to_its_end([*rank, *resume], folder, run, options, chance, tally, startup_s, training_s)
            equal.append(ending(run) == expected[combination])
            if tally.phases.total() >= options.kills:
                break
    tell(options, tally, equal)
    return 0 if all(equal) else 1


def run_to_its_end(
    command: list[str],
    folder: Path,
    run: Path,
    options: argparse.Namespace,
    chance: random.Random,
    tally: Tally,
    startup_s: float,
    training_s: float,
) -> None:
    """Start a run, kill it and resume it until it ends, or until the kills are used up and it ends undisturbed."""
    before = 0
    while True:
        launch = Launch(command, folder)
        tally.num_launches += 1
        is_killed = tally.phases.total() < options.kills and kill_somewhere(
            launch, options.steps, chance, tally, startup_s, training_s
        )
        code = launch.end()
        tally.codes[code] += 1
        if "Traceback" in launch.text("err"):
            tally.tracebacks[exception_in(launch.text("err"))] += 1
        if launch.reached():
            begun_at = first_step(launch.text("out"))
            tally.lost_steps.append(before - begun_at if before else 0)
            before = launch.reached()
        if code in (2, 3) or (code != 0 and not is_killed):
            raise SystemExit(f"exit code {code}:\n{launch.text('out')}{launch.text('err')}")
        if (run / "record.json").exists():
            return


def first_step(out: str) -> int:
    """Where a launch went on, as it told; 0 where it began."""
    told = [line for line in out.splitlines() if line.startswith("resumed      after ")]
    return int(told[0].split()[2]) if told else 0


def exception_in(err: str) -> str:
    """The first line that ends a traceback."""
    lines = iter(err.partition("Traceback")[2].splitlines()[1:])
    return next((line for line in lines if line and not line.startswith(" ")), "")[:120].replace("|", "/")


def kill_somewhere(
    launch: Launch, num_steps: int, chance: random.Random, tally: Tally, startup_s: float, training_s: float
) -> bool:
    """Wait for a random moment from start-up to the end, and kill; False where the launch has ended before."""
    moment = chance.random()
    if moment < 0.3:
        time.sleep(chance.uniform(0, startup_s))
    elif moment < 0.85:
        launch.wait_for(1)
        time.sleep(chance.uniform(0, 0.6 * training_s))
    else:
        launch.wait_for(num_steps)
        time.sleep(chance.uniform(0, 0.1))
    if launch.process.poll() is not None:
        tally.num_too_late += 1
        return False
    reached = launch.reached()
    way = chance.choice(WAYS)
    launch.kill(way, chance)
    tally.phases["start-up" if not reached else "training" if reached < num_steps else "the end"] += 1
    tally.ways[way] += 1
    return True


def tell(options: argparse.Namespace, tally: Tally, equal: list[bool]) -> None:
    """The summary."""
    num_equal = sum(equal)
    lost = sum(tally.lost_steps)
    rows = {
        "kills": tally.phases.total(),
        **{f"… in {phase}" if phase != "the end" else "… at the end": n for phase, n in sorted(tally.phases.items())},
        **{f"… by {way}": count for way, count in sorted(tally.ways.items())},
        "launches": tally.num_launches,
        "launches that ended before their kill": tally.num_too_late,
        "exit codes (number of times)": ", ".join(f"{code} ({n})" for code, n in sorted(tally.codes.items())),
        "launches with a traceback": tally.tracebacks.total(),
        **{f"… of {told}": count for told, count in tally.tracebacks.items()},
        "steps lost and taken again": f"{lost} (at most {max(tally.lost_steps)} at once)",
        "runs that ended": len(equal),
        "runs with the bits of an undisturbed one": num_equal,
    }
    print(f"{options.ranks} ranks, {options.steps} steps a run, a checkpoint every {options.checkpoint_every}:\n")
    print("| | |\n|---|---|")
    for what, value in rows.items():
        print(f"| {what} | {value} |")
    print(f"\n{'Equal: every run' if all(equal) else 'NOT equal: not every run'} ended with the same bits.")


if __name__ == "__main__":
    sys.exit(main())
