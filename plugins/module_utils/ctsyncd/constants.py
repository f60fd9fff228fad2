# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Numbers that the kernel or an RFC fixes, as plain integers for hot code, with names for output."""

from __future__ import annotations

# <linux/socket.h>: address families
AF_INET = 2
AF_INET6 = 10

# IANA protocol numbers
IPPROTO_ICMP = 1
IPPROTO_TCP = 6
IPPROTO_UDP = 17
IPPROTO_DCCP = 33
IPPROTO_GRE = 47
IPPROTO_ICMPV6 = 58
IPPROTO_VRRP = 112
IPPROTO_SCTP = 132
IPPROTO_UDPLITE = 136

PROTOCOL_NAMES = {
    IPPROTO_ICMP: "icmp",
    IPPROTO_TCP: "tcp",
    IPPROTO_UDP: "udp",
    IPPROTO_DCCP: "dccp",
    IPPROTO_GRE: "gre",
    IPPROTO_ICMPV6: "icmpv6",
    IPPROTO_VRRP: "vrrp",
    IPPROTO_SCTP: "sctp",
    IPPROTO_UDPLITE: "udplite",
}

# Protocols whose tuple carries a source and a destination port
PORT_PROTOCOLS = frozenset((IPPROTO_TCP, IPPROTO_UDP, IPPROTO_DCCP, IPPROTO_SCTP, IPPROTO_UDPLITE))
ICMP_PROTOCOLS = frozenset((IPPROTO_ICMP, IPPROTO_ICMPV6))

# <linux/netfilter/nf_conntrack_common.h>: enum ip_conntrack_status
IPS_EXPECTED = 0x1
IPS_SEEN_REPLY = 0x2
IPS_ASSURED = 0x4
IPS_CONFIRMED = 0x8
IPS_SRC_NAT = 0x10
IPS_DST_NAT = 0x20
IPS_SEQ_ADJUST = 0x40
IPS_SRC_NAT_DONE = 0x80
IPS_DST_NAT_DONE = 0x100
IPS_DYING = 0x200
IPS_FIXED_TIMEOUT = 0x400
IPS_TEMPLATE = 0x800
IPS_UNTRACKED = 0x1000
IPS_HELPER = 0x2000
IPS_OFFLOAD = 0x4000
IPS_HW_OFFLOAD = 0x8000

# <linux/netfilter/nf_conntrack_tcp.h>: enum tcp_conntrack
TCP_NONE = 0
TCP_SYN_SENT = 1
TCP_SYN_RECV = 2
TCP_ESTABLISHED = 3
TCP_FIN_WAIT = 4
TCP_CLOSE_WAIT = 5
TCP_LAST_ACK = 6
TCP_TIME_WAIT = 7
TCP_CLOSE = 8
TCP_SYN_SENT2 = 9

TCP_STATE_NAMES = (
    "NONE",
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "TIME_WAIT",
    "CLOSE",
    "SYN_SENT2",
)

# <linux/netfilter/nf_conntrack_sctp.h>: enum sctp_conntrack
SCTP_ESTABLISHED = 4
SCTP_STATE_NAMES = (
    "NONE",
    "CLOSED",
    "COOKIE_WAIT",
    "COOKIE_ECHOED",
    "ESTABLISHED",
    "SHUTDOWN_SENT",
    "SHUTDOWN_RECD",
    "SHUTDOWN_ACK_SENT",
    "HEARTBEAT_SENT",
)

# <linux/netfilter/nf_conntrack_tcp.h>: IP_CT_TCP_FLAG_*
TCP_FLAG_WINDOW_SCALE = 0x01
TCP_FLAG_SACK_PERM = 0x02
TCP_FLAG_CLOSE_INIT = 0x04
TCP_FLAG_BE_LIBERAL = 0x08

# Pre-shared keys that a node holds at once
MAX_KEYS = 8
