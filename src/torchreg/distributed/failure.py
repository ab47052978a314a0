"""What an error of a rank means: whether another rank is its cause, whether it needs a traceback, and its one line."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist

_GLOO_SOURCE = re.compile(r"^\[\S*/gloo/\S+] ")  # the start of gloo's errors; the event and advice follow
_NCCL_ERROR = "NCCL error in: "
_NCCL_CAUSE = re.compile(r"Last error:\s+(?P<cause>\S.*)|(?P<kind>nccl\w+: .*)")
_DEVICE_ERROR = re.compile(r"(CUDA|HIP) error: (?!.*(illegal|misaligned|assert))")  # these are a program's own


def is_lost_contact(error: BaseException) -> bool:
    """Whether a rank failed because another does not respond: the cause is elsewhere."""
    if str(error).startswith(_NCCL_ERROR):
        return "ncclRemoteError" in str(error)  # other errors of NCCL have a cause of their own
    if isinstance(error, TimeoutError | dist.DistError):
        return True
    # gloo's errors have no class of their own, and mpi4py, which has one, may not be installed.
    is_mpi = type(error).__module__ == "mpi4py.MPI"
    return isinstance(error, RuntimeError) and (is_mpi or bool(_GLOO_SOURCE.match(str(error))))


def is_expected(error: BaseException) -> bool:
    """Whether one line is enough: the machine or the user is at fault, not the program."""
    if isinstance(error, KeyboardInterrupt | OSError | ValueError | MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error)
    if text.startswith(_NCCL_ERROR) or _DEVICE_ERROR.match(text):
        return True
    return is_lost_contact(error) or "can't allocate memory" in text  # torch's RuntimeError on the CPU


def one_line(error: BaseException) -> str:
    """The error in one line, with its class where the text alone may not explain it."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    lost = "lost the other ranks: " if is_lost_contact(error) else ""
    if str(error).startswith(_NCCL_ERROR):
        causes = [match["cause"] or match["kind"] for match in _NCCL_CAUSE.finditer(str(error))]
        return f"{lost}NCCL: {causes[-1] if causes else str(error).splitlines()[0]}"
    if _DEVICE_ERROR.match(str(error)):
        return str(error).splitlines()[0]  # advice on debugging follows
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    if type(error) is TimeoutError or isinstance(error, ValueError):
        return text
    return lost + _GLOO_SOURCE.sub("", text).partition(". ")[0] if lost else f"{type(error).__name__}: {text}"
