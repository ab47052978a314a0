"""What the ranks of a shared launch do, one after the other: python -m tests.mpi.commands COMMANDS FOLDER.

A rank imports torch for seconds; a command then takes tenths. COMMANDS is JSON: by name, the `arguments` of `torchreg`,
or a `program` of these tests ("module:function") and its `arguments`. Where it matters, also the `folder` in
which they run (one of their own, beside those of the others), the `accident` (see `accident.py`), a shell command with
which the main rank `prepared` them, and the `world_size` of the ranks that take part (under torchrun only).

Each rank adds a line of JSON to FOLDER/ends.RANK for each: exit code, stdout, stderr, and what it trained as the main
rank of a run. The last command writes to the real streams, and its exit code is that of the process.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

from torchreg.cli import command, main
from torchreg.distributed.launcher import detect_launcher
from torchreg.distributed.stopping import SIGNALS
from torchreg.runs import run

from .accident import with_accident

sys.modules["matplotlib"] = None  # pictures take longer than the runs


def call(entry, trained):
    """Run one command; its exit code."""
    arguments = entry.get("arguments", [])
    if "program" in entry:
        module, function = entry["program"].split(":")
        getattr(import_module(module), function)(*arguments)
        return 0
    seams = {"seams": run.Seams(step=with_accident(*entry["accident"]))} if "accident" in entry else {}
    really_train = run.train

    def train(config, communicator, *others, **options):
        if communicator.is_main:  # of the ranks that run it together
            trained.append(config.run.name)
        return really_train(config, communicator, *others, **seams, **options)

    module = import_module({"sweep": "torchreg.sweeps.sweep"}.get(arguments[0], "torchreg.runs.run"))
    with patch.object(module, "train", train) if arguments[0] in ("train", "sweep") else contextlib.nullcontext():
        if entry["is_last"]:
            sys.argv[1:] = arguments
            return command()
        return main(arguments)


def begin(entry, number):
    """The state of a process that has just started; whether this rank takes part."""
    rank, world_size = detect_launcher(os.environ).rank, entry.get("world_size")
    if world_size is not None:
        if number > 1:  # the keys in the agent's store are taken
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            # Below the ports that the system gives to the sockets of other tests.
            port = os.environ.setdefault("FIRST_MASTER_PORT", os.environ["MASTER_PORT"])
            os.environ["MASTER_PORT"] = str(10_000 + (17 * int(port) + number) % 10_000)
        if rank >= world_size:
            return False
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    for each in SIGNALS:  # a command that has stopped ignores them
        signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
    folder = Path(entry["folder"])
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    if "prepared" in entry and rank == 0:  # before the ranks meet
        subprocess.run(entry["prepared"], shell=True, check=True)
    return True


def run_all(entries, folder):
    total = int(os.environ.get("WORLD_SIZE", "0"))
    rank = detect_launcher(os.environ).rank
    code, exit_at_once = 0, os._exit
    for number, (name, entry) in enumerate(entries.items(), start=1):
        entry = {"folder": name, "is_last": number == len(entries)} | entry
        entry["folder"] = folder / entry["folder"]
        if total:
            entry.setdefault("world_size", total)
        if not begin(entry, number):
            continue
        out, err, trained = io.StringIO(), io.StringIO(), []

        def leave(code, err=err):
            sys.__stderr__.write(err.getvalue())
            sys.__stderr__.flush()
            exit_at_once(code)

        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(os, "_exit", leave))
            if not entry["is_last"]:
                stack.enter_context(contextlib.redirect_stdout(out))
                stack.enter_context(contextlib.redirect_stderr(err))
            code = call(entry, trained)
        line = json.dumps(
            {"name": name, "code": code, "out": out.getvalue(), "err": err.getvalue(), "trained": trained}
        )
        with (folder / f"ends.{rank}").open("a") as ends:
            ends.write(line + "\n")
    return code


if __name__ == "__main__":
    try:
        exit_code = run_all(json.loads(sys.argv[1]), Path(sys.argv[2]))
    except BaseException:  # noqa: BLE001 - whatever it is, it ends all ranks
        traceback.print_exc()
        os._exit(1)  # MPI_Finalize would wait for ranks that wait for this one
    sys.exit(exit_code)
