// Copyright: (c) 2026, The ctsync authors
// GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
// SPDX-License-Identifier: GPL-3.0-or-later
//
// How long from a new flow on one firewall until the other one knows?
//
//   latency FROM TO INTERFACE COUNT MEAN_MS SEED
//       FROM and TO are network namespaces (paths below /run/netns), INTERFACE is TO's end of the sync link.  Writes COUNT
//       probe flows into FROM's table, at random (Poisson) times MEAN_MS apart.  Prints one line of JSON: microseconds
//       from the probe's entry in FROM's kernel to its entry in TO's kernel, and to the first datagram at TO that holds
//       its addresses in the clear; -1 is never within five seconds of the last one.
//
// All times are the kernel's own (CTA_TIMESTAMP_START of both entries, which needs nf_conntrack_timestamp=1, and the
// time of arrival of the datagram), and are read when all is over: nobody listens beside the daemons while they work,
// and what this program is late by is not counted.

#define _GNU_SOURCE
#include "ct.h"
#include <endian.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <math.h>
#include <net/if.h>
#include <sched.h>
#include <unistd.h>

enum { MAX_PROBES = 100000, GRACE_S = 5, LOOK_MS = 200 };

static const uint32_t MARKER = 0xcb00714du; // 203.0.113.77, the server of every probe
static int64_t made[MAX_PROBES], kernel[MAX_PROBES], wire[MAX_PROBES]; // nanoseconds since 1970; 0: not seen
static struct probe {
    uint32_t source; // network order
    int number;
} by_source[MAX_PROBES];
static int count;

static void enter(const char *path) {
    int fd = open(path, O_RDONLY);
    if (fd < 0 || setns(fd, CLONE_NEWNET))
        die(path);
    close(fd);
}

static int sniffer(const char *interface) {
    int fd = socket(AF_PACKET, SOCK_DGRAM, htons(ETH_P_IP)), room = 64 << 20, on = 1;
    struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP)};
    address.sll_ifindex = (int)if_nametoindex(interface);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) ||
        setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on))
        die("sniffer");
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    return fd;
}

static int by_address(const void *one, const void *other) {
    uint32_t a = ((const struct probe *)one)->source, b = ((const struct probe *)other)->source;
    return a < b ? -1 : a > b;
}

// Note when the probe from this address (network order) was seen first.
static void seen(int64_t *times, uint32_t source, int64_t when) {
    struct probe wanted = {source, 0}, *found = bsearch(&wanted, by_source, (size_t)count, sizeof wanted, by_address);
    if (found && !times[found->number])
        times[found->number] = when;
}

static int64_t arrived(struct msghdr *message) {
    for (struct cmsghdr *one = CMSG_FIRSTHDR(message); one; one = CMSG_NXTHDR(message, one))
        if (one->cmsg_level == SOL_SOCKET && one->cmsg_type == SO_TIMESTAMPNS) {
            struct timespec t;
            memcpy(&t, CMSG_DATA(one), sizeof t);
            return t.tv_sec * 1000000000ll + t.tv_nsec;
        }
    die("a datagram without its time of arrival");
    return 0;
}

static void read_packets(int packets) {
    char buffer[65536], control[256];
    uint32_t marker = htonl(MARKER), source;
    for (;;) {
        struct iovec data = {buffer, sizeof buffer};
        struct msghdr message = {
            .msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        ssize_t got = recvmsg(packets, &message, MSG_DONTWAIT);
        if (got <= 0)
            return;
        char *at = buffer, *hit;
        while ((hit = memmem(at, (size_t)(buffer + got - at), &marker, sizeof marker))) {
            if (hit - buffer >= 4) {
                memcpy(&source, hit - 4, sizeof source);
                seen(wire, source, arrived(&message));
            }
            at = hit + 1;
        }
    }
}

static struct nlattr *inside(char *at, int length, uint16_t type, int *left) {
    while (length >= NLA_HDRLEN) {
        struct nlattr *attribute = (struct nlattr *)at;
        if (attribute->nla_len < NLA_HDRLEN || attribute->nla_len > length)
            return NULL;
        if ((attribute->nla_type & NLA_TYPE_MASK) == type) {
            *left = attribute->nla_len - NLA_HDRLEN;
            return attribute;
        }
        at += NLA_ALIGN(attribute->nla_len);
        length -= NLA_ALIGN(attribute->nla_len);
    }
    return NULL;
}

// The value at a path of attributes (0 ends it); NULL if it is not there.
static char *value(char *at, int length, const uint16_t *path) {
    for (; *path; path++) {
        struct nlattr *attribute = inside(at, length, *path, &length);
        if (!attribute)
            return NULL;
        at = (char *)attribute + NLA_HDRLEN;
    }
    return at;
}

// An entry of a table: if it is a probe's, when was it made?
static void read_entry(struct nlmsghdr *header, int64_t *times) {
    static const uint16_t source_at[] = {CTA_TUPLE_ORIG, CTA_TUPLE_IP, CTA_IP_V4_SRC, 0},
                          server_at[] = {CTA_TUPLE_ORIG, CTA_TUPLE_IP, CTA_IP_V4_DST, 0},
                          start_at[] = {CTA_TIMESTAMP, CTA_TIMESTAMP_START, 0};
    int length = (int)header->nlmsg_len - (int)NLMSG_LENGTH(sizeof(struct nfgenmsg));
    char *at = (char *)header + NLMSG_LENGTH(sizeof(struct nfgenmsg));
    char *source = value(at, length, source_at), *server = value(at, length, server_at);
    uint32_t marker = htonl(MARKER), address;
    uint64_t when;
    if (!source || !server || memcmp(server, &marker, sizeof marker))
        return;
    char *start = value(at, length, start_at);
    if (!start) {
        fprintf(stderr, "an entry without the time when it was made: set net.netfilter.nf_conntrack_timestamp=1\n");
        exit(1);
    }
    memcpy(&address, source, sizeof address);
    memcpy(&when, start, sizeof when);
    seen(times, address, (int64_t)be64toh(when));
}

// The times of the probes' entries in the table of the namespace that `fd` is of.
static void read_table(int fd, int64_t *times) {
    static _Alignas(struct nlmsghdr) char buffer[1 << 16];
    struct {
        struct nlmsghdr header;
        struct nfgenmsg family;
    } ask = {{sizeof ask, NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET, NLM_F_REQUEST | NLM_F_DUMP, 1, 0},
             {AF_INET, NFNETLINK_V0, 0}};
    if (send(fd, &ask, sizeof ask, 0) < 0)
        die("dump");
    for (;;) {
        ssize_t got = recv(fd, buffer, sizeof buffer, 0);
        if (got < 0)
            die("dump");
        int left = (int)got;
        for (struct nlmsghdr *header = (struct nlmsghdr *)buffer; NLMSG_OK(header, left);
             header = NLMSG_NEXT(header, left)) {
            if (header->nlmsg_type == NLMSG_DONE)
                return;
            if (header->nlmsg_type == NLMSG_ERROR)
                die("dump");
            read_entry(header, times);
        }
    }
}

static int known(const int64_t *times) {
    int found = 0;
    for (int k = 0; k < count; k++)
        found += times[k] != 0;
    return found;
}

// Was all seen that will be?  Where TO's kernel gets entries at all it gets the last one after the datagram with it.
static int complete(void) {
    int entries = known(kernel);
    return entries == count || (entries == 0 && known(wire) == count);
}

static void pause_s(double wait) {
    struct timespec pause = {(time_t)wait, (long)((wait - (double)(time_t)wait) * 1e9)};
    if (wait > 0)
        nanosleep(&pause, NULL);
}

static void print(const char *name, const int64_t *times) {
    printf("\"%s\": [", name);
    for (int k = 0; k < count; k++)
        printf("%s%.0f", k ? ", " : "", times[k] ? (double)(times[k] - made[k]) / 1e3 : -1.0);
    printf("]");
}

int main(int argc, char **argv) {
    if (argc != 7) {
        fprintf(stderr, "latency FROM TO INTERFACE COUNT MEAN_MS SEED\n");
        return 2;
    }
    count = atoi(argv[4]);
    double mean = atof(argv[5]) / 1000;
    uint64_t seed = strtoull(argv[6], NULL, 10), z = mixed(seed);
    if (count > MAX_PROBES)
        count = MAX_PROBES;
    enter(argv[1]);
    int writer = netlink(), from = netlink();
    enter(argv[2]);
    int to = netlink(), packets = sniffer(argv[3]);
    for (int k = 0; k < count; k++)
        by_source[k] = (struct probe){htonl(flow("transit", seed, (uint64_t)k).source), k};
    qsort(by_source, (size_t)count, sizeof *by_source, by_address);
    struct sched_param realtime = {.sched_priority = 50}, usual = {0}; // probes come in time under load, too
    sched_setscheduler(0, SCHED_FIFO, &realtime);
    double next = now_s() + 0.1;
    for (int k = 0; k < count; k++) {
        char buffer[MESSAGE_ROOM];
        struct tuple t = flow("transit", seed, (uint64_t)k);
        t.server = MARKER;
        size_t length = request(buffer, IPCTNL_MSG_CT_NEW, NLM_F_CREATE | NLM_F_EXCL, 1, t);
        read_packets(packets);
        pause_s(next - now_s());
        if (send(writer, buffer, length, 0) < 0)
            die("send");
        z = mixed(z);
        next += -log(1.0 - (double)(z >> 11) / 9007199254740992.0) * mean;
    }
    sched_setscheduler(0, SCHED_OTHER, &usual);
    double until = now_s() + GRACE_S;
    do {
        pause_s(LOOK_MS / 1e3);
        read_packets(packets);
        read_table(to, kernel);
    } while (now_s() < until && !complete());
    read_table(from, made);
    if (known(made) < count) {
        fprintf(stderr, "probes that the kernel did not take\n");
        return 1;
    }
    printf("{");
    print("kernel_us", kernel);
    printf(", ");
    print("wire_us", wire);
    printf("}\n");
    return 0;
}
