#!/bin/sh
# Usage: tools/make_venv.sh PYTHON VENV REQUIREMENTS
# Creates the virtual environment VENV with PYTHON and installs the pinned REQUIREMENTS into it. Done already: returns
# at once. Requirements changed: installs the difference. Interrupted halfway: starts afresh.
set -eu
python=$1
venv=$2
requirements=$3

# What was installed last; `-r requirements.txt` inside another file counts through its content.
stamp="$venv/installed-$requirements"
# pip leaves packages that look whole when it is killed, so a marked environment is not mended but made again.
unfinished="$venv/unfinished"
version='import sys; sys.exit(sys.version_info[:2] != (3, 11))'
sum() { cat requirements.txt "$1" | cksum; }
wanted=$(sum "$requirements")
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ ! -e "$unfinished" ] &&
    "$venv/bin/python" -c "$version" 2>/dev/null; then
    exit 0
fi

check='import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))'
if ! "$python" -c "$check" >/dev/null 2>&1; then
    echo "error: '$python' is not a Python 3.11 with venv. Run: sudo apt-get install python3.11 python3.11-venv," \
        "or name one: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi

if [ -e "$unfinished" ] || ! "$venv/bin/python" -c "import pip; $version" >/dev/null 2>&1; then
    echo "Creating $venv with $("$python" --version)."
    mkdir -p "$venv"
    : >"$unfinished"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name unfinished -exec rm -rf {} +
    "$python" -m venv "$venv"
fi

: >"$unfinished"
rm -f "$venv"/installed-*  # what another list had installed may change now
echo "Installing $requirements into $venv (TensorFlow alone is about 600 MB; the first time takes some minutes)."
"$venv/bin/python" -m pip install --disable-pip-version-check --no-input --requirement "$requirements"
echo "$wanted" >"$stamp"
sum requirements.txt >"$venv/installed-requirements.txt"  # every other list includes it
rm "$unfinished"
