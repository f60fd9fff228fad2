#!/bin/sh
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# artifact.sh [sanity] - build the collection, install the artifact in an empty folder, and check it there:
# its playbooks parse, or, with 'sanity', it passes ansible-test's sanity tests.
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

ansible-galaxy collection build --output-path "$work" >/dev/null
# Nothing of this checkout's configuration: what is installed has to do by itself.
export ANSIBLE_CONFIG=/dev/null ANSIBLE_COLLECTIONS_PATH="$work/installed"
ansible-galaxy collection install --offline "$work"/ctsync-ha_firewall-*.tar.gz -p "$work/installed" >/dev/null
if [ "${1:-}" = sanity ]; then
    cd "$work/installed/ansible_collections/ctsync/ha_firewall"
    ansible-test sanity --python default --color no
    exit
fi
cd "$work"
for playbook in site failover_test; do
    ansible-playbook -i "$root/inventories/example/hosts.yml" "ctsync.ha_firewall.$playbook" --syntax-check
done
