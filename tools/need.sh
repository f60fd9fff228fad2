#!/bin/sh
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# need.sh PROGRAM:PACKAGE ... - make sure of programs: installs Debian's packages for those that are missing, saying so.
# A word without a colon is a package to install in any case.
set -eu
PATH=$PATH:/usr/sbin:/sbin
missing=
for need in "$@"; do
    case $need in
        *:*) command -v "${need%%:*}" >/dev/null 2>&1 || missing="$missing ${need#*:}" ;;
        *) missing="$missing $need" ;;
    esac
done
[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null 2>&1 || [ "$(id -u)" != 0 ]; then
    echo "Please install:$missing  (as root on a Debian system this is done for you)" >&2
    exit 1
fi
echo "Installing Debian packages:$missing"
# What is here for a test must not begin to serve, now (policy-rc.d, see invoke-rc.d(8)) or at the next boot.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq -o DPkg::Lock::Timeout=300 update
# shellcheck disable=SC2086 # a list of words
apt-get -qq -y -o DPkg::Lock::Timeout=300 --no-install-recommends install $missing >/dev/null
if [ -d /run/systemd/system ]; then
    for package in $missing; do
        units=$(dpkg -L "$package" | sed -n 's#.*/systemd/system/\([^/@]*\.\(service\|socket\)\)$#\1#p')
        for unit in "$package" $units; do systemctl --quiet disable "$unit" 2>/dev/null || true; done
    done
fi
# make lab-down names them (plugins/module_utils/_lab.py): what was installed here stays.
record=/var/lib/ctsync-lab
mkdir -p "$record"
# shellcheck disable=SC2086 # a list of words
printf '%s\n' $missing >>"$record/packages"
