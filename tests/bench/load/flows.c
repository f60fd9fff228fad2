// Copyright: (c) 2026, The ctsync authors
// GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
// SPDX-License-Identifier: GPL-3.0-or-later
//
// Flows for the benchmark, written into the kernel's table of the network namespace that this runs in.
//
//   flows add|delete SHAPE SEED FIRST COUNT RATE
//       Flows FIRST to FIRST + COUNT - 1 of the seed, RATE a second in batches of a millisecond, or with RATE 0 as fast
//       as the kernel takes them.  SHAPE: transit, site or snat, see ct.h.  Prints one line of JSON.  Exit status 1
//       when a translated flow did not come out translated.

#define _GNU_SOURCE
#include "ct.h"
#include <errno.h>

enum { BATCH = 50 };

static long drain(int fd, int flags) { // counts what the kernel refused
    char buffer[65536];
    long refused = 0;
    for (;;) {
        ssize_t got = recv(fd, buffer, sizeof buffer, flags);
        if (got < 0) {
            if (errno == ENOBUFS)
                continue;
            return refused;
        }
        for (struct nlmsghdr *h = (struct nlmsghdr *)buffer; NLMSG_OK(h, (unsigned)got); h = NLMSG_NEXT(h, got))
            if (h->nlmsg_type == NLMSG_ERROR)
                refused += ((struct nlmsgerr *)NLMSG_DATA(h))->error != 0;
    }
}

static int is_translated(int fd, struct tuple t) { // does the kernel say IPS_SRC_NAT?
    char buffer[8192];
    size_t length = request(buffer, IPCTNL_MSG_CT_GET, 0, 1, t);
    if (send(fd, buffer, length, 0) < 0)
        die("send");
    ssize_t got = recv(fd, buffer, sizeof buffer, 0);
    struct nlmsghdr *header = (struct nlmsghdr *)buffer;
    if (got < (ssize_t)NLMSG_HDRLEN || header->nlmsg_type == NLMSG_ERROR)
        return 0;
    char *at = buffer + NLMSG_HDRLEN + NLMSG_ALIGN(sizeof(struct nfgenmsg));
    while (at < buffer + got) {
        struct nlattr *attribute = (struct nlattr *)at;
        if ((attribute->nla_type & NLA_TYPE_MASK) == CTA_STATUS) {
            uint32_t status;
            memcpy(&status, at + NLA_HDRLEN, sizeof status);
            return (ntohl(status) & IPS_SRC_NAT) != 0;
        }
        at += NLA_ALIGN(attribute->nla_len);
    }
    return 0;
}

int main(int argc, char **argv) {
    if (argc != 7) {
        fprintf(stderr, "flows add|delete transit|site|snat SEED FIRST COUNT RATE\n");
        return 2;
    }
    int adding = !strcmp(argv[1], "add");
    const char *shape = argv[2];
    uint64_t seed = strtoull(argv[3], NULL, 10), first = strtoull(argv[4], NULL, 10);
    long count = atol(argv[5]), done = 0, refused = 0;
    double rate = atof(argv[6]);
    int fd = netlink();
    char buffer[BATCH * MESSAGE_ROOM];
    double began = now_s();
    while (done < count) {
        long batch = BATCH;
        if (rate > 0) { // what is due by now
            long due = (long)((now_s() - began) * rate) + 1 - done;
            if (due <= 0) {
                struct timespec pause = {0, 1000000};
                clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
                continue;
            }
            batch = due < BATCH ? due : BATCH;
        }
        if (batch > count - done)
            batch = count - done;
        size_t length = 0;
        for (long k = 0; k < batch; k++)
            length += request(buffer + length, adding ? IPCTNL_MSG_CT_NEW : IPCTNL_MSG_CT_DELETE,
                              adding ? NLM_F_CREATE | NLM_F_EXCL : 0, (uint32_t)(done + k + 1),
                              flow(shape, seed, first + (uint64_t)(done + k)));
        if (send(fd, buffer, length, 0) < 0)
            die("send");
        refused += drain(fd, MSG_DONTWAIT);
        done += batch;
    }
    double seconds = now_s() - began;
    int translated = 1;
    if (adding && !strcmp(shape, "snat")) { // the first that the kernel took
        translated = 0;
        for (long k = 0; k < count && k < 20 && !translated; k++)
            translated = is_translated(fd, flow(shape, seed, first + (uint64_t)k));
    }
    printf("{\"requests\": %ld, \"refused\": %ld, \"seconds\": %.6f, \"translated\": %s}\n", done, refused, seconds,
           translated ? "true" : "false");
    return translated ? 0 : 1;
}
