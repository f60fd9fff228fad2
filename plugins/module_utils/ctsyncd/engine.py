# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine: kernel events, the peer's datagrams, roles and commands in; datagrams and kernel requests out.

Sans-I/O: no socket, no clock.  The daemon feeds it and carries out what :meth:`Engine.poll`,
:meth:`Engine.kernel_requests` and :attr:`Engine.dump` ask for.  Times are monotonic seconds given by the caller.

The active node sends every change of every flow worth replicating.  The backup stores it in the external cache and, in
hot standby, has the kernel hold it at once with a *parked* (long) timer, because a flow that is refreshed by traffic
makes no events.  Who is active is decided elsewhere (keepalived); the engine is told.
"""

from __future__ import annotations

import collections
import errno
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from . import config, readiness, wire
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
    IPS_SEEN_REPLY,
    SCTP_ESTABLISHED,
    TCP_ESTABLISHED,
)
from .errors import WireError
from .filters import Filter
from .flow import Flow, merge
from .session import BlockReceived, PeerLeft, Session, SessionUp, StatusReceived
from .tables import ExternalCache, Pending, Replica

HOT_STANDBY = "hot-standby"
EXTERNAL_CACHE = "external-cache"

CREATE = "create"
UPDATE = "update"
TIMER = "timer"  # an update of the timer alone
DELETE = "delete"

_DONE = {CREATE: "kernel_created", UPDATE: "kernel_updated", TIMER: "kernel_timers_set", DELETE: "kernel_deleted"}

BULK = "bulk"
RECONCILE = "reconcile"
FLUSH = "flush"

SORTED_PER_TURN = 5_000  # replicas looked at in search of closing flows
DUMP_ROOM = 20_000  # changes or requests that may wait before a dump, or the link, is read on
REQUEST_BULK_AFTER_S = 2.0
PURGE_AFTER_S = 60.0
RETRY_REFUSED_S = 10.0  # at first; the wait doubles from one vain attempt to the next
RETRY_REFUSED_MAX_S = 600.0

_BULK_BEGIN = b"begin"
_BULK_END = b"end"
_BULK_REQUEST = b"request"
_ADOPTING = 1  # attempt of an update whose success means: the kernel holds the replica
_GONE = b"-"  # before a flow's key: its end, which must not be overtaken by a new flow with the same key

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

_KEPT_BITS = IPS_SEEN_REPLY | IPS_ASSURED
_KEPT_FIELDS = ("mark", "labels", "seqadj", "tcp_wscale", "sctp_vtags")

_ROLE_CODES = {
    readiness.ACTIVE: wire.ROLE_ACTIVE,
    readiness.BACKUP: wire.ROLE_BACKUP,
    readiness.TRANSITION: wire.ROLE_TRANSITION,
}
_ROLE_NAMES = {code: name for name, code in _ROLE_CODES.items()}


class Settings(NamedTuple):
    """What the configuration decides about the engine.

    ``park_timeout_s``: timer of a replica in the kernel.  ``lag_limit_s``: older changes without acknowledgement show
    in the verdict.  ``filter``, ``ignore`` and ``unreplied``: see :class:`filters.Filter`.
    """

    mode: str = HOT_STANDBY
    replicate: bool = True
    unreplied: bool = False  # replicate flows without a reply (not TCP, SCTP) too
    park_timeout_s: int = 86_400
    ignore: tuple[str, ...] = ()  # networks whose flows are never replicated
    filter: config.Filter = config.EVERYTHING
    lag_limit_s: float = 2.0
    commit_at_takeover: bool = True
    table_limit: int = 1_048_576


class Request(NamedTuple):
    """One request to the kernel.  ``attempt`` counts what was tried for this flow before."""

    operation: str
    key: bytes
    flow: Flow
    timeout: int | None
    attempt: int = 0


class Dump(NamedTuple):
    """A kernel dump that the engine wants; a new ``number`` means: begin again."""

    number: int
    purpose: str


class Engine:
    """State replication with one peer, as seen from one node."""

    def __init__(self, settings: Settings, session: Session, now: float) -> None:
        self.settings = settings
        self.session = session
        self.counters: collections.Counter[str] = collections.Counter()
        self.role = readiness.TRANSITION
        self.role_since = now
        self.cache = ExternalCache(settings.table_limit)
        self.pending = Pending(settings.table_limit)
        self.dump: Dump | None = None
        self.problem = ""  # what stops replication: the node cannot become ready
        self.impaired: tuple[str, ...] = ()  # what an operator should mend, but does not stop it
        self.timeouts: Mapping[str, int] = {}  # this kernel's, in seconds: sysctls net.netfilter.nf_conntrack_NAME
        self.complete = False
        self._side = ""  # ACTIVE or BACKUP: the last role that was not a transition
        self.filter = _filter(settings)
        self._parked_s = settings.park_timeout_s  # the longest timer that a replica may be parked with
        self._excluded = 0  # flows of the peer's last bulk, and since, that this node's filter excludes
        self._unclear: list[Flow] = []
        self._announced: set[bytes] = set()
        self._kernel: collections.deque[Request] = collections.deque()
        self._trim: collections.deque[bytes] = collections.deque()  # replicas whose true state is due
        self._closing: collections.deque[bytes] = collections.deque()  # those of them that go first
        self._unsorted = 0  # how many of the first in _trim may be closing
        self._asked = 0  # requests handed out whose result is not here yet
        self._refused: dict[bytes, int] = {}  # replicas that the kernel does not take, and the errno
        self._refused_wait_s = RETRY_REFUSED_S
        self._refused_at: float | None = None  # when they are tried again
        self._dumps = 0
        self._dump_queue: collections.deque[str] = collections.deque()
        self._dump_seen: set[bytes] = set()
        self._bulk_number = 0
        self._bulk_flows = 0
        self._bulk_due = False
        self._completing = False
        self._adopting = False
        self._peer = wire.Status(wire.ROLE_UNKNOWN, 0, 0)
        self._peer_left = False
        self._session_since = now
        self._request_at = now
        self._purge_at: float | None = None
        self._now = now  # of the last poll

    def reconfigure(self, settings: Settings, now: float) -> None:
        """Other settings from now on; ``mode``, ``replicate`` and the limits of tables stay what they were.

        Where the filter is another one the active node sends its whole table again, and the peer removes what is not in
        it.  A backup removes the replicas that are excluded now (nobody else would) and asks for the whole table.
        """
        old, self.settings = self.settings, settings
        self._parked_s = max(self._parked_s, settings.park_timeout_s)
        if _filtering(old) == _filtering(settings):
            return
        own = self.filter.own
        self.filter = _filter(settings)
        self.filter.own = own
        if self.active:
            self._bulk_due = True
            return
        for key, replica in self.cache.items():
            if not self.filter.concerns(wire.decode_flow(replica.record)):
                self.counters["excluded_removed"] += 1
                self._delete(key)
        if self.session.established:
            self.request_bulk(now)

    # --- role --------------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        return self._side == readiness.ACTIVE

    def set_role(self, role: str, now: float) -> None:
        """The kernel says who holds the virtual IPs: all of them (active), none (backup), some (transition)."""
        if role == self.role:
            return
        self.role = role
        self.role_since = now
        self.counters["role_changes"] += 1
        if role in (readiness.TRANSITION, self._side):
            return
        first, self._side = not self._side, role
        if role == readiness.ACTIVE:
            self._become_active(first)
        else:
            self._become_backup(now)

    def _become_active(self, first: bool) -> None:
        """The virtual IPs are here.  In hot standby the kernel holds the flows already: nothing stands in the way.

        What follows sets true states and timers, closing flows first; then the peer is told the whole table.
        """
        self._drop_dumps()
        self.cache.end_bulk()
        self._announced.clear()
        self._purge_at = None
        self.complete = False
        self._completing = self._adopting = False
        if not first:
            self._take_over()
        self._bulk_due = True

    def _take_over(self) -> None:
        if self.settings.mode == HOT_STANDBY or self.settings.commit_at_takeover:
            self._trim.extend(self.cache.keys())
            self._unsorted = len(self._trim)

    def _become_backup(self, now: float) -> None:
        """The virtual IPs are gone.  This node's flows belong to the new active node now; its bulk says which."""
        self._drop_dumps()
        self._bulk_due = False
        self._trim.clear()
        self._closing.clear()
        self._unsorted = 0
        self._kernel.clear()
        self._announced.clear()
        self._refused.clear()
        self.cache.clear()
        self._excluded = 0
        self.complete = False
        self._completing = False
        self._session_since = now
        if not self.session.established:
            self.pending.clear()

    # --- kernel: events ----------------------------------------------------------------------------------------------

    def set_addresses(self, own: Iterable[bytes]) -> None:
        """Addresses of this node, virtual IPs included (packed): flows that begin or end here are not replicated."""
        self.filter.own = frozenset(own)

    def kernel_event(self, flow: Flow, destroyed: bool, now: float) -> None:
        """A conntrack event that this daemon did not cause."""
        self.counters["events"] += 1
        if not self.active:
            if destroyed:
                self._replica_vanished(flow)
            return
        key = flow.key
        if (self._trim or self._closing) and (destroyed or not _is_open(flow)):
            self.cache.pop(key)  # it ends here already: the kernel knows its state and timer better
        if not self.settings.replicate or not self.session.established:
            return
        if key in self._announced:
            if not destroyed and self.filter.keeps(flow):
                self._announce(key, flow, now)
            else:
                self._announced.discard(key)
                self.pending.drop(key)
                self._queue(_GONE + key, wire.tlv(wire.RECORD_DELETE, key), now)
        elif destroyed:
            pass
        elif self.filter.matches(flow):
            self._announce(key, flow, now)
        elif self.filter.is_unclear(flow) and self.filter.concerns(flow):
            self._unclear.append(flow)

    def take_unclear(self) -> list[Flow]:
        """Flows whose last event did not say enough to judge them.

        The caller looks each up in the kernel and gives what it finds to :meth:`kernel_event`.
        """
        found, self._unclear = self._unclear, []
        return found

    def _announce(self, key: bytes, flow: Flow, now: float) -> None:
        self._announced.add(key)
        waiting = self.pending.get(key)
        if waiting is not None:  # the kernel's events leave out what did not change since the last one
            known = wire.decode_flow(waiting[wire.TLV_BYTES :])
            flow = merge(known, flow) if known.reply == flow.reply else flow
        self._queue(key, wire.tlv(wire.RECORD_UPSERT, wire.encode_flow(flow)), now)

    def kernel_overrun(self) -> None:
        """Events were lost: the kernel's table is read again."""
        self.counters["overruns"] += 1
        if self.active:
            self._bulk_due = True
        else:
            self._reconcile()

    def _reconcile(self) -> None:
        """Compare this backup's kernel with the external cache, if that is worth it: it is complete."""
        if self.settings.mode == HOT_STANDBY and (self.complete or self._completing):
            self._want_dump(RECONCILE)

    def _queue(self, key: bytes, record: bytes, now: float) -> None:
        if self.pending.full:
            self.counters["pending_overflows"] += 1
            self.pending.clear()
            self._bulk_due = True
            return
        self.pending.put(key, record, now)

    def _replica_vanished(self, flow: Flow) -> None:
        """Somebody (an operator, the kernel's timer) removed an entry that the peer still has."""
        key = flow.key
        replica = self.cache.get(key)
        if replica is not None and replica.injected:
            self.counters["replicas_restored"] += 1
            self._make(key, replica)

    def is_announced(self, flow: Flow) -> bool:
        """Does this entry of the kernel belong to the internal cache: replicated, and not the peer's?"""
        return self.filter.matches(flow) and (self.active or flow.key not in self.cache)

    # --- kernel: dumps -----------------------------------------------------------------------------------------------

    @property
    def dump_room(self) -> bool:
        """May the running dump be read on?"""
        return len(self.pending) < DUMP_ROOM and len(self._kernel) < DUMP_ROOM

    def dump_slice(self, flows: Iterable[Flow], now: float) -> None:
        """Entries of the dump that :attr:`dump` asks for."""
        if self.dump is None:
            return
        take = {BULK: self._bulk_flow, RECONCILE: self._reconcile_flow, FLUSH: self._flush_flow}[self.dump.purpose]
        for flow in flows:
            take(flow, now)

    def dump_finished(self, consistent: bool, now: float) -> None:
        """The dump came to its end.  ``consistent``: the kernel's table did not move under it (NLM_F_DUMP_INTR)."""
        if self.dump is None:
            return
        purpose, self.dump = self.dump.purpose, None
        self.counters["dumps"] += 1
        if not consistent and purpose != FLUSH:
            self.counters["dumps_interrupted"] += 1
        if purpose == BULK:
            if consistent:
                self._queue(_BULK_END, wire.encode_bulk_end(self._bulk_number, self._bulk_flows), now)
            else:
                self._bulk_due = True
        elif purpose == RECONCILE:
            if consistent:
                self._reconcile_missing()
                self._adopting = False
            else:
                self._want_dump(RECONCILE)
        self._dump_seen = set()

    def _want_dump(self, purpose: str) -> None:
        if purpose not in self._dump_queue:
            self._dump_queue.append(purpose)

    def _drop_dumps(self) -> None:
        self.dump = None
        self._dump_queue.clear()
        self._dump_seen = set()

    def _next_dump(self, now: float) -> None:
        if self.active and self._bulk_due and not self._busy_with_kernel and self.session.established:
            if self.dump is not None and self.dump.purpose == BULK:
                self.dump = None  # begin again
            self._bulk_due = False
            if self.settings.replicate:
                self._want_dump(BULK)
        if self.dump is None and self._dump_queue:
            self._dumps += 1
            self.dump = Dump(self._dumps, self._dump_queue.popleft())
            self._dump_seen = set()
            if self.dump.purpose == BULK:
                self._bulk_number += 1
                self._bulk_flows = 0
                self._announced.clear()  # what this bulk does not name, and no event does, is gone
                self._queue(_BULK_BEGIN, wire.encode_bulk_begin(self._bulk_number), now)
                self.counters["bulks_sent"] += 1

    def _bulk_flow(self, flow: Flow, now: float) -> None:
        if self.filter.matches(flow):
            self._bulk_flows += 1
            key = flow.key
            self._announced.add(key)
            self._queue(key, wire.tlv(wire.RECORD_UPSERT, wire.encode_flow(flow)), now)

    def _reconcile_flow(self, flow: Flow, _now: float) -> None:
        """Compare an entry of this backup's kernel with the external cache; the cache is right.

        What the cache does not know and the filter excludes is not this daemon's to remove.
        """
        key = flow.key
        replica = self.cache.get(key)
        if replica is None:
            if self.filter.concerns(flow):
                self.counters["stale_removed"] += 1
                self._ask(DELETE, key, flow)
            return
        self._dump_seen.add(key)
        wanted = wire.decode_flow(replica.record)
        if wanted.reply != flow.reply:
            self.counters["replaced"] += 1
            self._ask(DELETE, key, flow)
            self._make(key, replica)
        elif not replica.injected and replica.asked is None:
            self._park(key, replica, wanted)

    def _reconcile_missing(self) -> None:
        for key, replica in self.cache.items():
            if key not in self._dump_seen and replica.asked is None:
                self.counters["replicas_restored"] += 1
                self._make(key, replica)

    def _flush_flow(self, flow: Flow, _now: float) -> None:
        if self.filter.concerns(flow):
            key = flow.key
            replica = self.cache.get(key)
            if replica is not None:
                replica.injected = False
            self._ask(DELETE, key, flow)

    # --- kernel: requests --------------------------------------------------------------------------------------------

    @property
    def _busy_with_kernel(self) -> bool:
        return bool(self._kernel or self._trim or self._closing or self._asked)

    @property
    def overloaded(self) -> bool:
        """The kernel is behind: the link should not be read now (the peer's credit runs out, it waits)."""
        return len(self._kernel) > DUMP_ROOM

    def kernel_requests(self, limit: int) -> list[Request]:
        """At most ``limit`` requests to carry out now; their results go to :meth:`kernel_results`."""
        out: list[Request] = []
        while self._kernel and len(out) < limit:
            out.append(self._kernel.popleft())
        asked = bool(self._asked or out)
        # only when the kernel has what it was asked for before: a replica under way still gets a parked timer
        if not asked:
            out = self._true_states(limit)
        self._asked += len(out)
        return out

    def _true_states(self, limit: int) -> list[Request]:
        """Some of what a take-over has to do, closing flows first; a large table must not stop the loop."""
        out: list[Request] = []
        for dummy in range(min(self._unsorted, SORTED_PER_TURN)):
            self._unsorted -= 1
            key = self._trim.popleft()
            replica = self.cache.get(key)
            if replica is not None:
                (self._closing if _is_closing(replica.record) else self._trim).append(key)
        for dummy in range(limit):
            ready = self._closing or (self._trim if not self._unsorted else None)
            if not ready:
                break
            request = self._true_state(ready.popleft())
            if request is not None:
                out.append(request)
        return out

    def _true_state(self, key: bytes) -> Request | None:
        """What gives a replica its true state and timer at take-over; None if it has them."""
        replica = self.cache.get(key)
        if replica is None:
            return None
        flow = wire.decode_flow(replica.record)
        lifetime = self._lifetime(flow)
        if not replica.injected:
            return Request(CREATE, key, flow, lifetime)
        if _is_closing(replica.record):
            return Request(UPDATE, key, flow, lifetime)
        if (flow.timeout or 0) - (self._now - replica.since) >= self._parked_s:
            return None  # was never parked, and has that much left
        return Request(TIMER, key, flow, lifetime)

    def _lifetime(self, flow: Flow) -> int | None:
        """Seconds that a replica may live at take-over until a packet refreshes it.

        The record may say too little: it tells what was left when the flow last made an event or a bulk named it, and
        packets refresh the timer without an event.  So an open flow gets its protocol's time, as from a packet now.
        """
        if not _is_open(flow):
            return flow.timeout
        replied, streaming = _TIMEOUT_NAMES.get(flow.proto, ("generic_timeout", "generic_timeout"))
        own = self.timeouts.get(streaming if flow.assured else replied)
        return flow.timeout if own is None else max(own, flow.timeout or 0)

    def kernel_results(self, results: Iterable[tuple[Request, int]]) -> None:
        """Results, 0 or an errno, of requests."""
        for request, error in results:
            self._asked -= 1
            if error == 0:
                self._accepted(request)
            else:
                self._failed(request, error)

    def _ask(self, operation: str, key: bytes, flow: Flow, timeout: int | None = None, attempt: int = 0) -> None:
        self._kernel.append(Request(operation, key, flow, timeout, attempt))

    def _make(self, key: bytes, replica: Replica, attempt: int = 0) -> None:
        """Have the kernel make the entry of a replica, as the peer described it last, with a parked timer."""
        flow = wire.decode_flow(replica.record)
        replica.injected = False
        replica.asked = replica.record
        self._ask(CREATE, key, flow, self._parked(flow), attempt)

    def _parked(self, flow: Flow) -> int | None:
        """A replica's timer: long, because a flow that is refreshed by traffic makes no events."""
        if self.settings.mode != HOT_STANDBY:
            return flow.timeout
        return max(flow.timeout or 0, self.settings.park_timeout_s)

    def _park(self, key: bytes, replica: Replica, flow: Flow) -> None:
        """The kernel has the entry already (an earlier life of this node): adopt it."""
        replica.injected = False
        replica.asked = replica.record
        self.counters["adopted"] += 1
        self._ask(UPDATE, key, flow, self._parked(flow), _ADOPTING)

    def _accepted(self, request: Request) -> None:
        self.counters[_DONE[request.operation]] += 1
        if request.operation != CREATE and request.attempt != _ADOPTING:
            return
        self._refused.pop(request.key, None)
        replica = self.cache.get(request.key)
        if replica is None:
            if self.active and self.settings.replicate and self.session.established:
                # a late flow of the former active node; this node's bulk may have gone out without it
                self._announce(request.key, request.flow, self._now)
            return
        if self.dump is not None:
            self._dump_seen.add(request.key)  # a running dump may have passed its place already
        asked, replica.asked, replica.injected = replica.asked, None, True
        if asked is not None and asked is not replica.record and not self.active:  # it changed meanwhile
            self._refresh(request.key, replica, wire.decode_flow(asked), wire.decode_flow(replica.record))

    def _refresh(self, key: bytes, replica: Replica, old: Flow, new: Flow) -> None:
        """Bring the kernel's entry of a replica from ``old`` to ``new``, as far as that matters before a take-over."""
        if old.reply != new.reply:
            self._ask(DELETE, key, old)
            self._make(key, replica)
        elif new.status & ~old.status & _KEPT_BITS or any(
            getattr(old, name) != getattr(new, name) for name in _KEPT_FIELDS
        ):
            self._ask(UPDATE, key, new, self._parked(new))

    def _failed(self, request: Request, error: int) -> None:
        operation, key, flow, timeout, attempt = request
        replica = self.cache.get(key)
        if operation == DELETE:
            if error != errno.ENOENT:
                self._refuse(request, error)
        elif operation in (UPDATE, TIMER):
            if error == errno.ENOENT and replica is not None and operation == UPDATE and self.active:
                self._ask(CREATE, key, flow, timeout, 1)
            elif error == errno.ENOENT and self.active:
                pass  # it ended meanwhile
            elif error == errno.ENOENT and replica is not None and (attempt == _ADOPTING or replica.asked is None):
                self._make(key, replica, 1)
            elif error == errno.EBUSY and operation == UPDATE:
                self.counters["status_kept"] += 1  # the entry has status bits that the peer's has not
                self._ask(TIMER, key, flow, timeout, attempt)
            elif error != errno.ENOENT:
                self._refuse(request, error)
        elif replica is None and not self.active:
            pass  # the peer removed it meanwhile
        elif error == errno.EEXIST and self.active:
            self.counters["kept_own"] += 1  # the flow passed here already: this node knows it better
        elif error == errno.EEXIST and replica is not None and replica.injected:
            pass  # another request was faster
        elif error == errno.EEXIST and attempt == 0 and replica is not None:
            if self._adopting:
                self._park(key, replica, wire.decode_flow(replica.record))
            else:
                self._ask(DELETE, key, flow)
                self._make(key, replica, 1)
        elif error in (errno.ENOENT, errno.EOPNOTSUPP) and flow.master is not None and attempt < 2:
            self.counters["degraded_without_master"] += 1
            self._ask(CREATE, key, flow._replace(master=None, master_proto=0), timeout, 2)
        elif error != errno.EEXIST and flow.helper is not None and attempt < 3:
            self.counters["degraded_without_helper"] += 1
            self._ask(CREATE, key, flow._replace(helper=None), timeout, 3)
        else:
            self._refuse(request, error)

    def _refuse(self, request: Request, error: int) -> None:
        name = errno.errorcode.get(error, str(error)).lower()
        self.counters[f"kernel_refused_{request.operation}_{name}"] += 1
        replica = self.cache.get(request.key)
        if replica is not None and (request.operation == CREATE or request.attempt == _ADOPTING):
            replica.injected, replica.asked = False, None
            self._refused[request.key] = error
            if self._refused_at is None:
                self._refused_at = self._now + self._refused_wait_s

    # --- the peer ----------------------------------------------------------------------------------------------------

    def receive(self, datagram: bytes, now: float) -> None:
        """A datagram from the peer's address."""
        for event in self.session.receive(datagram, now):
            if isinstance(event, BlockReceived):
                self._receive_records(event.records, now)
            elif isinstance(event, StatusReceived):
                self._peer = event.status
                self._peer_left = False
            elif isinstance(event, SessionUp):
                self._session_up(now)
            elif isinstance(event, PeerLeft):
                self.counters["peer_left"] += 1
                self._peer_left = True
                self._peer = wire.Status(wire.ROLE_UNKNOWN, 0, 0)

    def _session_up(self, now: float) -> None:
        self._session_since = now
        self._request_at = now + REQUEST_BULK_AFTER_S
        self._peer = wire.Status(wire.ROLE_UNKNOWN, 0, 0)
        self.pending.clear()
        self._announced.clear()
        self.cache.end_bulk()
        self._completing = False
        if self.active:
            self._bulk_due = True
        else:
            self.complete = False

    def _receive_records(self, records: bytes, now: float) -> None:
        try:
            for kind, payload in wire.iter_tlv(records):
                self.counters["records_received"] += 1
                try:
                    self._receive_record(kind, payload, now)
                except WireError as error:
                    self.counters["records_" + error.kind] += 1
        except WireError as error:  # where the next record begins is unknown
            self.counters["records_" + error.kind] += 1

    def _receive_record(self, kind: int, payload: bytes, now: float) -> None:
        if not self.settings.replicate:
            self.counters["ignored_replication_off"] += 1
        elif kind == wire.RECORD_UPSERT:
            flow = wire.decode_flow(payload)
            if not self.filter.passes_through(flow):
                self.counters["refused_own_addresses"] += 1
            elif not self.filter.selects(flow):
                self._exclude(flow)
            elif self.active:
                self._ask(CREATE, flow.key, flow, self._lifetime(flow))
            else:
                self._upsert(flow.key, flow, payload, now)
        elif kind == wire.RECORD_DELETE:
            wire.decode_key(payload)
            if not self.active:
                self._delete(payload)
        elif kind == wire.RECORD_BULK_BEGIN:
            wire.decode_bulk_begin(payload)
            if not self.active:
                self.cache.begin_bulk()
                self._excluded = 0
                self._completing = False
                self._adopting = self.settings.mode == HOT_STANDBY
        elif kind == wire.RECORD_BULK_END:
            wire.decode_bulk_end(payload)
            if not self.active and self.cache.bulk_running:
                self._bulk_ended()
        elif kind == wire.RECORD_BULK_REQUEST:
            self.counters["bulks_requested"] += 1
            self._bulk_due = self._bulk_due or self.active
        else:
            self.counters["skipped_unknown_record"] += 1

    def _exclude(self, flow: Flow) -> None:
        """The peer replicates what this node's filter excludes: the filters are different."""
        self.counters["refused_by_filter"] += 1
        if not self.active:
            self._excluded += 1
            self._delete(flow.key)

    def _upsert(self, key: bytes, flow: Flow, record: bytes, now: float) -> None:
        known = self.cache.get(key)
        before = known.record if known is not None else None
        old = None
        if before is not None and before != record:
            old = wire.decode_flow(before)
            if old.reply == flow.reply:  # the kernel's events leave out what did not change
                flow = merge(old, flow)
                record = wire.encode_flow(flow)
        replica = self.cache.put(key, record, now)
        if replica is None:
            self.counters["external_cache_full"] += 1
        elif self.settings.mode != HOT_STANDBY or replica.asked is not None:
            return
        elif not replica.injected:
            self._make(key, replica)
        elif old is not None:
            self._refresh(key, replica, old, flow)

    def _delete(self, key: bytes) -> None:
        replica = self.cache.pop(key)
        self._refused.pop(key, None)
        if replica is not None and self.settings.mode == HOT_STANDBY:
            self._ask(DELETE, key, wire.decode_flow(replica.record))

    def _bulk_ended(self) -> None:
        """What the bulk did not name is stale and goes; then this kernel's table is compared with the cache."""
        for key in self.cache.end_bulk():
            self.counters["stale_removed"] += 1
            self._delete(key)
        self.counters["bulks_received"] += 1
        self._completing = True
        if self.settings.mode == HOT_STANDBY:
            self._want_dump(RECONCILE)

    # --- commands ----------------------------------------------------------------------------------------------------

    def commit(self) -> int:
        """Put every flow of the external cache that the kernel does not hold into the kernel; returns how many."""
        waiting = [key for key, replica in self.cache.items() if not replica.injected]
        self._trim.extend(waiting)
        return len(waiting)

    def flush_external(self) -> int:
        """Forget the external cache (the kernel keeps its entries); returns how many entries it had."""
        forgotten = len(self.cache)
        self.cache.clear()
        self._refused.clear()
        if not self.active:
            self.complete = self._completing = False
        return forgotten

    def flush_kernel(self) -> None:
        """Remove from this node's kernel every flow that the engine would replicate."""
        self._want_dump(FLUSH)

    def resync(self) -> None:
        """Read the kernel's table again: the active node sends it, a backup compares it with its external cache."""
        if self.active:
            self._bulk_due = True
        else:
            self._reconcile()

    def request_bulk(self, now: float) -> None:
        """Ask the active peer for its whole table."""
        self._request_at = now + REQUEST_BULK_AFTER_S
        self._queue(_BULK_REQUEST, wire.tlv(wire.RECORD_BULK_REQUEST), now)

    def purge_later(self, now: float) -> None:
        """In ``PURGE_AFTER_S`` remove entries from this backup's kernel that the peer does not have."""
        if self._purge_at is None:
            self._purge_at = now + PURGE_AFTER_S

    def refusals(self) -> int:
        """Requests that the kernel refused so far."""
        return sum(count for name, count in self.counters.items() if name.startswith("kernel_refused_"))

    @property
    def idle(self) -> bool:
        """Nothing is under way towards the kernel."""
        return not (self._busy_with_kernel or self.dump or self._dump_queue)

    # --- output ------------------------------------------------------------------------------------------------------

    def poll(self, now: float) -> list[bytes]:
        """Datagrams to send to the peer now."""
        self._now = now
        self._housekeeping(now)
        self.session.set_status(self._status())
        self._send_pending(now)
        return self.session.poll(now)

    def next_deadline(self) -> float:
        """When :meth:`poll` wants to be called next (monotonic seconds)."""
        times = (self.session.next_deadline(), self._purge_at, self._refused_at)
        return min(moment for moment in times if moment is not None)

    def _housekeeping(self, now: float) -> None:
        if self._purge_at is not None and now >= self._purge_at:
            self._purge_at = None
            self.resync()
        if self._refused_at is not None and now >= self._refused_at:
            self._retry_refused()
        taken_over = self.settings.mode == HOT_STANDBY or self.settings.commit_at_takeover
        if self.active and taken_over and len(self.cache) and not self._busy_with_kernel:
            self.cache.clear()  # these flows are this node's own now
        if self._completing and self.dump is None and not self._dump_queue and not self._busy_with_kernel:
            self._completing = False
            self.complete = True
        if (
            not self.active
            and self.settings.replicate
            and not self.complete
            and not self._completing
            and not self.cache.bulk_running
            and self._peer.role == wire.ROLE_ACTIVE
            and now >= self._request_at
        ):
            self.request_bulk(now)
        self._next_dump(now)

    def _retry_refused(self) -> None:
        """What stood in the way may be gone, and what is stale here goes by the comparison."""
        self._refused_at = None
        if self.active or not self._refused:
            self._refused_wait_s = RETRY_REFUSED_S
            return
        self.counters["refused_tried_again"] += len(self._refused)
        self._refused_wait_s = min(self._refused_wait_s * 2, RETRY_REFUSED_MAX_S)
        self._refused_at = self._now + self._refused_wait_s
        self._reconcile()

    def _send_pending(self, now: float) -> None:
        session = self.session
        while len(self.pending) and session.credit() > 0:
            records, born = self.pending.take(session.block_bytes)
            block = b"".join(records)
            if len(block) > session.block_bytes:
                self.counters["records_too_long"] += 1
                continue
            session.send_block(block, len(records), born, now)

    def _status(self) -> wire.Status:
        flags = wire.STATUS_REPLICATES if self.settings.replicate else 0
        if self.complete:
            flags |= wire.STATUS_COMPLETE
        return wire.Status(_ROLE_CODES.get(self.role, wire.ROLE_UNKNOWN), flags, len(self.cache))

    # --- what people and keepalived want to know ---------------------------------------------------------------------

    def lag(self, now: float) -> tuple[int, float]:
        """Changes that the peer has not acknowledged, and the age of the oldest in seconds."""
        sent, oldest = self.session.lag()
        waiting = self.pending.oldest
        times = [moment for moment in (oldest, waiting) if moment is not None]
        return sent + len(self.pending), max(0.0, now - min(times)) if times else 0.0

    def verdict(self, now: float) -> readiness.Verdict:
        return readiness.judge(
            readiness.Facts(
                role=self.role if self._side != readiness.ACTIVE or self.role == readiness.BACKUP else readiness.ACTIVE,
                replicate=self.settings.replicate,
                peer=self.session.peer,
                session=self.session.established,
                peer_alive=self.session.alive(now),
                peer_left=self._peer_left,
                peer_silent_s=None if self.session.last_seen is None else max(0.0, now - self.session.last_seen),
                peer_role=_ROLE_NAMES.get(self._peer.role, ""),
                peer_replicates=bool(self._peer.flags & wire.STATUS_REPLICATES),
                peer_complete=bool(self._peer.flags & wire.STATUS_COMPLETE),
                complete=self.complete,
                waiting=len(self._kernel) if len(self._kernel) > DUMP_ROOM else 0,
                refused=collections.Counter(self._refused.values()),
                lag_s=self.lag(now)[1],
                lag_limit_s=self.settings.lag_limit_s,
                problem=self.problem,
                impaired=self._impairments(),
            )
        )

    def _impairments(self) -> tuple[str, ...]:
        if self.active or not self._excluded:
            return self.impaired
        text = f"{self.session.peer} replicates flows that this node's filter excludes: give both the same filter"
        return (*self.impaired, text)

    def peer_status(self, now: float) -> dict[str, Any]:
        """The peer's part of ``status --json``."""
        alive = self.session.alive(now)
        events, age = self.lag(now)
        last = self.session.last_seen
        bulk = "complete" if self.complete else "receiving" if self.cache.bulk_running or self._completing else "none"
        return {
            "node": self.session.peer,
            "state": "up" if alive else "silent" if self.session.established else "handshake",
            "role": _ROLE_NAMES.get(self._peer.role, "unknown") if alive else "unknown",
            "complete": bool(self._peer.flags & wire.STATUS_COMPLETE),
            "last_seen_s": None if last is None else round(max(0.0, now - last), 3),
            "lag": {"events": events, "age_s": round(age, 3)},
            "bulk": bulk,
        }

    def external_flows(self) -> Iterator[tuple[Flow, float]]:
        """The external cache: flows and when their replication began (monotonic seconds)."""
        for _key, replica in self.cache.items():
            yield wire.decode_flow(replica.record), replica.since


def _filtering(settings: Settings) -> tuple[object, ...]:
    return settings.filter, settings.ignore, settings.unreplied


def _filter(settings: Settings) -> Filter:
    return Filter(settings.filter, settings.ignore, settings.unreplied)


def _is_open(flow: Flow) -> bool:
    """Neither half-open nor closing, as far as the flow says."""
    return flow.state is None or flow.state == _OPEN.get(flow.proto, flow.state)


def _is_closing(record: bytes) -> bool:
    state = wire.tcp_state(record)
    return state is not None and state > TCP_ESTABLISHED
