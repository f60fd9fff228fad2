#!/bin/sh
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# venv.sh - make .venv (pinned tools, requirements.txt) and .vendor (the collections that only the lab needs).
# Does nothing when both are up to date. PYTHON=... chooses the interpreter, 3.11 or newer.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
# Of this bundle only the Docker connection is taken, and what that depends on.
bundle=ansible==12.3.0
collections="community/docker community/library_inventory_filtering_v1"

sh tools/need.sh "${python}:python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2
    exit 1
}
stamp=$(cat requirements.txt tools/venv.sh | cksum)

if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        # Debian ships the module without what it needs; of a Python from elsewhere this package is no help.
        version=$("$python" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
        sh tools/need.sh "python${version}-venv"
    fi
    echo "Making the virtual environment .venv (about half a minute)"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    echo "$stamp" >.venv/stamp
fi

if [ "$(cat .vendor/stamp 2>/dev/null)" != "$bundle" ]; then
    echo "Fetching the collections that the lab needs into .vendor (54 MB, of which 3 are kept)"
    rm -rf .vendor
    mkdir -p .vendor/download
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest .vendor/download "$bundle"
    # shellcheck disable=SC2086 # a list of words
    .venv/bin/python - .vendor $collections <<'PYTHON'
import glob
import sys
import zipfile

target, *wanted = sys.argv[1:]
with zipfile.ZipFile(glob.glob(f"{target}/download/*.whl")[0]) as wheel:
    prefixes = tuple(f"ansible_collections/{name}/" for name in wanted)
    wheel.extractall(target, [name for name in wheel.namelist() if name.startswith(prefixes)])
PYTHON
    rm -rf .vendor/download
    echo "$bundle" >.vendor/stamp
fi
