"""What happens when a rank raises, is killed or stopped, or a node's link is cut, under each available launcher.

    python scripts/fault_matrix.py --syncs mpi ddp

Every case is a real `torchreg train` in which one rank causes the fault itself, in the middle of training. The output
is a Markdown table. Simulated nodes (root only) come from the script that TORCHREG_HOSTS_LAB names; without it, or
without a launcher, those cases are excluded, with the reason.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import tyro

from torchreg.core import checkpoint

CASE_VARIABLE = "TORCHREG_FAULT_CASE"  # set in a rank: the case, and the folder where ranks leave their process ids
FAULT_STEP = 200
CHECKPOINT_EVERY = 60  # the last before the fault is that of step 180
START_WITHIN_S = 90.0
LAUNCHER_ENDS_WITHIN_S = 60.0
NUM_RANKS = {"mpiexec": 3, "torchrun": 3, "mpiexec on 2 nodes": 4}

Fault = Literal["raise", "defect", "no memory", "hook", "kill", "stop", "cut"]
Sync = Literal["ddp", "allreduce", "mpi"]


@dataclass(frozen=True)
class Case:
    """One fault, on one rank (for `cut`, the node that is cut off: node 2), under one launcher."""

    fault: Fault
    rank: int
    launcher: str
    sync: Sync
    optimizer: Literal["sgd", "manual"]
    timeout_s: float = 10.0
    resume: bool = False
    """Continue a stopped rank once the others have ended: torchrun waits 30 s before it kills a stopped one."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case. Seconds count from the fault."""

    exit_code: int | None  # None: the launcher had to be killed
    output: str
    ranks_end_s: float | None  # all ranks but a stopped one; None: they had to be killed
    launcher_end_s: float
    left: tuple[str, ...]  # processes of the case that outlived its launcher by a second
    lost: str

    @property
    def reasons(self) -> list[str]:
        """The lines in which torchreg reports why it ends."""
        return re.findall(r"^torchreg: error.*", self.output, re.MULTILINE)

    def reported(self) -> str:
        """The reason that was printed: torchreg's, or the launcher's where it ended all ranks first."""
        if self.reasons:
            return " / ".join(self.reasons)
        if banner := re.search(r"PID \d+ RUNNING AT \S+\n= +EXIT CODE: \d+", self.output):
            return "mpiexec: " + re.sub(r"[\n= ]+", " ", banner[0])
        cause = self.output.partition("Root Cause")[2]
        fields = dict(re.findall(r"^  (host|rank|traceback) *: (.*)", cause, re.MULTILINE))
        return "torchrun: rank {rank} ({host}): {traceback}".format(**fields) if len(fields) == 3 else "nothing"


class Nodes:
    """The script that simulates nodes on this machine, and what may be missing for it."""

    def __init__(self) -> None:
        beside = Path(__file__).resolve().parents[2] / "shared" / "lab" / "hosts"
        self.script = Path(os.environ.get("TORCHREG_HOSTS_LAB", beside))

    def missing(self) -> str | None:
        """Why nodes cannot be simulated here; None where they can."""
        if not self.script.is_file():
            return f"no script that simulates nodes at {self.script}: set TORCHREG_HOSTS_LAB"
        if os.geteuid() != 0:
            return "simulated nodes need root"
        if not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
            return "simulated nodes need iproute2 and util-linux"
        probe = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False)
        if probe.returncode != 0:
            return f"no network namespaces here: {probe.stderr.strip()}"
        return None

    def are_up(self) -> bool:
        """Whether there are simulated nodes already: another process's, or those of a killed one."""
        return "trg-" in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout

    @contextmanager
    def up(self, count: int) -> Iterator[None]:
        """Nodes n1 to n<count>, which are gone afterwards, whatever happens."""
        try:
            self("up", str(count))
            yield
        finally:
            self("down")

    def __call__(self, *arguments: str) -> None:
        """Run the script. Its own processes keep no pipe of ours open."""
        subprocess.run([str(self.script), *arguments], check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


def command(case: Case, nodes: Nodes) -> list[str]:
    """The launcher's command line."""
    bin_dir, num_ranks = Path(sys.executable).parent, str(NUM_RANKS[case.launcher])
    rank = [
        *(__file__, "--distributed", "torch", "--device", "cpu", "--optimizer", case.optimizer, "--sync", case.sync),
        *("--timeout-s", str(case.timeout_s), "--max-steps", "200000", "--name", "case"),
        *("--checkpoint-every", str(CHECKPOINT_EVERY)),
    ]
    if case.launcher == "torchrun":
        torchrun = [str(bin_dir / "torchrun"), "--standalone", "--local-addr", "localhost"]
        return [*torchrun, "--nproc-per-node", num_ranks, *rank]
    mpiexec = [str(bin_dir / "mpiexec"), "-n", num_ranks]
    if case.launcher == "mpiexec on 2 nodes":
        mpiexec = [str(nodes.script), "mpiexec", "-hosts", "n1,n2", "-ppn", "2", "-n", num_ranks]
    return [*mpiexec, sys.executable, *rank]


def run_case(case: Case, folder: Path, nodes: Nodes | None = None) -> Outcome:
    """Run one case in an empty folder. Nothing is left running; simulated nodes must be up where it needs them."""
    nodes = nodes or Nodes()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "UCX_TLS": "tcp",  # simulated nodes share a kernel: UCX would reach the other node through its shared memory
        CASE_VARIABLE: json.dumps({"folder": str(folder), **asdict(case)}),  # `_mark` is its start
    }
    segments = shared_memory()
    with (folder / "output").open("w") as output:
        launcher = subprocess.Popen(
            command(case, nodes), cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        return _watch(case, folder, launcher, nodes)
    finally:
        for pid in processes_of(folder):
            _signal(pid, signal.SIGKILL)
        launcher.wait()
        remove_unused(shared_memory() - segments)


def _watch(case: Case, folder: Path, launcher: subprocess.Popen[bytes], nodes: Nodes) -> Outcome:
    fault = folder / "fault"
    if not _wait_until(lambda: fault.exists() or launcher.poll() is not None, START_WITHIN_S) or not fault.exists():
        raise RuntimeError(f"training did not begin within {START_WITHIN_S:g} s: {(folder / 'output').read_text()}")
    start_s = fault.stat().st_mtime
    if case.fault == "cut":
        start_s = time.time()
        nodes("cut", "2")
    pids = {int(file.suffix[1:]): int(file.read_text()) for file in folder.glob("rank.*")}
    stopped = pids[case.rank] if case.fault == "stop" else None
    ranks = [pid for pid in pids.values() if pid != stopped]
    within_s = case.timeout_s + LAUNCHER_ENDS_WITHIN_S
    ended = _wait_until(lambda: not any(is_running(pid, folder) for pid in ranks), within_s)
    ranks_end_s = time.time() - start_s
    if stopped and case.resume:
        _signal(stopped, signal.SIGCONT)
    exited = _wait_until(lambda: launcher.poll() is not None, LAUNCHER_ENDS_WITHIN_S)
    launcher_end_s = time.time() - start_s
    _wait_until(lambda: not processes_of(folder), 1.0)
    left = tuple(_command_line(pid) for pid in processes_of(folder)) if exited else ()
    output = (folder / "output").read_text(errors="replace")
    code = launcher.returncode if exited else None
    return Outcome(code, output, ranks_end_s if ended else None, launcher_end_s, left, what_was_lost(folder))


def what_was_lost(folder: Path) -> str:
    """What a user lost: only the steps since the last checkpoint, if every checkpoint is complete."""
    last = 0
    for path in sorted((folder / "runs" / "case" / "checkpoints").glob("step-*.pt")):
        try:
            last = checkpoint.load(path).step
        except ValueError as error:
            return f"DAMAGED {path.name}: {error}"
    return f"{max(0, FAULT_STEP - last)} steps" if last else "ALL: no checkpoint"


def processes_of(folder: Path) -> list[int]:
    """Processes with this case in their environment, on whichever simulated node."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and is_running(int(entry), folder)]


def is_running(pid: int, folder: Path) -> bool:
    """Whether the process is of this case and has not ended; a zombie has."""
    if pid == os.getpid():
        return False
    try:
        return _mark(folder).encode() in Path(f"/proc/{pid}/environ").read_bytes()  # empty for a zombie
    except OSError:
        return False


def _mark(folder: Path) -> str:
    return f"{CASE_VARIABLE}={json.dumps({'folder': str(folder)})}"[:-1]


def shared_memory() -> set[Path]:
    """MPICH's segments."""
    return set(Path("/dev/shm").glob("mpich_shm_*"))


def remove_unused(segments: set[Path]) -> None:
    """Remove those that no process maps: killed ranks do not remove theirs from /dev/shm."""
    maps = ""
    for file in Path("/proc").glob("[0-9]*/maps"):
        try:
            maps += file.read_text()
        except OSError:  # ended meanwhile
            continue
    for segment in segments:
        if str(segment) not in maps:
            segment.unlink(missing_ok=True)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:80]
    except OSError:
        return f"process {pid}"


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _wait_until(condition: Callable[[], bool], within_s: float) -> bool:
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def work(case: dict[str, Any]) -> int:
    """A rank's part: `torchreg train`, in which the fault happens on the rank of the case at step 200."""
    from torchreg.cli import main as torchreg_main
    from torchreg.distributed.launcher import detect_launcher
    from torchreg.runs import run

    folder, rank = Path(case["folder"]), detect_launcher(os.environ).rank
    is_victim, backwards = rank == case["rank"], itertools.count()

    def faulty_model(model: Any) -> Any:
        (folder / f"rank.{rank}").write_text(str(os.getpid()))
        if is_victim and case["fault"] == "hook":
            model.weight.register_hook(faulty_hook)
        return model

    def faulty_hook(gradient: Any) -> None:
        if next(backwards) == FAULT_STEP:
            cause("defect", folder)

    def faulty_step(step: Any) -> Any:
        def step_with_fault(batch: Any, learning_rates: Any) -> Any:
            if is_victim and case["fault"] != "hook" and batch.step == FAULT_STEP:
                cause(case["fault"], folder)
            return step(batch, learning_rates)

        return step_with_fault

    with patch.object(run, "train", partial(run.train, seams=run.Seams(model=faulty_model, step=faulty_step))):
        return torchreg_main(["train", *sys.argv[1:]])


def cause(fault: Fault, folder: Path) -> None:
    """Cause the fault in this process. A link is cut by the launching process, once the file exists."""
    (folder / "fault").touch()
    if fault == "raise":
        raise OSError(28, "No space left on device")
    if fault == "defect":
        raise KeyError("weights")
    if fault == "no memory":
        raise MemoryError("Unable to allocate 3.00 GiB")
    if fault in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


@dataclass(frozen=True)
class Options:
    """Which cases to run."""

    faults: tuple[Fault, ...] = ("raise", "kill", "stop", "cut")
    launchers: tuple[str, ...] = tuple(NUM_RANKS)
    syncs: tuple[Sync, ...] = ("ddp", "allreduce", "mpi")
    timeout_s: float = 10.0


def cases(options: Options) -> Iterator[Case]:
    """All that are possible: a link needs nodes, MPI needs mpiexec."""
    for launcher in options.launchers:
        on_nodes = launcher == "mpiexec on 2 nodes"
        for fault in options.faults:
            for rank in (2,) if fault == "cut" else (0, 3 if on_nodes else 1):
                for sync in options.syncs:
                    if (fault == "cut" and not on_nodes) or (sync == "mpi" and launcher == "torchrun"):
                        continue
                    optimizer: Literal["sgd", "manual"] = "sgd" if sync == "ddp" else "manual"
                    yield Case(fault, rank, launcher, sync, optimizer, options.timeout_s)


def row(case: Case, outcome: Outcome) -> str:
    """A line of the table."""
    who = "node n2" if case.fault == "cut" else f"rank {case.rank}"
    code = "hung, killed" if outcome.exit_code is None else f"exit {outcome.exit_code}"
    ranks = "never" if outcome.ranks_end_s is None else f"{outcome.ranks_end_s:.1f}"
    reported = outcome.reported().replace("|", "/")
    fields = [
        *(f"{case.fault} {who}", case.launcher, f"{case.optimizer}/{case.sync}", f"{code}: {reported}", ranks),
        *(f"{outcome.launcher_end_s:.1f}", " / ".join(outcome.left) or "none", outcome.lost),
    ]
    return f"| {' | '.join(fields)} |"


def main() -> int:
    """Run the cases one after another, and print the table as it grows; returns the exit code."""
    if CASE_VARIABLE in os.environ:
        return work(json.loads(os.environ[CASE_VARIABLE]))
    options = tyro.cli(Options, description=__doc__)
    nodes = Nodes()
    excluded = {"mpiexec on 2 nodes": nodes.missing()}
    if not excluded["mpiexec on 2 nodes"] and nodes.are_up():
        excluded["mpiexec on 2 nodes"] = "another process's simulated nodes are up: `hosts down` removes them"
    for launcher in ("mpiexec", "torchrun"):
        excluded[launcher] = None if Path(sys.executable).with_name(launcher).is_file() else f"there is no {launcher}"
    titles = ("fault", "launcher", "optimizer/sync", "what happened", "ranks ended, s", "launcher ended, s")
    print(f"| {' | '.join((*titles, 'processes left', 'lost'))} |")
    print("|" + "---|" * (len(titles) + 2))
    for case in cases(options):
        if excluded[case.launcher]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            if case.launcher == "mpiexec on 2 nodes":
                with nodes.up(2):
                    outcome = run_case(case, Path(folder), nodes)
            else:
                outcome = run_case(case, Path(folder), nodes)
        print(row(case, outcome), flush=True)
    for launcher, reason in excluded.items():
        if reason and launcher in options.launchers:
            print(f"\nExcluded: {launcher} ({reason}).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
