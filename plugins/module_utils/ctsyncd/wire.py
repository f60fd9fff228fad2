# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sync protocol's bytes: datagram headers, frames, records, flow records (docs/protocol.md).

Pure functions, bytes to values and back.  Everything is big-endian.  Every decoder raises :class:`WireError`, with the
label of the counter that the fault belongs to, and nothing else, whatever the bytes are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from .constants import AF_INET, AF_INET6, IPPROTO_TCP
from .errors import WireError
from .flow import Flow, SeqAdj, Tuple

VERSION = 1

# Datagram kinds
HELLO = 1
DATA = 2

NONCE_BYTES = 16
TAG_BYTES = 16

_COMMON = struct.Struct("!BBBx")  # version, kind, key id, zero
_HELLO_TAIL = struct.Struct("!16sQ")  # sender's nonce, packet number
_DATA_TAIL = struct.Struct("!8sQ")  # session: first half of the sender's nonce, packet number
HELLO_HEADER_BYTES = _COMMON.size + _HELLO_TAIL.size
DATA_HEADER_BYTES = _COMMON.size + _DATA_TAIL.size

# Frames inside a sealed DATA datagram
FRAME_BLOCK = 1
FRAME_ACK = 2
FRAME_STATUS = 3
FRAME_BYE = 4

# Records inside a block
RECORD_UPSERT = 1
RECORD_DELETE = 2
RECORD_BULK_BEGIN = 3
RECORD_BULK_END = 4
RECORD_BULK_REQUEST = 5

_TLV = struct.Struct("!BH")
TLV_BYTES = _TLV.size
_U64 = struct.Struct("!Q")
_BULK_END = struct.Struct("!II")
_U32 = struct.Struct("!I")
_ACK = struct.Struct("!QQB")
_RANGE = struct.Struct("!QQ")
MAX_ACK_RANGES = 32

BLOCK_HEADER_BYTES = TLV_BYTES + _U64.size


class Header(NamedTuple):
    """A datagram's clear header.  ``sender`` is the 16-byte nonce (HELLO) or its first 8 bytes (DATA)."""

    kind: int
    key_id: int
    sender: bytes
    number: int
    size: int


def encode_header(kind: int, key_id: int, sender: bytes, number: int) -> bytes:
    """Clear header of a datagram; it is also the AEAD's additional data."""
    common = _COMMON.pack(VERSION, kind, key_id)
    if kind == HELLO:
        return common + _HELLO_TAIL.pack(sender, number)
    return common + _DATA_TAIL.pack(sender[:8], number)


def decode_header(data: bytes) -> Header:
    """Read a datagram's header.  Raises WireError ``truncated``, ``wrong_version`` or ``malformed``."""
    if len(data) < DATA_HEADER_BYTES + TAG_BYTES:
        raise WireError("truncated", f"{len(data)} bytes")
    version, kind, key_id = _COMMON.unpack_from(data)
    if version != VERSION:
        raise WireError("wrong_version", str(version))
    if kind == HELLO:
        if len(data) < HELLO_HEADER_BYTES + TAG_BYTES:
            raise WireError("truncated", f"{len(data)} bytes")
        sender, number = _HELLO_TAIL.unpack_from(data, _COMMON.size)
        return Header(kind, key_id, sender, number, HELLO_HEADER_BYTES)
    if kind == DATA:
        sender, number = _DATA_TAIL.unpack_from(data, _COMMON.size)
        return Header(kind, key_id, sender, number, DATA_HEADER_BYTES)
    raise WireError("malformed", f"datagram kind {kind}")


def tlv(kind: int, payload: bytes = b"") -> bytes:
    """One frame or record: kind (1 byte), length of the payload (2 bytes), payload."""
    return _TLV.pack(kind, len(payload)) + payload


def iter_tlv(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Frames or records one after the other.  Raises WireError ``malformed`` where a length does not fit."""
    end = len(data)
    while offset < end:
        if offset + TLV_BYTES > end:
            raise WireError("malformed", "truncated record header")
        kind, length = _TLV.unpack_from(data, offset)
        offset += TLV_BYTES
        if offset + length > end:
            raise WireError("malformed", "record longer than its datagram")
        yield kind, data[offset : offset + length]
        offset += length


# --- HELLO -----------------------------------------------------------------------------------------------------------


class Hello(NamedTuple):
    """Contents of a HELLO.  ``echo`` is the nonce of the receiver that the sender answers to (zeros: none yet)."""

    echo: bytes
    node: str
    capabilities: int
    version: str


_HELLO_ECHO = 1
_HELLO_NODE = 2
_HELLO_CAPABILITIES = 3
_HELLO_VERSION = 4
NO_NONCE = bytes(NONCE_BYTES)


def encode_hello(hello: Hello) -> bytes:
    return (
        tlv(_HELLO_ECHO, hello.echo)
        + tlv(_HELLO_NODE, hello.node.encode())
        + tlv(_HELLO_CAPABILITIES, _U32.pack(hello.capabilities))
        + tlv(_HELLO_VERSION, hello.version.encode())
    )


def decode_hello(data: bytes) -> Hello:
    """Unknown fields are skipped; the echo and the node's name must be there.  Raises WireError ``malformed``."""
    fields = dict(iter_tlv(data))
    try:
        echo = fields[_HELLO_ECHO]
        node = fields[_HELLO_NODE].decode("utf-8")
        (capabilities,) = _U32.unpack(fields.get(_HELLO_CAPABILITIES, b"\0\0\0\0"))
        version = fields.get(_HELLO_VERSION, b"").decode("utf-8")
    except (KeyError, UnicodeDecodeError, struct.error) as error:
        raise WireError("malformed", f"hello: {error!r}") from error
    if len(echo) != NONCE_BYTES or len(node) > 64 or len(version) > 64:
        raise WireError("malformed", "hello: field sizes")
    return Hello(echo, node, capabilities, version)


# --- frames ----------------------------------------------------------------------------------------------------------


class Ack(NamedTuple):
    """``expected``: first block not yet received in order; ``limit``: first block that must not be sent yet;
    ``ranges``: half-open ranges [first, end) received out of order."""

    expected: int
    limit: int
    ranges: tuple[tuple[int, int], ...]


def encode_ack(ack: Ack) -> bytes:
    ranges = ack.ranges[:MAX_ACK_RANGES]
    return tlv(
        FRAME_ACK,
        _ACK.pack(ack.expected, ack.limit, len(ranges)) + b"".join(_RANGE.pack(first, end) for first, end in ranges),
    )


def decode_ack(payload: bytes) -> Ack:
    """Raises WireError ``malformed``."""
    if len(payload) < _ACK.size:
        raise WireError("malformed", "ack: truncated")
    expected, limit, count = _ACK.unpack_from(payload)
    if count > MAX_ACK_RANGES or len(payload) < _ACK.size + count * _RANGE.size:
        raise WireError("malformed", "ack: ranges")
    ranges = tuple(_RANGE.unpack_from(payload, _ACK.size + i * _RANGE.size) for i in range(count))
    last = expected
    for first, end in ranges:
        if first < last or end <= first:
            raise WireError("malformed", "ack: ranges out of order")
        last = end
    return Ack(expected, limit, ranges)


def encode_block(sequence: int, records: bytes) -> bytes:
    return tlv(FRAME_BLOCK, _U64.pack(sequence) + records)


def decode_block(payload: bytes) -> tuple[int, bytes]:
    """Sequence and records of a block frame.  Raises WireError ``malformed``."""
    if len(payload) < _U64.size:
        raise WireError("malformed", "block: truncated")
    return _U64.unpack_from(payload)[0], payload[_U64.size :]


# Roles on the wire
ROLE_UNKNOWN = 0
ROLE_BACKUP = 1
ROLE_ACTIVE = 2
ROLE_TRANSITION = 3

STATUS_REPLICATES = 0x01  # the sender replicates (not switched off)
STATUS_COMPLETE = 0x02  # the sender, a backup, holds the complete table

_STATUS = struct.Struct("!BBI")


class Status(NamedTuple):
    """Heartbeat.  ``flows``: entries of the sender's external cache."""

    role: int
    flags: int
    flows: int


def encode_status(status: Status) -> bytes:
    return tlv(FRAME_STATUS, _STATUS.pack(*status))


def decode_status(payload: bytes) -> Status:
    """Longer payloads come from newer peers and are accepted.  Raises WireError ``malformed``."""
    if len(payload) < _STATUS.size:
        raise WireError("malformed", "status: truncated")
    return Status(*_STATUS.unpack_from(payload))


# --- records ---------------------------------------------------------------------------------------------------------


def encode_bulk_begin(bulk: int) -> bytes:
    return tlv(RECORD_BULK_BEGIN, _U32.pack(bulk))


def encode_bulk_end(bulk: int, flows: int) -> bytes:
    return tlv(RECORD_BULK_END, _BULK_END.pack(bulk, flows))


def decode_bulk_begin(payload: bytes) -> int:
    if len(payload) < _U32.size:
        raise WireError("malformed", "bulk begin")
    return int(_U32.unpack_from(payload)[0])


def decode_bulk_end(payload: bytes) -> tuple[int, int]:
    """Bulk number and the number of flows that it named."""
    if len(payload) < _BULK_END.size:
        raise WireError("malformed", "bulk end")
    number, flows = _BULK_END.unpack_from(payload)
    return number, flows


_ADDRESS_BYTES = {AF_INET: 4, AF_INET6: 16}

# A flow record: this head, the original tuple, the reply tuple, then optional fields as TLVs.
_FLOW = struct.Struct("!BBHBII")  # family, protocol, zone, bytes of l4, status, timeout
_NO_TIMEOUT = 0xFFFFFFFF

_F_STATE = 1
_F_WSCALE = 2
_F_FLAGS = 3
_F_VTAGS = 4
_F_MARK = 5
_F_LABELS = 6
_F_HELPER = 7
_F_MASTER = 8
_F_SEQADJ = 9

_STATE_HEADER = tlv(_F_STATE, b"\0")[:TLV_BYTES]
_VTAGS = struct.Struct("!II")
_SEQADJ = struct.Struct("!IiiIii")
_MASTER = struct.Struct("!BB")


def encode_flow(flow: Flow) -> bytes:
    """Compact record of a flow: what the peer needs to make the same entry.

    Not carried: CTA_ID, timestamps (the peer's own are its truth)."""
    timeout = _NO_TIMEOUT if flow.timeout is None else min(flow.timeout, _NO_TIMEOUT - 1)
    out = [
        _FLOW.pack(flow.family, flow.proto, flow.zone, len(flow.orig.l4), flow.status & 0xFFFFFFFF, timeout),
        *flow.orig,
        *flow.reply,
    ]
    if flow.state is not None:
        out.append(tlv(_F_STATE, bytes((flow.state,))))
    if flow.tcp_wscale is not None:
        out.append(tlv(_F_WSCALE, bytes(flow.tcp_wscale)))
    if flow.tcp_flags is not None:
        out.append(tlv(_F_FLAGS, bytes(flow.tcp_flags)))
    if flow.sctp_vtags is not None:
        out.append(tlv(_F_VTAGS, _VTAGS.pack(*flow.sctp_vtags)))
    if flow.mark is not None:
        out.append(tlv(_F_MARK, _U32.pack(flow.mark)))
    if flow.labels is not None:
        out.append(tlv(_F_LABELS, flow.labels))
    if flow.helper is not None:
        out.append(tlv(_F_HELPER, flow.helper.encode()))
    if flow.master is not None:
        master = flow.master
        out.append(
            tlv(_F_MASTER, _MASTER.pack(flow.master_proto, len(master.l4)) + master.src + master.dst + master.l4)
        )
    if flow.seqadj is not None:
        out.append(tlv(_F_SEQADJ, _SEQADJ.pack(*flow.seqadj[0], *flow.seqadj[1])))
    return b"".join(out)


def _tuple_at(data: bytes, offset: int, address: int, l4: int) -> tuple[Tuple, int]:
    middle, ports, end = offset + address, offset + 2 * address, offset + 2 * address + l4
    if end > len(data):
        raise WireError("malformed", "flow: truncated tuple")
    return Tuple(data[offset:middle], data[middle:ports], data[ports:end]), end


def decode_flow(data: bytes) -> Flow:
    """The flow of a record; unknown optional fields are skipped.  Raises WireError ``malformed``."""
    if len(data) < _FLOW.size:
        raise WireError("malformed", "flow: truncated head")
    family, proto, zone, l4, status, timeout = _FLOW.unpack_from(data)
    address = _ADDRESS_BYTES.get(family)
    if address is None or l4 not in (0, 4):
        raise WireError("malformed", f"flow: family {family}, {l4} bytes of ports")
    orig, offset = _tuple_at(data, _FLOW.size, address, l4)
    reply, offset = _tuple_at(data, offset, address, l4)
    fields = dict(iter_tlv(data, offset))
    try:
        helper = fields[_F_HELPER].decode("ascii") if _F_HELPER in fields else None
        master, master_proto = None, 0
        if _F_MASTER in fields:
            master_proto, master_l4 = _MASTER.unpack_from(fields[_F_MASTER])
            if master_l4 not in (0, 4):
                raise WireError("malformed", f"flow: master with {master_l4} bytes of ports")
            master, _end = _tuple_at(fields[_F_MASTER], _MASTER.size, address, master_l4)
        seqadj = None
        if _F_SEQADJ in fields:
            numbers = _SEQADJ.unpack(fields[_F_SEQADJ])
            seqadj = (SeqAdj(*numbers[:3]), SeqAdj(*numbers[3:]))
        state = fields[_F_STATE][0] if _F_STATE in fields else None
        wscale, flags = fields.get(_F_WSCALE), fields.get(_F_FLAGS)
        return Flow(
            family,
            proto,
            zone,
            orig,
            reply,
            status,
            timeout=None if timeout == _NO_TIMEOUT else timeout,
            state=state,
            tcp_wscale=None if wscale is None else (wscale[0], wscale[1]),
            tcp_flags=None if flags is None else (flags[0], flags[1]),
            sctp_vtags=_VTAGS.unpack(fields[_F_VTAGS]) if _F_VTAGS in fields else None,
            mark=_U32.unpack(fields[_F_MARK])[0] if _F_MARK in fields else None,
            labels=fields.get(_F_LABELS),
            helper=helper,
            master=master,
            master_proto=master_proto,
            seqadj=seqadj,
        )
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise WireError("malformed", f"flow: {error!r}") from error


def tcp_state(record: bytes) -> int | None:
    """State of a TCP flow in a valid record, without decoding all of it; None for other protocols."""
    if record[1] != IPPROTO_TCP:
        return None
    place = _FLOW.size + 4 * _ADDRESS_BYTES[record[0]] + 2 * record[4]
    if record[place : place + TLV_BYTES] == _STATE_HEADER:  # where encode_flow puts it
        return record[place + TLV_BYTES]
    return decode_flow(record).state


def decode_key(key: bytes) -> tuple[int, int, int, Tuple]:
    """Family, protocol, zone and original tuple of a flow key.  Raises WireError ``malformed``."""
    if len(key) < 4 or key[0] not in _ADDRESS_BYTES:
        raise WireError("malformed", "flow key")
    address = _ADDRESS_BYTES[key[0]]
    l4 = len(key) - 4 - 2 * address
    if l4 not in (0, 4):
        raise WireError("malformed", "flow key: size")
    orig, _end = _tuple_at(key, 4, address, l4)
    return key[0], key[1], int.from_bytes(key[2:4], "big"), orig
