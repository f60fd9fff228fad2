# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which flows are replicated.  Pure; every event, dumped entry and record of the peer is judged here.

A flow by itself is judged by sets of integers and masked integers (:mod:`ipaddress` is for the start, it costs some
microseconds per address).  Rows are judged by columns: one byte of all rows is translated to 0 or 1 at once, and such
columns, read as long integers, are combined by ``&`` and ``|``.  What is suspicious then is judged flow by flow.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Tuple

from .config import EVERYTHING, Network
from .config import Filter as Selection
from .constants import (
    IPPROTO_SCTP,
    IPPROTO_TCP,
    IPPROTO_VRRP,
    IPS_SEEN_REPLY,
    SCTP_ESTABLISHED,
    TCP_CLOSE,
    TCP_CLOSE_WAIT,
    TCP_ESTABLISHED,
    TCP_LAST_ACK,
    TCP_SYN_RECV,
    TCP_SYN_SENT,
    TCP_SYN_SENT2,
)
from .flow import Flow
from .rows import MARK_FROM_END, SHAPES, STATE_FROM_END, STATUS_FROM_END, Sheet, unpack

COMPILED_LIMIT = 64  # values per list in a BPF program, whose conditional jumps reach 255 instructions

HALF_OPEN = (TCP_SYN_SENT, TCP_SYN_RECV, TCP_SYN_SENT2)

FEW = 4  # rows up to which judging one after the other is cheaper than by columns
IPV4_BYTES = 4
_MANY_NETWORKS = 16  # from here on one look-up for each prefix length is cheaper than columns for each network

Rows = Mapping[bytes, bytes]


class EventFilter(NamedTuple):
    """Events that the kernel need not deliver, because :class:`Filter` gives the engine nothing to do for them.

    It drops, of all events but DESTROY: other ``protocols`` and ``zones`` than these (empty: none), flows without a
    reply (``replied_only``; not TCP and SCTP, which have states), and these ``tcp_states``.  What does not say what is
    asked for passes; an absent zone is zone 0.  Flows without a reply and TCP states are delivered where the event has
    labels, a master connection or a sequence adjustment: no later event tells them again.
    """

    protocols: tuple[int, ...] = ()
    zones: tuple[int, ...] = ()
    replied_only: bool = False
    tcp_states: tuple[int, ...] = ()


class Prefixes:
    """A set of networks; ``address in prefixes`` costs one look-up for each different prefix length."""

    __slots__ = ("_v4", "_v6")

    def __init__(self, networks: Iterable[str | Network]) -> None:
        found: dict[tuple[int, int], set[int]] = {}
        for item in networks:
            network = ipaddress.ip_network(item)
            found.setdefault((network.version, int(network.netmask)), set()).add(int(network.network_address))
        self._v4 = tuple((mask, frozenset(nets)) for (version, mask), nets in found.items() if version == 4)
        self._v6 = tuple((mask, frozenset(nets)) for (version, mask), nets in found.items() if version == 6)

    def __bool__(self) -> bool:
        return bool(self._v4 or self._v6)

    def __contains__(self, packed: bytes) -> bool:
        return self.holds(packed, packed)

    def holds(self, packed: bytes, other: bytes) -> bool:
        """Either of two addresses of one family."""
        masks = self._v4 if len(packed) == IPV4_BYTES else self._v6
        if not masks:
            return False
        one, two = int.from_bytes(packed, "big"), int.from_bytes(other, "big")
        for mask, nets in masks:  # noqa: SIM110 - a generator costs more than the loop
            if one & mask in nets or two & mask in nets:
                return True
        return False


def _table(wanted: Callable[[int], bool]) -> bytes:
    """For bytes.translate: 1 for the bytes that are wanted, 0 for all others."""
    return bytes(wanted(byte) for byte in range(256))


def _among(wanted: Iterable[int]) -> bytes:
    return _table(frozenset(wanted).__contains__)


_IS_TCP = _among((IPPROTO_TCP,))
_IS_SCTP = _among((IPPROTO_SCTP,))
_IS_VRRP = _among((IPPROTO_VRRP,))
_TCP_WORTH = _among(range(TCP_ESTABLISHED, TCP_LAST_ACK + 1))
_TCP_KEPT = _among((0, *range(TCP_ESTABLISHED, TCP_CLOSE + 1)))  # 0: not said
_SCTP_WORTH = _among((SCTP_ESTABLISHED,))
_REPLIED = _table(lambda byte: bool(byte & IPS_SEEN_REPLY))
_LOOPBACK = _among((127,))
_MULTICAST = _table(lambda byte: byte >= 224)
_LOCAL_V6 = _among((0xFE, 0xFF))  # link-local, multicast, and what else begins so

_Pattern = Tuple[Tuple[int, bytes], ...]  # places in an address, and the bytes that are wanted there


class _Columns:
    """Rows of one shape, as columns of bytes.  A *mask* is an integer of one byte, 0 or 1, for each row."""

    def __init__(self, key_len: int, rows: Rows) -> None:
        self.shape = SHAPES[key_len]
        self.all = int.from_bytes(b"\1" * len(rows), "little")
        self._rows = rows
        self._keys = b"".join(rows)
        self._values = b"".join(rows.values())
        self._protocols = self._keys[:: self.shape.key]

    @property
    def pairs(self) -> Iterable[tuple[bytes, bytes]]:
        """Key and value of each."""
        return self._rows.items()

    def of_protocol(self, table: bytes) -> int:
        return int.from_bytes(self._protocols.translate(table), "little")

    def of_key(self, at: int, table: bytes) -> int:
        return int.from_bytes(self._keys[at :: self.shape.key].translate(table), "little")

    def of_value(self, at: int, table: bytes) -> int:
        return int.from_bytes(self._values[at :: self.shape.value].translate(table), "little")

    def from_end(self, place: int, table: bytes) -> int:
        """Of the values, counted from their end."""
        return self.of_value(self.shape.value - place, table)

    def source(self, pattern: _Pattern) -> int:
        """Rows whose flows begin at an address of this pattern."""
        mask = self.all
        for at, table in pattern:
            mask &= self.of_key(1 + at, table)
            if not mask:
                break
        return mask

    def server(self, pattern: _Pattern) -> int:
        """Rows whose answers come from an address of this pattern."""
        mask = self.all
        for at, table in pattern:
            mask &= self.of_value(at, table)
            if not mask:
                break
        return mask

    def take(self, mask: int) -> Rows:
        if mask == self.all:
            return self._rows
        return dict(itertools.compress(self._rows.items(), mask.to_bytes(len(self._rows), "little"))) if mask else {}

    def mask_of(self, chosen: Rows) -> int:
        return int.from_bytes(bytes(map(chosen.__contains__, self._rows)), "little")


class _SheetColumns(_Columns):
    """The same of a sheet, which has them.  Of a key that repeats there is a byte in a mask each time."""

    def __init__(self, sheet: Sheet) -> None:  # pylint: disable=super-init-not-called
        self.shape = SHAPES[sheet.key_len]
        self.all = int.from_bytes(b"\1" * len(sheet), "little")
        self._sheet = sheet

    @property
    def pairs(self) -> Iterable[tuple[bytes, bytes]]:
        return zip(self._sheet.keys, self._sheet.values)

    def take(self, mask: int) -> Rows:
        return dict(itertools.compress(self.pairs, mask.to_bytes(len(self._sheet), "little")))

    def mask_of(self, chosen: Rows) -> int:
        return int.from_bytes(bytes(map(chosen.__contains__, self._sheet.keys)), "little")

    def of_protocol(self, table: bytes) -> int:
        return self.of_key(0, table)

    def of_key(self, at: int, table: bytes) -> int:
        column = self._sheet.columns[at]
        if column == column[:1] * len(column):  # so it is with most of them
            return self.all if table[column[0]] else 0
        return int.from_bytes(column.translate(table), "little")

    def of_value(self, at: int, table: bytes) -> int:
        return self.of_key(self.shape.key + at, table)


def _patterns(networks: Iterable[str | Network]) -> dict[int, list[_Pattern]]:
    """Of each network, by the size of its addresses, which bytes of it stand where."""
    patterns: dict[int, list[_Pattern]] = {4: [], 16: []}
    for item in networks:
        network = ipaddress.ip_network(item)
        pairs = zip(network.network_address.packed, network.netmask.packed)
        pattern = tuple((at, _masked(byte, mask)) for at, (byte, mask) in enumerate(pairs) if mask)
        patterns[network.max_prefixlen // 8].append(pattern)
    return patterns


def _masked(value: int, mask: int) -> bytes:
    return _table(lambda byte: byte & mask == value)


class Filter:
    """The operator's selection, and what is never replicated.

    ``own``: addresses of this node, virtual IPs included (packed).  ``ignore``: networks whose flows are not
    replicated.  ``unreplied``: flows without a reply (not TCP, SCTP) are replicated too.
    """

    def __init__(
        self, selection: Selection = EVERYTHING, ignore: Iterable[str | Network] = (), unreplied: bool = False
    ) -> None:
        ignore = tuple(ignore)
        self._own: frozenset[bytes] = frozenset()
        self._own_patterns: dict[int, _Pattern | None] = {4: None, 16: None}
        self._ignore = Prefixes(ignore) or None
        self._ignore_patterns = _patterns(ignore)
        self._only = Prefixes(selection.addresses) or None
        self._only_patterns = _patterns(selection.addresses)
        self._protocols = frozenset(selection.protocols)
        self._zones = frozenset(selection.zones)
        self._states = frozenset(selection.tcp_states)
        self._marks = tuple((mark.value, mark.mask) for mark in selection.marks)
        self._everything = not (self._only or self._protocols or self._zones or self._states or self._marks)
        self._unreplied = unreplied
        self._protocol_table = _among(number for number in self._protocols if number < 256)
        self._state_table = _among((0, *self._states))
        self._mark_patterns = [
            tuple(
                (MARK_FROM_END - at, _masked(value >> shift & 255, mask >> shift & 255))
                for at, shift in enumerate((24, 16, 8, 0))
                if mask >> shift & 255 or value >> shift & 255
            )
            for value, mask in self._marks
        ]

    @property
    def own(self) -> frozenset[bytes]:
        return self._own

    @own.setter
    def own(self, own: frozenset[bytes]) -> None:
        if own == self._own:
            return
        self._own = own
        for size in (4, 16):
            found = [address for address in own if len(address) == size]
            pattern = tuple((at, _among(address[at] for address in found)) for at in range(size))
            # the bytes that tell most first: an address ends differently
            self._own_patterns[size] = pattern[::-1] if found else None

    # --- rows --------------------------------------------------------------------------------------------------------

    def select_rows(self, key_len: int, rows: Rows) -> Rows:
        """Those that :meth:`matches`."""
        if len(rows) <= FEW:
            return self._few_matching(key_len, rows)
        columns = _Columns(key_len, rows)
        return columns.take(self._matching(columns))

    def matches_all(self, sheet: Sheet) -> bool:
        """Are all of these flows such that it :meth:`matches`?  Not to be relied upon where a key repeats."""
        columns = _SheetColumns(sheet)
        return self._matching(columns) == columns.all

    def _matching(self, columns: _Columns) -> int:
        tcp, sctp = columns.of_protocol(_IS_TCP), columns.of_protocol(_IS_SCTP)
        others = columns.all & ~(tcp | sctp)
        worth = tcp & columns.from_end(STATE_FROM_END, _TCP_WORTH) if tcp else 0
        if sctp:
            worth |= sctp & columns.from_end(STATE_FROM_END, _SCTP_WORTH)
        if others:
            worth |= others if self._unreplied else others & columns.from_end(STATUS_FROM_END - 1, _REPLIED)
        return self._passing(columns, worth & self._selected(columns))

    def keep_rows(self, key_len: int, rows: Rows) -> Rows:
        """Those that the filter :meth:`keeps`."""
        if len(rows) <= FEW:
            return _one_by_one(rows, self.keeps)
        columns = _Columns(key_len, rows)
        half_open = columns.of_protocol(_IS_TCP) & ~columns.from_end(STATE_FROM_END, _TCP_KEPT)
        return columns.take(columns.all & ~half_open & self._marked(columns) & self._in_state(columns))

    def passing_rows(self, key_len: int, rows: Rows) -> Rows:
        """Those of flows that :meth:`passes_through`."""
        if len(rows) <= FEW:
            size = SHAPES[key_len].address
            return {key: value for key, value in rows.items() if self._row_passes(size, key, value)}
        columns = _Columns(key_len, rows)
        return columns.take(self._passing(columns, columns.all))

    def selected_rows(self, key_len: int, rows: Rows) -> Rows:
        """Those that the filter :meth:`selects`."""
        if self._everything:
            return rows
        if len(rows) <= FEW:
            return _one_by_one(rows, self.selects)
        columns = _Columns(key_len, rows)
        return columns.take(self._selected(columns))

    def concerned_rows(self, key_len: int, rows: Rows) -> Rows:
        """Those that the filter :meth:`concerns`."""
        return self.selected_rows(key_len, self.passing_rows(key_len, rows))

    def _few_matching(self, key_len: int, rows: Rows) -> Rows:
        """Without a flow for each of them: where few events come in, making one takes longer than judging it."""
        size, chosen = SHAPES[key_len].address, {}
        for key, value in rows.items():
            proto = key[0]
            if proto == IPPROTO_TCP:
                worth = _TCP_WORTH[value[-STATE_FROM_END]]
            elif proto == IPPROTO_SCTP:
                worth = _SCTP_WORTH[value[-STATE_FROM_END]]
            else:
                worth = self._unreplied or _REPLIED[value[1 - STATUS_FROM_END]]
            if worth and self._row_passes(size, key, value) and (self._everything or self.selects(unpack(key, value))):
                chosen[key] = value
        return chosen

    def _row_passes(self, size: int, key: bytes, value: bytes) -> bool:
        """:meth:`passes_through`; ``size`` is that of an address."""
        return self._passes(key[0], key[1 : 1 + size], value[:size], key[1 + size : 1 + 2 * size])

    def _passing(self, columns: _Columns, mask: int) -> int:
        """Of the rows in ``mask`` those that pass through."""
        if not mask:
            return 0
        size = columns.shape.address
        suspicious = columns.of_protocol(_IS_VRRP)
        if size == 4:
            suspicious |= columns.of_key(1, _LOOPBACK) | columns.of_value(0, _LOOPBACK) | columns.of_key(5, _MULTICAST)
        else:
            suspicious |= columns.of_key(1, _LOCAL_V6) | columns.of_key(17, _LOCAL_V6)
        own = self._own_patterns[size]
        if own is not None:
            suspicious |= columns.source(own) | columns.server(own)
        ignored = self._ignore_patterns[size]
        if len(ignored) > _MANY_NETWORKS:
            suspicious = columns.all
        else:
            for pattern in ignored:
                suspicious |= columns.source(pattern) | columns.server(pattern)
        suspicious &= mask
        if not suspicious:
            return mask
        cleared = _one_by_one(columns.take(suspicious), self.passes_through)
        return mask & ~suspicious | (suspicious & columns.mask_of(cleared) if cleared else 0)

    def _selected(self, columns: _Columns) -> int:
        mask = columns.all
        if self._protocols:
            mask &= columns.of_protocol(self._protocol_table)
        if self._zones:
            mask &= self._in_zone(columns)
        if self._only is not None:
            mask &= self._from_only(columns)
        if self._marks:
            mask &= self._marked(columns)
        return mask & self._in_state(columns) if self._states else mask

    def _in_zone(self, columns: _Columns) -> int:
        shape = columns.shape
        if not shape.zone:
            return columns.all if 0 in self._zones else 0
        at = shape.key - shape.zone
        return int.from_bytes(
            bytes(key[at] << 8 | key[at + 1] in self._zones for key, _value in columns.pairs), "little"
        )

    def _from_only(self, columns: _Columns) -> int:
        patterns = self._only_patterns[columns.shape.address]
        if len(patterns) > _MANY_NETWORKS:
            only, size = self._only or (), columns.shape.address
            found = bytes(key[1 : 1 + size] in only or value[:size] in only for key, value in columns.pairs)
            return int.from_bytes(found, "little")
        mask = 0
        for pattern in patterns:
            mask |= columns.source(pattern) | columns.server(pattern)
        return mask

    def _marked(self, columns: _Columns) -> int:
        if not self._marks:
            return columns.all
        mask = 0
        for pattern in self._mark_patterns:
            one = columns.all
            for place, table in pattern:
                one &= columns.from_end(place, table)
            mask |= one
        return mask

    def _in_state(self, columns: _Columns) -> int:
        if not self._states:
            return columns.all
        return columns.all & ~(columns.of_protocol(_IS_TCP) & ~columns.from_end(STATE_FROM_END, self._state_table))

    # --- one flow ----------------------------------------------------------------------------------------------------

    def passes_through(self, flow: Flow) -> bool:
        """By its addresses a flow through the firewall: not its own, not local, not ignored."""
        return self._passes(flow.proto, flow.orig.src, flow.reply.src, flow.orig.dst)

    def _passes(self, proto: int, source: bytes, server: bytes, target: bytes) -> bool:
        if proto == IPPROTO_VRRP:
            return False
        own = self._own
        if source in own or server in own:
            return False
        if len(source) == IPV4_BYTES:
            if source[0] == 127 or server[0] == 127 or target[0] >= 224:
                return False
        elif target[0] == 0xFF or target[:2] == b"\xfe\x80" or source[:2] == b"\xfe\x80":
            return False
        ignore = self._ignore
        return ignore is None or not ignore.holds(source, server)

    def selects(self, flow: Flow) -> bool:
        """The operator's selection names this flow, as it is now.  A mark that is not said is 0; a state that is not
        said excludes nothing."""
        if self._protocols and flow.proto not in self._protocols:
            return False
        if self._zones and flow.zone not in self._zones:
            return False
        only = self._only
        if only is not None and flow.orig.src not in only and flow.reply.src not in only:
            return False
        return self._selects_mark_and_state(flow)

    def _selects_mark_and_state(self, flow: Flow) -> bool:
        if self._marks:
            mark = flow.mark or 0
            for value, mask in self._marks:
                if mark & mask == value:
                    break
            else:
                return False
        if self._states and flow.proto == IPPROTO_TCP and flow.state is not None:
            return flow.state in self._states
        return True

    def concerns(self, flow: Flow) -> bool:
        """May this node make and remove such an entry?  What this excludes belongs to others."""
        return self.passes_through(flow) and self.selects(flow)

    def matches(self, flow: Flow) -> bool:
        """Is this flow replicated?  Nothing half-open is, and nothing that is over before it was told: no packet of a
        connection in TIME_WAIT matters to anybody but its ends, which give up or start anew without an entry."""
        proto = flow.proto
        if proto == IPPROTO_TCP:
            worth = flow.state is not None and TCP_ESTABLISHED <= flow.state <= TCP_LAST_ACK
        elif proto == IPPROTO_SCTP:
            worth = flow.state == SCTP_ESTABLISHED
        else:
            worth = self._unreplied or bool(flow.status & IPS_SEEN_REPLY)
        return worth and self.passes_through(flow) and self.selects(flow)

    def keeps(self, flow: Flow) -> bool:
        """Does a flow that is replicated stay so after this change?  Addresses, protocol and zone never change."""
        if flow.proto == IPPROTO_TCP and flow.state is not None and not TCP_ESTABLISHED <= flow.state <= TCP_CLOSE:
            return False
        return self._selects_mark_and_state(flow)

    def is_unclear(self, flow: Flow) -> bool:
        """A mark may have come to a flow whose state the event does not say: the kernel must be asked."""
        return bool(self._marks) and flow.proto in (IPPROTO_TCP, IPPROTO_SCTP) and flow.state is None

    @property
    def events(self) -> EventFilter:
        """What of this the kernel can decide.

        Half-open TCP states: no entry goes back to SYN_SENT (nf_conntrack_proto_tcp.c removes the old entry first,
        and its DESTROY passes).  One that the firewall holds for established while its ends are not may go through
        SYN_RECV; ESTABLISHED or DESTROY follows within the timeout of SYN_RECV, until then the peer keeps what it has.
        Between FIN_WAIT, which says that the flow is closing, and its end CLOSE_WAIT and LAST_ACK say nothing that
        matters to the peer: FIN_WAIT takes the same packets to the same ends, and its timer is not shorter.
        With a selection of states all but the half-open ones pass: a flow that leaves it must go on the peer, too.  So
        do other marks.  A reply, once seen, is never unseen.
        """
        return EventFilter(
            protocols=tuple(sorted(self._protocols)) if len(self._protocols) <= COMPILED_LIMIT else (),
            zones=tuple(sorted(self._zones)) if len(self._zones) <= COMPILED_LIMIT else (),
            replied_only=not self._unreplied,
            tcp_states=HALF_OPEN if self._states else (*HALF_OPEN, TCP_CLOSE_WAIT, TCP_LAST_ACK),
        )


def _one_by_one(rows: Rows, judge: Callable[[Flow], bool]) -> Rows:
    return {key: value for key, value in rows.items() if judge(unpack(key, value))}
