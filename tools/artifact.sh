#!/bin/sh
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# artifact.sh [sanity | install FOLDER] - build the collection, install it in an empty folder, and check it there:
# its playbooks parse and all of it is documented, or, with 'sanity', it passes ansible-test's sanity tests.
# 'install' does no more than that, in FOLDER, where it stays: the molecule scenarios deploy it from there.
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

# Nothing of this checkout's configuration: what is installed has to do by itself.
: >"$work/ansible.cfg"
installed=$work/installed
if [ "${1:-}" = install ]; then
    mkdir -p "$2"
    installed=$(cd "$2" && pwd)
    rm -rf "$installed/ansible_collections"
fi
export ANSIBLE_CONFIG="$work/ansible.cfg" ANSIBLE_COLLECTIONS_PATH="$installed"
ansible-galaxy collection build --output-path "$work" >/dev/null
ansible-galaxy collection install --offline "$work"/ctsync-ha_firewall-*.tar.gz -p "$installed" >/dev/null

[ "${1:-}" != install ] || exit 0

if [ "${1:-}" = sanity ]; then
    # pyenv's shims exist for versions that are not chosen, and then fail: offer the versions themselves.
    if command -v pyenv >/dev/null 2>&1; then
        PATH=$(echo "$PATH" | tr : '\n' | grep -v '/shims$' | paste -sd:)
        for versions in "$(pyenv root)"/versions/3.*/bin; do PATH=$PATH:$versions; done
    fi
    # ansible-test makes virtual environments for its tests; they are kept in a home of its own, in this checkout.
    PIP_CACHE_DIR=$(python -m pip cache dir)
    export PIP_CACHE_DIR HOME="$root/.cache/ansible-test"
    cache=$HOME/.ansible/test/cache
    if ! [ -s "$cache/get_pip_24_2.py" ]; then
        # It would download a script that installs this very pip; the wheel can do that, too.
        mkdir -p "$cache"
        python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$cache" pip==24.2
        cat >"$cache/get_pip_24_2.py" <<'PYTHON'
import glob
import os
import runpy
import sys

wheel = glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), "pip-24.2-*.whl"))[0]
sys.path.insert(0, wheel)
sys.argv = ["pip", "install", "--no-deps", "--no-index", wheel]
runpy.run_module("pip", run_name="__main__")
PYTHON
    fi
    cd "$installed/ansible_collections/ctsync/ha_firewall"
    # Of the Python versions that the modules support (tests/config.yml), those that this machine has take part.
    took='' absent=''
    for version in 3.9 3.10 3.11 3.12 3.13; do
        if command -v "python$version" >/dev/null 2>&1; then took="$took $version"; else absent="$absent $version"; fi
    done
    if [ -n "$absent" ] && [ "${SANITY_PYTHONS:-}" = all ]; then
        echo "SANITY_PYTHONS=all: this machine has no Python$absent. Install it (python3.N must be on the PATH, or below pyenv), or" \
            "leave SANITY_PYTHONS out: then the versions that are there have to do." >&2
        exit 1
    fi
    ansible-test sanity --color no
    echo "Sanity tests passed with Python$took${absent:+; this machine lacks, so not tried with$absent}."
    exit
fi

cd "$work"
for playbook in site failover_test status switchover upgrade rotate_key uninstall; do
    ansible-playbook -i "$root/inventories/example/hosts.yml" "ctsync.ha_firewall.$playbook" --syntax-check
done
python "$root/tools/check_docs.py" "$installed"/ansible_collections/ctsync/ha_firewall
echo "The artifact installs, its playbooks parse, its modules, filters and roles are documented."
