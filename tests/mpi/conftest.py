"""Ranks that are started one by one, each with an environment of its own."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


@pytest.fixture
def start_ranks(tmp_path):
    """Start one process for each mapping of variables, as RANK of WORLD_SIZE, and wait for all of them."""

    def start(command, environments, *, timeout_s=60, **shared):
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        common = {
            **os.environ,
            "PATH": path,
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(len(environments)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **shared,
        }

        def run_rank(rank):
            return subprocess.run(
                command,
                env={**common, "RANK": str(rank), **environments[rank]},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )

        with ThreadPoolExecutor(len(environments)) as pool:
            return list(pool.map(run_rank, range(len(environments))))

    return start
