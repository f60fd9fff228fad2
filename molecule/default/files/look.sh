#!/bin/sh
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# What a node consists of, as far as the collection touches it: to be compared before the deployment and after the removal.
export LC_ALL=C
# files by name, mode and contents; not the copies that tools keep of the last version (passwd-), nor caches
find /etc /usr/sbin /usr/lib/systemd /usr/lib/ctsyncd /usr/local /var/lib -xdev \
    \( -path '/var/lib/apt/*' -o -path '/var/lib/dpkg/*' -o -path '/var/lib/systemd/*' -o -path '/var/lib/ucf/*' -o -name '*-' \
    -o -name ld.so.cache -o -name __pycache__ \) -prune -o -type f -printf '%p %m %u %g ' -exec md5sum {} \; \
    -o -type l -printf '%p -> %l\n' -o -type d -printf '%p/ %m %u %g\n' 2>/dev/null | sort
find /run -name 'ctsync*.fifo' -o -name 'ctsyncd*' -o -name not-ready | sort
dpkg-query -W -f '${db:Status-Abbrev}${Package} ${Version}\n'
systemctl list-unit-files --no-pager --no-legend 'ctsync*' 'keepalived*'
for key in net/ipv4/ip_forward net/ipv4/conf/all/rp_filter net/netfilter/nf_conntrack_events net/netfilter/nf_conntrack_tcp_loose \
    net/netfilter/nf_conntrack_timestamp; do
    echo "$key $(cat /proc/sys/$key)"
done
{ iptables-save; ip6tables-save; } | grep -v -e '^#' -e '^\*' -e '^:.* ACCEPT ' -e '^COMMIT'
ip -o -4 address show | awk '{ print $2, $4 }'
exit 0
