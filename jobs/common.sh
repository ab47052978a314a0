# shellcheck shell=bash
# What the job scripts share: sourced, in the folder of the checkout, after a script's own settings.
#
# A step that may take long is a child of the script in the background, because bash waits for a child in the
# foreground before it looks at a signal: so SIGTERM reaches torchreg, which saves and ends with 75.

KILL_AFTER_S=${KILL_AFTER_S:-30} # from SIGTERM to SIGKILL for a launcher that does not end
RESERVE_S=${RESERVE_S:-120}      # of the walltime, for the start of the ranks and the end of the job
REQUEUE=${REQUEUE:-0}            # how many more jobs may follow by themselves
LAUNCHER=${LAUNCHER:-auto}       # see torchreg scale command
WITHOUT=${WITHOUT:-}             # names of the machine's variables to exclude
CONTAINER=${CONTAINER:-}         # what runs a program in a container, as in "singularity run FILE"
VENV=${VENV-$PWD/.venv-$MACHINE} # made by jobs/setup.sh, or your own with torchreg in it; VENV= takes the python as it is
[[ -z $VENV || $VENV == /* ]] || VENV=$PWD/$VENV

fail() { # MESSAGE: one line, and the end
    echo "job: error: $*" >&2
    exit 2
}

# What `module load` gets for the site's python with torch, and the device that a node has: ranks that do not see it end
# the job, which would else train, or prove the stack, on CPUs.
case $MACHINE in
polaris) site_modules="conda" site_device=cuda ;;
aurora) site_modules="frameworks" site_device=xpu ;;
perlmutter) site_modules="pytorch" site_device=cuda ;;
frontier) site_modules="PrgEnv-gnu miniforge3 rocm rccl-net-plugin craype-accel-amd-gfx90a" site_device=cuda ;;
lumi) site_modules="" site_device=cuda ;;
generic) site_modules="" site_device=auto ;;
*) fail "the machine is '$MACHINE': give generic, polaris, aurora, perlmutter, frontier or lumi" ;;
esac
MODULES=${MODULES-$site_modules} # MODULES= loads none
DEVICE=${DEVICE:-$site_device}

load_modules() { # MODULES; the python on the PATH is then the one that torchreg's venv lies over
    local name
    [[ -z $MODULES ]] || command -v module >/dev/null ||
        fail "there is no command module here, to load $MODULES: choose MACHINE=generic, or set MODULES= (to nothing)"
    [[ $MACHINE != polaris ]] || module use /soft/modulefiles
    for name in $MODULES; do
        module load "$name" || fail "module load $name failed: name the site's modules in MODULES"
        [[ $name != conda* ]] || conda activate base || fail "conda activate base failed after module load $name"
    done
    command -v python3 >/dev/null || fail "there is no python3 on the PATH: name a module that brings one in MODULES"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$(command -v python3) is $(python3 -V 2>&1), and torchreg needs 3.10 or newer: name its module in MODULES"
}

use_python() { # a job installs nothing: its nodes would wait for it, and many have no network
    local over
    if [[ -n $CONTAINER ]]; then
        read -ra container <<<"$CONTAINER"
        torchreg=("$VENV/bin/torchreg")
        return
    fi
    load_modules
    if [[ -n $VENV ]]; then
        [[ -x $VENV/bin/python3 ]] ||
            fail "VENV is $VENV, where there is no python: run 'bash jobs/setup.sh $MACHINE' on a login node first"
        over=$(cat "$VENV/torchreg.stamp" 2>/dev/null) || over=$(command -v python3)
        [[ $over == "$(command -v python3)" ]] ||
            fail "$VENV lies over '$over', not $(command -v python3): run 'bash jobs/setup.sh $MACHINE' again"
        export PATH="$VENV/bin:$PATH"
    fi
    command -v torchreg >/dev/null ||
        fail "there is no torchreg in ${VENV:-the python on the PATH}: run 'bash jobs/setup.sh $MACHINE' on a login node"
    python3 -c 'import sys, importlib.util as u; s = u.find_spec("ezpz"); sys.exit(not (s and s.origin))' ||
        echo "ezpz is not installed here, so that torch alone sets up the ranks: jobs/setup.sh installs it"
}

pbs_value() { # ATTRIBUTE: what PBS knows of this job, nothing where it does not answer
    qstat -f -w "$PBS_JOBID" 2>/dev/null | sed -n "s/^ *$1 = //p"
}

seconds_of() { # HH:MM:SS
    local hours minutes seconds
    IFS=: read -r hours minutes seconds <<<"$1"
    [[ $hours$minutes$seconds =~ ^[0-9]+$ && -n $seconds ]] || fail "walltime is '$1': give WALLTIME as HH:MM:SS"
    echo $((10#$hours * 3600 + 10#$minutes * 60 + 10#$seconds))
}

time_left_s() { # of this job. OpenPBS gives a job no time of its end, so it follows from the walltime.
    local end=${SLURM_JOB_END_TIME:-}
    if [[ -z $end && -n ${SLURM_JOB_ID:-} ]]; then # Slurm before 23 has to be asked
        end=$(SLURM_TIME_FORMAT='%s' scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.* EndTime=\([0-9]*\) .*/\1/p')
    fi
    if [[ -n $end ]]; then
        echo $((end - $(date +%s)))
    else
        echo $(($(seconds_of "$WALLTIME") - SECONDS))
    fi
}

set_limits() { # TIME_LIMIT_S: when torchreg saves and stops; TIMEOUT_S: when a launcher that hangs is ended
    local asked=
    [[ -z ${PBS_JOBID:-} ]] || asked=$(pbs_value Resource_List.walltime)
    WALLTIME=${asked:-$WALLTIME}
    local left
    left=$(time_left_s) || exit
    TIME_LIMIT_S=$((left - RESERVE_S))
    TIMEOUT_S=$((left - KILL_AFTER_S - 15))
    ((TIME_LIMIT_S > 0 && TIMEOUT_S > 0)) ||
        fail "the job ends in $left s, of which $RESERVE_S s are for its start and end: ask for more walltime"
}

container=() torchreg=(torchreg)
launcher_program=

end_child() { # srun kills ranks when it gets SIGTERM: so Slurm signals them, and srun waits for them
    if [[ $launcher_program == srun ]]; then
        scancel --signal=TERM "$SLURM_JOB_ID"
    else
        kill -TERM "$child"
    fi 2>/dev/null
}

run_to_end() { # COMMAND...: sets `code`; passes SIGTERM on (and Ctrl-C, as SIGTERM), and waits on
    local before
    num_terms=0
    "$@" &
    child=$!
    trap 'num_terms=$((num_terms + 1)); end_child' TERM INT
    while :; do
        before=$num_terms
        code=0
        wait "$child" || code=$?
        ((num_terms > before)) || break # else it was the signal that ended the wait, and not the child
    done
    trap - TERM INT
}

train_on_all_ranks() { # NAME TRAIN PROGRAM: PROGRAM, or run NAME of torchreg train with options TRAIN; sets `code`
    local command limit=(--time-limit-s "$TIME_LIMIT_S")
    read -ra command <<<"${3:-$2}"
    if [[ -n $3 ]]; then
        on_all_ranks "${command[@]}" "${limit[@]}"
    else
        on_all_ranks "${torchreg[@]}" train --device "$DEVICE" --name "$1" --resume auto "${limit[@]}" "${command[@]}"
    fi
}

on_all_ranks() { # COMMAND...: under the launcher; sets `code`
    local tokens launch=() without=()
    read -ra without <<<"$WITHOUT"
    ((${#without[@]} == 0)) || unset -v "${without[@]}"
    tokens=$("${container[@]}" "${torchreg[@]}" scale command --launcher "$LAUNCHER" --machine "$MACHINE" \
        --ranks-per-node "$RANKS_PER_NODE" ${without[@]:+--without "${without[@]}"}) || exit
    mapfile -t launch <<<"$tokens"
    launcher_program=${launch[0]}
    set -- "${launch[@]}" "${container[@]}" "$@"
    echo "+ $*"
    run_to_end timeout --kill-after="$KILL_AFTER_S" "$TIMEOUT_S" "$@"
}

end_job() { # SCRIPT SETTINGS...: prints what is next, submits SCRIPT again with SETTINGS if asked, and exits with `code`
    local script=$1
    shift
    case $code in
    0) ;;
    75)
        # A signal long before the end of the job is a qdel or scancel, or a preemption after which the scheduler starts
        # the job again by itself.
        local time_is_over=$(($(time_left_s) < RESERVE_S + 120))
        [[ $num_terms -gt 0 || -n ${SLURM_JOB_ID:-} ]] || time_is_over=1 # it was torchreg that saw the end coming
        if ((REQUEUE > 0 && time_is_over)); then
            submit_again "$script" "$@"
        else
            echo "saved, and not finished: submit $script again with the same settings to resume"
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
        if ((${SLURM_RESTART_COUNT:-0} >= REQUEUE)); then
            echo "saved, and not finished, and queued again $REQUEUE times already: submit $script to resume"
            return
        fi
        echo "saved, and not finished: job $SLURM_JOB_ID is queued again" # before Slurm ends this script for it
        scontrol requeue "$SLURM_JOB_ID" || echo "it could not be queued again: submit $script to resume"
        return
    fi
    local options=(-q "$PBS_O_QUEUE") names='' name value
    value=$(pbs_value Account_Name)
    [[ -z $value ]] || options+=(-A "$value")
    for name in select filesystems; do
        value=$(pbs_value "Resource_List.$name")
        [[ -z $value ]] || options+=(-l "$name=$value")
    done
    REQUEUE=$((REQUEUE - 1))
    for name in REQUEUE WALLTIME MACHINE MODULES CONTAINER DEVICE LAUNCHER RANKS_PER_NODE VENV WITHOUT RESERVE_S \
        KILL_AFTER_S "$@"; do
        # A name alone: qsub takes the value from here, commas and blanks as they are.
        [[ ! -v $name ]] || { export "${name?}" && names+=${names:+,}$name; }
    done
    if qsub "${options[@]}" -l "walltime=$WALLTIME" -v "$names" "$script"; then
        echo "saved, and not finished: submitted again, with $REQUEUE more to follow"
    else
        echo "saved, and not finished, and qsub failed: submit $script again with the same settings to resume"
    fi
}
