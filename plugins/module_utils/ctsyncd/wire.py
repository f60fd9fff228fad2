# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sync protocol's bytes: datagram headers, frames, records, columns of flows (docs/protocol.md).

Pure functions, bytes to values and back.  Everything is big-endian.  Every decoder raises :class:`WireError`, with the
label of the counter that the fault belongs to, and nothing else, whatever the bytes are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import NamedTuple

from . import rows as shapes
from .conditions import FINGERPRINT, Conditions
from .errors import WireError

VERSION = 2

# Datagram kinds
HELLO = 1
DATA = 2

NONCE_BYTES = 16
TAG_BYTES = 16
NUMBER_BYTES = 8  # of a packet number
DIGEST_BYTES = 4  # of header and plaintext, behind the header
AEAD_NONCE_BYTES = NUMBER_BYTES + DIGEST_BYTES

# version, kind, key id, zero, sender's nonce (of DATA its first half, which names the session), packet number
_HELLO_HEADER = struct.Struct("!BBBx16sQ")
_DATA_HEADER = struct.Struct("!BBBx8sQ")
HELLO_HEADER_BYTES = _HELLO_HEADER.size
DATA_HEADER_BYTES = _DATA_HEADER.size
DATA_OVERHEAD_BYTES = DATA_HEADER_BYTES + DIGEST_BYTES + TAG_BYTES  # of a datagram, beside its frames

# Frames inside a sealed DATA datagram
FRAME_BLOCK = 1
FRAME_ACK = 2
FRAME_STATUS = 3
FRAME_BYE = 4
FRAME_HEARD = 5
FRAME_PROBE = 6
FRAME_ECHO = 7
FRAME_PART = 8
FRAME_KEYS = 9

# Records inside a block
RECORD_ROWS = 1
RECORD_GONE = 2
RECORD_FLOW = 3
RECORD_BULK_BEGIN = 4
RECORD_BULK_END = 5
RECORD_BULK_REQUEST = 6
RECORD_CONDITIONS = 7
RECORD_ROLE = 8
RECORD_DIGEST = 16
RECORD_BUCKETS_REQUEST = 17
RECORD_BUCKETS = 18
RECORD_COMPARE_REQUEST = 19
RECORD_COMPARE_BEGIN = 20
RECORD_COMPARE_ROWS = 21
RECORD_COMPARE_FLOW = 22
RECORD_COMPARE_END = 23
RECORD_STATES_BEGIN = 24
RECORD_STATES = 25
RECORD_REPORT = 26
RECORD_EXPECT = 32
RECORD_EXPECT_GONE = 33

KEY_CHECK_BYTES = 1 + DIGEST_BYTES  # of one key in a KEYS: id and check value

MAX_ROWS = 1024  # rows of one record: what a few bytes may grow to

_TLV = struct.Struct("!BH")
TLV_BYTES = _TLV.size
_U64 = struct.Struct("!Q")
_BULK_END = struct.Struct("!II")
_U32 = struct.Struct("!I")
_ACK = struct.Struct("!QQ")
MAX_EARLY_BYTES = 64  # of an ACK: one bit for each block that a receiver may keep

_BLOCK_HEAD = struct.Struct("!BHQ")  # of its frame, and its number
BLOCK_HEADER_BYTES = _BLOCK_HEAD.size


class Header(NamedTuple):
    """A datagram's clear header, of ``size`` bytes.  ``sender`` is the 16-byte nonce (HELLO) or its first 8 (DATA)."""

    kind: int
    key_id: int
    sender: bytes
    number: int
    size: int


def encode_header(kind: int, key_id: int, sender: bytes, number: int) -> bytes:
    """Clear header of a datagram; it is also the AEAD's additional data."""
    layout = _HELLO_HEADER if kind == HELLO else _DATA_HEADER  # which takes the first half of a nonce
    return layout.pack(VERSION, kind, key_id, sender, number)


def decode_header(data: bytes) -> Header:
    """Read a datagram's header.  Raises WireError ``truncated``, ``wrong_version`` or ``malformed``."""
    if len(data) < DATA_OVERHEAD_BYTES:
        raise WireError("truncated", f"{len(data)} bytes")
    version, kind, key_id, sender, number = _DATA_HEADER.unpack_from(data)
    if version != VERSION:
        raise WireError("wrong_version", str(version))
    if kind == DATA:
        return Header(kind, key_id, sender, number, DATA_HEADER_BYTES)
    if kind != HELLO:
        raise WireError("malformed", f"datagram kind {kind}")
    if len(data) < HELLO_HEADER_BYTES + DIGEST_BYTES + TAG_BYTES:
        raise WireError("truncated", f"{len(data)} bytes")
    _version, _kind, _key_id, sender, number = _HELLO_HEADER.unpack_from(data)
    return Header(kind, key_id, sender, number, HELLO_HEADER_BYTES)


def aead_nonce(header: bytes, digest: bytes) -> bytes:
    """The AEAD's nonce: the packet number, which every header ends with, and the digest of header and plaintext."""
    return header[-NUMBER_BYTES:] + digest


def sealed_parts(header: Header, data: bytes) -> tuple[bytes, bytes, bytes]:
    """The AEAD's nonce, what is sealed and the additional data of a datagram with this header."""
    size = header.size
    return data[size - NUMBER_BYTES : size + DIGEST_BYTES], data[size + DIGEST_BYTES :], data[:size]


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
    ``early``: bit k (1 << k) tells that block ``expected`` + 1 + k was received."""

    expected: int
    limit: int
    early: int


def encode_ack(ack: Ack) -> bytes:
    early = ack.early.to_bytes(-(-ack.early.bit_length() // 8), "little")
    return tlv(FRAME_ACK, _ACK.pack(ack.expected, ack.limit) + early[:MAX_EARLY_BYTES])


def decode_ack(payload: bytes) -> Ack:
    """Raises WireError ``malformed``."""
    if not _ACK.size <= len(payload) <= _ACK.size + MAX_EARLY_BYTES:
        raise WireError("malformed", f"ack: {len(payload)} bytes")
    expected, limit = _ACK.unpack_from(payload)
    return Ack(expected, limit, int.from_bytes(payload[_ACK.size :], "little"))


def encode_block(sequence: int, records: bytes) -> bytes:
    return _BLOCK_HEAD.pack(FRAME_BLOCK, _U64.size + len(records), sequence) + records


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
STATUS_EQUAL = 0x04  # the last digest said that this table is the active node's
STATUS_DIFFERS = 0x08  # it did not, for a while, or again and again

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


class Heard(NamedTuple):
    """``number``: the highest packet number received of the other node in this session; ``blocks``: CRC-32 over the
    records of all blocks received of it in order."""

    number: int
    blocks: int


_HEARD = struct.Struct("!QI")
HEARD_BYTES = TLV_BYTES + _HEARD.size


def encode_heard(heard: Heard) -> bytes:
    return tlv(FRAME_HEARD, _HEARD.pack(*heard))


def decode_heard(payload: bytes) -> Heard:
    """Longer payloads come from newer peers and are accepted.  Raises WireError ``malformed``."""
    if len(payload) < _HEARD.size:
        raise WireError("malformed", "heard: truncated")
    return Heard(*_HEARD.unpack_from(payload))


# A node at rest says in each heartbeat what it said in the one before, but for the packet number in the HEARD.  So what
# follows that number, as far as a HEARD, an ACK without early blocks and a STATUS go, is compared and kept as one.
_BEAT_REST = slice(TLV_BYTES + _U64.size, HEARD_BYTES + TLV_BYTES + _ACK.size + TLV_BYTES + _STATUS.size)
BEAT_BYTES = _BEAT_REST.stop
_BEAT = struct.Struct(f"!{TLV_BYTES}sQ{BEAT_BYTES - TLV_BYTES - _U64.size}s")
_BEAT_HEADS = (
    (slice(0, TLV_BYTES), _TLV.pack(FRAME_HEARD, _HEARD.size)),
    (slice(HEARD_BYTES, HEARD_BYTES + TLV_BYTES), _TLV.pack(FRAME_ACK, _ACK.size)),
    (slice(BEAT_BYTES - TLV_BYTES - _STATUS.size, BEAT_BYTES - _STATUS.size), _TLV.pack(FRAME_STATUS, _STATUS.size)),
)


def beat_rest(frames: bytes) -> bytes:
    """What follows the packet number in frames that begin with a heartbeat; nothing where they do not."""
    for where, head in _BEAT_HEADS:
        if frames[where] != head:
            return b""
    return frames[_BEAT_REST]


def encode_beat(number: int, rest: bytes) -> bytes:
    """A heartbeat with another packet number."""
    return _BEAT.pack(_BEAT_HEADS[0][1], number, rest)


def beat_number(frames: bytes, rest: bytes) -> int:
    """The packet number, where frames begin with a heartbeat that has this rest; else -1."""
    if len(frames) < BEAT_BYTES or not rest:
        return -1
    head, number, found = _BEAT.unpack_from(frames)
    return number if found == rest and head == _BEAT_HEADS[0][1] else -1


Keys = Mapping[int, bytes]  # check values by key id


def encode_keys(keys: Keys) -> bytes:
    """Which pre-shared keys this node accepts: ids and check values of ``DIGEST_BYTES``, by id."""
    return tlv(FRAME_KEYS, b"".join(bytes((key_id,)) + keys[key_id] for key_id in sorted(keys)))


def decode_keys(payload: bytes) -> Keys:
    """Raises WireError ``malformed``."""
    places = range(0, len(payload), KEY_CHECK_BYTES)
    ids = [payload[at] for at in places]
    if len(payload) % KEY_CHECK_BYTES or not ids or 0 in ids or ids != sorted(set(ids)):
        raise WireError("malformed", "keys: not a list of ids, rising, and check values")
    return {payload[at]: payload[at + 1 : at + KEY_CHECK_BYTES] for at in places}


class Probe(NamedTuple):
    """Asks whether ``link`` (its place in the lists of both nodes, from 0) carries datagrams of this length.

    ``number`` counts the probes of a link; ``at_once``: the answer must not wait for the next heartbeat.
    """

    link: int
    at_once: bool
    number: int


_PROBE = struct.Struct("!BBI")
_PROBE_AT_ONCE = 0x01
PROBE_BYTES = TLV_BYTES + _PROBE.size


def encode_probe(probe: Probe, length: int = 0) -> bytes:
    """The frame, with zeros up to ``length`` bytes (as far as it is shorter)."""
    payload = _PROBE.pack(probe.link, _PROBE_AT_ONCE if probe.at_once else 0, probe.number)
    return tlv(FRAME_PROBE, payload.ljust(length - TLV_BYTES, b"\0"))


def decode_probe(payload: bytes) -> Probe:
    """What follows is there for its length only.  Raises WireError ``malformed``."""
    if len(payload) < _PROBE.size:
        raise WireError("malformed", "probe: truncated")
    link, flags, number = _PROBE.unpack_from(payload)
    return Probe(link, bool(flags & _PROBE_AT_ONCE), number)


class Echo(NamedTuple):
    """Probe ``number`` of ``link`` came, ``delay`` microseconds before this was sent."""

    link: int
    number: int
    delay: int


_ECHO = struct.Struct("!BII")
ECHO_BYTES = TLV_BYTES + _ECHO.size
_LONGEST_DELAY = 0xFFFFFFFF


def encode_echo(echo: Echo) -> bytes:
    return tlv(FRAME_ECHO, _ECHO.pack(echo.link, echo.number, min(echo.delay, _LONGEST_DELAY)))


def decode_echo(payload: bytes) -> Echo:
    """Longer payloads come from newer peers and are accepted.  Raises WireError ``malformed``."""
    if len(payload) < _ECHO.size:
        raise WireError("malformed", "echo: truncated")
    return Echo(*_ECHO.unpack_from(payload))


class Part(NamedTuple):
    """Bytes of a block's records from ``offset`` on; they are ``total`` bytes."""

    block: int
    offset: int
    total: int
    records: bytes


_PART = struct.Struct("!QHH")
PART_HEADER_BYTES = TLV_BYTES + _PART.size
MAX_BLOCK_BYTES = 9216  # of records, put together out of parts


def encode_part(part: Part) -> bytes:
    return tlv(FRAME_PART, _PART.pack(*part[:3]) + part.records)


def decode_part(payload: bytes) -> Part:
    """Raises WireError ``malformed``."""
    if len(payload) <= _PART.size:
        raise WireError("malformed", "part: truncated")
    block, offset, total = _PART.unpack_from(payload)
    records = payload[_PART.size :]
    if total > MAX_BLOCK_BYTES or offset + len(records) > total:
        raise WireError("malformed", "part: beyond its block")
    return Part(block, offset, total, records)


# --- records ---------------------------------------------------------------------------------------------------------


def encode_bulk_begin(bulk: int) -> bytes:
    return tlv(RECORD_BULK_BEGIN, _U32.pack(bulk))


def encode_bulk_end(bulk: int, flows: int) -> bytes:
    return tlv(RECORD_BULK_END, _BULK_END.pack(bulk, flows))


def encode_role(role: int) -> bytes:
    """In which role, one of ROLE_*, the sender says the records that follow."""
    return tlv(RECORD_ROLE, bytes((role,)))


def decode_role(payload: bytes) -> int:
    """One of ROLE_*; a number that this version does not know is ROLE_UNKNOWN."""
    if not payload:
        raise WireError("malformed", "role")
    return payload[0] if payload[0] <= ROLE_TRANSITION else ROLE_UNKNOWN


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


_CONDITION = struct.Struct("!II")  # CRC-32 of the name, value
_CONDITIONS_RULESET = 1
_CONDITIONS_PARAMETERS = 2


def encode_conditions(conditions: Conditions) -> bytes:
    """A whole record."""
    parameters = b"".join(_CONDITION.pack(*item) for item in sorted(conditions.parameters.items()))
    return tlv(
        RECORD_CONDITIONS,
        tlv(_CONDITIONS_RULESET, bytes.fromhex(conditions.ruleset)) + tlv(_CONDITIONS_PARAMETERS, parameters),
    )


def decode_conditions(payload: bytes) -> Conditions:
    """Unknown fields are skipped, absent ones say nothing.  Raises WireError ``malformed``."""
    fields = dict(iter_tlv(payload))
    ruleset = fields.get(_CONDITIONS_RULESET, b"").hex()
    parameters = fields.get(_CONDITIONS_PARAMETERS, b"")
    if (ruleset and not FINGERPRINT.match(ruleset)) or len(parameters) % _CONDITION.size:
        raise WireError("malformed", "conditions")
    return Conditions(ruleset, dict(_CONDITION.iter_unpack(parameters)))


# --- columns ---------------------------------------------------------------------------------------------------------
#
# Column k is byte k of all rows.  Each column has one of four modes, told by two bits, one in each of two masks.  In a
# mask column 0 is the most significant bit of the first byte; bits after the last column are zero:
#   ZERO (0, 0)   every byte is zero: nothing follows
#   SAME (0, 1)   every byte is the same: that byte
#   FEW  (1, 0)   at most 16 different bytes: how many less one, those bytes, and for each row its index, two in a byte
#   FULL (1, 1)   every byte as it is
# The masks are followed by the bytes of all SAME columns, then by all FEW columns, then by all FULL columns.

_COLUMNS = struct.Struct("!BH")  # length of the keys, rows
_FEW = 16
_FEW_PLAIN = 8  # different bytes in all rows that go into each part of them, used or not
_SAMPLE = 24  # rows that are looked at to say so of many
_CROWD = 96  # rows of a part in which a column with many different bytes, some of them frequent, is seldom FEW
_MIRROR_SHARE = 1.05  # where fewer than one in so many rows differ alike, hardly any part of them does
_FEW_ROWS = 24  # with fewer rows FEW saves next to nothing
_FEW_SHARE = 20  # where one of two bytes that were looked at is in fewer rows than one in so many, there are not few
_ZERO, _ONE = b"01"
_BITS = bytes(code == _ONE for code in range(256))
_DIGITS = b"0123456789abcdef"
_NOT_ZERO = b"0" + b"1" * 255  # of each byte the digit of the mask that it has in a column of its own
_ZONE_DIRECTIONS = b"\1\2"


class _Layout(NamedTuple):
    """How rows of one shape lie in a record.

    ``mirror``: for each column of the reply tuple, in order, the column of the original tuple that has the same byte in
    it where nothing is translated.  ``plain``: what stands before a single row that is sent as it is, all columns SAME.
    """

    width: int
    mask: int  # bytes
    mirror_mask: int  # bytes
    reply: int  # first column of the reply tuple
    mirror: tuple[int, ...]
    plain: bytes


def _layout(shape: shapes.Shape) -> _Layout:
    source, destination, ports = 1, 1 + shape.address, 1 + 2 * shape.address
    half = shape.l4 // 2
    mirror = (
        *range(destination, destination + shape.address),
        *range(source, source + shape.address),
        *range(ports + half, ports + shape.l4),
        *range(ports, ports + half),
    )
    mask, mirror_mask = -(-shape.row // 8), -(-len(mirror) // 8)
    same = ((1 << shape.row) - 1 << -shape.row % 8).to_bytes(mask, "big")
    plain = _COLUMNS.pack(shape.key, 1) + bytes(mirror_mask + mask) + same
    return _Layout(shape.row, mask, mirror_mask, shape.key, mirror, plain)


_ROWS = {length: _layout(shape) for length, shape in shapes.SHAPES.items()}
_PAIRS = {length: struct.Struct(f"{shape.key}s{shape.value}s") for length, shape in shapes.SHAPES.items()}


def iter_rows(key_len: int, rows: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Key and value of each of the joined rows; also what ``dict`` and ``dict.update`` take."""
    return _PAIRS[key_len].iter_unpack(rows)


def split_keys(key_len: int, keys: bytes) -> list[bytes]:
    """Joined keys, one by one."""
    return shapes.split_keys(key_len, keys)


def encode_rows(key_len: int, rows: bytes) -> bytes:
    """Payload of ROWS: joined rows (1 to ``MAX_ROWS``) of the shape that ``key_len`` tells.

    A single row is sent as it is: to take it apart and to put it together would take longer than all else that is done
    with it, and where flows come one by one nothing depends on 20 bytes (50 for IPv6).
    """
    layout = _ROWS[key_len]
    width = layout.width
    if len(rows) == width:
        return layout.plain + rows
    count = len(rows) // width
    columns = [rows[at::width] for at in range(width)]
    mirrored, nothing = 0, bytes(count)
    for at, original in enumerate(layout.mirror, layout.reply):
        column, other = columns[at], columns[original]
        mirrored <<= 1
        if column == other:
            columns[at] = nothing
            mirrored |= 1
        elif column.count(column[0]) != count and other.count(other[0]) != count:
            difference = _xor(column, other)
            if difference.count(difference[0]) == count:
                columns[at] = difference
                mirrored |= 1
    mirrored <<= -len(layout.mirror) % 8
    head = _COLUMNS.pack(key_len, count) + mirrored.to_bytes(layout.mirror_mask, "big")
    return head + _encode_columns(columns, count)


class RowColumns:
    """Rows, given by columns, that are encoded part by part: what a column is in all of them is looked at once.

    In a flood most columns have one byte in all rows, or are mirrored in all of them, and in most of the others no byte
    is frequent: no part has to look at any of these.
    """

    def __init__(self, key_len: int, columns: Sequence[bytes]) -> None:
        self._key_len = key_len
        self._layout = layout = _ROWS[key_len]
        self._columns = columns
        count = len(columns[0])
        firsts = bytearray([column[0] for column in columns])
        same = [column == column[:1] * count for column in columns]  # far cheaper than to count
        first = 1 << len(layout.mirror) - 1
        self._mirrored = 0
        self._unclear: list[tuple[int, int, int]] = []  # bit, column and the one that it may mirror in a part
        for place, original in enumerate(layout.mirror):
            at = layout.reply + place
            if columns[at] == columns[original]:
                firsts[at], same[at] = 0, True
                self._mirrored |= first >> place
            elif not (same[at] and same[original]) and _may_mirror(columns[at], columns[original]):
                self._unclear.append((first >> place, at, original))
        self._firsts = bytes(firsts)
        # the columns with several bytes, and whether these may be few in a part
        self._several = {at: _few_somewhere(columns[at]) for at in range(len(columns)) if not same[at]}
        self._few: list[tuple[int, bytes, bytes, str]] = []  # place, column, what FEW says of it, and its digits
        self._full: list[int] = []
        self._begins: dict[tuple[tuple[int, int], ...], bytes] = {}
        self._plain_from = _FEW_ROWS  # rows in a part
        self._plain = not self._unclear and self._are_plain()

    def _are_plain(self) -> bool:
        """Has each column with several bytes few of them, or too many in any part?  Then all parts are much alike."""
        for at, perhaps in self._several.items():
            column = self._columns[at]
            if not perhaps:
                self._full.append(at)
            elif _crowded(column):
                self._full.append(at)
                self._plain_from = _CROWD
            else:
                values = _values(column)
                if len(values) > _FEW_PLAIN:
                    return False
                digits = column.translate(bytes.maketrans(values, _DIGITS[: len(values)])).decode("ascii")
                self._few.append((at, column, bytes((len(values) - 1,)) + values, digits))
        return True

    def _begin(self, single: tuple[tuple[int, int], ...]) -> bytes:
        """What parts begin with, behind their heads.  ``single``: columns of few bytes that have one of them there."""
        high, firsts = bytearray(b"0" * len(self._firsts)), bytearray(self._firsts)
        for at, _column, _begin, _digits in self._few:
            high[at], firsts[at] = _ONE, 0
        for at in self._full:
            high[at], firsts[at] = _ONE, 1
        for at, byte in single:
            high[at], firsts[at] = _ZERO, byte
        masks = _masks(high, firsts)
        for at in self._full:
            firsts[at] = 0
        mirrors = (self._mirrored << -len(self._layout.mirror) % 8).to_bytes(self._layout.mirror_mask, "big")
        return mirrors + masks + firsts.translate(None, b"\0")

    def _encode_plain(self, head: bytes, start: int, end: int) -> bytes:
        single, few, columns = [], [], self._columns
        for at, column, begin, digits in self._few:
            part = column[start:end]
            if part == part[:1] * len(part):
                single.append((at, part[0]))
            else:
                half = digits[start:end]
                few.append(begin + bytes.fromhex(half if len(half) % 2 == 0 else half + "0"))
        known = tuple(single)
        begins = self._begins.get(known)
        if begins is None:
            begins = self._begins[known] = self._begin(known)
        return b"".join((head, begins, *few, *[columns[at][start:end] for at in self._full]))

    def encode(self, start: int, end: int) -> bytes:
        """Payload of ROWS: those from ``start`` to ``end``."""
        count = end - start
        if self._plain and count >= self._plain_from:
            return self._encode_plain(_COLUMNS.pack(self._key_len, count), start, end)
        layout, columns = self._layout, self._columns
        mirrored, firsts = self._mirrored, bytearray(self._firsts)
        parts = {}
        for bit, at, original in self._unclear:
            column, other = columns[at][start:end], columns[original][start:end]
            if column == other:
                parts[at] = bytes(count)
                mirrored |= bit
            elif column.count(column[0]) != count and other.count(other[0]) != count:
                difference = _xor(column, other)
                if difference.count(difference[0]) == count:
                    parts[at] = difference
                    mirrored |= bit
        several = []
        for at in sorted({**self._several, **parts}) if parts else self._several:
            column = parts.get(at) or columns[at][start:end]
            perhaps = at in parts or self._several[at]
            if perhaps:
                firsts[at] = column[0]
                times = column.count(column[0])
                if times == count:
                    continue
                perhaps = _may_be_few(column, times)
            several.append((at, column, perhaps))
        mirrored <<= -len(layout.mirror) % 8
        head = _COLUMNS.pack(self._key_len, count) + mirrored.to_bytes(layout.mirror_mask, "big")
        return head + _encode_several(firsts, several, count)


def decode_rows(payload: bytes) -> tuple[int, bytes]:
    """Length of the keys and the joined rows of ROWS.  Raises WireError ``malformed``."""
    key_len, count = _decode_columns_head(payload)
    layout = _ROWS[key_len]
    width = layout.width
    rows: bytes | bytearray
    if len(payload) == len(layout.plain) + width and payload.startswith(layout.plain):
        rows = payload[len(layout.plain) :]
    else:
        at = _COLUMNS.size + layout.mirror_mask
        mirrored = _bits(_mask(payload[_COLUMNS.size : at], len(layout.mirror), layout.mirror_mask), len(layout.mirror))
        rows = _decode_columns(payload, at, width, count)
        for to, original in compress(enumerate(layout.mirror, layout.reply), mirrored):
            column, other = rows[to::width], rows[original::width]
            rows[to::width] = other if column.count(0) == count else _xor(column, other)
    _check_zones(rows, key_len, width)
    return key_len, bytes(rows)


def encode_gone(key_len: int, keys: bytes) -> bytes:
    """Payload of GONE: joined keys (1 to ``MAX_ROWS``) of one length."""
    count = len(keys) // key_len
    return _COLUMNS.pack(key_len, count) + _encode_columns([keys[at::key_len] for at in range(key_len)], count)


def decode_gone(payload: bytes) -> tuple[int, bytes]:
    """Length of the keys and the joined keys of GONE.  Raises WireError ``malformed``."""
    key_len, count = _decode_columns_head(payload)
    keys = _decode_columns(payload, _COLUMNS.size, key_len, count)
    _check_zones(keys, key_len, key_len)
    return key_len, bytes(keys)


def _decode_columns_head(payload: bytes) -> tuple[int, int]:
    if len(payload) < _COLUMNS.size:
        raise WireError("malformed", "columns: truncated")
    key_len, count = _COLUMNS.unpack_from(payload)
    if key_len not in shapes.SHAPES or not 1 <= count <= MAX_ROWS:
        raise WireError("malformed", f"columns: {count} keys of {key_len} bytes")
    return key_len, count


def _xor(one: bytes | bytearray, two: bytes | bytearray) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(two, "little")).to_bytes(len(one), "little")


def _encode_columns(columns: list[bytes], count: int) -> bytes:
    """Masks and columns."""
    firsts = bytearray([column[0] for column in columns])
    several = [
        (place, columns[place], _may_be_few(columns[place], times))
        for place, times in enumerate(map(bytes.count, columns, firsts))
        if times != count
    ]
    return _encode_several(firsts, several, count)


def _may_be_few(column: bytes, times: int) -> bool:
    """Is it worth a closer look whether it has few different bytes?  ``times``: how often its first one is in it."""
    count = len(column)
    return count >= _FEW_ROWS and max(times, column.count(column[count >> 1])) * _FEW_SHARE > count


def _encode_several(firsts: bytearray, several: list[tuple[int, bytes, bool]], count: int) -> bytes:
    """The same where each column has its byte of ``firsts`` in all rows, but for ``several`` (in order): the place of a
    column, the column, and whether it may have few different bytes."""
    high = bytearray(b"0" * len(firsts))
    full: list[bytes] = []
    few: list[bytes] = []
    for place, column, perhaps in several:
        high[place] = _ONE
        firsts[place] = 1  # as in FULL
        if perhaps:
            values = set(column)
            if len(values) <= _FEW and 1 + len(values) + (count + 1) // 2 < count:
                few.append(_encode_few(column, bytes(sorted(values))))
                firsts[place] = 0
                continue
        full.append(column)
    masks = _masks(high, firsts)
    for place, _column, _perhaps in several:
        firsts[place] = 0
    return b"".join((masks, firsts.translate(None, b"\0"), *few, *full))


def _few_somewhere(column: bytes) -> bool:
    """May this column have few different bytes in some part of it?  A look at its beginning, its middle and its end."""
    count = len(column)
    if count < _FEW_ROWS:
        return True
    for at in _places(count):
        part = column[at : at + _CROWD]
        if _may_be_few(part, part.count(part[0])):
            return True
    return False


def _crowded(column: bytes) -> bool:
    """Has it too many different bytes for FEW in most parts of ``_CROWD`` rows, for all that some are frequent?

    So it is with ports of servers: most are a few well-known ones, the others random.
    """
    places = _places(len(column))
    return sum([len(set(column[at : at + _CROWD])) for at in places]) > _FEW * len(places)


def _places(count: int) -> tuple[int, int, int]:
    """Where of so many rows ``_CROWD`` are looked at: beginning, middle, end."""
    return 0, count >> 1, max(0, count - _CROWD)


def _values(column: bytes) -> bytes:
    """The different bytes of a column, sorted: quickly where they are few."""
    known = set(column[:_SAMPLE])
    return bytes(sorted(known.union(column.translate(None, bytes(known)))))


def _may_mirror(column: bytes, original: bytes) -> bool:
    """Is it likely that in some part of many rows one of these differs from the other by the same bits in all rows?"""
    difference = _xor(column, original)
    return _MIRROR_SHARE * max(map(difference.count, (difference[0], difference[-1], 0))) > len(column)


def _masks(high: bytearray, low: bytearray) -> bytes:
    """Both masks of columns: ``high`` of binary digits, ``low`` has a bit for each byte that is not 0."""
    pad = -len(high) % 8
    size = (len(high) + pad) // 8
    digits = low.translate(_NOT_ZERO)
    return (int(high, 2) << pad).to_bytes(size, "big") + (int(digits, 2) << pad).to_bytes(size, "big")


def _encode_few(column: bytes, values: bytes) -> bytes:
    digits = column.translate(bytes.maketrans(values, _DIGITS[: len(values)])).decode("ascii")
    if len(digits) % 2:
        digits += "0"
    return bytes((len(values) - 1,)) + values + bytes.fromhex(digits)


def _decode_columns(payload: bytes, at: int, width: int, count: int) -> bytearray:
    """The rows of masks and columns that begin at ``at`` and fill the payload."""
    size = -(-width // 8)
    high = _mask(payload[at : at + size], width, size)
    low = _mask(payload[at + size : at + 2 * size], width, size)
    at += 2 * size
    same = tuple(compress(range(width), _bits(low & ~high, width)))
    if at + len(same) > len(payload):
        raise WireError("malformed", "columns: truncated")
    template = bytearray(width)
    for column, value in zip(same, payload[at : at + len(same)]):
        template[column] = value
    at += len(same)
    rows = template * count
    if high & ~low:
        for column in compress(range(width), _bits(high & ~low, width)):
            rows[column::width], at = _decode_few(payload, at, count)
    for column in compress(range(width), _bits(high & low, width)):
        if at + count > len(payload):
            raise WireError("malformed", "columns: truncated")
        rows[column::width] = payload[at : at + count]
        at += count
    if at != len(payload):
        raise WireError("malformed", "columns: more than said")
    return rows


def _decode_few(payload: bytes, at: int, count: int) -> tuple[bytes, int]:
    """A FEW column that begins at ``at``, and where it ends."""
    known = payload[at] + 1 if at < len(payload) else 0
    end = at + 1 + known + (count + 1) // 2
    if not 1 <= known <= _FEW or end > len(payload):
        raise WireError("malformed", "columns: few")
    digits = payload[at + 1 + known : end].hex().encode("ascii")
    used = _DIGITS[:known]
    if digits.translate(None, used):
        raise WireError("malformed", "columns: index of nothing")
    return digits[:count].translate(bytes.maketrans(used, payload[at + 1 : at + 1 + known])), end


def _mask(mask: bytes, width: int, size: int) -> int:
    """A mask as a number whose last bit is that of the last column.  Raises WireError ``malformed``."""
    if len(mask) != size:
        raise WireError("malformed", "columns: truncated mask")
    pad = size * 8 - width
    number = int.from_bytes(mask, "big")
    if number & ((1 << pad) - 1):
        raise WireError("malformed", "columns: mask of more columns than there are")
    return number >> pad


def _bits(mask: int, width: int) -> bytes:
    """The bits of a mask, one per byte."""
    return format(mask, f"0{width}b").encode("ascii").translate(_BITS)


def _check_zones(rows: bytes | bytearray, key_len: int, width: int) -> None:
    """No two keys may mean the same flow: a zone that is written out is not 0, and a direction is one direction."""
    zone = shapes.SHAPES[key_len].zone
    if not zone:
        return
    at = key_len - zone
    if 0 in rows[at + 1 :: width] and (0, 0) in zip(rows[at::width], rows[at + 1 :: width]):
        raise WireError("malformed", "key: zone 0")
    if zone == 3 and rows[at + 2 :: width].translate(None, _ZONE_DIRECTIONS):
        raise WireError("malformed", "key: direction of the zone")


def encode_flow_record(key: bytes, value: bytes, extras: bytes) -> bytes:
    """Payload of FLOW: one flow, that has extras or leaves something out."""
    return bytes((len(key),)) + key + value + extras


def decode_flow_record(payload: bytes) -> tuple[bytes, bytes, bytes]:
    """Key, value and extras of FLOW; the extras can be unpacked.  Raises WireError ``malformed``."""
    shape = shapes.SHAPES.get(payload[0]) if payload else None
    if shape is None or len(payload) < 1 + shape.row:
        raise WireError("malformed", "flow: size")
    end = 1 + shape.key
    key, value, extras = payload[1:end], payload[end : end + shape.value], payload[1 + shape.row :]
    _check_zones(key, len(key), len(key))
    if extras:
        shapes.unpack(key, value, extras)
    return key, value, extras


# --- comparisons -----------------------------------------------------------------------------------------------------

BUCKETS = 1024
BUCKETS_TOLD = 32  # at most in one record
COMPARE_REPAIR = 0x01  # the receiver takes what it is told
COMPARE_REPORT = 0x02  # the receiver answers with REPORT
COMPARE_BROKEN_OFF = 0xFFFFFFFF  # COMPARE_END, instead of flows named: no end comes, what was told is not all

_DIGEST = struct.Struct("!IQ")
_COMPARE = struct.Struct("!IB")
_SUMS = struct.Struct("!IH")
_REPORT = struct.Struct("!II7I")
REPORT_COUNTS = 7
_BITMAP_BYTES = BUCKETS // 8


def encode_digest(flows: int, total: int) -> bytes:
    return tlv(RECORD_DIGEST, _DIGEST.pack(flows, total))


def decode_digest(payload: bytes) -> tuple[int, int]:
    """Flows and digest of the whole table.  Longer payloads come from newer peers and are accepted.

    Raises WireError ``malformed``.
    """
    if len(payload) < _DIGEST.size:
        raise WireError("malformed", "digest: truncated")
    flows, total = _DIGEST.unpack_from(payload)
    return flows, total


def encode_sums(kind: int, number: int, first: int, sums: Sequence[int]) -> bytes:
    """BUCKETS or STATES: at most ``BUCKETS_TOLD`` sums of the buckets from ``first`` on."""
    return tlv(kind, _SUMS.pack(number, first) + struct.pack(f"!{len(sums)}Q", *sums))


def decode_sums(payload: bytes) -> tuple[int, int, tuple[int, ...]]:
    """Number, first bucket and sums.  Raises WireError ``malformed``."""
    count, rest = divmod(len(payload) - _SUMS.size, 8)
    if rest or not 1 <= count <= BUCKETS_TOLD:
        raise WireError("malformed", f"sums: {len(payload)} bytes")
    number, first = _SUMS.unpack_from(payload)
    if first + count > BUCKETS:
        raise WireError("malformed", f"sums: buckets {first} to {first + count - 1}")
    return number, first, struct.unpack_from(f"!{count}Q", payload, _SUMS.size)


def encode_number(kind: int, number: int) -> bytes:
    """A record that is a number: STATES_BEGIN."""
    return tlv(kind, _U32.pack(number))


def decode_number(payload: bytes) -> int:
    """Raises WireError ``malformed``."""
    if len(payload) < _U32.size:
        raise WireError("malformed", "number: truncated")
    return int(_U32.unpack_from(payload)[0])


class Compare(NamedTuple):
    """A comparison: its number, ``COMPARE_*`` flags, and the buckets whose flows are compared."""

    number: int
    flags: int
    buckets: frozenset[int]


def encode_compare(kind: int, compare: Compare) -> bytes:
    """COMPARE_REQUEST or COMPARE_BEGIN."""
    bits = 0
    for bucket in compare.buckets:
        bits |= 1 << bucket
    return tlv(kind, _COMPARE.pack(compare.number, compare.flags) + bits.to_bytes(_BITMAP_BYTES, "little"))


def decode_compare(payload: bytes) -> Compare:
    """Longer payloads come from newer peers and are accepted.  Raises WireError ``malformed``."""
    if len(payload) < _COMPARE.size + _BITMAP_BYTES:
        raise WireError("malformed", "compare: truncated")
    number, flags = _COMPARE.unpack_from(payload)
    bits = format(int.from_bytes(payload[_COMPARE.size : _COMPARE.size + _BITMAP_BYTES], "little"), f"0{BUCKETS}b")
    return Compare(number, flags, frozenset(at for at, bit in enumerate(reversed(bits)) if bit == "1"))


def encode_compare_end(number: int, flows: int) -> bytes:
    return tlv(RECORD_COMPARE_END, _BULK_END.pack(number, flows))


class Report(NamedTuple):
    """What a comparison found: flows compared, differences by kind, and some of them: kind and key."""

    number: int
    flows: int
    counts: tuple[int, ...]
    keys: list[tuple[int, bytes]]


def encode_report(report: Report, room: int) -> bytes:
    """As many of the keys as fit into ``room`` bytes are told."""
    out = [_REPORT.pack(report.number, report.flows, *report.counts)]
    room -= TLV_BYTES + _REPORT.size
    for kind, key in report.keys:
        room -= 2 + len(key)
        if room < 0:
            break
        out.append(bytes((kind, len(key))) + key)
    return tlv(RECORD_REPORT, b"".join(out))


def decode_report(payload: bytes) -> Report:
    """Raises WireError ``malformed``."""
    if len(payload) < _REPORT.size:
        raise WireError("malformed", "report: truncated")
    number, flows, *counts = _REPORT.unpack_from(payload)
    keys = []
    at = _REPORT.size
    while at < len(payload):
        key = payload[at + 2 : at + 2 + payload[at + 1]] if at + 1 < len(payload) else b""
        if len(key) not in shapes.SHAPES or payload[at] >= REPORT_COUNTS or len(key) != payload[at + 1]:
            raise WireError("malformed", "report: key")
        _check_zones(key, len(key), len(key))
        keys.append((payload[at], key))
        at += 2 + len(key)
    return Report(number, flows, tuple(counts), keys)
