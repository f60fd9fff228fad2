# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a take-over has to do: the kernel gets the true states and timers of replicas, closing flows first."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping

from .constants import (
    IPPROTO_DCCP,
    IPPROTO_GRE,
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_SCTP,
    IPPROTO_TCP,
    IPPROTO_UDP,
    IPPROTO_UDPLITE,
    IPS_ASSURED,
    SCTP_ESTABLISHED,
    TCP_ESTABLISHED,
)
from .ctnetlink import FALLBACK_TIMEOUT
from .jobs import CREATE, TIMER, UPDATE, Job, Request, Work
from .rows import NO_TIMEOUT, STATE_FROM_END, STATUS_FROM_END, TIMEOUT_FROM_END, unpack
from .situation import SORTED_PER_TURN, Situation
from .tables import Copies, ExternalCache

_OPEN = {IPPROTO_TCP: TCP_ESTABLISHED, IPPROTO_SCTP: SCTP_ESTABLISHED}
_TIMEOUT_NAMES = {  # of a flow that was replied to, and of one that is ASSURED
    IPPROTO_TCP: ("tcp_timeout_established", "tcp_timeout_established"),
    IPPROTO_SCTP: ("sctp_timeout_established", "sctp_timeout_established"),
    IPPROTO_DCCP: ("dccp_timeout_open", "dccp_timeout_open"),
    IPPROTO_UDP: ("udp_timeout", "udp_timeout_stream"),
    IPPROTO_UDPLITE: ("udp_timeout", "udp_timeout_stream"),
    IPPROTO_GRE: ("gre_timeout", "gre_timeout_stream"),
    IPPROTO_ICMP: ("icmp_timeout", "icmp_timeout"),
    IPPROTO_ICMPV6: ("icmpv6_timeout", "icmpv6_timeout"),
}


def is_open(proto: int, state: int | None) -> bool:
    """Neither half-open nor closing, as far as is said."""
    return not state or state == _OPEN.get(proto, state)


def is_closing(key: bytes, value: bytes) -> bool:
    return key[0] == IPPROTO_TCP and value[-STATE_FROM_END] > TCP_ESTABLISHED


def timeout_of(value: bytes) -> int:
    """Seconds, or NO_TIMEOUT."""
    return int.from_bytes(value[-TIMEOUT_FROM_END:-STATE_FROM_END], "big")


def known_timeout(value: bytes) -> int | None:
    told = timeout_of(value)
    return None if told == NO_TIMEOUT else told


def untimed(value: bytes) -> bytes:
    """The same value, its timeout not said."""
    return value[:-TIMEOUT_FROM_END] + b"\xff\xff\xff\xff" + value[-STATE_FROM_END:]


class TakeOver:
    """Replicas whose true state is due.  ``timeouts``: this kernel's, in seconds: sysctls nf_conntrack_NAME."""

    def __init__(self, situation: Situation, cache: ExternalCache, copies: Copies) -> None:
        self.timeouts: Mapping[str, int] = {}
        self._situation = situation
        self._cache = cache
        self._copies = copies
        self._parked_s = situation.settings.park_timeout_s  # the longest timer that a replica may be parked with
        self._due: collections.deque[bytes] = collections.deque()
        self._closing: collections.deque[bytes] = collections.deque()  # those of them that go first
        self._unsorted = 0  # how many of the first in _due may be closing

    @property
    def running(self) -> bool:
        return bool(self._due or self._closing)

    def parked_at_most(self, park_timeout_s: int) -> None:
        """Replicas may have been parked for so long, too."""
        self._parked_s = max(self._parked_s, park_timeout_s)

    def begin(self) -> None:
        self._due.extend(self._cache.keys())
        self._unsorted = len(self._due)

    def add(self, keys: Iterable[bytes]) -> None:
        """The kernel is to have these replicas."""
        self._due.extend(keys)

    def stop(self) -> None:
        self._due.clear()
        self._closing.clear()
        self._unsorted = 0

    def work(self, limit: int) -> list[Job]:
        """Requests for at most ``limit`` flows; a large table must not stop the loop."""
        cache = self._cache
        for dummy in range(min(self._unsorted, SORTED_PER_TURN)):
            self._unsorted -= 1
            key = self._due.popleft()
            value = cache.value(key)
            if value is not None:
                (self._closing if is_closing(key, value) else self._due).append(key)
        keys = _pop(self._closing, limit)
        if not self._unsorted:
            keys += _pop(self._due, limit - len(keys))
        jobs: list[Job] = []
        groups: dict[tuple[str, int], Work] = {}
        lifetimes: dict[tuple[int, bytes], int] = {}
        lacking = set(self._copies.lacking(keys))
        values, extras = cache.value, cache.extras
        for key in keys:
            value = values(key)
            operation = "" if value is None else CREATE if key in lacking else self._operation(key, value)
            if value is None or not operation:
                continue
            kind = (key[0], value[-STATUS_FROM_END : 1 - STATE_FROM_END])  # all that the lifetime depends on
            lifetime = lifetimes.get(kind)
            if lifetime is None:
                lifetime = lifetimes[kind] = self.lifetime(key, value)
            if operation != TIMER and key in extras:
                jobs.append(Request(operation, key, unpack(key, value, extras[key]), lifetime))
                continue
            shape = (operation, len(key))
            work = groups.get(shape)
            if work is None:
                work = groups[shape] = Work(*shape, [], [], [])
                jobs.append(work)
            work.keys.append(key)
            work.timeouts.append(lifetime)
            if operation != TIMER:
                work.values.append(value)
        return jobs

    def _operation(self, key: bytes, value: bytes) -> str:
        """What gives a replica that the kernel holds its true state and timer; nothing if it has them."""
        if key[0] == IPPROTO_GRE:
            return ""  # the timer is fixed, see ctnetlink.create
        if is_closing(key, value):
            return UPDATE
        told = known_timeout(value) or 0
        if told >= self._parked_s:
            replica = self._cache.get(key)
            if replica is not None and told - (self._situation.now - replica.since) >= self._parked_s:
                return ""  # was never parked, and has that much left
        return TIMER

    def lifetime(self, key: bytes, value: bytes) -> int:
        """Seconds that a replica may live at take-over until a packet refreshes it.

        The record may say too little: it tells what was left when the flow last made an event or a bulk named it, and
        packets refresh the timer without an event.  So an open flow gets its protocol's time, as from a packet now.
        Only GRE gets the time that replicas are parked for: no packet refreshes the timer that it is given.
        """
        proto, told = key[0], known_timeout(value)
        own = None
        if proto == IPPROTO_GRE:
            own = self._situation.settings.park_timeout_s
        elif is_open(proto, value[-STATE_FROM_END]):
            replied, streaming = _TIMEOUT_NAMES.get(proto, ("generic_timeout", "generic_timeout"))
            assured = value[-STATUS_FROM_END + 1] & IPS_ASSURED
            own = self.timeouts.get(streaming if assured else replied)
        if own is None:
            return FALLBACK_TIMEOUT if told is None else told
        return max(own, told or 0)


def _pop(keys: collections.deque[bytes], limit: int) -> list[bytes]:
    """The first keys, at most ``limit``; they leave the queue."""
    return [keys.popleft() for dummy in range(min(limit, len(keys)))]
