// Copyright: (c) 2026, The ctsync authors
// GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
// SPDX-License-Identifier: GPL-3.0-or-later
//
// What flows.c and latency.c share: ctnetlink requests for established TCP flows with random tuples.

#include <arpa/inet.h>
#include <linux/netfilter/nf_conntrack_common.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_conntrack.h>
#include <linux/netlink.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { TCP_ESTABLISHED_STATE = 3, TIMEOUT_S = 432000, MESSAGE_ROOM = 512 };

struct tuple {
    uint32_t source, server, translated; // host order; translated 0: no source NAT
    uint16_t source_port, server_port, translated_port;
};

static inline double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static inline void die(const char *what) {
    perror(what);
    exit(1);
}

static inline uint64_t mixed(uint64_t z) { // splitmix64: the same number for the same input, random to the eye
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static inline uint32_t public_address(uint64_t *z) { // a unicast address of the Internet
    for (;;) {
        *z = mixed(*z);
        uint32_t a = (uint32_t)*z, top = a >> 24;
        if (top == 0 || top == 10 || top == 127 || top >= 224 || a >> 16 == 0xc0a8 || a >> 20 == 0xac1 ||
            a >> 16 == 0xa9fe || a >> 22 == 0x191)
            continue;
        return a;
    }
}

// Flow number `index` of a seed.  Shapes: "transit" both ends anywhere; "site" the server is one of 256; "snat" the
// client is one of 65,536 inside, translated to one address, 7 of 8 with their port kept as the kernel does when it can.
static inline struct tuple flow(const char *shape, uint64_t seed, uint64_t index) {
    uint64_t z = mixed(mixed(seed) ^ index);
    struct tuple t = {0};
    t.source = public_address(&z);
    t.server = public_address(&z);
    z = mixed(z);
    t.source_port = (uint16_t)(1024 + (z & 0xffff) % 64512);
    unsigned dice = (unsigned)(z >> 16) % 100, any = (unsigned)(z >> 32) & 0xffff;
    t.server_port = (uint16_t)(dice < 60 ? 443 : dice < 75 ? 80 : dice < 80 ? 22 : 1024 + any % 64512);
    z = mixed(z);
    if (!strcmp(shape, "site"))
        t.server = 0xc6336400u | (z & 0xff); // 198.51.100.0/24
    if (!strcmp(shape, "snat")) {
        t.source = 0x0a000000u | (z & 0xffff); // 10.0.0.0/16
        t.translated = 0xc0a80164u;            // 192.168.1.100
        t.translated_port = (z >> 16) % 8 ? t.source_port : (uint16_t)(1024 + (z >> 32) % 64512);
    }
    return t;
}

static inline struct nlattr *begin(char **at, uint16_t type) {
    struct nlattr *attribute = (struct nlattr *)*at;
    attribute->nla_type = type | NLA_F_NESTED;
    *at += NLA_HDRLEN;
    return attribute;
}

static inline void end(char **at, struct nlattr *attribute) { attribute->nla_len = (uint16_t)(*at - (char *)attribute); }

static inline void put(char **at, uint16_t type, const void *data, uint16_t length) {
    struct nlattr *attribute = (struct nlattr *)*at;
    attribute->nla_type = type;
    attribute->nla_len = NLA_HDRLEN + length;
    memcpy(*at + NLA_HDRLEN, data, length);
    memset(*at + NLA_HDRLEN + length, 0, NLA_ALIGN(length) - length);
    *at += NLA_HDRLEN + NLA_ALIGN(length);
}

static inline void put8(char **at, uint16_t type, uint8_t v) { put(at, type, &v, 1); }
static inline void put16(char **at, uint16_t type, uint16_t v) { v = htons(v), put(at, type, &v, 2); }
static inline void put32(char **at, uint16_t type, uint32_t v) { v = htonl(v), put(at, type, &v, 4); }

static inline void put_tuple(char **at, uint16_t type, uint32_t src, uint32_t dst, uint16_t sport, uint16_t dport) {
    struct nlattr *tuple = begin(at, type), *inner = begin(at, CTA_TUPLE_IP);
    put32(at, CTA_IP_V4_SRC, src);
    put32(at, CTA_IP_V4_DST, dst);
    end(at, inner);
    inner = begin(at, CTA_TUPLE_PROTO);
    put8(at, CTA_PROTO_NUM, IPPROTO_TCP);
    put16(at, CTA_PROTO_SRC_PORT, sport);
    put16(at, CTA_PROTO_DST_PORT, dport);
    end(at, inner);
    end(at, tuple);
}

// A request about a flow: IPCTNL_MSG_CT_NEW creates it, _DELETE and _GET name it.  Returns its length.
static inline size_t request(char *buffer, unsigned operation, uint16_t flags, uint32_t number, struct tuple t) {
    struct nlmsghdr *header = (struct nlmsghdr *)buffer;
    struct nfgenmsg *family = (struct nfgenmsg *)(buffer + NLMSG_HDRLEN);
    char *at = buffer + NLMSG_HDRLEN + NLMSG_ALIGN(sizeof *family);
    memset(buffer, 0, (size_t)(at - buffer));
    header->nlmsg_type = (uint16_t)(NFNL_SUBSYS_CTNETLINK << 8 | operation);
    header->nlmsg_flags = (uint16_t)(NLM_F_REQUEST | flags);
    header->nlmsg_seq = number;
    family->nfgen_family = AF_INET;
    put_tuple(&at, CTA_TUPLE_ORIG, t.source, t.server, t.source_port, t.server_port);
    if (operation == IPCTNL_MSG_CT_NEW) {
        // With source NAT, too, the plain mirror: from a translated tuple the kernel would conclude that nothing is left to
        // translate, and the flow would look right and be dead.
        put_tuple(&at, CTA_TUPLE_REPLY, t.server, t.source, t.server_port, t.source_port);
        put32(&at, CTA_STATUS, IPS_SEEN_REPLY | IPS_ASSURED | IPS_CONFIRMED);
        put32(&at, CTA_TIMEOUT, TIMEOUT_S);
        struct nlattr *info = begin(&at, CTA_PROTOINFO), *tcp = begin(&at, CTA_PROTOINFO_TCP);
        put8(&at, CTA_PROTOINFO_TCP_STATE, TCP_ESTABLISHED_STATE);
        end(&at, tcp);
        end(&at, info);
        if (t.translated) {
            struct nlattr *nat = begin(&at, CTA_NAT_SRC);
            put32(&at, CTA_NAT_V4_MINIP, t.translated);
            put32(&at, CTA_NAT_V4_MAXIP, t.translated);
            struct nlattr *ports = begin(&at, CTA_NAT_PROTO);
            put16(&at, CTA_PROTONAT_PORT_MIN, t.translated_port);
            put16(&at, CTA_PROTONAT_PORT_MAX, t.translated_port);
            end(&at, ports);
            end(&at, nat);
        }
    }
    header->nlmsg_len = (uint32_t)(at - buffer);
    return (size_t)(at - buffer);
}

static inline int netlink(void) {
    int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER), on = 1, room = 8 << 20;
    struct sockaddr_nl address = {.nl_family = AF_NETLINK};
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address))
        die("netlink");
    setsockopt(fd, SOL_NETLINK, NETLINK_CAP_ACK, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room);
    return fd;
}
