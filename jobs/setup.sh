#!/bin/bash -l
# Make the venv of a machine's jobs, once, on a login node: over the site's python, whose torch, NumPy and mpi4py are
# used and never replaced, with torchreg, the packages that the site lacks, and ezpz. Run it again after an update.
#
#   bash -l jobs/setup.sh polaris
#
# Settings: MODULES and VENV as in the jobs; EZPZ= leaves ezpz out, EZPZ=FOLDER takes a checkout of it.
MACHINE=${1:-}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source jobs/common.sh || exit
EZPZ=${EZPZ-.[ezpz]} # from the commit that pyproject.toml names

[[ -n $VENV ]] || fail "VENV is empty: name a folder, or leave it out for $PWD/.venv-$MACHINE"
load_modules
python=$(command -v python3)
find_torch='import importlib.util as u; s = u.find_spec("torch"); print(s.origin if s else "")'
[[ -n $(python3 -c "$find_torch") ]] ||
    fail "$python has no torch: name its module in MODULES; or install torch as the site's guide says into a venv of your \
own, then torchreg with 'pip install -e .[scale]', and give jobs VENV=FOLDER"

exec 9<"jobs/setup.sh"
flock -n 9 || { echo "another jobs/setup.sh is at work: waiting for it" && flock 9; } || fail "flock failed on $PWD"
# Never empty a folder that somebody else filled.
[[ -e $VENV/torchreg.stamp || -z $(ls -A "$VENV" 2>&1) || ! -e $VENV ]] ||
    fail "VENV is $VENV, which this script did not make: name an empty or a new folder"
{ mkdir -p "$VENV" && echo unfinished >"$VENV/torchreg.stamp"; } 2>/dev/null ||
    fail "VENV is $VENV, which cannot be written"
find "$VENV" -mindepth 1 -maxdepth 1 ! -name torchreg.stamp -exec rm -rf {} +

echo "making $VENV over $python"
python3 -m venv --system-site-packages "$VENV" || fail "$python -m venv failed"
export PATH="$VENV/bin:$PATH"
python3 - >"$VENV/site.txt" <<'PYTHON' || exit
from importlib.metadata import PackageNotFoundError, version

for name in ("torch", "numpy", "pandas", "scipy", "mpi4py"):
    try:
        print(f"{name}=={version(name).split('+')[0]}")
    except PackageNotFoundError:
        pass
PYTHON
install=(python3 -m pip install --quiet --disable-pip-version-check --constraint "$VENV/site.txt")
"${install[@]}" --editable '.[scale]' || fail "pip could not install torchreg into $VENV: see above"
[[ -z $EZPZ ]] || "${install[@]}" "$EZPZ" ||
    fail "pip could not install ezpz into $VENV: EZPZ= leaves it out, EZPZ=FOLDER takes a checkout of it"
[[ $(python3 -c "$find_torch") != "$VENV"/* ]] ||
    fail "$VENV has a torch of its own, not the site's: see which package brought it with 'pip show torch'"
echo "$python" >"$VENV/torchreg.stamp"
echo "ready: the jobs of $MACHINE find it${EZPZ:+, ezpz included}"
