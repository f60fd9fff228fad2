# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""ctnetlink messages to flows and back, without any I/O.

Headers and attribute headers are in host byte order, attribute values in network byte order
(<linux/netlink.h>, <linux/netfilter/nfnetlink.h>, <linux/netfilter/nfnetlink_conntrack.h>).  Whatever is malformed
raises :class:`NetlinkError` and nothing else; attributes that are not known are skipped.
"""

from __future__ import annotations

import enum
import struct
from typing import Iterator, NamedTuple, Optional, Union

from .constants import (
    AF_INET,
    AF_INET6,
    ICMP_PROTOCOLS,
    IPPROTO_DCCP,
    IPPROTO_GRE,
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_SCTP,
    IPPROTO_TCP,
    IPS_ASSURED,
    IPS_CONFIRMED,
    IPS_DST_NAT,
    IPS_EXPECTED,
    IPS_FIXED_TIMEOUT,
    IPS_SEEN_REPLY,
    IPS_SRC_NAT,
    TCP_ESTABLISHED,
    TCP_FLAG_BE_LIBERAL,
    TCP_FLAG_CLOSE_INIT,
    TCP_FLAG_SACK_PERM,
    TCP_FLAG_WINDOW_SCALE,
)
from .errors import NetlinkError, WireError
from .flow import BOTH_DIRECTIONS, ZONE_ORIGINAL, ZONE_REPLY, Flow, SeqAdj, Tuple
from .rows import unpack_key

Buffer = Union[bytes, bytearray, memoryview]

# <linux/netlink.h>: message types
NLMSG_NOOP = 1
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSG_OVERRUN = 4

# <linux/netlink.h>: message flags; the meaning of 0x100 and above depends on the request
NLM_F_REQUEST = 0x01
NLM_F_MULTI = 0x02
NLM_F_ACK = 0x04
NLM_F_DUMP_INTR = 0x10
NLM_F_EXCL = 0x200
NLM_F_DUMP = 0x300
NLM_F_CREATE = 0x400

# <linux/netlink.h>: nlattr.nla_type flags
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

# <linux/netfilter/nfnetlink.h>
NFNL_SUBSYS_CTNETLINK = 1

# <linux/netfilter/nfnetlink_conntrack.h>: enum cntl_msg_types
IPCTNL_MSG_CT_NEW = 0
IPCTNL_MSG_CT_GET = 1
IPCTNL_MSG_CT_DELETE = 2
IPCTNL_MSG_CT_GET_CTRZERO = 3

# the same: enum ctattr_type
CTA_TUPLE_ORIG = 1
CTA_TUPLE_REPLY = 2
CTA_STATUS = 3
CTA_PROTOINFO = 4
CTA_HELP = 5
CTA_NAT_SRC = 6
CTA_TIMEOUT = 7
CTA_MARK = 8
CTA_ID = 12
CTA_NAT_DST = 13
CTA_TUPLE_MASTER = 14
CTA_SEQ_ADJ_ORIG = 15
CTA_SEQ_ADJ_REPLY = 16
CTA_ZONE = 18
CTA_TIMESTAMP = 20
CTA_LABELS = 22

# the same: enum ctattr_tuple, ctattr_ip, ctattr_l4proto
CTA_TUPLE_IP = 1
CTA_TUPLE_PROTO = 2
CTA_TUPLE_ZONE = 3
CTA_IP_V4_SRC = 1
CTA_IP_V4_DST = 2
CTA_IP_V6_SRC = 3
CTA_IP_V6_DST = 4
CTA_PROTO_NUM = 1
CTA_PROTO_SRC_PORT = 2
CTA_PROTO_DST_PORT = 3
CTA_PROTO_ICMP_ID = 4
CTA_PROTO_ICMP_TYPE = 5
CTA_PROTO_ICMP_CODE = 6
CTA_PROTO_ICMPV6_ID = 7
CTA_PROTO_ICMPV6_TYPE = 8
CTA_PROTO_ICMPV6_CODE = 9

# the same: enum ctattr_protoinfo and one per protocol
CTA_PROTOINFO_TCP = 1
CTA_PROTOINFO_DCCP = 2
CTA_PROTOINFO_SCTP = 3
CTA_PROTOINFO_TCP_STATE = 1
CTA_PROTOINFO_TCP_WSCALE_ORIGINAL = 2
CTA_PROTOINFO_TCP_WSCALE_REPLY = 3
CTA_PROTOINFO_TCP_FLAGS_ORIGINAL = 4
CTA_PROTOINFO_TCP_FLAGS_REPLY = 5
CTA_PROTOINFO_DCCP_STATE = 1
CTA_PROTOINFO_DCCP_ROLE = 2
CTA_PROTOINFO_SCTP_STATE = 1
CTA_PROTOINFO_SCTP_VTAG_ORIGINAL = 2
CTA_PROTOINFO_SCTP_VTAG_REPLY = 3

# the same: enum ctattr_nat, ctattr_protonat, ctattr_seqadj, ctattr_tstamp, ctattr_help
CTA_NAT_V4_MINIP = 1
CTA_NAT_V4_MAXIP = 2
CTA_NAT_PROTO = 3
CTA_NAT_V6_MINIP = 4
CTA_NAT_V6_MAXIP = 5
CTA_PROTONAT_PORT_MIN = 1
CTA_PROTONAT_PORT_MAX = 2
CTA_SEQADJ_CORRECTION_POS = 1
CTA_SEQADJ_OFFSET_BEFORE = 2
CTA_SEQADJ_OFFSET_AFTER = 3
CTA_TIMESTAMP_START = 1
CTA_HELP_NAME = 1

# <net/netfilter/nf_conntrack_helper.h>: NF_CT_HELPER_NAME_LEN, the closing NUL included
HELPER_NAME_LEN = 16
# <net/netfilter/nf_conntrack_labels.h>: NF_CT_LABELS_MAX_SIZE in bytes
LABELS_MAX_LEN = 16

FALLBACK_TIMEOUT = 300
"""Seconds given to a created entry whose timeout is not known: an offloaded flow (IPS_OFFLOAD) reports none."""

_MAX_ERRNO = 4095  # <linux/err.h>: MAX_ERRNO

# TCP flags that mean something on another machine.  The others describe window data that is not replicated.
_TCP_FLAGS_CARRIED = TCP_FLAG_WINDOW_SCALE | TCP_FLAG_SACK_PERM | TCP_FLAG_CLOSE_INIT | TCP_FLAG_BE_LIBERAL

# nf_conntrack_proto_icmp.c and nf_conntrack_proto_icmpv6.c: invmap[]
_ICMP_MIRROR = {8: 0, 0: 8, 13: 14, 14: 13, 15: 16, 16: 15, 17: 18, 18: 17}
_ICMPV6_MIRROR = {128: 129, 129: 128, 139: 140, 140: 139}

_ADDRESS_LEN = {AF_INET: 4, AF_INET6: 16}

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, seq, pid
_NFGEN = struct.Struct("=BBH")  # struct nfgenmsg: family, version, resource id
_ATTR = struct.Struct("=HH")  # struct nlattr: length, type
_INT = struct.Struct("=i")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_S32 = struct.Struct(">i")
_U64 = struct.Struct(">Q")

HEADER_LEN = _HEADER.size


class Kind(enum.IntEnum):
    """What a message from the kernel is."""

    NEW = 1  # event: an entry was confirmed or created
    UPDATE = 2  # event: an entry changed
    DESTROY = 3  # event: an entry is gone
    DUMP = 4  # answer to a dump or a get
    DONE = 5  # end of a dump, ``errno`` says whether it is whole
    ERROR = 6  # answer to the request ``seq``; ``errno`` 0 is an acknowledgement
    OVERRUN = 7  # events were lost


class Message(NamedTuple):
    """One message from the kernel.

    ``portid`` is nlmsg_pid: in an event, the port of the netlink socket whose request caused it, 0 if a packet or a
    timer did.  ``flags`` is nlmsg_flags (NLM_F_DUMP_INTR matters in dumps).  ``errno`` is positive, 0 for success.
    """

    kind: Kind
    flow: Flow | None = None
    seq: int = 0
    portid: int = 0
    flags: int = 0
    errno: int = 0


Event = Message


# --- decoding ---


def split(data: Buffer) -> Iterator[tuple[int, int, int, int, bytes]]:
    """Type, flags, sequence number, port id and payload of every message in a netlink buffer.

    Raises NetlinkError where the buffer is malformed; what was yielded before is good.
    """
    data = bytes(data)
    total = len(data)
    at = 0
    while at < total:
        if total - at < HEADER_LEN:
            raise NetlinkError(f"{total - at} bytes left, a netlink header needs {HEADER_LEN}")
        length, kind, flags, seq, portid = _HEADER.unpack_from(data, at)
        if length < HEADER_LEN or length > total - at:
            raise NetlinkError(f"netlink message of {length} bytes in {total - at}")
        yield kind, flags, seq, portid, data[at + HEADER_LEN : at + length]
        at += (length + 3) & ~3


def parse_messages(data: Buffer) -> Iterator[Message]:
    """Every conntrack message, error and end mark in a netlink buffer, in order.

    Messages of other subsystems and NLMSG_NOOP are skipped.  Raises NetlinkError where the buffer is malformed; what
    was yielded before is good.
    """
    for kind, flags, seq, portid, payload in split(data):
        message = parse_message(kind, flags, seq, portid, payload)
        if message is not None:
            yield message


def parse_message(kind: int, flags: int, seq: int, portid: int, payload: bytes) -> Message | None:
    """One message out of :func:`split`, None if it does not concern conntrack; NetlinkError if malformed."""
    if kind >> 8 == NFNL_SUBSYS_CTNETLINK:
        what = kind & 0xFF
        if what == IPCTNL_MSG_CT_DELETE:
            meaning = Kind.DESTROY
        elif what != IPCTNL_MSG_CT_NEW:
            return None
        elif flags & NLM_F_MULTI:
            meaning = Kind.DUMP
        else:
            meaning = Kind.NEW if flags & NLM_F_CREATE else Kind.UPDATE
        return Message(meaning, decode_flow(payload), seq, portid, flags)
    if kind == NLMSG_ERROR:
        return Message(Kind.ERROR, None, seq, portid, flags, parse_errno(payload, required=True))
    if kind == NLMSG_DONE:
        return Message(Kind.DONE, None, seq, portid, flags, parse_errno(payload))
    if kind == NLMSG_OVERRUN:
        return Message(Kind.OVERRUN, None, seq, portid, flags)
    return None


def parse_errno(payload: bytes, required: bool = False) -> int:
    """The positive error number in an NLMSG_ERROR or NLMSG_DONE, 0 for success."""
    if len(payload) < _INT.size:
        if required or payload:
            raise NetlinkError(f"an error number of {len(payload)} bytes")
        return 0
    number = -int(_INT.unpack_from(payload)[0])
    if not 0 <= number <= _MAX_ERRNO:
        raise NetlinkError(f"error number {number}")
    return number


def attributes(data: bytes, start: int = 0) -> dict[int, bytes]:
    """Type (without flags) to value of the attributes in ``data`` from ``start`` on; NetlinkError if malformed.

    Of attributes with the same type the last one counts, as in the kernel's nla_parse.
    """
    found: dict[int, bytes] = {}
    total = len(data)
    at = start
    while at < total:
        if total - at < 4:
            raise NetlinkError(f"{total - at} stray bytes behind the attributes")
        length, kind = _ATTR.unpack_from(data, at)
        if length < 4 or length > total - at:
            raise NetlinkError(f"attribute {kind & NLA_TYPE_MASK} of {length} bytes in {total - at}")
        found[kind & NLA_TYPE_MASK] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def _fixed(value: bytes, size: int, name: str) -> bytes:
    if len(value) != size:
        raise NetlinkError(f"{name} has {len(value)} bytes instead of {size}")
    return value


def _u8(value: bytes, name: str) -> int:
    return _fixed(value, 1, name)[0]


def _u16(value: bytes, name: str) -> int:
    return int(_U16.unpack(_fixed(value, 2, name))[0])


def _u32(value: bytes, name: str) -> int:
    return int(_U32.unpack(_fixed(value, 4, name))[0])


def decode_flow(payload: bytes) -> Flow:
    """The flow in the payload (struct nfgenmsg and attributes) of a conntrack message.

    Raises NetlinkError if it is malformed or lacks one of the two tuples.
    """
    if len(payload) < _NFGEN.size:
        raise NetlinkError(f"nfgenmsg of {len(payload)} bytes")
    family = payload[0]
    if family not in _ADDRESS_LEN:
        raise NetlinkError(f"address family {family} is neither IPv4 nor IPv6")
    found = attributes(payload, _NFGEN.size)
    value = found.get
    orig_value, reply_value = value(CTA_TUPLE_ORIG), value(CTA_TUPLE_REPLY)
    if orig_value is None or reply_value is None:
        raise NetlinkError("conntrack entry without its two tuples")
    proto, orig, zone = decode_tuple(orig_value, family)
    reply_proto, reply, reply_zone = decode_tuple(reply_value, family)
    if reply_proto != proto or len(reply.l4) != len(orig.l4):
        raise NetlinkError(f"tuples of protocols {proto} and {reply_proto}, {len(orig.l4)} and {len(reply.l4)} bytes")
    status = timeout = mark = ident = start = master = seqadj = helper = None
    state: int | None = None
    wscale = flags = vtags = None
    master_proto = 0
    direction = BOTH_DIRECTIONS
    if (part := value(CTA_ZONE)) is not None:
        zone = _u16(part, "CTA_ZONE")
    elif zone:  # ctnetlink_dump_zone_id: a zone of one direction only is told inside the tuple of that direction
        direction = ZONE_ORIGINAL
    elif reply_zone:
        zone, direction = reply_zone, ZONE_REPLY
    if (part := value(CTA_STATUS)) is not None:
        status = _u32(part, "CTA_STATUS")
    if (part := value(CTA_TIMEOUT)) is not None:
        timeout = _u32(part, "CTA_TIMEOUT")
    if (part := value(CTA_PROTOINFO)) is not None:
        state, wscale, flags, vtags = _decode_protoinfo(part)
    if (part := value(CTA_MARK)) is not None:
        mark = _u32(part, "CTA_MARK")
    if (part := value(CTA_ID)) is not None:
        ident = _u32(part, "CTA_ID")
    if (part := value(CTA_HELP)) is not None and (part := attributes(part).get(CTA_HELP_NAME)) is not None:
        name = part.split(b"\0", 1)[0]
        if len(name) >= HELPER_NAME_LEN or not name.isascii():
            raise NetlinkError(f"helper name of {len(name)} bytes")
        helper = name.decode("ascii")
    if (labels := value(CTA_LABELS)) is not None and len(labels) > LABELS_MAX_LEN:
        raise NetlinkError(f"{len(labels)} bytes of labels")
    if (part := value(CTA_TUPLE_MASTER)) is not None:
        master_proto, master, _zone = decode_tuple(part, family)
    if (part := value(CTA_SEQ_ADJ_ORIG)) is not None and (other := value(CTA_SEQ_ADJ_REPLY)) is not None:
        seqadj = (_decode_seqadj(part), _decode_seqadj(other))
    if (part := value(CTA_TIMESTAMP)) is not None and (part := attributes(part).get(CTA_TIMESTAMP_START)) is not None:
        start = int(_U64.unpack(_fixed(part, 8, "CTA_TIMESTAMP_START"))[0])
    return Flow(
        family,
        proto,
        zone,
        orig,
        reply,
        status or 0,
        timeout,
        state,
        wscale,
        flags,
        vtags,
        mark,
        labels,
        helper,
        master,
        master_proto,
        seqadj,
        start,
        ident,
        direction,
    )


def decode_tuple(value: bytes, family: int) -> tuple[int, Tuple, int]:
    """Protocol, tuple and zone (0 if the tuple names none).  Raises NetlinkError if it is malformed.

    The kernel's usual layout, addresses and ports, is compared as a whole; everything else is walked.
    """
    layout, marks = _PORT_TUPLES[family]
    if len(value) == layout.size:
        mark0, src, mark1, dst, mark2, proto, mark3, sport, mark4, dport = layout.unpack(value)
        if (mark0, mark1, mark2, mark3, mark4) == marks and proto not in _L4_LAYOUTS:
            return proto, Tuple(src, dst, sport + dport), 0
    return _walk_tuple(value, family)


def _walk_tuple(value: bytes, family: int) -> tuple[int, Tuple, int]:
    parts = attributes(value)
    if CTA_TUPLE_IP not in parts or CTA_TUPLE_PROTO not in parts:
        raise NetlinkError("tuple without addresses or protocol")
    addresses = attributes(parts[CTA_TUPLE_IP])
    want = _ADDRESS_LEN[family]
    kinds = (CTA_IP_V4_SRC, CTA_IP_V4_DST) if family == AF_INET else (CTA_IP_V6_SRC, CTA_IP_V6_DST)
    if kinds[0] not in addresses or kinds[1] not in addresses:
        raise NetlinkError("tuple without source or destination of its address family")
    src = _fixed(addresses[kinds[0]], want, "source address")
    dst = _fixed(addresses[kinds[1]], want, "destination address")
    keys = attributes(parts[CTA_TUPLE_PROTO])
    if CTA_PROTO_NUM not in keys:
        raise NetlinkError("tuple without a protocol number")
    proto = _u8(keys[CTA_PROTO_NUM], "CTA_PROTO_NUM")
    layout = _L4_LAYOUTS.get(proto, _PORTS)
    l4 = b""
    if layout[0][0] in keys:
        for kind, size in layout:
            if kind not in keys:
                raise NetlinkError(f"tuple of protocol {proto} without attribute {kind}")
            l4 += _fixed(keys[kind], size, f"attribute {kind} of a tuple of protocol {proto}")
    zone = _u16(parts[CTA_TUPLE_ZONE], "CTA_TUPLE_ZONE") if CTA_TUPLE_ZONE in parts else 0
    return proto, Tuple(src, dst, l4), zone


# Attributes and sizes of Tuple.l4, in its order.  GRE's two keys travel as ports.
_PORTS = ((CTA_PROTO_SRC_PORT, 2), (CTA_PROTO_DST_PORT, 2))
_L4_LAYOUTS = {
    IPPROTO_ICMP: ((CTA_PROTO_ICMP_ID, 2), (CTA_PROTO_ICMP_TYPE, 1), (CTA_PROTO_ICMP_CODE, 1)),
    IPPROTO_ICMPV6: ((CTA_PROTO_ICMPV6_ID, 2), (CTA_PROTO_ICMPV6_TYPE, 1), (CTA_PROTO_ICMPV6_CODE, 1)),
}


def l4_layout(proto: int) -> tuple[tuple[int, int], ...]:
    """Attributes and sizes of ``Tuple.l4``, in its order."""
    return _L4_LAYOUTS.get(proto, _PORTS)


# A tuple of addresses and ports: its bytes, and the attribute headers (five groups) between its values
_PORT_TUPLES = {
    family: (
        struct.Struct(f"=8s{size}s4s{size}s8sB3x4s2s2x4s2s2x"),
        (
            _ATTR.pack(12 + 2 * size, CTA_TUPLE_IP | NLA_F_NESTED) + _ATTR.pack(4 + size, src),
            _ATTR.pack(4 + size, dst),
            _ATTR.pack(28, CTA_TUPLE_PROTO | NLA_F_NESTED) + _ATTR.pack(5, CTA_PROTO_NUM),
            _ATTR.pack(6, CTA_PROTO_SRC_PORT),
            _ATTR.pack(6, CTA_PROTO_DST_PORT),
        ),
    )
    for family, size, src, dst in (
        (AF_INET, 4, CTA_IP_V4_SRC, CTA_IP_V4_DST),
        (AF_INET6, 16, CTA_IP_V6_SRC, CTA_IP_V6_DST),
    )
}


_Two = Optional[tuple[int, int]]


def _decode_protoinfo(value: bytes) -> tuple[int | None, _Two, _Two, _Two]:
    """State, TCP window scales, TCP flags, SCTP verification tags."""
    state: int | None = None
    scales: _Two = None
    flags: _Two = None
    tags: _Two = None
    parts = attributes(value)
    if CTA_PROTOINFO_TCP in parts:
        tcp = attributes(parts[CTA_PROTOINFO_TCP])
        if (part := tcp.get(CTA_PROTOINFO_TCP_STATE)) is not None:
            state = _u8(part, "TCP state")
        part, other = tcp.get(CTA_PROTOINFO_TCP_WSCALE_ORIGINAL), tcp.get(CTA_PROTOINFO_TCP_WSCALE_REPLY)
        if part is not None and other is not None:
            scales = (_u8(part, "window scale"), _u8(other, "window scale"))
        part, other = tcp.get(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL), tcp.get(CTA_PROTOINFO_TCP_FLAGS_REPLY)
        if part is not None and other is not None:
            flags = (_fixed(part, 2, "TCP flags")[0], _fixed(other, 2, "TCP flags")[0])
    elif CTA_PROTOINFO_SCTP in parts:
        sctp = attributes(parts[CTA_PROTOINFO_SCTP])
        if (part := sctp.get(CTA_PROTOINFO_SCTP_STATE)) is not None:
            state = _u8(part, "SCTP state")
        part, other = sctp.get(CTA_PROTOINFO_SCTP_VTAG_ORIGINAL), sctp.get(CTA_PROTOINFO_SCTP_VTAG_REPLY)
        if part is not None and other is not None:
            tags = (_u32(part, "SCTP tag"), _u32(other, "SCTP tag"))
    elif CTA_PROTOINFO_DCCP in parts:
        part = attributes(parts[CTA_PROTOINFO_DCCP]).get(CTA_PROTOINFO_DCCP_STATE)
        if part is not None:
            state = _u8(part, "DCCP state")
    return state, scales, flags, tags


def _decode_seqadj(value: bytes) -> SeqAdj:
    parts = attributes(value)
    try:
        position = parts[CTA_SEQADJ_CORRECTION_POS]
        before = parts[CTA_SEQADJ_OFFSET_BEFORE]
        after = parts[CTA_SEQADJ_OFFSET_AFTER]
    except KeyError as missing:
        raise NetlinkError(f"sequence adjustment without attribute {missing}") from None
    return SeqAdj(
        _u32(position, "CTA_SEQADJ_CORRECTION_POS"),
        int(_S32.unpack(_fixed(before, 4, "CTA_SEQADJ_OFFSET_BEFORE"))[0]),
        int(_S32.unpack(_fixed(after, 4, "CTA_SEQADJ_OFFSET_AFTER"))[0]),
    )


# --- encoding ---


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to 4 bytes."""
    length = _ATTR.size + len(value)
    return _ATTR.pack(length, kind) + value + b"\0" * (-length & 3)


def nested(kind: int, *parts: bytes) -> bytes:
    """One attribute that holds others."""
    return attribute(kind | NLA_F_NESTED, b"".join(parts))


def message(kind: int, flags: int, seq: int, payload: bytes = b"") -> bytes:
    """One netlink message from port 0 (the kernel fills in the port of the socket)."""
    return _HEADER.pack(HEADER_LEN + len(payload), kind, flags | NLM_F_REQUEST, seq & 0xFFFFFFFF, 0) + payload


def _request(what: int, flags: int, seq: int, family: int, *parts: bytes) -> bytes:
    return message(NFNL_SUBSYS_CTNETLINK << 8 | what, flags, seq, _NFGEN.pack(family, 0, 0) + b"".join(parts))


def icmp_mirror(proto: int) -> bytes:
    """The type of the other direction by type, of ICMP or ICMPv6 (for bytes.translate)."""
    kinds = _ICMP_MIRROR if proto == IPPROTO_ICMP else _ICMPV6_MIRROR
    return bytes(kinds.get(kind, kind) for kind in range(256))


def mirror(proto: int, direction: Tuple) -> Tuple:
    """The tuple of the other direction if nothing is translated (nf_ct_invert_tuple).

    An ICMP type without a counterpart is kept; the kernel tracks no such flow.
    """
    l4 = direction.l4
    if proto == IPPROTO_ICMP:
        l4 = l4[:2] + bytes(_ICMP_MIRROR.get(kind, kind) for kind in l4[2:3]) + l4[3:]
    elif proto == IPPROTO_ICMPV6:
        l4 = l4[:2] + bytes(_ICMPV6_MIRROR.get(kind, kind) for kind in l4[2:3]) + l4[3:]
    else:
        l4 = l4[2:] + l4[:2]
    return Tuple(direction.dst, direction.src, l4)


def encode_tuple(kind: int, family: int, proto: int, direction: Tuple, zone: int = 0) -> bytes:
    want = _ADDRESS_LEN.get(family)
    if want is None:
        raise NetlinkError(f"address family {family} is neither IPv4 nor IPv6")
    if len(direction.src) != want or len(direction.dst) != want or len(direction.l4) not in (0, 4):
        raise NetlinkError(f"tuple {direction} does not fit address family {family}, protocol {proto}")
    if direction.l4 and proto not in _L4_LAYOUTS:
        layout, marks = _PORT_TUPLES[family]
        src, dst, l4 = direction
        body = layout.pack(*(marks[0], src, marks[1], dst, marks[2], proto, marks[3], l4[:2], marks[4], l4[2:]))
        return nested(kind, body, _tuple_zone(zone)) if zone else nested(kind, body)
    kinds = (CTA_IP_V4_SRC, CTA_IP_V4_DST) if family == AF_INET else (CTA_IP_V6_SRC, CTA_IP_V6_DST)
    keys = [attribute(CTA_PROTO_NUM, bytes((proto,)))]
    if direction.l4:
        at = 0
        for key, size in _L4_LAYOUTS.get(proto, ()):
            keys.append(attribute(key, direction.l4[at : at + size]))
            at += size
    return nested(
        kind,
        nested(CTA_TUPLE_IP, attribute(kinds[0], direction.src), attribute(kinds[1], direction.dst)),
        nested(CTA_TUPLE_PROTO, *keys),
        _tuple_zone(zone),
    )


def _tuple_zone(zone: int) -> bytes:
    return attribute(CTA_TUPLE_ZONE, _U16.pack(zone)) if zone else b""


def _orig(flow: Flow) -> bytes:
    """The original tuple, and the zone where the kernel looks for it when it searches an entry by that tuple.

    A zone of the reply direction alone is no part of the original tuple's identity (nf_ct_zone_equal): without it the
    entry is found, with CTA_ZONE it is not.
    """
    one_way = flow.zone if flow.zone_dir == ZONE_ORIGINAL else 0
    zone = attribute(CTA_ZONE, _U16.pack(flow.zone)) if flow.zone and flow.zone_dir == BOTH_DIRECTIONS else b""
    return encode_tuple(CTA_TUPLE_ORIG, flow.family, flow.proto, flow.orig, one_way) + zone


def _nat(kind: int, family: int, address: bytes, key: bytes) -> bytes:
    """CTA_NAT_SRC or CTA_NAT_DST to exactly this address and this port (ICMP: id)."""
    kinds = (CTA_NAT_V4_MINIP, CTA_NAT_V4_MAXIP) if family == AF_INET else (CTA_NAT_V6_MINIP, CTA_NAT_V6_MAXIP)
    parts = [attribute(kinds[0], address), attribute(kinds[1], address)]
    if key:
        parts.append(
            nested(CTA_NAT_PROTO, attribute(CTA_PROTONAT_PORT_MIN, key), attribute(CTA_PROTONAT_PORT_MAX, key))
        )
    return nested(kind, *parts)


def _translations(flow: Flow) -> bytes:
    """The NAT that turns the mirrored reply tuple into the flow's own."""
    parts = b""
    icmp = flow.proto in ICMP_PROTOCOLS
    if flow.status & IPS_SRC_NAT:
        parts += _nat(CTA_NAT_SRC, flow.family, flow.reply.dst, flow.reply.l4[:2] if icmp else flow.reply.l4[2:])
    if flow.status & IPS_DST_NAT:
        # The id of an ICMP flow belongs to its source; the translated one is set with CTA_NAT_SRC.
        parts += _nat(CTA_NAT_DST, flow.family, flow.reply.src, flow.orig.l4[:2] if icmp else flow.reply.l4[:2])
    return parts


def _protoinfo(flow: Flow, liberal: bool) -> bytes:
    state = flow.state
    if flow.proto == IPPROTO_TCP:
        if state is None and flow.status & IPS_ASSURED:
            state = (
                TCP_ESTABLISHED  # an offloaded flow reports no protocol data, and only established ones are offloaded
            )
        if state is None:
            return b""
        return nested(CTA_PROTOINFO, _tcp(flow, state, liberal))
    if flow.proto == IPPROTO_SCTP and state is not None and flow.sctp_vtags is not None:
        return nested(
            CTA_PROTOINFO,
            nested(
                CTA_PROTOINFO_SCTP,
                attribute(CTA_PROTOINFO_SCTP_STATE, bytes((state,))),
                attribute(CTA_PROTOINFO_SCTP_VTAG_ORIGINAL, _U32.pack(flow.sctp_vtags[0])),
                attribute(CTA_PROTOINFO_SCTP_VTAG_REPLY, _U32.pack(flow.sctp_vtags[1])),
            ),
        )
    if flow.proto == IPPROTO_DCCP and state is not None:
        return nested(
            CTA_PROTOINFO,
            nested(
                CTA_PROTOINFO_DCCP,
                attribute(CTA_PROTOINFO_DCCP_STATE, bytes((state,))),
                attribute(CTA_PROTOINFO_DCCP_ROLE, b"\0"),  # the original direction is the client's
            ),
        )
    return b""


def _tcp(flow: Flow, state: int, liberal: bool) -> bytes:
    """State, window scale and flags of a TCP flow.

    The kernel takes the two window scales only if the flags of both directions have WINDOW_SCALE
    (nf_conntrack_proto_tcp.c, nlattr_to_tcp).  Not to have it in both means: the window is not scaled.

    ``liberal``: packets are not dropped for their window position (IP_CT_TCP_FLAG_BE_LIBERAL).  Without it the flow
    still gets the flag if its window scale is unknown.  The position itself is not replicated: the kernel begins to
    track it with the first packet that passes.  If that is a retransmission of data whose acknowledgement was lost with
    the other node, the acknowledgement that follows is for data that was never seen, hence INVALID.
    """
    parts = [attribute(CTA_PROTOINFO_TCP_STATE, bytes((state,)))]
    flags = flow.tcp_flags
    if flags is None:
        mask = TCP_FLAG_SACK_PERM | TCP_FLAG_BE_LIBERAL
        flags = (mask, mask)
    else:
        mask = _TCP_FLAGS_CARRIED
        scaled = flags[0] & flags[1] & TCP_FLAG_WINDOW_SCALE
        if scaled and flow.tcp_wscale is not None:
            parts.append(attribute(CTA_PROTOINFO_TCP_WSCALE_ORIGINAL, bytes((flow.tcp_wscale[0],))))
            parts.append(attribute(CTA_PROTOINFO_TCP_WSCALE_REPLY, bytes((flow.tcp_wscale[1],))))
        elif scaled:
            flags = (flags[0] & ~TCP_FLAG_WINDOW_SCALE, flags[1] & ~TCP_FLAG_WINDOW_SCALE)
            liberal = True
        if liberal:
            flags = (flags[0] | TCP_FLAG_BE_LIBERAL, flags[1] | TCP_FLAG_BE_LIBERAL)
    parts.append(attribute(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, bytes((flags[0] & mask, mask))))
    parts.append(attribute(CTA_PROTOINFO_TCP_FLAGS_REPLY, bytes((flags[1] & mask, mask))))
    return nested(CTA_PROTOINFO_TCP, *parts)


def _seqadj(flow: Flow) -> bytes:
    if flow.seqadj is None:
        return b""
    return b"".join(
        nested(
            kind,
            attribute(CTA_SEQADJ_CORRECTION_POS, _U32.pack(one.correction_pos)),
            attribute(CTA_SEQADJ_OFFSET_BEFORE, _S32.pack(one.offset_before)),
            attribute(CTA_SEQADJ_OFFSET_AFTER, _S32.pack(one.offset_after)),
        )
        for kind, one in zip((CTA_SEQ_ADJ_ORIG, CTA_SEQ_ADJ_REPLY), flow.seqadj)
    )


def _labels(flow: Flow) -> bytes:
    if flow.labels is None:
        return b""
    if len(flow.labels) > LABELS_MAX_LEN or len(flow.labels) % 4:
        raise NetlinkError(f"{len(flow.labels)} bytes of labels")
    return attribute(CTA_LABELS, flow.labels)


def _helper(flow: Flow) -> bytes:
    if not flow.helper:
        return b""
    try:
        name = flow.helper.encode("latin-1") + b"\0"
    except UnicodeEncodeError:
        raise NetlinkError(f"helper name {flow.helper!r}") from None
    if len(name) > HELPER_NAME_LEN or name.count(b"\0") != 1:
        raise NetlinkError(f"helper name {flow.helper!r}")
    return nested(CTA_HELP, attribute(CTA_HELP_NAME, name))


def create(
    flow: Flow,
    seq: int = 0,
    *,
    timeout: int | None = None,
    ack: bool = False,
    liberal: bool = True,
    helper: bool = True,
    master: bool = True,
) -> bytes:
    """Request to create the entry; EEXIST if the original tuple or the translated reply tuple is taken.

    ``timeout``: seconds, instead of the flow's own.  ``liberal``: see :func:`_tcp`.  ``helper`` and ``master`` False
    leave these out: the retry after EOPNOTSUPP (helper unknown here) and ENOENT (master not in the table).

    With NAT the reply tuple is sent as the plain mirror of the original one: the kernel applies CTA_NAT_* to it and
    sets the NAT bits only if that changes something (nf_nat_core.c, nf_nat_setup_info).  CTA_STATUS cannot set them.

    The timer of a GRE entry is fixed: an entry that was not made by a packet has no timeouts of its own, so its first
    packet would set the timer to 0 (nf_conntrack_proto_gre.c, gre_packet).
    Raises NetlinkError if the flow cannot be expressed.
    """
    family, proto = flow.family, flow.proto
    natted = flow.status & (IPS_SRC_NAT | IPS_DST_NAT)
    seconds = timeout if timeout is not None else flow.timeout if flow.timeout is not None else FALLBACK_TIMEOUT
    status = flow.status & (IPS_SEEN_REPLY | IPS_ASSURED) | IPS_CONFIRMED
    if proto == IPPROTO_GRE:
        status |= IPS_FIXED_TIMEOUT
    return _request(
        IPCTNL_MSG_CT_NEW,
        NLM_F_CREATE | NLM_F_EXCL | (NLM_F_ACK if ack else 0),
        seq,
        family,
        _orig(flow),
        encode_tuple(
            CTA_TUPLE_REPLY,
            family,
            proto,
            mirror(proto, flow.orig) if natted else flow.reply,
            flow.zone if flow.zone_dir == ZONE_REPLY else 0,
        ),
        attribute(CTA_STATUS, _U32.pack(status)),
        attribute(CTA_TIMEOUT, _U32.pack(seconds)),
        _protoinfo(flow, liberal),
        b"" if flow.mark is None else attribute(CTA_MARK, _U32.pack(flow.mark)),
        _labels(flow),
        _helper(flow) if helper else b"",
        b""
        if flow.master is None or not master
        else encode_tuple(CTA_TUPLE_MASTER, family, flow.master_proto or proto, flow.master),
        _seqadj(flow),
        _translations(flow) if natted else b"",
    )


def update(
    flow: Flow,
    seq: int = 0,
    *,
    timeout: int | None = None,
    ack: bool = False,
    liberal: bool = True,
    status: bool = True,
    expected: bool | None = None,
) -> bytes:
    """Request to change an existing entry (found by original tuple and zone); ENOENT if there is none.

    NAT, master and helper are fixed when an entry is created and are left out (the kernel answers EOPNOTSUPP to the
    first two).  CTA_STATUS can only set SEEN_REPLY and ASSURED; to clear one is EBUSY, and so is an EXPECTED bit that
    differs from the kernel's.  ``expected`` tells whether the kernel's entry has it (default: the flow has a master);
    ``status`` False leaves the status out, which never fails.  ``liberal``: see :func:`_tcp`.  The timeout of a GRE
    entry is left out: that of one that was made by :func:`create` is fixed (EPERM).
    """
    bits = flow.status & (IPS_SEEN_REPLY | IPS_ASSURED) | IPS_CONFIRMED
    if expected if expected is not None else flow.master is not None:
        bits |= IPS_EXPECTED
    seconds = None if flow.proto == IPPROTO_GRE else timeout if timeout is not None else flow.timeout
    return _request(
        IPCTNL_MSG_CT_NEW,
        NLM_F_ACK if ack else 0,
        seq,
        flow.family,
        _orig(flow),
        attribute(CTA_STATUS, _U32.pack(bits)) if status else b"",
        b"" if seconds is None else attribute(CTA_TIMEOUT, _U32.pack(seconds)),
        _protoinfo(flow, liberal),
        b"" if flow.mark is None else attribute(CTA_MARK, _U32.pack(flow.mark)),
        _labels(flow),
        _seqadj(flow),
    )


def loosen(flow: Flow, seq: int = 0, ack: bool = False) -> bytes:
    """Request to make both directions of an existing TCP entry liberal, see :func:`_tcp`, and to change nothing else.

    Without CTA_PROTOINFO_TCP_STATE the state stays (nf_conntrack_proto_tcp.c, nlattr_to_tcp).
    """
    flags = bytes((TCP_FLAG_BE_LIBERAL, TCP_FLAG_BE_LIBERAL))  # value, mask
    parts = (attribute(kind, flags) for kind in (CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, CTA_PROTOINFO_TCP_FLAGS_REPLY))
    protoinfo = nested(CTA_PROTOINFO, nested(CTA_PROTOINFO_TCP, *parts))
    return _request(IPCTNL_MSG_CT_NEW, NLM_F_ACK if ack else 0, seq, flow.family, _orig(flow), protoinfo)


def delete(flow: Flow, seq: int = 0, ident: int | None = None, ack: bool = False) -> bytes:
    """Request to delete the entry with the flow's original tuple and zone; ENOENT if there is none.

    ``ident``: only if the kernel's CTA_ID is this one (not a later incarnation).
    """
    return _request(
        IPCTNL_MSG_CT_DELETE,
        NLM_F_ACK if ack else 0,
        seq,
        flow.family,
        _orig(flow),
        b"" if ident is None else attribute(CTA_ID, _U32.pack(ident)),
    )


def flow_of_key(key: bytes) -> Flow:
    """A flow that has only the identity of ``Flow.key``, enough for :func:`delete` and :func:`get`.

    Raises NetlinkError if the key is malformed.
    """
    try:
        shape, proto, zone, direction, orig = unpack_key(key)
    except WireError as error:
        raise NetlinkError(str(error)) from None
    return Flow(shape.family, proto, zone, orig, mirror(proto, orig), 0, zone_dir=direction)


def get(flow: Flow, seq: int = 0) -> bytes:
    """Request for the entry with the flow's original tuple and zone; the answer is a DUMP message or ENOENT."""
    return _request(
        IPCTNL_MSG_CT_GET,
        0,
        seq,
        flow.family,
        _orig(flow),
    )


def dump(seq: int = 0, family: int = 0, zero: bool = False) -> bytes:
    """Request for the whole table, or that of one address family; ``zero`` resets the packet counters."""
    return _request(IPCTNL_MSG_CT_GET_CTRZERO if zero else IPCTNL_MSG_CT_GET, NLM_F_DUMP, seq, family)


def fence(seq: int) -> bytes:
    """A request that does nothing but is acknowledged; it ends a batch of requests that answer only if they fail."""
    return message(NLMSG_NOOP, NLM_F_ACK, seq)
