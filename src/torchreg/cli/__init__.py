"""The commands. Each is a module that is imported when it runs, so that `--help` answers at once."""

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
from types import FrameType
from typing import Any

from torchreg.cli.options import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED
from torchreg.distributed.launcher import detect_launcher
from torchreg.runs.stopping import ignore_signals

COMMANDS = {
    "train": "train the model, on one process or many ranks",
    "plan": "predict stability, noise floor and steps to a target for many world sizes",
    "sweep": "train with many batch sizes or learning rates, prediction beside measurement",
    "verify": "check a distributed stack with known answers",
    "scale": "measure how training scales, over many launches",
    "report": "turn a campaign's records into one report",
    "data": "show, fetch or make the data",
}
# What the extras bring: the name that is imported, and that of the package.
_PACKAGES = {"yaml": "pyyaml"} | {name: name for name in ("jinja2", "matplotlib", "msgspec", "pyarrow", "scipy")}
_ON_ALL_RANKS = ("train", "sweep", "verify", "scale measure", "scale run")  # the last refuses to run on ranks
_FORWARDED_WITHIN_S = 0.3  # a launcher drops what it has not yet passed on when the first rank ends the others
_USAGE = """\
usage: torchreg [-h] [--version] {commands} ...

Train one linear layer across many ranks, with the right answer known beforehand.

commands:
{descriptions}

`torchreg COMMAND --help` shows the options of a command.
"""


class _Stream(io.FileIO):
    """A standard stream that drops what cannot be written, and keeps the error unless only the reader is gone."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):  # a closed pipe, terminal, descriptor
                self.error = error
            return len(data)


def command() -> int:
    """`main` as a process, which ends after it; a reader of its output who leaves loses the output, not the run."""
    stdout, _ = _keep_output_from_failing()
    os.environ["MPLBACKEND"] = "agg"  # a notebook's kernel leaves its own here, which may be none of ours
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else a lost connection is pages of C++ frames
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    code = main()
    sys.stdout.flush()
    if stdout.error and code == 0:
        _tell(f"stdout cannot be written ({stdout.error.strerror}): what is missing there is lost")
        code = EXIT_FAILED
    ignore_signals()
    # Nothing is worth collecting any more: looking through a thousand modules takes half a second, on each rank.
    gc.freeze()
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: a `KeyboardInterrupt`, or the end at once within an import, which may swallow it and go on half done."""
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    if frame is None:
        raise KeyboardInterrupt
    _tell("interrupted")
    sys.stderr.flush()
    time.sleep(_FORWARDED_WITHIN_S)
    os._exit(EXIT_INTERRUPTED)


def _keep_output_from_failing() -> list[_Stream]:
    """Replace stdout and stderr by streams that never raise, with `?` for what their encoding lacks; the raw ones."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by `>&-`: the next file, a checkpoint say, would take its number
            os.open(os.devnull, os.O_RDWR)
    raw = []
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name) or open(descriptor, "w", closefd=False)  # noqa: SIM115
        with contextlib.suppress(OSError):
            before.flush()
        raw.append(_Stream(descriptor, "w", closefd=False))
        raises = before.errors == "strict" or (before.errors == "surrogateescape" and before.encoding != "utf-8")
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw[-1]),
            encoding=before.encoding,
            errors="replace" if raises else before.errors,
            line_buffering=before.line_buffering,
            write_through=before.write_through,
        )
        setattr(sys, name, stream)
    return raw


def main(argv: Sequence[str] | None = None) -> int:
    """The `torchreg` command; returns its exit code.

    0: done. 1: a failure. 2: bad input, told in one line on stderr. 3: training diverged; its record is written.
    75: stopped by a signal or the time limit, and saved: start it again with --resume auto. 130: interrupted by Ctrl-C
    before there was anything to save.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except ValueError as error:
        _tell(str(error))
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        package = _PACKAGES[error.name]
        _tell(f"{arguments[0]} needs the package {package}, which is not installed: pip install {package}")
    except KeyboardInterrupt:
        _tell("interrupted")
        return EXIT_INTERRUPTED
    except (OSError, MemoryError) as error:  # a full disk, a missing permission: the machine's fault, not the program's
        _tell(f"{type(error).__name__}: {error}")
        return EXIT_FAILED
    return EXIT_BAD_INPUT


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        from torchreg import __version__

        print(f"torchreg {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        descriptions = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
        print(_USAGE.format(commands="{" + ",".join(COMMANDS) + "}", descriptions=descriptions), end="")
        return 0 if arguments else EXIT_BAD_INPUT
    command, *options = arguments
    if command not in COMMANDS:
        raise ValueError(f"{command!r} is no command: the commands are {', '.join(COMMANDS)}")
    if not any(" ".join(arguments[:2]).startswith(begin) for begin in _ON_ALL_RANKS) and not _is_main_rank():
        return 0  # the main rank does it: each file is written once
    code: int = import_module(f"torchreg.cli.{command}_command").run(options)
    return code


def _tell(message: str) -> None:
    """One line on stderr, from the main rank only."""
    if _is_main_rank():
        from torchreg.console import printable

        print(f"torchreg: error: {printable(' '.join(message.split()))}", file=sys.stderr)


def _is_main_rank() -> bool:
    with contextlib.suppress(ValueError):
        return detect_launcher(os.environ).rank == 0
    return True


if __name__ == "__main__":
    sys.exit(command())
