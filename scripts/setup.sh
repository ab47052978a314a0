#!/usr/bin/env bash
# Make .venv with torchreg and the extras in $1, from the tested versions; seconds when it is there already.
#
#   PYTHON=python3.12 bash scripts/setup.sh mpi,plot
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-mpi,plot}
wanted="$extras $(cat pyproject.toml scripts/constraints.txt | cksum)"
stamp=.venv/torchreg-$extras.stamp

if [[ -x .venv/bin/torchreg && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
    exit 0
fi
[[ -x .venv/bin/python ]] || "${PYTHON:-python3}" -m venv .venv
echo "installing torchreg[$extras] into .venv; the first time takes a few minutes" >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint scripts/constraints.txt --editable ".[$extras]"
echo "$wanted" >"$stamp"
