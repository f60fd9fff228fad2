# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which flows are replicated.  Pure; every event, dumped entry and record of the peer is judged here.

Sets of integers and masked integers only: :mod:`ipaddress` is for the start, it costs some microseconds per address.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import NamedTuple

from .config import EVERYTHING, Network
from .config import Filter as Selection
from .constants import (
    AF_INET,
    IPPROTO_SCTP,
    IPPROTO_TCP,
    IPPROTO_VRRP,
    IPS_SEEN_REPLY,
    SCTP_ESTABLISHED,
    TCP_CLOSE,
    TCP_ESTABLISHED,
    TCP_SYN_RECV,
    TCP_SYN_SENT,
    TCP_SYN_SENT2,
    TCP_TIME_WAIT,
)
from .flow import Flow

COMPILED_LIMIT = 64  # values per list in a BPF program, whose conditional jumps reach 255 instructions

HALF_OPEN = (TCP_SYN_SENT, TCP_SYN_RECV, TCP_SYN_SENT2)


class EventFilter(NamedTuple):
    """Events that the kernel need not deliver, because :class:`Filter` gives the engine nothing to do for them.

    It drops, of all events but DESTROY: other ``protocols`` and ``zones`` than these (empty: none), flows without a
    reply (``replied_only``; not TCP and SCTP, which have states), and these ``tcp_states``.  What does not say what is
    asked for passes; an absent zone is zone 0.
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
        masks = self._v4 if len(packed) == 4 else self._v6
        if not masks:
            return False
        number = int.from_bytes(packed, "big")
        for mask, nets in masks:  # noqa: SIM110 - a generator costs more than the loop
            if number & mask in nets:
                return True
        return False


class Filter:
    """The operator's selection, and what is never replicated.

    ``own``: addresses of this node, virtual IPs included (packed).  ``ignore``: networks whose flows are not
    replicated.  ``unreplied``: flows without a reply (not TCP, SCTP) are replicated too.
    """

    def __init__(
        self, selection: Selection = EVERYTHING, ignore: Iterable[str | Network] = (), unreplied: bool = False
    ) -> None:
        self.own: frozenset[bytes] = frozenset()
        self._ignore = Prefixes(ignore) or None
        self._only = Prefixes(selection.addresses) or None
        self._protocols = frozenset(selection.protocols)
        self._zones = frozenset(selection.zones)
        self._states = frozenset(selection.tcp_states)
        self._marks = tuple((mark.value, mark.mask) for mark in selection.marks)
        self._unreplied = unreplied

    def passes_through(self, flow: Flow) -> bool:
        """By its addresses a flow through the firewall: not its own, not local, not ignored."""
        if flow.proto == IPPROTO_VRRP:
            return False
        source, server, target = flow.orig.src, flow.reply.src, flow.orig.dst
        if source in self.own or server in self.own:
            return False
        if flow.family == AF_INET:
            if source[0] == 127 or server[0] == 127 or target[0] >= 224:
                return False
        elif target[0] == 0xFF or target[:2] == b"\xfe\x80" or source[:2] == b"\xfe\x80":
            return False
        ignore = self._ignore
        return ignore is None or not (source in ignore or server in ignore)

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
        """Is this flow replicated?  Nothing half-open is, and nothing that is over."""
        proto = flow.proto
        if proto == IPPROTO_TCP:
            worth = flow.state is not None and TCP_ESTABLISHED <= flow.state <= TCP_TIME_WAIT
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
        Other TCP states pass whatever the selection is: a flow that leaves it must go on the peer, too.  So do other
        marks.  A reply, once seen, is never unseen.
        """
        return EventFilter(
            protocols=tuple(sorted(self._protocols)) if len(self._protocols) <= COMPILED_LIMIT else (),
            zones=tuple(sorted(self._zones)) if len(self._zones) <= COMPILED_LIMIT else (),
            replied_only=not self._unreplied,
            tcp_states=HALF_OPEN,
        )
