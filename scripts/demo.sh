#!/usr/bin/env bash
# From nothing to a trained model: make .venv with all that the README's commands need, then train on two MPI ranks with
# the built-in data. TORCH_INDEX and PYTHON are scripts/setup.sh's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh mpi,plot,scale
export PATH="$PWD/.venv/bin:$PATH"
mpiexec -n 2 torchreg train --recipe lesson --device cpu --name demo --overwrite --plot
echo "next         source .venv/bin/activate"
