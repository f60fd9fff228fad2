# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Many ctnetlink messages at once, by columns: events and dumps to rows, rows to requests.  No I/O.

Messages of a kind that the kernel writes again and again have the same attributes in the same places.  What stands at
a place is the *column* of that place: ``block[place::length]`` takes one byte out of each of a thousand joined
messages in a single step of the interpreter, ``out[place::length] = column`` writes one into a thousand rows.

Nothing is guessed.  A :class:`Layout` is learned from a message that was walked attribute by attribute, and it knows
the header (length and type) of each attribute that the walk went through.  A message of the same length and type whose
headers are all the same at the same places has the same attributes with values of the same sizes, so the general way
(:func:`ctnetlink.decode_flow`) would find the same; every other message goes the general way.  They are compared as
whole numbers: ``block & mask == want``, where the mask has the headers' bits.  The length alone tells nothing: 216
bytes are "TCP with a mark" and "TCP in a zone of the original direction".

What layouts there are comes from net/netfilter/nf_conntrack_netlink.c.  ``ctnetlink_conntrack_event`` writes
TUPLE_ORIG, TUPLE_REPLY, [ZONE], ID, STATUS; then in an event of an entry's end [COUNTERS_ORIG, COUNTERS_REPLY,
TIMESTAMP] (accounting, timestamps), [TIMEOUT] (if deleted; a timer's end has none) and [PROTOINFO], a TCP state alone;
in other events TIMEOUT, [PROTOINFO] (not of UDP and ICMP), [HELP, SECCTX, LABELS, TUPLE_MASTER, SEQ_ADJ_ORIG,
SEQ_ADJ_REPLY, SYNPROXY]; then [MARK] (if changed or not 0) and [TIMESTAMP_EVENT].  ``ctnetlink_fill_info``, for dumps:
TUPLE_ORIG, TUPLE_REPLY, [ZONE], STATUS, MARK, ID, USE, [TUPLE_MASTER], TIMEOUT, [COUNTERS_ORIG, COUNTERS_REPLY,
TIMESTAMP], [PROTOINFO, HELP, SECCTX, LABELS, SEQ_ADJ...].  A tuple is IP {SRC, DST}, PROTO {NUM, and two ports, or id,
type and code}, [ZONE].  With IPv4 and ports, in bytes from the start of the message (struct nlmsghdr: 16, struct
nfgenmsg: 4)::

    20 TUPLE_ORIG   24 IP  28 header of SRC, 32 SRC  36, 40 DST  44 PROTO  48, 52 NUM  56, 60 SRC_PORT  64, 68 DST_PORT
    72 TUPLE_REPLY  76 IP  80, 84 SRC  88, 92 DST  96 PROTO  100, 104 NUM  108, 112 SRC_PORT  116, 120 DST_PORT

With IPv6 NUM is at 76.  Those two places are all that is fixed in this module, and only to sort messages before they
are compared with what was learned.
"""

from __future__ import annotations

import array
import functools
import itertools
import operator
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Callable, NamedTuple, Union

from . import ctnetlink
from .constants import (
    AF_INET,
    AF_INET6,
    ICMP_PROTOCOLS,
    IPS_ASSURED,
    IPS_CONFIRMED,
    IPS_DST_NAT,
    IPS_SEEN_REPLY,
    IPS_SRC_NAT,
    TCP_FLAG_BE_LIBERAL,
)
from .errors import NetlinkError
from .flow import BOTH_DIRECTIONS, Flow, merge
from .rows import (
    FLAGS_FROM_END,
    MARK_FROM_END,
    NO_SCALE,
    SCALE_FROM_END,
    SHAPES,
    STATE_FROM_END,
    STATUS_FROM_END,
    TIMEOUT_FROM_END,
    Changes,
    Shape,
    interleave,
    is_partial,
    join,
    pack_value,
    unpack,
)

# <linux/netlink.h>: the type of a message of a subsystem has the subsystem in its high byte
_CT_NEW = ctnetlink.NFNL_SUBSYS_CTNETLINK << 8 | ctnetlink.IPCTNL_MSG_CT_NEW
_CT_DELETE = ctnetlink.NFNL_SUBSYS_CTNETLINK << 8 | ctnetlink.IPCTNL_MSG_CT_DELETE


class Gathering:
    """:class:`Changes` that are being put together, change by change in the order in which they happened.

    ``parts``: what came first, as columns, with the length of the keys; before anything else comes :meth:`settle`.
    """

    def __init__(self) -> None:
        self.rows: dict[int, dict[bytes, bytes]] = {}
        self.flows: dict[bytes, Flow] = {}
        self.gone: dict[bytes, None] = {}
        self.parts: list[tuple[int, list[bytes | bytearray]]] = []

    def settle(self) -> None:
        """What is in columns becomes rows: what follows may be about the same flows."""
        if self.parts:
            for sheet in join(self.parts):
                self.rows.setdefault(sheet.key_len, {}).update(sheet.rows())
            self.parts = []

    def row(self, key: bytes, value: bytes) -> None:
        """The flow is now as this row says."""
        known = self.flows.get(key)
        if known is None:
            self.rows.setdefault(len(key), {})[key] = value
        else:
            self.flows[key] = _newer(known, unpack(key, value))

    def flow(self, flow: Flow) -> None:
        """The flow is now as an event says that may have extras or leave something out."""
        key = flow.key
        if flow.mark is None:  # an event names every mark but 0 (ctnetlink_conntrack_event)
            flow = flow._replace(mark=0)
        if not needs_flow(flow):
            self.row(key, pack_value(flow))
            return
        known = self.flows.get(key)
        if known is None and (value := self.rows.get(len(key), _NONE).pop(key, None)) is not None:
            known = unpack(key, value)
        self.flows[key] = flow if known is None else _newer(known, flow)

    def end(self, key: bytes) -> None:
        """The flow ended."""
        self.rows.get(len(key), _NONE).pop(key, None)
        self.flows.pop(key, None)
        self.gone[key] = None

    def changes(self, events: int, lost: bool = False, more: bool = False) -> Changes:
        """What was put together."""
        rows = {key_len: known for key_len, known in self.rows.items() if known}
        sheets = join(self.parts) if self.parts else ()
        return Changes(rows, list(self.flows.values()), list(self.gone), events, lost, more, sheets)


_NONE: dict[bytes, bytes] = {}  # stays empty


def needs_flow(flow: Flow) -> bool:
    """Is a row not enough for this flow?  It has extras, or leaves out what a row must say."""
    return (
        flow.labels is not None
        or flow.helper is not None
        or flow.master is not None
        or flow.seqadj is not None
        or flow.sctp_vtags is not None
        or is_partial(flow)
    )


def _newer(known: Flow, flow: Flow) -> Flow:
    """Another reply tuple is another flow."""
    return merge(known, flow) if known.reply == flow.reply else flow


# --- layouts ---

_FAMILY_AT = ctnetlink.HEADER_LEN  # struct nfgenmsg begins with it
_ATTRIBUTES_AT = ctnetlink.HEADER_LEN + 4
_SEQ_AT = 8

# What messages are sorted by: length, type, [flags,] family, the bytes at 52 and 76
_EVENT_HEAD = "=IH10xB35xB23xB"
_DUMP_HEAD = struct.Struct("=IHH8xB35xB23xB")
HEAD_BYTES = _DUMP_HEAD.size
"""Bytes that a buffer must have behind the start of a message, however short that is."""

_ATTR = struct.Struct("=HH")  # struct nlattr: length, type

_COLUMNS_FROM = 6  # fewer messages are cheaper one by one
_COMPARED = 32  # messages at once, as one number ...
_COMPARED_BY_COLUMNS = 64  # ... unless they are so many: to make numbers of all bytes costs more than the columns
_WORD = 4  # bytes of struct nlattr, that stands at a multiple of them
_LAYOUTS_PER_HEAD = 4
_HEADS = 128

# Attributes whose values decide more than a column can tell
_GENERAL_ONLY = frozenset(
    (
        *(ctnetlink.CTA_HELP, ctnetlink.CTA_LABELS, ctnetlink.CTA_TUPLE_MASTER),
        *(ctnetlink.CTA_SEQ_ADJ_ORIG, ctnetlink.CTA_SEQ_ADJ_REPLY),
    )
)

_IP_KINDS = {
    AF_INET: (ctnetlink.CTA_IP_V4_SRC, ctnetlink.CTA_IP_V4_DST),
    AF_INET6: (ctnetlink.CTA_IP_V6_SRC, ctnetlink.CTA_IP_V6_DST),
}

# TCP window scales (at most 14) and flags travel as nibbles: every byte as high and as low one, for translate()
_SCALE_HIGH = bytes(min(byte, 14) << 4 for byte in range(256))
_SCALE_LOW = bytes(min(byte, 14) for byte in range(256))
_FLAGS_HIGH = bytes((byte & 15) << 4 for byte in range(256))
_FLAGS_LOW = bytes(byte & 15 for byte in range(256))

_Places = dict[int, tuple[int, int]]  # kind of an attribute: place and end of its value
_Part = tuple[int, int]  # place, size; place 0: not there


class _UnlearnableError(Exception):
    """A message that only the general way may read."""


class _Walk:
    """The attributes of one message by place; ``headers`` are the places of struct nlattr that were passed."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self.headers: list[int] = []
        self.top = self._attributes(_ATTRIBUTES_AT, len(message))

    def _attributes(self, at: int, end: int) -> _Places:
        found: _Places = {}
        while at < end:
            if end - at < _ATTR.size:
                raise _UnlearnableError
            length, kind = _ATTR.unpack_from(self._message, at)
            kind &= ctnetlink.NLA_TYPE_MASK
            if kind in found or not _ATTR.size <= length <= end - at:
                raise _UnlearnableError
            self.headers.append(at)
            found[kind] = (at + _ATTR.size, at + length)
            at += (length + 3) & ~3
        return found

    def inside(self, found: _Places, kind: int) -> _Places:
        """The attributes inside one of ``found``, none if that is missing."""
        return self._attributes(*found[kind]) if kind in found else {}

    def tuple_parts(self, kind: int, family: int, proto: int, size: int, l4: int) -> tuple[list[_Part], int, int]:
        """Of a tuple: places of source, destination and l4; place of the protocol; place of the zone or 0."""
        parts = self.inside(self.top, kind)
        addresses = self.inside(parts, ctnetlink.CTA_TUPLE_IP)
        keys = self.inside(parts, ctnetlink.CTA_TUPLE_PROTO)
        places = [(addresses[one][0], size) for one in _IP_KINDS[family]]
        if l4:
            places += [(keys[one][0], bytes_) for one, bytes_ in ctnetlink.l4_layout(proto)]
        return places, keys[ctnetlink.CTA_PROTO_NUM][0], _place(parts, ctnetlink.CTA_TUPLE_ZONE)


def _place(found: _Places, kind: int) -> int:
    return found[kind][0] if kind in found else 0


class Layout:
    """Messages that have exactly these attributes: what is compared, and where the parts of a row are.

    ``key_len`` is that of their rows, 0 if such messages go the general way.  ``ended``: they tell the end of flows.
    ``length``: bytes of each.
    """

    def __init__(self, message: bytes) -> None:
        """Learn from one message.  Raises NetlinkError if it is malformed, _UnlearnableError if it is unusual."""
        flow = ctnetlink.decode_flow(message[ctnetlink.HEADER_LEN :])
        self.length = len(message)
        if self.length & 3:
            raise _UnlearnableError
        self.ended = int.from_bytes(message[4:6], sys.byteorder) == _CT_DELETE
        walk = _Walk(message)
        sizes = (flow.family, flow.proto, len(flow.orig.src), len(flow.orig.l4))
        key, proto_at, zone_at = walk.tuple_parts(ctnetlink.CTA_TUPLE_ORIG, *sizes)
        reply, reply_proto_at, reply_zone_at = walk.tuple_parts(ctnetlink.CTA_TUPLE_REPLY, *sizes)
        zones = [(place, 2) for place in (_place(walk.top, ctnetlink.CTA_ZONE), zone_at, reply_zone_at) if place]
        if len(zones) > 1 or (zones and not flow.zone):
            raise _UnlearnableError
        self._zone_at = zones[0][0] if zones else 0
        state, scales, flags = _protoinfo(walk)
        walk.inside(walk.top, ctnetlink.CTA_TIMESTAMP)
        general = not _GENERAL_ONLY.isdisjoint(walk.top) or (not self.ended and needs_flow(flow))
        self.key_len = 0 if general else len(flow.key)
        suffix = b"" if flow.zone_dir == BOTH_DIRECTIONS else bytes((flow.zone_dir,))
        value: list[_Part] = []
        if not self.ended:
            status = _place(walk.top, ctnetlink.CTA_STATUS)
            if not status:
                raise _UnlearnableError
            timeout = _place(walk.top, ctnetlink.CTA_TIMEOUT)
            mark = _place(walk.top, ctnetlink.CTA_MARK)
            value = [*reply, (status + 2, 2), (timeout, 4), (state, 1), (0, 2), (mark, 4)]
        fixed = [(place, _ATTR.size) for place in walk.headers]
        fixed += [(0, 6), (_FAMILY_AT, 1), (proto_at, 1), (reply_proto_at, 1)]  # 6: nlmsg_len, nlmsg_type
        self._prepare_comparison(message, fixed)
        self._prepare_rows([(proto_at, 1), *key, *zones], suffix, value)
        self._prepare_row([(proto_at, 1), *key, *zones], suffix, value)
        self._scales, self._flags = scales, flags

    # comparing

    def _prepare_comparison(self, message: bytes, fixed: list[_Part]) -> None:
        mask = bytearray(self.length)
        for place, size in fixed:
            mask[place : place + size] = b"\xff" * size
        self._mask = int.from_bytes(mask * _COMPARED, "little")
        self._want = int.from_bytes(message * _COMPARED, "little") & self._mask
        words = [place for place in range(0, self.length, _WORD) if mask[place : place + _WORD] == b"\xff" * _WORD]
        self._fixed_words = [place // _WORD for place in words]
        self._fixed_bytes = [
            place for place in range(self.length) if mask[place] and place // _WORD * _WORD not in words
        ]
        self._mask_one = int.from_bytes(mask, "little")
        self._want_one = int.from_bytes(message, "little") & self._mask_one

    def fits(self, data: bytes | bytearray, count: int, stride: int = 0) -> bool:
        """Do all ``count`` messages, joined or one every ``stride`` bytes, have this layout?  Few must be joined."""
        if count >= _COMPARED_BY_COLUMNS:
            return self.fits_one(data[: self.length]) and self._repeats(data, count, stride or self.length)
        step = self.length * _COMPARED
        for at in range(0, len(data) - step + 1, step):
            if int.from_bytes(data[at : at + step], "little") & self._mask != self._want:
                return False
        rest = count % _COMPARED
        if not rest:
            return True
        beyond = 8 * self.length * (_COMPARED - rest)
        number = int.from_bytes(data[-self.length * rest :], "little")
        return number & (self._mask >> beyond) == self._want >> beyond

    def _repeats(self, data: bytes | bytearray, count: int, stride: int) -> bool:
        """Have all of these messages the same at the places that are compared?

        Each is compared with the one before it: nothing is copied, and nothing kept to compare with.
        """
        end = count * stride
        with memoryview(data) as view, view.cast("I") as words:
            step, last = stride // _WORD, end // _WORD
            for at in self._fixed_words:
                if words[at : last - step : step] != words[at + step : last : step]:
                    return False
            for at in self._fixed_bytes:
                if view[at : end - stride : stride] != view[at + stride : end : stride]:
                    return False
        return True

    # many messages

    def _prepare_rows(self, key: list[_Part], suffix: bytes, value: list[_Part]) -> None:
        """Which byte of a row comes from which of a message."""
        self._places: list[int] = []  # 0: the byte of _row
        row = bytearray()
        for place, size in key:
            self._places += range(place, place + size)
            row += bytes(size)
        row += suffix
        self._places += [0] * len(suffix)
        for place, size in value:
            self._places += range(place, place + size) if place else [0] * size
            row += bytes(size)
        if value:
            row[-SCALE_FROM_END] = NO_SCALE
        self._row = bytes(row)
        self._pairs = struct.Struct(f"{self.key_len}s{len(row) - self.key_len}s")

    def columns(self, block: bytes | bytearray, count: int, stride: int = 0) -> list[bytes | bytearray] | None:
        """The columns of the rows of ``count`` messages that have this layout, joined or every ``stride`` bytes.

        Those of keys alone if they ended.  None if one has a value that a column cannot carry.
        """
        length = stride or self.length
        end = count * length
        found: list[bytes | bytearray] = [
            block[place:end:length] if place else bytes((byte,)) * count for place, byte in zip(self._places, self._row)
        ]
        if not self.ended:
            if found[-TIMEOUT_FROM_END].count(0xFF):
                return None  # perhaps rows.NO_TIMEOUT
            if self._flags:
                original, reply = self._flags
                found[-FLAGS_FROM_END] = _joined(
                    block[original:end:length].translate(_FLAGS_HIGH), block[reply:end:length].translate(_FLAGS_LOW)
                )
                scales = bytes(count)
                if self._scales:
                    original, reply = self._scales
                    scales = _joined(
                        block[original:end:length].translate(_SCALE_HIGH), block[reply:end:length].translate(_SCALE_LOW)
                    )
                found[-SCALE_FROM_END] = scales
        if self._zone_at and _joined(
            block[self._zone_at : end : length], block[self._zone_at + 1 : end : length]
        ).count(0):
            return None  # zone 0 has no bytes in a key
        return found

    def pairs(self, columns: Sequence[bytes | bytearray]) -> Iterator[tuple[bytes, bytes]]:
        """Key and value (b"" if ended) of the rows that have these columns."""
        return self._pairs.iter_unpack(interleave(columns))

    def table(self, messages: list[bytearray]) -> dict[bytes, bytes] | None:
        """Key and last value of messages as long as this layout's; None if one has another layout, or such a value."""
        if len(messages) >= _COLUMNS_FROM:
            return self.table_of(b"".join(messages), len(messages), self.length)
        found = {}
        for message in messages:
            pair = self.pair(message) if self.fits_one(message) else None
            if pair is None:
                return None
            found[pair[0]] = pair[1]
        return found

    def table_of(self, data: bytes | bytearray, count: int, stride: int) -> dict[bytes, bytes] | None:
        """The same of many, one every ``stride`` bytes."""
        if count < _COMPARED_BY_COLUMNS and stride != self.length:
            data, stride = _tight(data, count, stride, self.length), self.length
        columns = self.columns(data, count, stride) if self.fits(data, count, stride) else None
        return None if columns is None else dict(self.pairs(columns))

    # one message

    def _prepare_row(self, key: list[_Part], suffix: bytes, value: list[_Part]) -> None:
        """A struct that takes the parts out of a message, and the places of a row's parts among them.

        Behind the parts come those that a message lacks.
        """
        places = dict(part for part in (*key, *value) if part[0])
        text, at = "=", 0
        for place in sorted(places):
            text += f"{place - at}x{places[place]}s"
            at = place + places[place]
        self._parts = struct.Struct(text)
        number = {place: index for index, place in enumerate(sorted(places))}
        self._key = operator.itemgetter(*(number[place] for place, _size in key))
        self._suffix = suffix
        absent = len(number)
        indexes = (number[place] if place else absent + size for place, size in value)
        self._value = operator.itemgetter(*indexes) if value else None

    def fits_one(self, message: bytes | bytearray) -> bool:
        return int.from_bytes(message, "little") & self._mask_one == self._want_one

    def pair(self, message: bytes | bytearray) -> tuple[bytes, bytes] | None:
        """The same as :meth:`pairs` of one message that has this layout."""
        parts = self._parts.unpack_from(message)
        key = b"".join(self._key(parts)) + self._suffix
        if self._zone_at and not message[self._zone_at] and not message[self._zone_at + 1]:
            return None
        if self._value is None:
            return key, b""
        nibbles = _UNKNOWN
        if self._flags:
            original, reply = self._flags
            flags = _FLAGS_HIGH[message[original]] | _FLAGS_LOW[message[reply]]
            scales = 0
            if self._scales:
                original, reply = self._scales
                scales = _SCALE_HIGH[message[original]] | _SCALE_LOW[message[reply]]
            nibbles = bytes((scales, flags))
        value = b"".join(self._value((*parts, b"", b"\0", nibbles, b"", b"\0\0\0\0")))
        return None if value[-TIMEOUT_FROM_END] == 0xFF else (key, value)


_UNKNOWN = bytes((NO_SCALE, 0))


def _joined(one: bytes | bytearray, other: bytes | bytearray) -> bytes:
    """Two columns, each byte the bits of both."""
    return (int.from_bytes(one, "little") | int.from_bytes(other, "little")).to_bytes(len(one), "little")


def _protoinfo(walk: _Walk) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Places of the TCP state, of both window scales, of both flags."""
    info = walk.inside(walk.top, ctnetlink.CTA_PROTOINFO)
    if not info:
        return 0, (), ()
    if set(info) != {ctnetlink.CTA_PROTOINFO_TCP}:
        raise _UnlearnableError  # SCTP has tags, which are extras; DCCP is rare
    tcp = walk.inside(info, ctnetlink.CTA_PROTOINFO_TCP)
    scales = (ctnetlink.CTA_PROTOINFO_TCP_WSCALE_ORIGINAL, ctnetlink.CTA_PROTOINFO_TCP_WSCALE_REPLY)
    flags = (ctnetlink.CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, ctnetlink.CTA_PROTOINFO_TCP_FLAGS_REPLY)
    return (
        _place(tcp, ctnetlink.CTA_PROTOINFO_TCP_STATE),
        tuple(tcp[kind][0] for kind in scales) if tcp.keys() >= set(scales) else (),
        tuple(tcp[kind][0] for kind in flags) if tcp.keys() >= set(flags) else (),
    )


# --- reading ---


class Reader:
    """Events and dumped entries to rows and flows: by columns where the layout is known, else the general way.

    ``fast`` and ``general`` count the messages that went each way, ``malformed`` those that could not be decoded.
    ``columns`` False: everything goes the general way.
    """

    def __init__(self, columns: bool = True) -> None:
        self.fast = 0
        self.general = 0
        self.malformed = 0
        self._columns = columns
        self._latest: Layout | None = None  # of messages that were all alike
        self._layouts: dict[tuple[int, ...], list[Layout]] = {}
        self._usual: dict[int, Layout] = {}  # of the latest messages of a length

    def events(self, data: bytearray, stride: int, lengths: list[int], into: Gathering) -> tuple[int, bool]:
        """Datagrams of events, one every ``stride`` bytes, each as long as ``lengths`` says.

        Returns how many events were in them, and whether they say that others were lost.  One that fills its place and
        says that it is longer was cut off: lost.
        """
        count = len(lengths)
        if not count:
            return 0, False
        latest = self._latest
        enough = count >= _COLUMNS_FROM or into.parts
        if latest is not None and enough and lengths.count(latest.length) == count:
            if count >= _COMPARED_BY_COLUMNS:
                alike = self._alike(latest, data, count, stride, into)
            else:
                block = _tight(data, count, stride, latest.length)
                alike = self._alike(latest, block, count, latest.length, into)
            if alike:
                return count, False
        into.settle()
        known = self._few if count < _COLUMNS_FROM else self._usual_ones
        if known(data, stride, lengths, into):
            return count, False
        longest = max(lengths)
        with memoryview(data)[: count * stride] as view:
            heads = list(_slots(f"{_EVENT_HEAD}{stride - HEAD_BYTES}x").iter_unpack(view))
            whole = _slots(f"{longest}s{stride - longest}x").iter_unpack(view)
            raw = [message for (message,) in whole]
        odd: dict[int, bytes] = {}
        lost = False
        if [head[0] for head in heads] != lengths:
            for slot, length in enumerate(lengths):
                if heads[slot][0] != length:
                    odd[slot] = raw[slot][:length]
                    lost |= length == stride < heads[slot][0]
        events, others = self._read(raw, heads, odd, into)
        return events, lost or others

    def _few(self, data: bytearray, stride: int, lengths: list[int], into: Gathering) -> bool:
        """Take few events one by one, if each has the layout that those of its length had; else False, with nothing
        done.  So it is on a quiet node."""
        pairs = []
        for slot, length in enumerate(lengths):
            layout = self._usual.get(length)
            message = data[slot * stride : slot * stride + length]
            pair = layout.pair(message) if layout is not None and layout.fits_one(message) else None
            if pair is None:
                return False
            pairs.append(pair)
        for key, value in pairs:
            if value:
                into.row(key, value)
            else:
                into.end(key)
        self.fast += len(pairs)
        return True

    def _alike(self, layout: Layout, data: bytes | bytearray, count: int, stride: int, into: Gathering) -> bool:
        """Take events that all have the layout of those before; False, with nothing done, if they have not."""
        if into.flows or not layout.fits(data, count, stride):
            return False
        columns = layout.columns(data, count, stride)
        if columns is None:
            return False
        if layout.ended:
            into.settle()
            self._put({}, dict(layout.pairs(columns)), set(), into)
        elif into.parts or (count >= _COMPARED_BY_COLUMNS and not (into.rows or into.gone)):
            into.parts.append((layout.key_len, columns))
        else:
            into.rows.setdefault(layout.key_len, {}).update(layout.pairs(columns))
        self.fast += count
        return True

    def _usual_ones(self, data: bytearray, stride: int, lengths: list[int], into: Gathering) -> bool:
        """Take events of several lengths, if all of a length have the layout that those before had, and no flow has
        events of two lengths, whose order would matter; else False, with nothing done.

        So it is with most of real traffic: states of connections that begin and close, and among them some that end.
        Where one of those of a less common length stands, its neighbour is doubled: then all are of one layout, and the
        columns need not be sorted out.
        """
        count, kinds, usual = len(lengths), set(lengths), self._usual
        if into.flows or not kinds <= usual.keys():
            return False
        most = max(kinds, key=lengths.count)
        others = list(itertools.compress(range(0, count * stride, stride), map(most.__ne__, lengths)))
        messages = [data[at : at + lengths[at // stride]] for at in others]
        gone: dict[bytes, bytes] = {}
        last: dict[bytes, bytes] = {}
        keys = 0
        for length in kinds - {most}:
            table = usual[length].table([message for message in messages if len(message) == length])
            if table is None:
                del usual[length]
                return False
            last.update(table)
            keys += len(table)
            if usual[length].ended:
                gone.update(table)
        neighbour = lengths.index(most) * stride
        for at in others:
            if at > neighbour:
                neighbour = at - stride
            data[at : at + most] = data[neighbour : neighbour + most]
        table = usual[most].table_of(data, count, stride)
        if table is None or len(last) != keys or not table.keys().isdisjoint(last):
            for at, message in zip(others, messages):
                data[at : at + len(message)] = message
            return False
        if usual[most].ended:
            gone.update(table)
        table.update(last)
        self._put(table, gone, {usual[length].key_len for length in kinds}, into)
        self._latest = None if others else usual[most]
        self.fast += count
        return True

    def dump(self, data: bytearray, length: int, into: Gathering) -> tuple[int, bool, list[ctnetlink.Message]]:
        """A datagram of a dump: how many entries were in it, whether the dump was interrupted, the other messages.

        ``data`` has HEAD_BYTES more than the ``length`` bytes.  Raises NetlinkError if the datagram is malformed;
        malformed entries are counted.
        """
        raw: list[bytes] = []
        heads: list[tuple[int, ...]] = []
        others: list[ctnetlink.Message] = []
        flags = at = 0
        with memoryview(data) as view:
            while at < length:
                head = _DUMP_HEAD.unpack_from(data, at)
                size, kind = head[0], head[1]
                if not ctnetlink.HEADER_LEN <= size <= length - at:
                    raise NetlinkError(f"netlink message of {size} bytes in {length - at}")
                flags |= head[2]
                message = bytes(view[at : at + size])
                if kind == _CT_NEW:
                    raw.append(message)
                    heads.append(head)
                else:
                    others += self._other(message)
                at += (size + 3) & ~3
        entries, _lost = self._read(raw, heads, {}, into)
        return entries, bool(flags & ctnetlink.NLM_F_DUMP_INTR), others

    def _other(self, message: bytes) -> list[ctnetlink.Message]:
        try:
            return [found for found in ctnetlink.parse_messages(message) if found.flow is None]
        except NetlinkError:
            self.malformed += 1
            return []

    def _read(
        self, raw: list[bytes], heads: list[tuple[int, ...]], odd: dict[int, bytes], into: Gathering
    ) -> tuple[int, bool]:
        """Messages (with something behind the shorter ones) and by what to sort them; those in ``odd`` are not sound.

        Returns how many events or entries they were, and whether they say that events were lost.
        """
        count = len(raw)
        groups: dict[tuple[int, ...], Sequence[int]] = {}
        if heads and heads.count(heads[0]) == count and not odd:
            groups[heads[0]] = range(count)
        else:
            lists: dict[tuple[int, ...], list[int]] = {}
            for slot, head in enumerate(heads):
                if slot in odd:
                    continue
                if head in lists:
                    lists[head].append(slot)
                else:
                    lists[head] = [slot]
            groups.update(lists)
        read: list[tuple[Sequence[int], list[tuple[bytes, bytes]]]] = []
        keys = total = 0
        key_lens: set[int] = set()
        last: dict[bytes, bytes] = {}
        gone: dict[bytes, bytes] = {}
        for head, members in groups.items():
            for layout, slots, pairs in self._sorted(head, members, raw):
                self._usual[layout.length] = layout
                key_lens.add(layout.key_len)
                total += len(slots)
                pairs_ = list(pairs)
                table = dict(pairs_)
                keys += len(table)
                last.update(table)
                if layout.ended:
                    gone.update(table)
                read.append((slots, pairs_))
        if total == count and not into.flows:
            self.fast += count
            self._latest = layout if len(read) == 1 else None
            if len(last) != keys:  # a flow with changes of several kinds: what was last is in the order of the messages
                last = dict(_in_order(read, count))
            self._put(last, gone, key_lens, into)
            return count, False
        found: list[tuple[bytes, bytes] | None] = [None] * count
        for slots, pairs_ in read:
            for slot, pair in zip(slots, pairs_):
                found[slot] = pair
        return self._one_by_one(raw, heads, odd, found, into)

    @staticmethod
    def _put(last: dict[bytes, bytes], gone: Iterable[bytes], key_lens: set[int], into: Gathering) -> None:
        """The last value of each key, empty if that is its end; all keys that ended."""
        ended = dict.fromkeys(gone)
        if ended:
            into.gone.update(ended)
            for table in into.rows.values():
                for key in ended.keys() & table.keys():
                    del table[key]
            last = {key: value for key, value in last.items() if value}
        if len(key_lens) == 1:
            into.rows.setdefault(key_lens.pop(), {}).update(last)
            return
        for key, value in last.items():
            into.rows.setdefault(len(key), {})[key] = value

    def _one_by_one(
        self,
        raw: list[bytes],
        heads: list[tuple[int, ...]],
        odd: dict[int, bytes],
        found: list[tuple[bytes, bytes] | None],
        into: Gathering,
    ) -> tuple[int, bool]:
        """The same in the order of the messages, for flows that are more than a row."""
        events, lost = 0, False
        for slot, pair in enumerate(found):
            if pair is None:
                message = odd.get(slot)
                count, others = self._general(raw[slot][: heads[slot][0]] if message is None else message, into)
                events += count
                lost |= others
                continue
            events += 1
            self.fast += 1
            if pair[1]:
                into.row(*pair)
            else:
                into.end(pair[0])
        return events, lost

    def _general(self, data: bytes, into: Gathering) -> tuple[int, bool]:
        """A datagram the general way: how many events or entries, and whether it says that others were lost."""
        events, lost = 0, False
        try:
            for message in ctnetlink.parse_messages(data):
                if message.flow is None:
                    lost |= message.kind == ctnetlink.Kind.OVERRUN
                    continue
                events += 1
                if message.kind == ctnetlink.Kind.DESTROY:
                    into.end(message.flow.key)
                else:
                    into.flow(message.flow)
        except NetlinkError:
            self.malformed += 1
        self.general += events
        return events, lost

    def _sorted(
        self, head: tuple[int, ...], members: Sequence[int], raw: list[bytes]
    ) -> Iterator[tuple[Layout, Sequence[int], Iterable[tuple[bytes, bytes]]]]:
        """What of a group of messages a layout can read: the layout, which messages, key and value of each."""
        length, kind, family = head[0], head[1], head[-3]
        if not self._columns or not members or kind not in (_CT_NEW, _CT_DELETE) or family not in _IP_KINDS:
            return
        if length < HEAD_BYTES:
            return
        sign = (length, kind, family, head[-2] if family == AF_INET else head[-1])
        known = self._layouts.get(sign)
        if known is None:
            if len(self._layouts) >= _HEADS:
                self._layouts.clear()
            known = self._layouts[sign] = []
        if len(members) >= _COLUMNS_FROM:
            messages = [raw[slot] for slot in members] if len(members) != len(raw) else raw
            if len(messages[0]) != length:
                messages = [message[:length] for message in messages]
            block = b"".join(messages)
            layout = next((one for one in known if one.fits(block, len(members))), None)
            if layout is None and not known:
                layout = self._learn(known, messages[0])
                if layout is not None and not layout.fits(block, len(members)):
                    layout = None
            if layout is not None:
                columns = layout.columns(block, len(members)) if layout.key_len else None
                if columns is not None:
                    yield layout, members, layout.pairs(columns)
                    return
        for slot in members:
            message = raw[slot][:length]
            layout = next((one for one in known if one.fits_one(message)), None) or self._learn(known, message)
            pair = layout.pair(message) if layout is not None and layout.key_len else None
            if layout is not None and pair is not None:
                yield layout, [slot], (pair,)

    @staticmethod
    def _learn(known: list[Layout], message: bytes) -> Layout | None:
        """Its layout, None if only the general way can read it."""
        if len(known) >= _LAYOUTS_PER_HEAD:
            return None
        try:
            layout = Layout(message)
        except (NetlinkError, _UnlearnableError):
            return None
        known.append(layout)
        return layout


def _tight(data: bytes | bytearray, count: int, stride: int, length: int) -> bytes:
    """The first ``length`` bytes out of each ``stride``, joined."""
    with memoryview(data)[: count * stride] as view:
        return b"".join(itertools.chain.from_iterable(_slots(f"{length}s{stride - length}x").iter_unpack(view)))


def _in_order(read: list[tuple[Sequence[int], list[tuple[bytes, bytes]]]], count: int) -> list[tuple[bytes, bytes]]:
    """All of the ``count`` pairs, each at the place that it has."""
    found = [(b"", b"")] * count
    for slots, pairs in read:
        for slot, pair in zip(slots, pairs):
            found[slot] = pair
    return found


_slots = functools.lru_cache(maxsize=64)(struct.Struct)


# --- writing ---


class Batch(NamedTuple):
    """Requests for the kernel.  ``pieces``: joined messages and the length of each of them.

    The nlmsg_seq of the first request of the first piece is the number that was asked for, and so on; ``order`` tells
    which row the request of each number is for.
    """

    pieces: list[tuple[Union[bytes, bytearray], int]]
    order: list[int]


BATCH_ROWS = 1024
"""Rows to one :class:`Batch` at most; some 250 bytes each."""

_BITS_WRITTEN = bytes(byte & (IPS_SEEN_REPLY | IPS_ASSURED) | IPS_CONFIRMED for byte in range(256))
_SCALE_HIGH_READ = bytes(byte >> 4 for byte in range(256))
_SCALE_LOW_READ = bytes(byte & 15 for byte in range(256))
_FLAGS_HIGH_READ = bytes(byte >> 4 | TCP_FLAG_BE_LIBERAL for byte in range(256))
_FLAGS_LOW_READ = bytes(byte & 15 | TCP_FLAG_BE_LIBERAL for byte in range(256))

# Rows that differ in one of these bits have different attributes in their requests
_NAT_BITS = bytes((byte & (IPS_SRC_NAT | IPS_DST_NAT)) >> 4 for byte in range(256))
_NO_STATE_BITS = bytes(0 if byte else 4 for byte in range(256))
_ASSURED_BITS = bytes(8 if byte & IPS_ASSURED else 0 for byte in range(256))
_NO_SCALE_BITS = bytes(16 if byte == NO_SCALE else 0 for byte in range(256))
_SCALED_BITS = bytes(32 if byte & 0x11 == 0x11 else 0 for byte in range(256))

_ICMP_MIRROR = {proto: ctnetlink.icmp_mirror(proto) for proto in ICMP_PROTOCOLS}


def _sample_create(key: bytes, value: bytes) -> bytes:
    return ctnetlink.create(unpack(key, value), timeout=0)


def create(key_len: int, keys: Sequence[bytes], values: Sequence[bytes], timeouts: Sequence[int], first: int) -> Batch:
    """The requests that :func:`ctnetlink.create` makes of these rows, numbered from ``first``.

    ``timeouts`` in seconds.  Raises NetlinkError if a row cannot be expressed.
    """
    return _requests(_sample_create, _Rows(key_len, keys, values, timeouts), first)


def _sample_update(key: bytes, value: bytes) -> bytes:
    return ctnetlink.update(unpack(key, value), timeout=0)


def update(key_len: int, keys: Sequence[bytes], values: Sequence[bytes], timeouts: Sequence[int], first: int) -> Batch:
    """The requests that :func:`ctnetlink.update` makes of these rows; otherwise as :func:`create`."""
    return _requests(_sample_update, _Rows(key_len, keys, values, timeouts), first)


def _sample_timers(key: bytes, _value: bytes) -> bytes:
    return ctnetlink.update(ctnetlink.flow_of_key(key), timeout=0, status=False)


def timers(key_len: int, keys: Sequence[bytes], timeouts: Sequence[int], first: int) -> Batch:
    """Requests that change timeouts and nothing else; otherwise as :func:`create`."""
    return _requests(_sample_timers, _Rows(key_len, keys, None, timeouts), first)


def _sample_loosen(key: bytes, _value: bytes) -> bytes:
    return ctnetlink.loosen(ctnetlink.flow_of_key(key))


def loosen(key_len: int, keys: Sequence[bytes], first: int) -> Batch:
    """Requests that make TCP entries liberal and change nothing else; otherwise as :func:`create`."""
    return _requests(_sample_loosen, _Rows(key_len, keys), first)


def _sample_delete(key: bytes, _value: bytes) -> bytes:
    return ctnetlink.delete(ctnetlink.flow_of_key(key))


def delete(key_len: int, keys: Sequence[bytes], first: int) -> Batch:
    """Requests that delete the entries of these keys; otherwise as :func:`create`."""
    return _requests(_sample_delete, _Rows(key_len, keys), first)


class _Rows(NamedTuple):
    """What requests are to be made of."""

    key_len: int
    keys: Sequence[bytes]
    values: Sequence[bytes] | None = None
    timeouts: Sequence[int] | None = None


_Sign = tuple[int, ...]
_Sample = Callable[[bytes, bytes], bytes]


def _requests(sample: _Sample, rows: _Rows, first: int) -> Batch:
    """Rows of the same attributes share a template: the message that ``sample`` makes of one of them."""
    shape = SHAPES.get(rows.key_len)
    if shape is None:
        raise NetlinkError(f"flow key of {rows.key_len} bytes")
    if len(rows.keys) < _COLUMNS_FROM:
        return _few_requests(sample, shape, rows, first)
    batch = Batch([], [])
    for sign, group in _alike(shape, rows):
        keys, values, seconds = _joined_rows(rows, group)
        template = _template(sample, shape, sign, keys[: shape.key], values[: shape.value])
        batch.pieces.append((template.fill(keys, values, seconds, first + len(batch.order)), template.length))
        batch.order.extend(group)
    return batch


def _few_requests(sample: _Sample, shape: Shape, rows: _Rows, first: int) -> Batch:
    """The same one by one, which costs less where they are few."""
    batch = Batch([], [])
    count, size = len(rows.keys), 0 if rows.values is None else shape.value
    values = [b""] * count if rows.values is None else rows.values
    timeouts = [0] * count if rows.timeouts is None else rows.timeouts
    if len(values) != count:
        raise NetlinkError(f"{count} keys and {len(values)} values")
    for index, (key, value, timeout) in enumerate(zip(rows.keys, values, timeouts)):
        if len(key) != shape.key:
            raise NetlinkError(f"keys that do not all have {shape.key} bytes")
        if len(value) != size:
            raise NetlinkError(f"values that do not all have {size} bytes")
        template = _template(sample, shape, _sign(shape, key, value), key, value)
        batch.pieces.append((template.fill_one(key, value, timeout, first + index), template.length))
        batch.order.append(index)
    return batch


def _template(sample: _Sample, shape: Shape, sign: _Sign, key: bytes, value: bytes) -> _Template:
    known = (sample, shape.key, sign)
    template = _templates.get(known)
    if template is None:
        if len(_templates) >= _TEMPLATES:
            _templates.clear()
        template = _templates[known] = _Template(sample(key, value), shape, key, value)
    return template


_templates: dict[tuple[_Sample, int, _Sign], _Template] = {}
_TEMPLATES = 256
_MAX = 0xFFFFFFFF


def _joined_rows(rows: _Rows, group: Sequence[int]) -> tuple[bytes, bytes, bytes]:
    """Keys, values and timeouts (4 bytes each, network order) of a group."""
    keys, values, timeouts = rows.keys, rows.values, rows.timeouts
    if len(group) != len(keys):
        keys = [keys[index] for index in group]
        values = None if values is None else [values[index] for index in group]
        timeouts = None if timeouts is None else [timeouts[index] for index in group]
    key, value, seconds = b"".join(keys), b"".join(values or ()), array.array("I", timeouts or ())
    if sys.byteorder == "little":
        seconds.byteswap()
    return key, value, seconds.tobytes()


def _alike(shape: Shape, rows: _Rows) -> list[tuple[_Sign, Sequence[int]]]:
    """Groups of rows (their indexes) whose requests have the same attributes, and what these have in common."""
    count = len(rows.keys)
    keys = b"".join(rows.keys)
    if not count:
        return []
    if len(keys) != count * shape.key:
        raise NetlinkError(f"keys that do not all have {shape.key} bytes")
    signs = [keys[0 :: shape.key]]
    if shape.zone:
        at = shape.key - shape.zone
        signs.append(_joined(keys[at :: shape.key], keys[at + 1 :: shape.key]).translate(_NO_STATE_BITS))
    if shape.zone == 3:
        signs.append(keys[shape.key - 1 :: shape.key])  # the direction
    if rows.values is not None:
        values, size = b"".join(rows.values), shape.value
        if len(values) != count * size:
            raise NetlinkError(f"values that do not all have {size} bytes")
        status = values[size - STATUS_FROM_END + 1 :: size]
        sign = _joined(status.translate(_NAT_BITS), status.translate(_ASSURED_BITS))
        for from_end, bits in (
            (STATE_FROM_END, _NO_STATE_BITS),
            (SCALE_FROM_END, _NO_SCALE_BITS),
            (FLAGS_FROM_END, _SCALED_BITS),
        ):
            sign = _joined(sign, values[size - from_end :: size].translate(bits))
        signs.append(sign)
    if all(sign.count(sign[0]) == count for sign in signs):
        return [(tuple(sign[0] for sign in signs), range(count))]
    groups: dict[_Sign, list[int]] = {}
    for index, signature in enumerate(zip(*signs)):
        groups.setdefault(signature, []).append(index)
    return list(groups.items())


def _sign(shape: Shape, key: bytes, value: bytes) -> _Sign:
    """What the request of one row has in common with others."""
    signs = [key[0]]
    if shape.zone:
        at = shape.key - shape.zone
        signs.append(_NO_STATE_BITS[key[at] | key[at + 1]])
    if shape.zone == 3:
        signs.append(key[-1])
    if value:
        status, flags = value[1 - STATUS_FROM_END], value[-FLAGS_FROM_END]
        about = _NO_STATE_BITS[value[-STATE_FROM_END]] | _NO_SCALE_BITS[value[-SCALE_FROM_END]] | _SCALED_BITS[flags]
        signs.append(_NAT_BITS[status] | _ASSURED_BITS[status] | about)
    return tuple(signs)


class _Template:
    """A request that was made of one row, and where the bytes of other rows with the same attributes go."""

    def __init__(self, message: bytes, shape: Shape, key: bytes, value: bytes) -> None:
        self.length = len(message)
        self._message = message
        self._shape = shape
        self._walk = _Walk(message)
        self._key, self._value = key, value
        # place, which column (of keys, values, seconds, numbers) and what to translate it with
        self._moves: list[tuple[int, int, int, bytes | None]] = []
        self._prepare()
        self._prepare_one()

    def fill(self, keys: bytes, values: bytes, seconds: bytes, first: int) -> bytearray:
        """Requests for these joined rows, numbered from ``first``."""
        count = len(keys) // self._shape.key
        out = bytearray(self._message * count)
        numbers = array.array("I", [number & _MAX for number in range(first, first + count)]).tobytes()
        sources = (keys, values, seconds, numbers)
        sizes = (self._shape.key, self._shape.value, 4, 4)
        length = self.length
        for to, source, at, table in self._moves:
            column = sources[source][at :: sizes[source]]
            out[to::length] = column if table is None else column.translate(table)
        return out

    def fill_one(self, key: bytes, value: bytes, seconds: int, number: int) -> bytes:
        """The request for one row, with this number."""
        sources = (key, value, seconds.to_bytes(4, "big"), (number & _MAX).to_bytes(4, sys.byteorder))
        translated = [sources[source].translate(table) for source, table in self._tables]
        return b"".join(self._pieces(b"".join((self._message, *sources, *translated))))

    def _prepare_one(self) -> None:
        """Pieces of a request out of all that it may be made of: the sample, the row, the row translated."""
        sizes = (self._shape.key, len(self._value), 4, 4)
        starts = list(itertools.accumulate(sizes, initial=self.length))
        # each source with each table that is used for it
        self._tables = list(dict.fromkeys([(source, table) for _to, source, _at, table in self._moves if table]))
        starts += itertools.accumulate([sizes[source] for source, _table in self._tables], initial=starts.pop())
        origin = list(range(self.length))
        for to, source, at, table in self._moves:
            origin[to] = at + starts[source if table is None else len(sizes) + self._tables.index((source, table))]
        cuts = [place for place in range(1, self.length) if origin[place] != origin[place - 1] + 1]
        ends = [*cuts, self.length]
        begins = [0, *cuts]
        self._pieces = operator.itemgetter(
            *[slice(origin[begin], origin[begin] + end - begin) for begin, end in zip(begins, ends)]
        )

    def _move(self, to: int, source: int, at: int, width: int = 1, table: bytes | None = None) -> None:
        self._moves += [(to + one, source, at + one, table) for one in range(width)]

    def _prepare(self) -> None:
        top, value = self._walk.top, self._shape.value
        self._move(_SEQ_AT, _NUMBERS, 0, 4)
        self._prepare_tuples()
        if ctnetlink.CTA_STATUS in top and self._value:
            self._move(top[ctnetlink.CTA_STATUS][0] + 3, _VALUES, value - STATUS_FROM_END + 1, 1, _BITS_WRITTEN)
        if ctnetlink.CTA_TIMEOUT in top:
            self._move(top[ctnetlink.CTA_TIMEOUT][0], _SECONDS, 0, 4)
        if ctnetlink.CTA_MARK in top:
            self._move(top[ctnetlink.CTA_MARK][0], _VALUES, value - MARK_FROM_END, 4)
        if ctnetlink.CTA_PROTOINFO in top and self._value:
            self._prepare_protoinfo(self._walk.inside(top, ctnetlink.CTA_PROTOINFO))

    def _prepare_tuples(self) -> None:
        shape, top = self._shape, self._walk.top
        proto, address, ports = self._key[0], shape.address, 2 * shape.address
        icmp = proto in ICMP_PROTOCOLS
        sizes = (shape.family, proto, address, shape.l4)
        parts = (0, 2, 3) if icmp else (0, 2)  # of l4
        places, _proto, zone = self._walk.tuple_parts(ctnetlink.CTA_TUPLE_ORIG, *sizes)
        for (to, width), at in zip(places, (1, 1 + address, *(1 + ports + part for part in parts))):
            self._move(to, _KEYS, at, width)
        zones = [zone, _place(top, ctnetlink.CTA_ZONE)]
        nat = [kind for kind in (ctnetlink.CTA_NAT_SRC, ctnetlink.CTA_NAT_DST) if kind in top]
        if ctnetlink.CTA_TUPLE_REPLY in top:
            places, _proto, zone = self._walk.tuple_parts(ctnetlink.CTA_TUPLE_REPLY, *sizes)
            zones.append(zone)
            if nat:  # the mirrored original tuple, see ctnetlink.create
                turned = parts if icmp else (2, 0)
                for (to, width), at in zip(places, (1 + address, 1, *(1 + ports + part for part in turned))):
                    self._move(to, _KEYS, at, width, _ICMP_MIRROR[proto] if icmp and at == 1 + ports + 2 else None)
            else:
                for (to, width), at in zip(places, (0, address, *(ports + part for part in parts))):
                    self._move(to, _VALUES, at, width)
        for zone in zones:
            if zone:
                self._move(zone, _KEYS, shape.key - shape.zone, 2)
        for kind in nat:
            self._prepare_translation(kind, icmp)

    def _prepare_translation(self, kind: int, icmp: bool) -> None:
        """CTA_NAT_SRC: the target of the reply; CTA_NAT_DST: its source.  An ICMP flow's id belongs to its source."""
        address = self._shape.address
        source = kind == ctnetlink.CTA_NAT_SRC
        found = self._walk.inside(self._walk.top, kind)
        for one in _NAT_ADDRESSES[self._shape.family]:
            self._move(found[one][0], _VALUES, address if source else 0, address)
        for place, _end in self._walk.inside(found, ctnetlink.CTA_NAT_PROTO).values():
            if icmp and not source:
                self._move(place, _KEYS, 1 + 2 * address, 2)
            else:
                self._move(place, _VALUES, 2 * address + (2 if source and not icmp else 0), 2)

    def _prepare_protoinfo(self, info: _Places) -> None:
        size = self._shape.value
        state, scales, flags = size - STATE_FROM_END, size - SCALE_FROM_END, size - FLAGS_FROM_END
        known = self._value[state] != 0  # else the template has a state that suits all
        dccp = self._walk.inside(info, ctnetlink.CTA_PROTOINFO_DCCP)
        if dccp and known:
            self._move(dccp[ctnetlink.CTA_PROTOINFO_DCCP_STATE][0], _VALUES, state)
        tcp = self._walk.inside(info, ctnetlink.CTA_PROTOINFO_TCP)
        if tcp and known:
            self._move(tcp[ctnetlink.CTA_PROTOINFO_TCP_STATE][0], _VALUES, state)
        if not tcp or self._value[scales] == NO_SCALE:
            return
        for kind, at, table in (
            (ctnetlink.CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, flags, _FLAGS_HIGH_READ),
            (ctnetlink.CTA_PROTOINFO_TCP_FLAGS_REPLY, flags, _FLAGS_LOW_READ),
            (ctnetlink.CTA_PROTOINFO_TCP_WSCALE_ORIGINAL, scales, _SCALE_HIGH_READ),
            (ctnetlink.CTA_PROTOINFO_TCP_WSCALE_REPLY, scales, _SCALE_LOW_READ),
        ):
            if kind in tcp:
                self._move(tcp[kind][0], _VALUES, at, 1, table)


_KEYS, _VALUES, _SECONDS, _NUMBERS = range(4)
_NAT_ADDRESSES = {
    AF_INET: (ctnetlink.CTA_NAT_V4_MINIP, ctnetlink.CTA_NAT_V4_MAXIP),
    AF_INET6: (ctnetlink.CTA_NAT_V6_MINIP, ctnetlink.CTA_NAT_V6_MAXIP),
}
