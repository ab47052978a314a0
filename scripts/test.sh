#!/usr/bin/env bash
# Everything that must hold: format, lint, types, layers, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"
unset PYTHONDONTWRITEBYTECODE # else each of some hundred processes compiles torchreg anew
ruff format --check .
ruff check .
mypy & types=$! # beside tests, many of which wait
lint-imports
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@" # many tests wait: two cores serve three workers
wait "$types"
