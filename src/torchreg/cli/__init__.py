"""The `torchreg` command: one table of subcommands. Each is a module that is imported when it runs."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.resources import files
from types import FrameType
from typing import Any

from torchreg import __version__
from torchreg.distributed.launcher import FORWARDED_WITHIN_S, detect_launcher
from torchreg.distributed.stopping import ignore_signals

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2  # reported in one line on stderr
EXIT_DIVERGED = 3  # the record is written
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal or the time limit, and saved; start it again
EXIT_INTERRUPTED = 130  # Ctrl-C before there was anything to save; 128 + SIGINT, as in a shell

COMMANDS = {
    "train": "train the model, on one process or many ranks",
    "runs": "list the runs of a folder, or show how one of them ended",
    "plot": "draw a finished run, sweep or plan from its records",
    "plan": "predict stability, noise floor and steps to a target by world size",
    "sweep": "train with many batch sizes or learning rates, beside predictions",
    "verify": "check a distributed stack with known answers",
    "scale": "measure how training scales, over many launches",
    "report": "turn a campaign's records into one report",
    "data": "show, fetch or make the data",
    "completion": "print a script with which bash and zsh complete all of this",
}
_ON_ALL_RANKS = {"train", "sweep", "verify", "scale measure", "scale run"}  # the last refuses to run on ranks
# The modules of the extras, and their packages.
_PACKAGES = {name: name for name in ("jinja2", "matplotlib", "msgspec", "pyarrow", "scipy")} | {"yaml": "pyyaml"}
_USAGE = f"""\
usage: torchreg [-h] [--version] COMMAND [OPTIONS]

Train one linear layer on many ranks, with the right answer known beforehand.

commands:
{"".join(f"  {name:10}  {what}{chr(10)}" for name, what in COMMANDS.items())}
Example: torchreg train --recipe lesson

`torchreg COMMAND --help` shows the options of a command, and an example.
"""


def command() -> int:
    """`main` as a process, which ends after it. Closed or broken output streams lose the output, not the run."""
    stdout = _protect_streams()
    os.environ["MPLBACKEND"] = "agg"  # a notebook's kernel sets its own
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else a lost connection prints pages of C++ frames
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    code = main()
    sys.stdout.flush()
    if stdout.error and code == 0:
        _report(f"stdout cannot be written ({stdout.error.strerror}): the rest of the output is lost")
        code = EXIT_FAILED
    ignore_signals()
    gc.freeze()  # a collection over a thousand modules at exit takes half a second, on each rank
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """The `torchreg` command; returns its exit code, one of those above."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except ValueError as error:
        _report(str(error))
    except ModuleNotFoundError as error:
        if not (package := _PACKAGES.get(error.name or "")):
            raise
        _report(f"{arguments[0]} needs the package {package}, which is not installed: pip install {package}")
    except KeyboardInterrupt:
        _report("interrupted")
        return EXIT_INTERRUPTED
    except (OSError, MemoryError) as error:  # a full disk, a missing permission
        _report(f"{type(error).__name__}: {error}")
        return EXIT_FAILED
    return EXIT_BAD_INPUT


class _Stream(io.FileIO):
    """A standard stream that drops what cannot be written. `error` is why, unless only the reader is gone."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):  # a closed pipe, terminal, descriptor
                self.error = error
            return len(data)


def _protect_streams() -> _Stream:
    """Replace stdout (returned raw) and stderr by streams that never raise, and print `?` where they lack a letter."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by `>&-`: the next file that is opened would take its number
            os.open(os.devnull, os.O_RDWR)
    raw = {name: _Stream(descriptor, "w", closefd=False) for descriptor, name in ((1, "stdout"), (2, "stderr"))}
    for name, stream in raw.items():
        before = getattr(sys, name) or open(stream.fileno(), "w", closefd=False)  # noqa: SIM115
        with contextlib.suppress(OSError):
            before.flush()
        raises = before.errors == "strict" or (before.errors == "surrogateescape" and before.encoding != "utf-8")
        options = {option: getattr(before, option) for option in ("encoding", "line_buffering", "write_through")}
        errors = "replace" if raises else before.errors
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(stream), errors=errors, **options))
    return raw["stdout"]


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"torchreg {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else EXIT_BAD_INPUT
    name, *options = arguments
    if name not in COMMANDS or (name == "completion" and set(options) - {"-h", "--help"}):
        raise ValueError(f"{' '.join(arguments[:2])!r} is no command: the commands are {', '.join(COMMANDS)}")
    if name == "completion":  # its first lines are its help
        print(files("torchreg.cli").joinpath("completion.sh").read_text(encoding="utf-8"), end="")
        return 0
    if own_rank() > 0 and not _ON_ALL_RANKS & {name, " ".join(arguments[:2])}:
        return 0  # each file is written once
    return int(import_module(f"torchreg.cli.{name}_command").run(options))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: a `KeyboardInterrupt`; within an import, which may catch it and continue half initialised, the end."""
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    if frame is None:
        raise KeyboardInterrupt
    _report("interrupted")
    time.sleep(FORWARDED_WITHIN_S)
    os._exit(EXIT_INTERRUPTED)


def _report(message: str) -> None:
    """Print an error in one line on stderr, on the main rank only."""
    if own_rank() == 0:
        from torchreg.console import printable

        print(f"torchreg: error: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)


def own_rank() -> int:
    """The rank of this process according to its launcher; 0 where that cannot be known."""
    with contextlib.suppress(ValueError):
        return detect_launcher(os.environ).rank
    return 0
