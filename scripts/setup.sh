#!/usr/bin/env bash
# Make .venv with torchreg and the extras in $1, from the tested versions; an instant when it is there already.
#
#   bash scripts/setup.sh mpi,plot,scale
#   PYTHON=python3.12 bash scripts/setup.sh       # instead of python3
#   TORCH_INDEX=URL bash scripts/setup.sh         # torch from this package index alone, the rest as pip is configured
#
# For Linux, macOS (its bash 3.2 too) and WSL. It may be interrupted at any moment: .venv carries torchreg.unfinished
# while it is changed, and the next start makes such a one anew. A .venv that it did not make is left alone.
set -euo pipefail
newline=$'\n' # bash 3.2 has no $'' within other quotes
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { # EXIT_CODE MESSAGE...
    echo "setup.sh: error: ${*:2}" >&2
    exit "$1"
}

with_included() { # EXTRAS: ",one,two," of them and of those that they include
    awk -v extras=",$1," '
        /^\[/ { inside = /optional-dependencies/ }
        inside && /^[a-z]+ = / { extra = $1 }
        inside && index(extras, "," extra ",") && match($0, /torchreg-hpc\[[a-z,]+/) {
            extras = extras substr($0, RSTART + 13, RLENGTH - 13) ","
        }
        END { print extras }' pyproject.toml
}

is_ready() { # whether .venv was finished here, from these versions, with all of $extras
    [[ -x .venv/bin/torchreg && -x .venv/bin/python && ! -e .venv/torchreg.unfinished ]] || return
    [[ "$(head -n 1 .venv/torchreg.stamp 2>/dev/null)" == "$origin" ]] || return
    local extra installed
    installed=$(with_included "$(tail -n 1 .venv/torchreg.stamp)")
    for extra in ${extras//,/ }; do
        [[ $installed == *,"$extra",* ]] || return
    done
}

python_version() { # COMMAND: sets `minor`, 3.x, and `base`, the interpreter behind a virtual environment
    minor='' base=''
    read -r minor base < <("$1" -c 'import sys
print("%d.%d" % sys.version_info[:2], getattr(sys, "_base_executable", sys.executable))' 2>/dev/null) || true
    [[ $minor =~ ^3\.[0-9]+$ && ${minor#3.} -ge 10 ]]
}

choose_python() { # sets `python`
    python=${PYTHON:-python3}
    local other found reason
    if ! python_version "$python"; then
        found="$python is $("$python" --version 2>&1 | tail -n 1)" || found="there is no working $python"
        for other in python3.13 python3.12 python3.11 python3.10; do
            ! python_version "$other" || fail 2 "torchreg needs Python 3.10 to 3.13, and $found: set PYTHON=$other"
        done
        fail 2 "torchreg needs Python 3.10 to 3.13, and $found: install one, and set PYTHON to it"
    fi
    python=$base
    reason=$("$python" -c 'import ensurepip, venv' 2>&1) ||
        fail 2 "$python cannot make virtual environments (${reason##*"$newline"}): Debian and Ubuntu have what it" \
            "lacks in the package python$minor-venv"
}

lock() { # until this process and its children end; flock(1) is not on macOS, and flock(2) is
    exec 9>.venv.lock
    "$python" -c 'import fcntl, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("another set-up of .venv is running; waiting for it", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError:
    pass  # a file system without locks'
}

empty_venv() { # the mark goes last; .venv may be a link to a folder elsewhere
    find .venv/ -mindepth 1 -maxdepth 1 ! -name torchreg.unfinished -exec rm -rf {} +
}

stopped() { # EXIT_CODE
    echo "setup.sh: error: interrupted; start it again" >&2
    exit "$1"
}

leave() { # a new .venv is finished, or gone
    [[ -n $is_new ]] || return 0
    trap '' INT TERM HUP
    empty_venv
    rm -f .venv/torchreg.unfinished
    rmdir .venv 2>/dev/null || true
}

locked() { # the packages of scripts/requirements.lock that $extras need, with their hashes
    awk -v wanted=",base$(with_included "$extras")" '
        /^# for / { take = 0; for (i = 3; i <= NF; i++) if (index(wanted, "," $i ",")) take = 1 }
        take' scripts/requirements.lock
}

pip_install() { # ARGUMENTS...: on a terminal with pip's progress, elsewhere quietly
    local messages quiet=--quiet
    [[ ! -t 2 ]] || quiet=--progress-bar=on
    export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
    if ! messages=$(.venv/bin/python -m pip install "$quiet" --no-compile "$@" 3>&1 1>&2 2>&3); then
        # pip ended by itself, and a package is either installed or not: an earlier .venv is as good as before.
        [[ -n $is_new ]] || rm -f .venv/torchreg.unfinished
        if [[ $messages == *Retrying* ]]; then
            fail 1 "pip reaches no package index: is there a network, or a proxy that it must be given (HTTPS_PROXY)?"
        fi
        messages=$(printf '%s\n' "$messages" | grep -v '^WARNING') || messages='no reason given'
        [[ $messages == *"$newline"* ]] || fail 1 "pip could not install torchreg[$extras]: ${messages#ERROR: }"
        echo "$messages" >&2
        fail 1 "pip could not install torchreg[$extras]; what it said is above"
    fi
}

extras=${1:-mpi,plot,scale}
origin="$PWD $(cat pyproject.toml scripts/constraints.txt scripts/requirements.lock | cksum)"
known=$(sed -n '/^\[project.optional-dependencies\]/,/^\[/s/^\([a-z]*\) = .*/\1/p' pyproject.toml)
for extra in ${extras//,/ }; do
    [[ $newline$known$newline == *"$newline$extra$newline"* ]] ||
        fail 2 "there is no extra '$extra'; there are ${known//$newline/, }"
done
if [[ -n ${PYTHON:-} && -x .venv/bin/python ]] && python_version "$PYTHON" && [[ ! -x .venv/bin/python$minor ]]; then
    fail 2 ".venv has another Python than PYTHON=$PYTHON: remove .venv first"
fi
! is_ready || exit 0

is_new=''
trap 'stopped 130' INT
trap 'stopped 143' TERM
trap 'stopped 129' HUP
trap leave EXIT
choose_python
lock
! is_ready || exit 0 # another set-up made it meanwhile
if [[ -n $(ls -A .venv 2>/dev/null) && -z $(compgen -G '.venv/torchreg*') ]]; then
    fail 2 ".venv was not made by this script: move it away"
fi

[[ ! -e .venv/torchreg.unfinished ]] || echo "the last set-up of .venv was interrupted: making it anew" >&2
stamp=$(cat .venv/torchreg.stamp 2>/dev/null) || stamp=''
if [[ -x .venv/bin/python && ! -e .venv/torchreg.unfinished && $stamp == "$PWD "* ]]; then
    touch .venv/torchreg.unfinished
    extras=$(printf '%s\n' "${stamp##*"$newline"}" "$extras" | tr , '\n' | sort -u | paste -sd , -) # none is lost
else
    is_new=yes
    mkdir -p .venv
    touch .venv/torchreg.unfinished
    empty_venv
    reason=$("$python" -m venv .venv 2>&1) || fail 1 "$python could not make .venv: ${reason##*"$newline"}"
fi
echo "installing torchreg[$extras] into .venv; the first time takes a few minutes" >&2
if [[ -n ${TORCH_INDEX:-} ]]; then
    pip_install --no-deps --index-url "$TORCH_INDEX" --constraint scripts/constraints.txt torch
elif [[ $(uname) == Linux && -n $is_new ]]; then
    echo "PyPI's torch for Linux brings CUDA: about 3 GB to download, 5 GB on the disk. Its CPU build is small:" \
        "TORCH_INDEX=https://download.pytorch.org/whl/cpu takes torch from there" >&2
fi
pip_install --no-deps --require-hashes --requirement <(locked)
pip_install --no-build-isolation --constraint scripts/constraints.txt --editable ".[$extras]" # torch is missing yet
.venv/bin/python -m compileall -qq -j 0 .venv/lib || true # on all cores; some packages carry files that do not compile
printf '%s\n' "$origin" "$extras" >.venv/torchreg.stamp.new
mv .venv/torchreg.stamp.new .venv/torchreg.stamp
rm .venv/torchreg.unfinished
is_new=''
