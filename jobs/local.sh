#!/usr/bin/env bash
# The campaign of jobs/campaigns/local.yaml on this machine, and its report. Stop it at any time: run it again to resume.
#
#   bash jobs/local.sh [options of torchreg scale run]
CAMPAIGN=${CAMPAIGN:-jobs/campaigns/local.yaml}
DIR=${DIR:-runs/local}
MACHINE=generic

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source jobs/common.sh || exit
if ! command -v torchreg >/dev/null; then
    bash scripts/setup.sh mpi,scale || exit
    export PATH="$PWD/.venv/bin:$PATH"
fi

run_to_end torchreg scale run "$CAMPAIGN" --dir "$DIR" "$@"
((code != 75)) || echo "stopped in time: run it again to resume"
if ((num_terms == 0 && code != 2)); then
    torchreg report "$DIR" || ((code)) || code=1
fi
exit "$code"
