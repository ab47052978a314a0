"""The commands. Each is a module that is imported when it runs, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from torchreg.cli.options import EXIT_BAD_INPUT, EXIT_FAILED
from torchreg.launcher import detect_launcher

COMMANDS = {
    "train": "train the model, on one process or many ranks",
    "plan": "predict stability, noise floor and steps to a target for many world sizes",
    "sweep": "train with many batch sizes or learning rates, prediction beside measurement",
    "verify": "check a distributed stack with known answers",
    "scale": "measure how training scales, over many launches",
    "report": "turn a campaign's records into one report",
    "data": "show, fetch or make the data",
}
_ON_ALL_RANKS = ("train", "sweep", "verify", "scale measure", "scale run")  # the last refuses to run on ranks
_USAGE = """\
usage: torchreg [-h] [--version] {commands} ...

Train one linear layer across many ranks, with the right answer known beforehand.

commands:
{descriptions}

`torchreg COMMAND --help` shows the options of a command.
"""


def command() -> int:
    """`main` as a process, which ends after it: nothing is worth collecting any more.

    Looking through a thousand modules for garbage takes half a second of a core at the end, on each rank.
    """
    from torchreg.terminal import accept_all_text

    accept_all_text()
    os.environ["MPLBACKEND"] = "agg"  # a notebook's kernel leaves its own here, which may be none of ours
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else a lost connection is pages of C++ frames
    code = main()
    gc.freeze()
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """The `torchreg` command; returns its exit code.

    0: done. 1: a failure. 2: bad input, told in one line on stderr. 3: training diverged; its record is written.
    75: stopped by a signal or the time limit, and saved: start it again with --resume auto.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except ValueError as error:
        _tell(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout went away, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
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
    code: int = import_module(f"torchreg.cli.{command}").run(options)
    return code


def _tell(message: str) -> None:
    """One line on stderr, from the main rank only."""
    if _is_main_rank():
        from torchreg.terminal import printable

        print(f"torchreg: error: {printable(' '.join(message.split()))}", file=sys.stderr)


def _is_main_rank() -> bool:
    with contextlib.suppress(ValueError):
        return detect_launcher(os.environ).rank == 0
    return True


if __name__ == "__main__":
    sys.exit(main())
