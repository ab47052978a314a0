"""Which network carries the gradients: a row, with a warning where TCP does on a machine that has something faster.

NCCL and RCCL report it in their log. gloo, MPI and oneCCL are known by their version and settings only.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from torchreg.distributed import mpi
from torchreg.distributed.communicator import Communicator
from torchreg.verification.checks import Check

_LOG, _OWN_LOG = "NCCL_DEBUG_FILE", "torchreg-nccl-"
_TCP = re.compile(r"NET/Socket|gloo|\b(tcp|sockets|sock)\b")


def capture_nccl_log(environ: os._Environ[str]) -> None:
    """Have NCCL or RCCL write its log to a file, before it starts, unless the user has chosen what becomes of it."""
    if torch.cuda.is_available() and not {"NCCL_DEBUG", _LOG} & environ.keys():
        descriptor, environ[_LOG] = tempfile.mkstemp(prefix=_OWN_LOG)
        os.close(descriptor)
        environ["NCCL_DEBUG"] = "INFO"


def network_check(communicator: Communicator) -> Check:
    """A row that never fails: how ranks communicate, and a warning of each kind of host that uses TCP needlessly."""
    communicator.all_reduce(torch.zeros(1, device=communicator.device))  # NCCL connects when it is first used
    log = Path(os.environ.get(_LOG, os.devnull))
    logged = log.read_text(errors="replace") if log.is_file() else ""  # the user's may have %h in its name
    if log.name.startswith(_OWN_LOG):
        log.unlink()
    if communicator.world_size == 1:
        return Check("topology", "network", "SKIP", "there is one rank only")
    networks = {"gloo": f"gloo over TCP ({os.environ.get('GLOO_SOCKET_IFNAME', 'interface of the host name')})"}
    if communicator.backend == "nccl":
        networks["nccl"] = nccl_network(logged) or "NCCL, whose log is not captured"
    elif communicator.backend == "xccl":
        networks["xccl"] = f"oneCCL, {settings(os.environ, 'CCL_ATL_TRANSPORT', 'FI_PROVIDER')}"
    if communicator.over_mpi:
        networks["MPI"] = mpi_network(mpi.import_mpi().Get_library_version(), os.environ)
    # Beside another backend gloo carries no gradients.
    carrying = [network for name, network in networks.items() if name in ("MPI", communicator.backend)]
    fabric = fast_fabric(Path("/sys/class")) if communicator.num_nodes > 1 else None
    own = [f"warning: {network}, on a host with {fabric}" for network in carrying if fabric and _TCP.search(network)]
    warnings = dict.fromkeys(text for texts in communicator.gather(own) for text in texts or ())
    return Check("topology", "network", "PASS", "; ".join([*networks.values(), *warnings]))


def nccl_network(log: str) -> str:
    """The transports in a log of NCCL or RCCL, such as `NCCL: NET/Socket, P2P`; an empty text without a log."""
    channels = re.findall(r"Channel .* via (NET/[^/\n]+|[A-Z]\w+)(.*)", log)
    networks = re.findall(r"Using network (\S.*\S)", log)
    names = dict.fromkeys(name + " with GDRDMA" * ("GDRDMA" in rest) for name, rest in channels)
    names = names or dict.fromkeys(f"NET/{name}, not used yet" for name in networks)
    provider = re.search(r"Selected [Pp]rovider is (\w+)", log)
    return f"NCCL: {', '.join(sorted(names))}{f' (libfabric {provider[1]})' if provider else ''}" if names else ""


def mpi_network(version: str, environ: Mapping[str, str]) -> str:
    """MPI's device by its version text, and the variables that decide its transport."""
    device = re.search(r"MPICH Device:\s*(\S.*)", version)
    name = device[1].strip() if device else re.split(r"[,\n]", version.strip())[0].rpartition(" : ")[2]
    names = "FI_PROVIDER", "UCX_TLS", "UCX_NET_DEVICES", "OMPI_MCA_pml", "OMPI_MCA_btl", "MPICH_OFI_NIC_POLICY"
    return f"MPI: {name}, {settings(environ, *names)}"


def settings(environ: Mapping[str, str], *names: str) -> str:
    """The variables that are set, or a remark that none is."""
    return " ".join(f"{name}={environ[name]}" for name in names if name in environ) or "no settings"


def fast_fabric(classes: Path) -> str | None:
    """Slingshot or InfiniBand, if the kernel knows a device of theirs; `classes` is /sys/class."""
    if any(classes.glob("cxi/*")) or any(classes.glob("net/hsn*")):
        return "Slingshot"
    return "InfiniBand or RoCE" if any(classes.glob("infiniband/*")) else None
