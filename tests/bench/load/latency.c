// Copyright: (c) 2026, The ctsync authors
// GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
// SPDX-License-Identifier: GPL-3.0-or-later
//
// How long from a new flow on one firewall until the other one knows?
//
//   latency FROM TO INTERFACE COUNT MEAN_MS SEED
//       FROM and TO are network namespaces (paths below /run/netns), INTERFACE is TO's end of the sync link.  Writes COUNT
//       probe flows into FROM's table, at random (Poisson) times MEAN_MS apart, and notes when TO's kernel reports each as new
//       and when a datagram arrives that holds its addresses in the clear.  Prints one line of JSON: microseconds from
//       just before the probe was handed to the kernel; -1 is never within five seconds of the last one.
//
// The listener in TO has a filter in the kernel, so that other flows cost it nothing but the filter.

#define _GNU_SOURCE
#include "ct.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <math.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <unistd.h>

enum { MAX_PROBES = 100000, GRACE_MS = 5000 };

static const uint32_t MARKER = 0xcb00714du; // 203.0.113.77, the server of every probe
static double sent[MAX_PROBES], kernel[MAX_PROBES], wire[MAX_PROBES];
static uint32_t sources[MAX_PROBES];

static void enter(const char *path) {
    int fd = open(path, O_RDONLY);
    if (fd < 0 || setns(fd, CLONE_NEWNET))
        die(path);
    close(fd);
}

static int listener(void) {
    int fd = netlink(), group = NFNLGRP_CONNTRACK_NEW, room = 64 << 20;
    struct sock_filter code[] = {
        // struct nlmsghdr 16, nfgenmsg 4, CTA_TUPLE_ORIG 4, CTA_TUPLE_IP 4, CTA_IP_V4_SRC 4 + 4, CTA_IP_V4_DST 4 + address
        {BPF_LD | BPF_W | BPF_ABS, 0, 0, 40},
        {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, MARKER},
        {BPF_RET | BPF_K, 0, 0, 0xffffffff},
        {BPF_RET | BPF_K, 0, 0, 0},
    };
    struct sock_fprog program = {4, code};
    if (setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) ||
        setsockopt(fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group, sizeof group))
        die("listener");
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    return fd;
}

static int sniffer(const char *interface) {
    int fd = socket(AF_PACKET, SOCK_DGRAM, htons(ETH_P_IP)), room = 64 << 20;
    struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP)};
    address.sll_ifindex = (int)if_nametoindex(interface);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address))
        die("sniffer");
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    return fd;
}

static int newest;                    // probes that were sent
static int kernel_seen, wire_seen; // of them

static void seen(double *times, int *count, uint32_t source, double now) {
    for (int k = newest - 1; k >= 0 && k > newest - 5000; k--)
        if (sources[k] == source) {
            if (times[k] < 0) {
                times[k] = now;
                ++*count;
            }
            return;
        }
}

static void read_all(int events, int packets) {
    char buffer[65536];
    ssize_t got;
    while ((got = recv(events, buffer, sizeof buffer, MSG_DONTWAIT)) > 0 || (got < 0 && errno == ENOBUFS)) {
        uint32_t source;
        if (got < 44)
            continue;
        memcpy(&source, buffer + 32, sizeof source);
        seen(kernel, &kernel_seen, ntohl(source), now_s());
    }
    uint32_t marker = htonl(MARKER);
    while ((got = recv(packets, buffer, sizeof buffer, MSG_DONTWAIT)) > 0) {
        double now = now_s();
        char *at = buffer, *hit;
        while ((hit = memmem(at, (size_t)(buffer + got - at), &marker, 4))) {
            uint32_t source;
            if (hit - buffer >= 4) {
                memcpy(&source, hit - 4, sizeof source);
                seen(wire, &wire_seen, ntohl(source), now);
            }
            at = hit + 1;
        }
    }
}

static void print(const char *name, const double *times, int count) {
    printf("\"%s\": [", name);
    for (int k = 0; k < count; k++)
        printf("%s%.0f", k ? ", " : "", times[k] < 0 ? -1.0 : (times[k] - sent[k]) * 1e6);
    printf("]");
}

int main(int argc, char **argv) {
    if (argc != 7) {
        fprintf(stderr, "latency FROM TO INTERFACE COUNT MEAN_MS SEED\n");
        return 2;
    }
    int count = atoi(argv[4]);
    double mean = atof(argv[5]) / 1000;
    uint64_t seed = strtoull(argv[6], NULL, 10), z = mixed(seed);
    if (count > MAX_PROBES)
        count = MAX_PROBES;
    enter(argv[1]);
    int writer = netlink();
    enter(argv[2]);
    int events = listener(), packets = sniffer(argv[3]);
    struct sched_param realtime = {.sched_priority = 50}; // what is measured is not how late this program is
    sched_setscheduler(0, SCHED_FIFO, &realtime);
    for (int k = 0; k < count; k++) {
        kernel[k] = wire[k] = -1;
        sources[k] = flow("transit", seed, (uint64_t)k).source;
    }
    struct pollfd both[2] = {{.fd = events, .events = POLLIN}, {.fd = packets, .events = POLLIN}};
    double next = now_s() + 0.1, until = 0;
    while (newest < count || (now_s() < until && kernel_seen < count)) {
        double now = now_s();
        if (newest < count && now >= next) {
            char buffer[MESSAGE_ROOM], answer[4096];
            struct tuple t = flow("transit", seed, (uint64_t)newest);
            t.server = MARKER;
            size_t length = request(buffer, IPCTNL_MSG_CT_NEW, NLM_F_CREATE | NLM_F_EXCL, 1, t);
            sent[newest++] = now_s();
            if (send(writer, buffer, length, 0) < 0)
                die("send");
            while (recv(writer, answer, sizeof answer, MSG_DONTWAIT) > 0)
                ;
            z = mixed(z);
            next += -log(1.0 - (double)(z >> 11) / 9007199254740992.0) * mean;
            if (newest == count)
                until = now_s() + GRACE_MS / 1000.0;
        }
        double wait = (newest < count ? next : until) - now_s();
        if (wait > 0) {
            struct timespec pause = {(time_t)wait, (long)((wait - (double)(time_t)wait) * 1e9)};
            ppoll(both, 2, &pause, NULL);
        }
        read_all(events, packets);
    }
    printf("{");
    print("kernel_us", kernel, count);
    printf(", ");
    print("wire_us", wire, count);
    printf("}\n");
    return 0;
}
