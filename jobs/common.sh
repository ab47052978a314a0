# shellcheck shell=bash
# What the job scripts share: sourced, in the folder of the checkout, after a script's own settings.
#
# A step that may take long is a child of the script in the background, because bash waits for a child in the
# foreground before it looks at a signal: so SIGTERM reaches torchreg, which saves and ends with 75.

KILL_AFTER_S=${KILL_AFTER_S:-30} # from SIGTERM to SIGKILL for a launcher that does not end
RESERVE_S=${RESERVE_S:-120}      # of the walltime, for the start of the ranks and the end of the job
REQUEUE=${REQUEUE:-0}            # how many more jobs may follow by themselves
LAUNCHER=${LAUNCHER:-auto}       # see torchreg scale command
WITHOUT=${WITHOUT:-}             # names of the machine's variables to leave out

fail() { # MESSAGE: one line, and the end
    echo "job: error: $*" >&2
    exit 2
}

job_says() { # ATTRIBUTE: what PBS knows of this job, nothing where it does not tell
    qstat -f -w "$PBS_JOBID" 2>/dev/null | sed -n "s/^ *$1 = //p"
}

seconds_of() { # HH:MM:SS
    local hours minutes seconds
    IFS=: read -r hours minutes seconds <<<"$1"
    [[ $hours$minutes$seconds =~ ^[0-9]+$ && -n $seconds ]] || fail "walltime is '$1': give WALLTIME as HH:MM:SS"
    echo $((10#$hours * 3600 + 10#$minutes * 60 + 10#$seconds))
}

time_left_s() { # of this job. OpenPBS tells a job nothing of its end, so it is reckoned from the walltime.
    if [[ -n ${SLURM_JOB_END_TIME:-} ]]; then
        echo $((SLURM_JOB_END_TIME - $(date +%s)))
    else
        echo $(($(seconds_of "$WALLTIME") - SECONDS))
    fi
}

set_limits() { # TIME_LIMIT_S: when torchreg saves and stops; TIMEOUT_S: when a launcher that hangs is ended
    local asked=
    [[ -z ${PBS_JOBID:-} ]] || asked=$(job_says Resource_List.walltime)
    WALLTIME=${asked:-$WALLTIME}
    local left
    left=$(time_left_s) || exit
    TIME_LIMIT_S=$((left - RESERVE_S))
    TIMEOUT_S=$((left - KILL_AFTER_S - 15))
    ((TIME_LIMIT_S > 0 && TIMEOUT_S > 0)) ||
        fail "the job ends in $left s, of which $RESERVE_S s are for its start and end: ask for more walltime"
}

site_python() { # the python on the PATH is the site's: a venv over it adds what it lacks, and never another torch
    VENV=${VENV-$PWD/.venv-$MACHINE} # VENV= takes the python as it is
    [[ -n $VENV ]] || return
    local wanted
    wanted="$(command -v python) $(cksum <pyproject.toml)"
    # One job at a time: the others find it made.
    (
        flock 9
        [[ $(cat "$VENV/torchreg.stamp" 2>/dev/null) == "$wanted" ]] || make_venv "$wanted"
    ) 9>"$VENV.lock" || exit
    # shellcheck disable=SC1091
    source "$VENV/bin/activate" || exit
}

make_venv() { # STAMP: the packages are those of pyproject.toml that may be missing, and hold nothing of the site's
    echo "making $VENV over $(command -v python)"
    python -m venv --clear --system-site-packages "$VENV" || exit
    # shellcheck disable=SC1091
    source "$VENV/bin/activate" || exit
    python - >"$VENV/site.txt" <<'PYTHON' || exit
from importlib.metadata import PackageNotFoundError, version

for name in ("torch", "numpy", "pandas", "scipy", "mpi4py"):
    try:
        print(f"{name}=={version(name).split('+')[0]}")
    except PackageNotFoundError:
        pass
PYTHON
    python -m pip install --quiet --no-deps --editable . || exit
    python -m pip install --quiet --constraint "$VENV/site.txt" \
        jinja2 matplotlib pandas pooch pyarrow pyyaml rich scipy tyro || exit
    python -c 'import sys, torch; sys.exit(torch.__file__.startswith(sys.prefix + "/"))' ||
        fail "torch in $VENV is not the site's: remove $VENV, and see which package brought it"
    echo "$1" >"$VENV/torchreg.stamp"
}

run_to_end() { # COMMAND...: sets `code`; passes SIGTERM on (and Ctrl-C, as SIGTERM), and waits on
    local before
    num_terms=0
    "$@" &
    child=$!
    trap 'num_terms=$((num_terms + 1)); kill -TERM "$child" 2>/dev/null' TERM INT
    while :; do
        before=$num_terms
        code=0
        wait "$child" || code=$?
        ((num_terms > before)) || break # else it was the signal that ended the wait, and not the child
    done
    trap - TERM INT
}

on_all_ranks() { # ARGUMENTS...: torchreg with them, under the launcher; sets `code`
    local tokens launch=() without=()
    read -ra without <<<"$WITHOUT"
    ((${#without[@]} == 0)) || unset -v "${without[@]}"
    tokens=$(torchreg scale command --launcher "$LAUNCHER" --machine "$MACHINE" --ranks-per-node "$RANKS_PER_NODE" \
        ${without[@]:+--without "${without[@]}"}) || exit
    mapfile -t launch <<<"$tokens"
    echo "+ ${launch[*]} torchreg $*"
    run_to_end timeout --kill-after="$KILL_AFTER_S" "$TIMEOUT_S" "${launch[@]}" torchreg "$@"
}

end_job() { # SCRIPT SETTINGS...: says what is next, submits SCRIPT again with SETTINGS if asked, and exits with `code`
    local script=$1
    shift
    case $code in
    0) ;;
    75)
        # A signal long before the end of the job is a qdel or scancel, or a preemption after which the scheduler starts
        # the job again by itself. (scancel signals the ranks and not the script.)
        local time_is_over=$(($(time_left_s) < RESERVE_S + 120))
        [[ $num_terms -gt 0 || -n ${SLURM_JOB_ID:-} ]] || time_is_over=1 # it was torchreg that saw the end coming
        if ((REQUEUE > 0 && time_is_over)); then
            submit_again "$script" "$@"
        else
            echo "saved, and not finished: submit $script again with the same settings to go on"
        fi
        ;;
    124 | 137)
        local within="$TIMEOUT_S s"
        ((num_terms == 0)) || within="$KILL_AFTER_S s of SIGTERM"
        echo "job: error: the launcher did not end within $within, and was ended (exit code $code)" >&2
        ;;
    *) echo "job: error: exit code $code" >&2 ;;
    esac
    exit "$code"
}

submit_again() { # SCRIPT SETTINGS...: once more, with this job's account, size, walltime and queue
    local script=$1
    shift
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        if ((${SLURM_RESTART_COUNT:-0} < REQUEUE)) && scontrol requeue "$SLURM_JOB_ID"; then
            echo "saved, and not finished: job $SLURM_JOB_ID is queued again"
        else
            echo "saved, and not finished, and not queued again: submit $script to go on"
        fi
        return
    fi
    local options=(-q "$PBS_O_QUEUE") names='' name value
    value=$(job_says Account_Name)
    [[ -z $value ]] || options+=(-A "$value")
    for name in select filesystems; do
        value=$(job_says "Resource_List.$name")
        [[ -z $value ]] || options+=(-l "$name=$value")
    done
    REQUEUE=$((REQUEUE - 1))
    for name in REQUEUE WALLTIME MACHINE LAUNCHER RANKS_PER_NODE VENV WITHOUT RESERVE_S KILL_AFTER_S "$@"; do
        # A name alone: qsub takes the value from here, commas and blanks as they are.
        [[ ! -v $name ]] || { export "${name?}" && names+=${names:+,}$name; }
    done
    if qsub "${options[@]}" -l "walltime=$WALLTIME" -v "$names" "$script"; then
        echo "saved, and not finished: submitted again, with $REQUEUE more to follow"
    else
        echo "saved, and not finished, and qsub failed: submit $script again with the same settings to go on"
    fi
}
