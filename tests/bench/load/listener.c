// Copyright: (c) 2026, The ctsync authors
// GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
// SPDX-License-Identifier: GPL-3.0-or-later
//
// What does it cost a firewall that somebody listens to conntrack events at all?
//
//   listener
//       Joins the groups of new, changed and ended flows with a filter that lets nothing through: the kernel builds
//       every event and drops it at once.  Prints "ready"; ends when it is killed.

#define _GNU_SOURCE
#include "ct.h"
#include <linux/filter.h>
#include <unistd.h>

int main(void) {
    int fd = netlink();
    struct sock_filter code[] = {{BPF_RET | BPF_K, 0, 0, 0}};
    struct sock_fprog program = {1, code};
    if (setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program))
        die("SO_ATTACH_FILTER");
    for (int group = NFNLGRP_CONNTRACK_NEW; group <= NFNLGRP_CONNTRACK_DESTROY; group++)
        if (setsockopt(fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group, sizeof group))
            die("NETLINK_ADD_MEMBERSHIP");
    printf("ready\n");
    fflush(stdout);
    for (;;)
        pause();
}
