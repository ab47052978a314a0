#!/usr/bin/env bash
# From nothing to a trained model: make .venv, then train on two MPI ranks with the built-in data.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh mpi,plot
export PATH="$PWD/.venv/bin:$PATH"
mpiexec -n 2 torchreg train --recipe lesson --name demo --overwrite --plot
