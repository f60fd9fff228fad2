# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the active node knows of helpers: its expectations, and what the kernel tells no event of.

Sans-I/O.  Expectations come by events, and by walks through the kernel's (small) table: after a take-over, after lost
events, and from time to time, because a helper that changes an expectation (SIP) makes no event.  The sequence
adjustment of a translated control connection makes no event either: the connections that have a helper are looked up,
soon after each event of one of their expectations, and in turn.

Nothing here runs as long as no flow has a helper.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Sequence

from .constants import IPPROTO_TCP, IPS_DST_NAT, IPS_SRC_NAT
from .expectation import INACTIVE, PERMANENT, Expectation
from .flow import Flow, flow_key
from .rows import SHAPES

LINGER_S = 3.0  # how long a backup keeps an expectation whose flow has begun: retransmissions of a lost SYN come in it
LOOK_SOON_S = 0.02  # after an event: the helper changes the packet just after it made the expectation
LOOK_S = 1.0  # between two turns of the slow look at all control connections
LOOKS = 40  # of them in one such turn
WALK_S = 5.0  # between two walks through the table, or more where it is large:
WALKED_PER_S = 200  # so many entries a second on average
DRIFT_S = 3  # a timer that is further off than that was set anew
MASTERS = 65_536  # flows with a helper that are followed
ORPHANS = 1024  # expectations whose master is not replicated, or not yet

_NAT = IPS_SRC_NAT | IPS_DST_NAT


class ExpectationSource:
    """Expectations of flows that this node replicates, and those flows.

    ``limit``: so many expectations are replicated at most.  ``changes``: what peers must be told, the expectation or,
    where it is gone, None, by name.  ``looks``: flows that the caller looks up for :meth:`adjusted`.  ``asks``: flows,
    by key, whose expectations it lists for :meth:`told`.  ``walking``: it walks through the table, for :meth:`walked`
    and :meth:`walk_ended`.  Times are monotonic seconds.
    """

    def __init__(self, limit: int, counters: collections.Counter[str]) -> None:
        self.limit = limit
        self.changes: dict[bytes, Expectation | None] = {}
        self.looks: list[Flow] = []
        self.asks: dict[bytes, Flow] = {}
        self.walking = False
        self.unread = False  # nothing is known yet: a walk is due, or runs
        self._counters = counters
        self._known: dict[bytes, tuple[Expectation, float]] = {}  # by name; when that was so
        self._of: dict[bytes, set[bytes]] = {}  # names by the key of their master
        self._masters: dict[bytes, Flow] = {}
        self._homes: dict[bytes, list[bytes]] = {}  # masters' keys by what they are without their zone
        self._orphans: dict[bytes, Expectation] = {}  # by name without zone
        self._lingering: dict[bytes, float] = {}  # used up; until when peers keep them
        self._turns: dict[bytes, None] = {}  # keys of masters to look up, in turn
        self._soon: dict[bytes, float] = {}
        self._look_at = 0.0
        self._walk_at = 0.0
        self._seen: set[bytes] = set()  # names that the walk, or an event since it began, told of

    def __len__(self) -> int:
        return len(self._known)

    @property
    def masters(self) -> int:
        """Flows with a helper."""
        return len(self._masters)

    def begin(self) -> None:
        """This node became active: what its kernel holds is not known."""
        self.clear()
        self.unread = self.limit > 0

    def clear(self) -> None:
        for table in (self.changes, self._known, self._of, self._masters, self._homes, self._orphans):
            table.clear()
        self._lingering.clear()
        self._soon.clear()
        self._turns.clear()
        self.looks = []
        self.asks.clear()
        self.walking = self.unread = False
        self._seen = set()

    def expectations(self, now: float) -> list[Expectation]:
        """All that are replicated, with what is left of their time."""
        return [_aged(one, now - at) for one, at in self._known.values()]

    # --- flows with a helper -----------------------------------------------------------------------------------------

    def master(self, flow: Flow) -> None:
        """A flow with a helper is replicated, and is now so."""
        key = flow.key
        known = self._masters.get(key)
        if known is None:
            if len(self._masters) >= MASTERS or not self.limit:
                self._counters["helper_flows_not_followed"] += 1
                return
            bare = flow_key(flow.proto, 0, flow.orig)
            self._homes.setdefault(bare, []).append(key)
            if flow.proto == IPPROTO_TCP and flow.status & _NAT:
                self._turns[key] = None
            self._masters[key] = flow
            for name in [name for name, one in self._orphans.items() if one.master_key == bare]:
                self._orphans.pop(name)
                self.asks[key] = flow
        elif flow.seqadj is not None:
            self._masters[key] = flow

    def ended(self, keys: Iterable[bytes]) -> None:
        """Flows ended, or are not replicated any more; their expectations go with them."""
        for key in keys:
            if self._masters.pop(key, None) is None:
                continue
            bare = _bare(key)
            homes = [home for home in self._homes.get(bare, ()) if home != key]
            if homes:
                self._homes[bare] = homes
            else:
                self._homes.pop(bare, None)
            self._soon.pop(key, None)
            self._turns.pop(key, None)
            for name in self._of.pop(key, ()):
                self._known.pop(name, None)
                self._lingering.pop(name, None)
                self.changes[name] = None

    def adjusted(self, flow: Flow) -> bool:
        """The kernel's entry of one of :attr:`looks`: must peers be told of it?"""
        known = self._masters.get(flow.key)
        if known is None or flow.seqadj is None or flow.seqadj == known.seqadj:
            return False
        self._masters[flow.key] = flow
        self._counters["sequence_adjustments_found"] += 1
        return True

    def knows(self, one: Expectation) -> bool:
        """Is this entry of the kernel's table, which does not tell its zone, of a flow that is replicated?"""
        return one.master_key in self._homes

    # --- what the kernel says ----------------------------------------------------------------------------------------

    def events(self, changes: Sequence[tuple[Expectation, bool]], lost: bool, now: float) -> None:
        """Expectations came, or are gone (True)."""
        self._counters["expectation_events"] += len(changes)
        for one, gone in changes:
            home = self._home(one)
            if home is None:
                if gone:
                    self._orphans.pop(one.name, None)
                continue
            self._look_soon(home, now)
            one = one.of(home)
            self._seen.add(one.name)
            if gone:
                self._gone(one, now)
            else:
                self._put(one, now)
        if lost:
            self._counters["expectation_events_lost"] += 1
            self._walk_at = now

    def _home(self, one: Expectation) -> bytes | None:
        """The key of its master, None if that is not known (yet): the kernel does not tell the zone."""
        bare = one.master_key
        homes = self._homes.get(bare, ())
        if len(homes) == 1:
            return homes[0]
        if homes:
            self.asks.update((home, self._masters[home]) for home in homes)
        elif len(self._orphans) < ORPHANS:
            self._orphans[one.name] = one
        return None

    def _look_soon(self, key: bytes, now: float) -> None:
        flow = self._masters[key]
        if flow.proto == IPPROTO_TCP and flow.status & _NAT:
            if key not in self._soon:
                self.looks.append(flow)
            self._soon[key] = now + LOOK_SOON_S

    def _put(self, one: Expectation, now: float) -> None:
        name = one.name
        before = self._known.get(name)
        if before is None:
            if len(self._known) >= self.limit:
                self._counters["expectations_over_limit"] += 1
                return
            self._counters["expectations_announced"] += 1
            self._of.setdefault(one.master_key, set()).add(name)
            self._lingering.pop(name, None)
        else:
            left = _aged(before[0], now - before[1]).timeout
            if before[0].lasting == one.lasting and abs(left - one.timeout) <= DRIFT_S:
                return
        self._known[name] = one, now
        self.changes[name] = one

    def _gone(self, one: Expectation, now: float) -> None:
        name = one.name
        if self._known.pop(name, None) is None:
            return
        self._forget_name(name, one.master_key)
        self._counters["expectations_ended"] += 1
        if one.timeout and not one.flags & (PERMANENT | INACTIVE) and len(self._lingering) < self.limit:
            self._lingering[name] = now + LINGER_S
            self.changes[name] = one._replace(used=True, timeout=int(LINGER_S))
        else:
            self.changes[name] = None

    def _forget_name(self, name: bytes, master: bytes) -> None:
        names = self._of.get(master)
        if names is not None:
            names.discard(name)
            if not names:
                del self._of[master]

    def told(self, master: Flow, listed: Sequence[Expectation] | None, now: float) -> None:
        """All expectations of one of :attr:`asks`; None if the kernel does not know the flow."""
        key = master.key
        if key not in self._masters or listed is None:
            return
        self._look_soon(key, now)
        names = set()
        for one in listed:
            one = one.of(key)
            names.add(one.name)
            self._put(one, now)
        self._seen.update(names)
        for name in self._of.get(key, set()) - names:
            self._gone(self._known[name][0], now)

    # --- walks -------------------------------------------------------------------------------------------------------

    def walked(self, some: Iterable[Expectation], now: float) -> None:
        """A part of the kernel's table."""
        for one in some:
            home = self._home(one)
            if home is not None:
                one = one.of(home)
                if one.name not in self._seen:
                    self._seen.add(one.name)
                    self._put(one, now)

    def walk_ended(self, whole: bool, now: float) -> None:
        """The walk is over.  ``whole``: nothing can be missing."""
        self.walking = self.unread = False
        self._walk_at = now + (max(WALK_S, len(self._known) / WALKED_PER_S) if whole else LOOK_S)
        if not whole:
            self._counters["expectation_walks_interrupted"] += 1
            return
        for name in [name for name in self._known if name not in self._seen]:
            one = self._known[name][0]
            if len(self._homes.get(_bare(one.master_key), ())) == 1:
                self._gone(one._replace(timeout=0), now)

    # --- time --------------------------------------------------------------------------------------------------------

    def poll(self, now: float, walk: bool = True) -> None:
        """Find out what is due.  ``walk``: may a walk begin now?"""
        if self._lingering:
            for name in [name for name, until in self._lingering.items() if until <= now]:
                del self._lingering[name]
                self.changes[name] = None
        if self._soon:
            for key in [key for key, moment in self._soon.items() if moment <= now]:
                del self._soon[key]
                if key in self._masters:
                    self.looks.append(self._masters[key])
        if self._turns and now >= self._look_at:
            self._look_at = now + LOOK_S
            for key in list(itertools.islice(self._turns, LOOKS)):
                del self._turns[key]
                self._turns[key] = None  # behind the others
                self.looks.append(self._masters[key])
        if walk and not self.walking and (self.unread or ((self._masters or self._known) and now >= self._walk_at)):
            self.walking = True
            self._seen = set()
            self._orphans.clear()

    def next_deadline(self) -> float:
        """When :meth:`poll` wants to be called; infinity where there is nothing to do."""
        moments = list(self._lingering.values())
        moments += self._soon.values()
        if self._turns:
            moments.append(self._look_at)
        if self._masters or self._known:
            moments.append(self._walk_at)
        return min(moments, default=float("inf"))


def _aged(one: Expectation, seconds: float) -> Expectation:
    return one._replace(timeout=max(0, one.timeout - int(seconds)))


def _bare(key: bytes) -> bytes:
    """A flow's key without its zone."""
    return key[: len(key) - SHAPES[len(key)].zone]
