# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine: kernel events, the peer's datagrams, roles and commands in; datagrams and work for the kernel out.

Sans-I/O: no socket, no clock.  The daemon feeds it and carries out what :meth:`Engine.poll`,
:meth:`Engine.kernel_work`, :meth:`Engine.take_questions` and :attr:`Engine.dump` ask for.  Times are monotonic seconds
given by the caller.

The active node sends every change of every flow worth replicating.  The backup stores it in the external cache and, in
hot standby, has the kernel hold it at once with a *parked* (long) timer, because a flow that is refreshed by traffic
makes no events.  Who is active is decided elsewhere (keepalived); the engine is told.

Flows are rows (:mod:`rows`), and nearly all of them are handled many at a time.  Flow by flow goes what has extras,
what the kernel refuses, and what changed in more than its state.
"""

from __future__ import annotations

import collections
import errno
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Union

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
from .ctnetlink import FALLBACK_TIMEOUT, flow_of_key
from .errors import WireError
from .filters import Filter
from .flow import Flow
from .pending import Pending
from .rows import (
    MARK_FROM_END,
    NO_TIMEOUT,
    SCALE_FROM_END,
    STATE_FROM_END,
    STATUS_FROM_END,
    TAIL_BYTES,
    TIMEOUT_FROM_END,
    Changes,
    merge_extras,
    merge_value,
    pack,
    pack_extras,
    unpack,
)
from .session import BlockReceived, PeerLeft, Session, SessionUp, StatusReceived
from .tables import Copies, ExternalCache

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

GIVE = "give"  # this backup's table for an active node that lacks it

WORK_SIZE = 1024  # rows in one piece of work
FEW_ROWS = 16  # up to which they are compared one by one
SORTED_PER_TURN = 5_000  # replicas looked at in search of closing flows, or given to the peer
EARLY_FLOWS = 16_384  # not replicated yet, of which extras are kept (some 200 bytes each)
DUMP_ROOM = 20_000  # changes or requests that may wait before a dump, or the link, is read on
REQUEST_BULK_AFTER_S = 2.0
PURGE_AFTER_S = 60.0
RETRY_REFUSED_S = 10.0  # at first; the wait doubles from one vain attempt to the next
RETRY_REFUSED_MAX_S = 600.0
REREAD_S = 5.0  # before the table is read again where events go on to be lost; doubles
REREAD_MAX_S = 60.0
SPLIT_BRAIN_S = 3.0  # both active for longer: not late flows of the former active node any more
LEARN_S = 10.0  # how long an active node without a table waits for a sign that its peer gives it one
LEARN_WITHIN_S = 300.0  # of becoming active; later the peer's table is older than its own

# Steps of an active node towards the table of its peer
_DUE = "due"
_ASKED = "asked"
_RECEIVING = "receiving"

_ADOPTING = 1  # attempt of an update whose success means: the kernel holds the replica

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


class Work(NamedTuple):
    """The same request for flows of one shape.  ``values`` and ``timeouts`` are empty where they say nothing."""

    operation: str
    key_len: int
    keys: list[bytes]
    values: list[bytes]
    timeouts: list[int]
    attempt: int = 0

    def part(self, first: int, end: int) -> Work:
        return self._replace(
            keys=self.keys[first:end], values=self.values[first:end], timeouts=self.timeouts[first:end]
        )

    def request(self, index: int) -> Request:
        """One of them as a request of its own.  Of a flow to be deleted only the key is known."""
        key = self.keys[index]
        value = self.values[index] if self.values else None
        flow = flow_of_key(key) if value is None else unpack(key, value)
        return Request(self.operation, key, flow, self.timeouts[index] if self.timeouts else None, self.attempt)


Job = Union[Work, Request]


class Question(NamedTuple):
    """The caller looks up the kernel's entry with this original tuple, in any direction, for :meth:`Engine.answer`.

    ``replica``: the key of the replica that the entry stands in the way of.
    """

    flow: Flow
    replica: bytes = b""


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
        self.cache = ExternalCache(settings.table_limit, now)
        self.copies = Copies(settings.mode == HOT_STANDBY)
        self.pending = Pending(settings.table_limit)
        self.dump: Dump | None = None
        self.problem = ""  # what stops replication: the node cannot become ready
        self.impaired: tuple[str, ...] = ()  # what an operator should mend, but does not stop it
        self.timeouts: Mapping[str, int] = {}  # this kernel's, in seconds: sysctls net.netfilter.nf_conntrack_NAME
        self.complete = False
        self.cold_start = False  # of the kernel's table nothing is known: the node booted, it did not go on
        self._side = ""  # ACTIVE or BACKUP: the last role that was not a transition
        self.filter = _filter(settings)
        self._parked_s = settings.park_timeout_s  # the longest timer that a replica may be parked with
        self._excluded = 0  # flows of the peer's last bulk, and since, that this node's filter excludes
        self._questions: list[Question] = []
        self._announced: set[bytes] = set()
        # Extras of flows that are not announced yet: the kernel tells most of them only once
        self._early: collections.OrderedDict[bytes, bytes] = collections.OrderedDict()
        self._kernel: collections.deque[Job] = collections.deque()
        self._queued = 0  # flows in it
        self._trim: collections.deque[bytes] = collections.deque()  # replicas whose true state is due
        self._closing: collections.deque[bytes] = collections.deque()  # those of them that go first
        self._unsorted = 0  # how many of the first in _trim may be closing
        self._asked = 0  # flows handed out whose result is not here yet
        self._refused_wait_s = RETRY_REFUSED_S
        self._refused_at: float | None = None  # when they are tried again
        self._dumps = 0
        self._dump_queue: collections.deque[str] = collections.deque()
        self._dump_seen: set[bytes] = set()  # keys that a running dump need not tell of any more
        self._bulk_number = 0
        self._bulk_flows = 0
        self._bulk_last = 0  # flows of the bulk before
        self._bulk_due = False
        self._reread_at: float | None = None  # events were lost: when the table is read again
        self._reread_wait_s = REREAD_S
        self._lost_at: float | None = None  # when events were lost last
        self._giving: collections.deque[bytes] | None = None  # replicas that the peer asked for and has not got
        self._completing = False
        self._adopting = False
        self._informed = False  # this node's table is as good as any: complete, or its own
        self._learn = ""  # a step towards the peer's table
        self._learn_until = now
        self._peer = wire.Status(wire.ROLE_UNKNOWN, 0, 0)
        self._peer_left = False
        self._both_active_since: float | None = None
        self._both_active_at = now  # when the peer said so last
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
        excluded = []
        for key, value, extras, _since in self.cache.items():
            if not self.filter.concerns(unpack(key, value, extras)):
                self.counters["excluded_removed"] += 1
                excluded.append(key)
        self._delete(excluded)
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
        self._both_active_since = None
        if role == readiness.ACTIVE:
            self._become_active(first, now)
        else:
            self._become_backup(now)

    def _become_active(self, first: bool, now: float) -> None:
        """The virtual IPs are here.  In hot standby the kernel holds the flows already: nothing stands in the way.

        What follows sets true states and timers, closing flows first; then the peer is told the whole table.  Where
        this node may lack flows it learns from the peer first, what it can.
        """
        self._drop_dumps()
        self.cache.end_bulk()
        self._announced = set()
        self._early.clear()
        self._purge_at = None
        if not (self._informed or self.complete or (first and not self.cold_start)):
            self._learn = _DUE
            self._learn_until = now + LEARN_S
        self._informed = True
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
        self._queued = 0
        self._announced = set()
        self._early.clear()
        self.cache.clear()
        self.copies.clear()
        self._excluded = 0
        self.complete = False
        self._completing = False
        if self._learn:  # it never knew all
            self._informed = False
            self._learn = ""
        self._session_since = now
        if not self.session.established:
            self.pending.clear()

    # --- kernel: events ----------------------------------------------------------------------------------------------

    def set_addresses(self, own: Iterable[bytes]) -> None:
        """Addresses of this node, virtual IPs included (packed): flows that begin or end here are not replicated."""
        self.filter.own = frozenset(own)

    def kernel_changes(self, changes: Changes, now: float) -> None:
        """What conntrack events said that this daemon did not cause."""
        self.counters["events"] += changes.events
        if not self.active:
            if changes.gone:
                self._replicas_vanished(changes.gone)
        else:
            self._changed(changes, now)
        if changes.lost:
            self._events_lost(now)

    def _changed(self, changes: Changes, now: float) -> None:
        gone = changes.gone
        if self._trim or self._closing:
            self._forget_ended(changes)
        if not self.settings.replicate or not self.session.established:
            return
        if self.dump is not None and self.dump.purpose == BULK:  # what the dump says of them may be older
            self._dump_seen.update(gone, *changes.rows.values())
        if gone:
            if self._early:
                for key in gone:
                    self._early.pop(key, None)
            if self.dump is None or self.dump.purpose != BULK:
                announced = self._announced
                gone = [key for key in gone if key in announced]
            self._end(gone, now)
        for key_len, rows in changes.rows.items():
            self._judge_rows(key_len, rows, now)
        for flow in changes.flows:
            self._judge(flow, now)

    def _forget_ended(self, changes: Changes) -> None:
        """While replicas get their true states: what ends here already the kernel knows better."""
        table = self.cache.table
        ended = [key for key in changes.gone if key in table]
        for rows in changes.rows.values():
            ended.extend(
                key for key, value in rows.items() if key in table and not _is_open(key[0], value[-STATE_FROM_END])
            )
        ended.extend(flow.key for flow in changes.flows if not _is_open(flow.proto, flow.state))
        for key in ended:
            self.cache.pop(key)
        self.copies.forget(ended)

    def _judge_rows(self, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        chosen = self.filter.select_rows(key_len, rows)
        if len(chosen) != len(rows):
            announced = self._announced
            others = {key: value for key, value in rows.items() if key in announced and key not in chosen}
            if others:
                kept = self.filter.keep_rows(key_len, others)
                self._end([key for key in others if key not in kept], now)
                chosen = {**chosen, **kept}
        if chosen and self._fits(len(chosen)):
            self._put_rows(key_len, chosen, now)

    def _put_rows(self, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        self._announced.update(rows)
        early = self._early.keys() & rows.keys() if self._early else ()
        if early:
            for key in early:
                self.pending.put_flow(key, rows[key], self._early.pop(key), now)
            rows = {key: value for key, value in rows.items() if key not in early}
        self.pending.put_rows(key_len, rows, now)

    def _judge(self, flow: Flow, now: float) -> None:
        key = flow.key
        if key in self._announced:
            if self.filter.keeps(flow):
                self._announce(flow, now)
            else:
                self._end((key,), now)
        elif self.filter.matches(flow):
            self._announce(flow, now)
        else:
            self._remember(flow)
            if self.filter.is_unclear(flow) and self.filter.concerns(flow):
                self._questions.append(Question(flow))

    def _remember(self, flow: Flow) -> None:
        """Keep the extras of a flow that is not replicated yet, until it is or ends; the oldest go first."""
        extras = pack_extras(flow._replace(sctp_vtags=None))  # these come with every state
        if not extras or not self.filter.passes_through(flow):
            return
        early, key = self._early, flow.key
        early[key] = merge_extras(early.get(key, b""), extras)
        if len(early) > EARLY_FLOWS:
            early.popitem(last=False)
            self.counters["early_extras_dropped"] += 1

    def _announce(self, flow: Flow, now: float) -> None:
        if self._fits(1):
            key, value, extras = pack(flow)
            if self._early:
                extras = merge_extras(self._early.pop(key, b""), extras)
            self._announced.add(key)
            self.pending.put_flow(key, value, extras, now)

    def _end(self, keys: Sequence[bytes], now: float) -> None:
        if keys and self._fits(len(keys)):
            self._announced.difference_update(keys)
            self.pending.remove(keys, now)

    def _mark(self, record: bytes, now: float) -> None:
        if self._fits(1):
            self.pending.mark(record, now)

    def _fits(self, changes: int) -> bool:
        """Is there room for so many changes?  If not, all that wait are dropped, and a bulk replaces them."""
        if len(self.pending) + changes <= self.pending.limit:
            return True
        self.counters["pending_overflows"] += 1
        self.pending.clear()
        self._giving = None
        if self.dump is not None and self.dump.purpose in (BULK, GIVE):
            self.dump = None  # its beginning is lost
        self._bulk_due = self.active
        return False

    def take_questions(self) -> list[Question]:
        """What the kernel must be asked; the caller gives what it finds to :meth:`answer`."""
        found, self._questions = self._questions, []
        return found

    def answer(self, question: Question, found: Flow | None, now: float) -> None:
        """The kernel's entry, None if there is none."""
        if not question.replica:  # an event that did not say enough to judge it
            if found is not None and self.active and self.settings.replicate and self.session.established:
                self._judge(found, now)
            return
        if self.active or question.replica not in self.cache:
            return
        if found is not None and found.key not in self.cache and self.filter.concerns(found):
            self.counters["stale_removed"] += 1
            self._work(DELETE, [found.key])
        self._make((question.replica,), 1)

    def _events_lost(self, now: float) -> None:
        """The kernel's table is read again: at once, or later where events go on to be lost."""
        self.counters["overruns"] += 1
        calm = self._lost_at is None or now - self._lost_at > REREAD_MAX_S
        self._lost_at = now
        if calm:
            self._reread_wait_s = REREAD_S
        if self._reread_at is not None:
            return
        if calm and not self._rereading:
            self._reread_at = now
            return
        self._reread_at = now + self._reread_wait_s
        self._reread_wait_s = min(self._reread_wait_s * 2, REREAD_MAX_S)

    @property
    def _rereading(self) -> bool:
        purposes = (BULK, RECONCILE)
        return (self.dump is not None and self.dump.purpose in purposes) or any(
            purpose in purposes for purpose in self._dump_queue
        )

    def _reread(self, now: float) -> None:
        if self._reread_at is not None and now >= self._reread_at and not self._rereading:
            self._reread_at = None
            self.resync()

    def _reconcile(self) -> None:
        """Compare this backup's kernel with the external cache, if that is worth it: it is complete."""
        if self.settings.mode == HOT_STANDBY and (self.complete or self._completing):
            self._want_dump(RECONCILE)

    def _replicas_vanished(self, keys: Iterable[bytes]) -> None:
        """Somebody (an operator, the kernel's timer) removed entries that the peer still has."""
        table, held = self.cache.table, self.copies.held
        vanished = [key for key in keys if key in table and held(key)]
        self.counters["replicas_restored"] += len(vanished)
        self._make(vanished)

    def internal(self, flow: Flow) -> bool:
        """Does this entry of the kernel belong to the internal cache: replicated, and not the peer's?"""
        return self.filter.matches(flow) and (self.active or flow.key not in self.cache)

    # --- kernel: dumps -----------------------------------------------------------------------------------------------

    @property
    def dump_room(self) -> bool:
        """May the running dump be read on?"""
        return len(self.pending) < DUMP_ROOM and self._queued < DUMP_ROOM

    def dump_slice(self, changes: Changes, now: float) -> None:
        """Entries of the dump that :attr:`dump` asks for."""
        if self.dump is None:
            return
        take_rows, take_flow = {
            BULK: (self._bulk_rows, self._bulk_flow),
            RECONCILE: (self._reconcile_rows, self._reconcile_flow),
            FLUSH: (self._flush_rows, self._flush_flow),
            GIVE: (self._give_rows, self._give_flow),
        }[self.dump.purpose]
        for key_len, rows in changes.rows.items():
            take_rows(key_len, rows, now)
        for flow in changes.flows:
            take_flow(flow, now)

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
                self._bulk_last = self._bulk_flows
                self._mark(wire.encode_bulk_end(self._bulk_number, self._bulk_flows), now)
            else:
                self._bulk_due = True
        elif purpose == RECONCILE:
            if consistent:
                self._reconcile_missing()
                self._adopting = False
            else:
                self._want_dump(RECONCILE)
        elif purpose == GIVE and not consistent:
            self._giving = None
            self._want_dump(GIVE)
        if purpose in (BULK, RECONCILE) and self._reread_at is not None:
            self._reread_at = max(self._reread_at, now + REREAD_S)
        self._dump_seen = set()

    def _want_dump(self, purpose: str) -> None:
        if purpose not in self._dump_queue:
            self._dump_queue.append(purpose)

    def _drop_dumps(self) -> None:
        self.dump = None
        self._giving = None
        self._dump_queue.clear()
        self._dump_seen = set()
        self._reread_at = None

    def _next_dump(self, now: float) -> None:
        if (
            self.active
            and self._bulk_due
            and not self._learn
            and not self._busy_with_kernel
            and self.session.established
            and (self.dump is None or self.dump.purpose != BULK)  # a running one comes to its end first
        ):
            self._bulk_due = False
            if self.settings.replicate:
                self._want_dump(BULK)
        if self.dump is None and self._dump_queue:
            self._dumps += 1
            self.dump = Dump(self._dumps, self._dump_queue.popleft())
            self._dump_seen = set()
            if self.dump.purpose in (BULK, GIVE):
                self._bulk_number += 1
                self._bulk_flows = 0
                self._announced = set()  # what this bulk does not name, and no event does, is gone
                self._mark(wire.encode_bulk_begin(self._bulk_number), now)
                self.counters["bulks_sent" if self.dump.purpose == BULK else "bulks_given"] += 1
            if self.dump.purpose == GIVE:
                self._giving = collections.deque(self.cache.keys())

    def _bulk_rows(self, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        self._name(key_len, self.filter.select_rows(key_len, rows), now)

    def _name(self, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        seen = self._dump_seen
        if seen:
            rows = {key: value for key, value in rows.items() if key not in seen}
        if rows and self._fits(len(rows)):
            self._bulk_flows += len(rows)
            self._put_rows(key_len, rows, now)

    def _bulk_flow(self, flow: Flow, now: float) -> None:
        if flow.key in self._dump_seen:
            if flow.key in self._announced:
                self._questions.append(Question(flow))  # its event is newer, but may have left out the extras
            return
        if self.filter.matches(flow):
            self._bulk_flows += 1
            self._announce(flow, now)
        else:
            self._remember(flow)

    def _give_rows(self, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        """What the cache does not know; a timer that may be parked says nothing of the flow."""
        table, parked = self.cache.table, self.settings.park_timeout_s
        others = {
            key: value if _timeout(value) < parked else _untimed(value)
            for key, value in self.filter.select_rows(key_len, rows).items()
            if key not in table
        }
        if others and self._fits(len(others)):
            self._bulk_flows += len(others)
            self.pending.put_rows(key_len, others, now)

    def _give_flow(self, flow: Flow, now: float) -> None:
        if self.filter.matches(flow) and flow.key not in self.cache and self._fits(1):
            self._bulk_flows += 1
            if flow.timeout is not None and flow.timeout >= self.settings.park_timeout_s:
                flow = flow._replace(timeout=None)
            self.pending.put_flow(*pack(flow), now)

    def _give(self, now: float) -> None:
        """Send the peer some of the replicas that it asked for; the bulk ends when cache and kernel are through."""
        if self._giving is None or len(self.pending) >= DUMP_ROOM:
            return
        rows: dict[int, dict[bytes, bytes]] = {}
        room = self.pending.limit - len(self.pending) - 1
        for dummy in range(min(len(self._giving), SORTED_PER_TURN, room)):
            replica = self.cache.get(self._giving.popleft())
            if replica is None:
                continue
            self._bulk_flows += 1
            if replica.extras:
                self.pending.put_flow(replica.key, replica.value, replica.extras, now)
            else:
                rows.setdefault(len(replica.key), {})[replica.key] = replica.value
        for key_len, part in rows.items():
            self.pending.put_rows(key_len, part, now)
        if not self._giving and (self.dump is None or self.dump.purpose != GIVE):
            self._giving = None
            self._mark(wire.encode_bulk_end(self._bulk_number, self._bulk_flows), now)

    def _reconcile_rows(self, key_len: int, rows: Mapping[bytes, bytes], _now: float) -> None:
        """Compare entries of this backup's kernel with the external cache; the cache is right.

        What the cache does not know and the filter excludes is not this daemon's to remove.
        """
        table = self.cache.table
        known = [key for key in rows if key in table]
        if len(known) != len(rows):
            unknown = {key: value for key, value in rows.items() if key not in table}
            stale = list(self.filter.concerned_rows(key_len, unknown))
            self.counters["stale_removed"] += len(stale)
            self._work(DELETE, stale)
        if not known:
            return
        self._dump_seen.update(known)
        end = len(rows[known[0]]) - TAIL_BYTES
        replaced = [key for key in known if rows[key][:end] != table[key][:end]]
        if replaced:
            self._replace(replaced)
        if not self.copies.settled:
            self._park([key for key in known if key not in self.copies.asked and not self.copies.held(key)])

    def _reconcile_flow(self, flow: Flow, now: float) -> None:
        key, value, _extras = pack(flow)
        self._reconcile_rows(len(key), {key: value}, now)

    def _reconcile_missing(self) -> None:
        seen, asked = self._dump_seen, self.copies.asked
        missing = [key for key in self.cache.table if key not in seen and key not in asked]
        self.counters["replicas_restored"] += len(missing)
        self._make(missing)

    def _flush_rows(self, key_len: int, rows: Mapping[bytes, bytes], _now: float) -> None:
        doomed = list(self.filter.concerned_rows(key_len, rows))
        self.copies.lose([key for key in doomed if key in self.cache])
        self._work(DELETE, doomed)

    def _flush_flow(self, flow: Flow, now: float) -> None:
        key, value, _extras = pack(flow)
        self._flush_rows(len(key), {key: value}, now)

    # --- kernel: work ------------------------------------------------------------------------------------------------

    @property
    def _busy_with_kernel(self) -> bool:
        return bool(self._kernel or self._trim or self._closing or self._asked)

    @property
    def overloaded(self) -> bool:
        """The kernel is behind: the link should not be read now (the peer's credit runs out, it waits)."""
        return self._queued > DUMP_ROOM

    def kernel_work(self, limit: int) -> list[Job]:
        """Requests for at most ``limit`` flows, to be carried out now, one piece after the other.

        The result of each piece goes to :meth:`kernel_results`.
        """
        out: list[Job] = []
        room = limit
        while self._kernel and room > 0:
            job = self._kernel[0]
            size = _size(job)
            if isinstance(job, Work) and size > room:
                self._kernel[0] = job.part(room, size)
                job, size = job.part(0, room), room
            else:
                self._kernel.popleft()
            self._queued -= size
            room -= size
            out.append(job)
        # only when the kernel has what it was asked for before: a replica under way still gets a parked timer
        if not (self._asked or out):
            out = self._true_states(limit)
        self._asked += sum(map(_size, out))
        return out

    def _true_states(self, limit: int) -> list[Job]:
        """Some of what a take-over has to do, closing flows first; a large table must not stop the loop."""
        for dummy in range(min(self._unsorted, SORTED_PER_TURN)):
            self._unsorted -= 1
            key = self._trim.popleft()
            value = self.cache.value(key)
            if value is not None:
                (self._closing if _is_closing(key, value) else self._trim).append(key)
        keys = _pop(self._closing, limit)
        if not self._unsorted:
            keys += _pop(self._trim, limit - len(keys))
        jobs: list[Job] = []
        groups: dict[tuple[str, int], Work] = {}
        lifetimes: dict[tuple[int, bytes], int] = {}
        lacking = set(self.copies.lacking(keys))
        values, extras = self.cache.value, self.cache.extras
        for key in keys:
            value = values(key)
            operation = "" if value is None else CREATE if key in lacking else self._true_state(key, value)
            if value is None or not operation:
                continue
            kind = (key[0], value[-STATUS_FROM_END : 1 - STATE_FROM_END])  # all that the lifetime depends on
            lifetime = lifetimes.get(kind)
            if lifetime is None:
                lifetime = lifetimes[kind] = self._lifetime(key, value)
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

    def _true_state(self, key: bytes, value: bytes) -> str:
        """The operation that gives a replica that the kernel holds its true state and timer at take-over; nothing if it
        has them."""
        if key[0] == IPPROTO_GRE:
            return ""  # the timer is fixed, see ctnetlink.create
        if _is_closing(key, value):
            return UPDATE
        told = _known_timeout(value) or 0
        if told >= self._parked_s:
            replica = self.cache.get(key)
            if replica is not None and told - (self._now - replica.since) >= self._parked_s:
                return ""  # was never parked, and has that much left
        return TIMER

    def _lifetime(self, key: bytes, value: bytes) -> int:
        """Seconds that a replica may live at take-over until a packet refreshes it.

        The record may say too little: it tells what was left when the flow last made an event or a bulk named it, and
        packets refresh the timer without an event.  So an open flow gets its protocol's time, as from a packet now.
        Only GRE gets the time that replicas are parked for: no packet refreshes the timer that it is given.
        """
        proto, told = key[0], _known_timeout(value)
        own = None
        if proto == IPPROTO_GRE:
            own = self.settings.park_timeout_s
        elif _is_open(proto, value[-STATE_FROM_END]):
            replied, streaming = _TIMEOUT_NAMES.get(proto, ("generic_timeout", "generic_timeout"))
            assured = value[-STATUS_FROM_END + 1] & IPS_ASSURED
            own = self.timeouts.get(streaming if assured else replied)
        if own is None:
            return FALLBACK_TIMEOUT if told is None else told
        return max(own, told or 0)

    def kernel_results(self, job: Job, failures: Collection[tuple[int, int]]) -> None:
        """What a piece of work came to: index in it and errno of what failed."""
        self._asked -= _size(job)
        if isinstance(job, Request):
            if failures:
                self._failed(job, next(iter(failures))[1])
            else:
                self._accepted(job.operation, [job.key], job.attempt, job)
            return
        failed = dict(failures)
        done = [key for index, key in enumerate(job.keys) if index not in failed] if failed else job.keys
        self._accepted(job.operation, done, job.attempt, job)
        if failed and job.operation == CREATE and job.attempt == 0:
            failed = self._exist(job, failed)
        for index, error in failed.items():
            self._failed(job.request(index), error)

    def _exist(self, job: Work, failed: dict[int, int]) -> dict[int, int]:
        """Many entries that are there already: kept as a node's own, or adopted.  Returns the other failures."""
        if not (self.active or self._adopting):
            return failed
        there = [job.keys[index] for index, error in failed.items() if error == errno.EEXIST]
        if self.active:
            self.counters["kept_own"] += len(there)  # the flows passed here already: this node knows them better
        else:
            table, held = self.cache.table, self.copies.held
            self._park([key for key in there if key in table and not held(key)])
        return {index: error for index, error in failed.items() if error != errno.EEXIST}

    def _push(self, job: Job) -> None:
        self._queued += _size(job)
        self._kernel.append(job)

    def _work(
        self,
        operation: str,
        keys: Sequence[bytes],
        values: Sequence[bytes] = (),
        timeouts: Sequence[int] = (),
        attempt: int = 0,
    ) -> None:
        """Queue work for flows of any shape, in pieces; small ones join what was queued last, if it is the same."""
        lengths = set(map(len, keys))
        if len(lengths) > 1:
            for key_len in sorted(lengths):
                mask = [len(key) == key_len for key in keys]
                some_keys, some_values = list(itertools.compress(keys, mask)), list(itertools.compress(values, mask))
                self._work(operation, some_keys, some_values, list(itertools.compress(timeouts, mask)), attempt)
            return
        for key_len in lengths:
            last = self._kernel[-1] if self._kernel else None
            if (
                isinstance(last, Work)
                and (last.operation, last.key_len, last.attempt) == (operation, key_len, attempt)
                and len(last.keys) + len(keys) <= WORK_SIZE
            ):
                self._queued += len(keys)
                last.keys.extend(keys)
                last.values.extend(values)
                last.timeouts.extend(timeouts)
                return
            work = Work(operation, key_len, list(keys), list(values), list(timeouts), attempt)
            for first in range(0, len(work.keys), WORK_SIZE):
                self._push(work.part(first, first + WORK_SIZE))

    def _ask(self, operation: str, key: bytes, flow: Flow, timeout: int | None = None, attempt: int = 0) -> None:
        self._push(Request(operation, key, flow, timeout, attempt))

    def _make(self, keys: Sequence[bytes], attempt: int = 0) -> None:
        """Have the kernel make the entries of replicas, as the peer described them last, with parked timers."""
        self._hold(CREATE, keys, attempt)

    def _park(self, keys: Sequence[bytes]) -> None:
        """The kernel has the entries already (an earlier life of this node): adopt them."""
        self.counters["adopted"] += len(keys)
        self._hold(UPDATE, keys, _ADOPTING)

    def _hold(self, operation: str, keys: Sequence[bytes], attempt: int) -> None:
        if not keys:
            return
        self.copies.ask(keys)
        extras = self.cache.extras
        if extras:
            for key in keys:
                if key in extras:
                    replica = self.cache.get(key)
                    if replica is not None:
                        flow = unpack(key, replica.value, replica.extras)
                        self._ask(operation, key, flow, self._parked([replica.value])[0], attempt)
            keys = [key for key in keys if key not in extras]
        values = self.cache.values(keys)
        self._work(operation, keys, values, self._parked(values), attempt)

    def _parked(self, values: Sequence[bytes]) -> list[int]:
        """Timers of replicas: long, because a flow that is refreshed by traffic makes no events."""
        if self.settings.mode != HOT_STANDBY:
            return [FALLBACK_TIMEOUT if told == NO_TIMEOUT else told for told in map(_timeout, values)]
        parked = self.settings.park_timeout_s
        return [parked if told < parked or told == NO_TIMEOUT else told for told in map(_timeout, values)]

    def _replace(self, keys: Sequence[bytes]) -> None:
        """The kernel holds earlier incarnations of replicas, with other translations."""
        self.counters["replaced"] += len(keys)
        self._work(DELETE, keys)
        self._make(keys)

    def _accepted(self, operation: str, keys: Sequence[bytes], attempt: int, job: Job) -> None:
        self.counters[_DONE[operation]] += len(keys)
        if (operation != CREATE and attempt != _ADOPTING) or not keys:
            return
        table = self.cache.table
        known = [key for key in keys if key in table]
        if self.active and len(known) != len(keys):
            self._announce_late([key for key in keys if key not in table], job)
        if self.dump is not None:
            self._dump_seen.update(known)  # a running dump may have passed its place already
        self.copies.hold(known)
        if self.copies.outdated and not self.active:  # some changed meanwhile
            for key in known:
                before = self.copies.outdated.pop(key, None)
                if before is not None:
                    self._refresh(key, *before)

    def _announce_late(self, keys: Sequence[bytes], job: Job) -> None:
        """Late flows of the former active node; this node's bulk may have gone out without them."""
        if self._bulk_due or not self.settings.replicate or not self.session.established or not self._fits(len(keys)):
            return
        self._announced.update(keys)
        if isinstance(job, Request):
            self.pending.put_flow(*pack(job.flow), self._now)
        else:
            late = set(keys)
            rows = {key: value for key, value in zip(job.keys, job.values) if key in late}
            self.pending.put_rows(job.key_len, rows, self._now)

    def _refresh(self, key: bytes, value: bytes, extras: bytes) -> None:
        """Bring the kernel's entry of a replica from this older state to the newest, as far as that matters before a
        take-over."""
        replica = self.cache.get(key)
        if replica is None:
            return
        end = len(value) - TAIL_BYTES
        if value[:end] != replica.value[:end]:
            self._work(DELETE, [key])
            self._make([key])
            return
        old, new = unpack(key, value, extras), unpack(key, replica.value, replica.extras)
        if new.status & ~old.status & _KEPT_BITS or any(
            getattr(old, name) != getattr(new, name) for name in _KEPT_FIELDS
        ):
            timeout = self._parked([replica.value])
            if replica.extras:
                self._ask(UPDATE, key, new, timeout[0])
            else:
                self._work(UPDATE, [key], [replica.value], timeout)

    def _failed(self, request: Request, error: int) -> None:
        operation, key, flow, timeout, attempt = request
        known = key in self.cache
        if operation == DELETE:
            if error != errno.ENOENT:
                self._refuse(request, error)
        elif operation in (UPDATE, TIMER):
            if error == errno.ENOENT and known and operation == UPDATE and self.active:
                self._ask(CREATE, key, flow, timeout, 1)
            elif error == errno.ENOENT and self.active:
                pass  # it ended meanwhile
            elif error == errno.ENOENT and known and (attempt == _ADOPTING or key not in self.copies.asked):
                self._make((key,), 1)
            elif error == errno.EBUSY and operation == UPDATE:
                self.counters["status_kept"] += 1  # the entry has status bits that the peer's has not
                self._ask(TIMER, key, flow, timeout, attempt)
            elif error != errno.ENOENT:
                self._refuse(request, error)
        elif not known and not self.active:
            pass  # the peer removed it meanwhile
        elif error == errno.EEXIST and self.active:
            self.counters["kept_own"] += 1  # the flow passed here already: this node knows it better
        elif error == errno.EEXIST and known and self.copies.held(key):
            pass  # another request was faster
        elif error == errno.EEXIST and attempt == 0 and known:
            if self._adopting:
                self._park((key,))
            else:
                self._work(DELETE, [key])
                self._make((key,), 1)
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
        if request.key in self.cache and (request.operation == CREATE or request.attempt == _ADOPTING):
            self.copies.refuse(request.key, error)
            if self._refused_at is None:
                self._refused_at = self._now + self._refused_wait_s

    # --- the peer ----------------------------------------------------------------------------------------------------

    def receive(self, datagram: bytes, now: float) -> None:
        """A datagram from the peer's address."""
        for event in self.session.receive(datagram, now):
            if isinstance(event, BlockReceived):
                self._receive_records(event.records, now)
            elif isinstance(event, StatusReceived):
                self._peer_says(event.status, now)
            elif isinstance(event, SessionUp):
                self._session_up(now)
            elif isinstance(event, PeerLeft):
                self.counters["peer_left"] += 1
                self._peer_left = True
                self._peer = wire.Status(wire.ROLE_UNKNOWN, 0, 0)

    def _peer_says(self, status: wire.Status, now: float) -> None:
        self._peer = status
        self._peer_left = False
        if status.role != wire.ROLE_ACTIVE:
            self._both_active_since = None
        elif not self.active:
            self._informed = False  # flows go on there without this node
        elif self._both_active_since is None or now - self._both_active_at > SPLIT_BRAIN_S:
            self._both_active_since = now
        self._both_active_at = now

    def _split_brain(self, now: float) -> bool:
        """Both nodes are active, and not just for a moment."""
        return self._both_active_since is not None and now - self._both_active_since > SPLIT_BRAIN_S

    def _session_up(self, now: float) -> None:
        self._session_since = now
        self._request_at = now + REQUEST_BULK_AFTER_S
        self._peer = wire.Status(wire.ROLE_UNKNOWN, 0, 0)
        self._both_active_since = None
        self.pending.clear()
        self._giving = None
        self._announced = set()
        self._early.clear()
        self.cache.end_bulk()
        self._completing = False
        if self.dump is not None and self.dump.purpose in (BULK, GIVE):
            self.dump = None  # the peer has not heard of its beginning
        if self.active:
            self._bulk_due = True
            if self._learn:
                self._learn = _DUE if now - self.role_since < LEARN_WITHIN_S else ""
                self._learn_until = now + LEARN_S
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
        elif kind == wire.RECORD_ROWS:
            key_len, joined = wire.decode_rows(payload)
            self._receive_rows(key_len, dict(wire.iter_rows(key_len, joined)), now)
        elif kind == wire.RECORD_FLOW:
            key, value, extras = wire.decode_flow_record(payload)
            self._receive_flow(key, value, extras, now)
        elif kind == wire.RECORD_GONE:
            key_len, joined = wire.decode_gone(payload)
            if not self.active:
                self._delete(wire.split_keys(key_len, joined))
        elif kind == wire.RECORD_BULK_BEGIN:
            wire.decode_bulk_begin(payload)
            if not self.active:
                self.cache.begin_bulk()
                self._excluded = 0
                self._completing = False
                self._adopting = self.settings.mode == HOT_STANDBY
            elif self._learn == _ASKED:
                self._learn = _RECEIVING
        elif kind == wire.RECORD_BULK_END:
            wire.decode_bulk_end(payload)
            if not self.active and self.cache.bulk_running:
                self._bulk_ended()
            elif self.active and self._learn == _RECEIVING:
                self.counters["tables_learned"] += 1
                self._learn = ""
        elif kind == wire.RECORD_BULK_REQUEST:
            self._bulk_requested()
        else:
            self.counters["skipped_unknown_record"] += 1

    def _bulk_requested(self) -> None:
        self.counters["bulks_requested"] += 1
        if not self.active:
            if self.dump is None or self.dump.purpose != GIVE:
                self._want_dump(GIVE)
        elif self.dump is None or self.dump.purpose != BULK:  # else it is on its way
            self._bulk_due = True

    def _receive_rows(self, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        passed = self.filter.passing_rows(key_len, rows)
        if len(passed) != len(rows):
            self.counters["refused_own_addresses"] += len(rows) - len(passed)
        chosen = self.filter.selected_rows(key_len, passed)
        if len(chosen) != len(passed):
            self._exclude([key for key in passed if key not in chosen])
        if not chosen:
            return
        if not self.active:
            self._store_rows(chosen, now)
        elif self._accept_late(len(chosen), now):
            keys, values = list(chosen), list(chosen.values())
            self._work(CREATE, keys, values, list(map(self._lifetime, keys, values)))

    def _receive_flow(self, key: bytes, value: bytes, extras: bytes, now: float) -> None:
        flow = unpack(key, value, extras)
        if not self.filter.passes_through(flow):
            self.counters["refused_own_addresses"] += 1
        elif not self.filter.selects(flow):
            self._exclude([key])
        elif not self.active:
            self._store_flow(key, value, extras, now)
        elif self._accept_late(1, now):
            self._ask(CREATE, key, flow, self._lifetime(key, value))

    def _accept_late(self, count: int, now: float) -> bool:
        """May an active node take flows from its peer?"""
        if self._learn in (_ASKED, _RECEIVING):
            self._learn_until = now + LEARN_S
        if self._split_brain(now):
            self.counters["refused_split_brain"] += count
            return False
        return True

    def _exclude(self, keys: Sequence[bytes]) -> None:
        """The peer replicates what this node's filter excludes: the filters are different."""
        self.counters["refused_by_filter"] += len(keys)
        if not self.active:
            self._excluded += len(keys)
            self._delete(keys)

    def _store_rows(self, rows: Mapping[bytes, bytes], now: float) -> None:
        table = self.cache.table
        fresh: Mapping[bytes, bytes] = {key: value for key, value in rows.items() if key not in table}
        if len(fresh) != len(rows):
            known = {key: value for key, value in rows.items() if key in table} if fresh else rows
            self._store_known(known)
        if not fresh:
            return
        stored = self.cache.add_rows(fresh, now)
        self.counters["external_cache_full"] += len(fresh) - len(stored)
        if self.settings.mode == HOT_STANDBY:
            self._make(list(stored))

    def _store_known(self, rows: Mapping[bytes, bytes]) -> None:
        """Newer states of replicas.  The kernel's copies follow only where that matters before a take-over."""
        table, extras, copies = self.cache.table, self.cache.extras, self.copies
        changed = []
        for key, value in _changed_copies(rows, [table[key] for key in rows]):
            changed.append((key, value, extras.get(key, b"")))
            if extras and rows[key][:-TAIL_BYTES] != value[:-TAIL_BYTES]:
                extras.pop(key, None)  # it is another flow
        self.cache.replace_rows(rows)
        if self.settings.mode != HOT_STANDBY:
            return
        for key, value, old_extras in changed:
            if key in copies.asked:
                copies.outdated.setdefault(key, (value, old_extras))
            elif copies.held(key):
                self._refresh(key, value, old_extras)
        if not copies.settled:
            self._make([key for key in rows if key not in copies.asked and not copies.held(key)])

    def _store_flow(self, key: bytes, value: bytes, extras: bytes, now: float) -> None:
        before = self.cache.get(key)
        if before is not None and before.value[:-TAIL_BYTES] == value[:-TAIL_BYTES]:
            value = merge_value(before.value, value)  # the kernel's events leave out what did not change
            extras = merge_extras(before.extras, extras)
        if not self.cache.put(key, value, extras, now):
            self.counters["external_cache_full"] += 1
        elif self.settings.mode != HOT_STANDBY:
            return
        elif before is None:
            self._make((key,))
        elif key in self.copies.asked:
            self.copies.outdated.setdefault(key, (before.value, before.extras))
        elif self.copies.held(key):
            self._refresh(key, before.value, before.extras)
        else:
            self._make((key,))

    def _delete(self, keys: Iterable[bytes]) -> None:
        known = [key for key in keys if self.cache.pop(key)]
        self.copies.forget(known)
        if self.settings.mode == HOT_STANDBY:
            self._work(DELETE, known)

    def _bulk_ended(self) -> None:
        """What the bulk did not name is stale and goes; then this kernel's table is compared with the cache."""
        stale = self.cache.end_bulk()
        self.counters["stale_removed"] += len(stale)
        self._delete(stale)
        self.counters["bulks_received"] += 1
        self._completing = True
        if self.settings.mode == HOT_STANDBY:
            self._want_dump(RECONCILE)

    # --- commands ----------------------------------------------------------------------------------------------------

    def commit(self) -> int:
        """Put every flow of the external cache that the kernel does not hold into the kernel; returns how many."""
        waiting = self.copies.lacking(self.cache.table)
        self._trim.extend(waiting)
        return len(waiting)

    def flush_external(self) -> int:
        """Forget the external cache (the kernel keeps its entries); returns how many entries it had."""
        forgotten = len(self.cache)
        self.cache.clear()
        self.copies.clear()
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
        """Ask the peer for its whole table."""
        self._request_at = now + REQUEST_BULK_AFTER_S
        self._mark(wire.tlv(wire.RECORD_BULK_REQUEST), now)

    def purge_later(self, now: float) -> None:
        """In ``PURGE_AFTER_S`` remove entries from this backup's kernel that the peer does not have; in the classic
        mode all that it would replicate, for there the peer's are in the external cache."""
        if self._purge_at is None:
            self._purge_at = now + PURGE_AFTER_S

    def _purge(self) -> None:
        self._purge_at = None
        if self.settings.mode == HOT_STANDBY or self.active:
            self.resync()
        else:
            self.flush_kernel()

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
        self._give(now)
        self._send_pending(now)
        return self.session.poll(now)

    def next_deadline(self) -> float:
        """When :meth:`poll` wants to be called next (monotonic seconds)."""
        deadline = self.session.next_deadline()
        for moment in (self._purge_at, self._refused_at, self._reread_at):
            if moment is not None and moment < deadline:
                deadline = moment
        return min(deadline, self._learn_until) if self._learn and self.session.established else deadline

    def _housekeeping(self, now: float) -> None:
        if self._purge_at is not None and now >= self._purge_at:
            self._purge()
        if self._refused_at is not None and now >= self._refused_at:
            self._retry_refused()
        if self._reread_at is not None:
            self._reread(now)
        if self._learn:
            self._learn_from_peer(now)
        taken_over = self.settings.mode == HOT_STANDBY or self.settings.commit_at_takeover
        if self.active and taken_over and len(self.cache) and not self._busy_with_kernel:
            self.cache.clear()  # these flows are this node's own now
            self.copies.clear()
        if self._completing and self.dump is None and not self._dump_queue and not self._busy_with_kernel:
            self._completing = False
            self.complete = self._informed = True
        if (
            not self.active
            and self.settings.replicate
            and not self.complete
            and not self._completing
            and not self.cache.bulk_running
            and self._peer.role == wire.ROLE_ACTIVE
            and now >= self._request_at
            and self.session.alive(now)
        ):
            self.request_bulk(now)
        self._next_dump(now)

    def _learn_from_peer(self, now: float) -> None:
        """An active node whose table may lack flows gets them from its peer, once, before it tells its own table."""
        if not self.session.established or not self.settings.replicate:
            return
        if self._learn == _DUE and self._peer.role == wire.ROLE_BACKUP:
            if self._peer.flags & wire.STATUS_REPLICATES:
                self._learn = _ASKED
                self._learn_until = now + LEARN_S
                self.request_bulk(now)
            else:
                self._learn = ""
        elif now >= self._learn_until:
            self.counters["tables_not_learned"] += 1
            self._learn = ""

    def _retry_refused(self) -> None:
        """What stood in the way may be gone; if not, what is stale of it goes."""
        self._refused_at = None
        refused = self.copies.refused
        if self.active or not refused:
            self._refused_wait_s = RETRY_REFUSED_S
            return
        self.counters["refused_tried_again"] += len(refused)
        self._refused_wait_s = min(self._refused_wait_s * 2, RETRY_REFUSED_MAX_S)
        self._refused_at = self._now + self._refused_wait_s
        taken = [key for key, error in refused.items() if error == errno.EEXIST]
        for replica in map(self.cache.get, taken[:SORTED_PER_TURN]):
            if replica is not None:
                flow = unpack(replica.key, replica.value)
                self._questions.append(Question(flow._replace(orig=flow.reply), replica.key))
        self._make([key for key, error in refused.items() if error != errno.EEXIST])

    def _send_pending(self, now: float) -> None:
        session = self.session
        while len(self.pending) and session.credit() > 0:
            block, count, born = self.pending.take(session.block_bytes)
            if not count:
                break
            session.send_block(block, count, born, now)

    def _status(self) -> wire.Status:
        flags = wire.STATUS_REPLICATES if self.settings.replicate else 0
        if self.complete:
            flags |= wire.STATUS_COMPLETE
        flows = len(self._announced) if self.active else len(self.cache)
        if self.dump is not None and self.dump.purpose == BULK:
            flows = max(flows, self._bulk_last)
        return wire.Status(_ROLE_CODES.get(self.role, wire.ROLE_UNKNOWN), flags, flows)

    # --- what people and keepalived want to know ---------------------------------------------------------------------

    def lag(self, now: float) -> tuple[int, float]:
        """Changes that the peer has not acknowledged, and the age of the oldest in seconds."""
        sent, oldest = self.session.lag()
        waiting = self.pending.oldest
        times = [moment for moment in (oldest, waiting) if moment is not None]
        return sent + len(self.pending), max(0.0, now - min(times)) if times else 0.0

    def condition(self, now: float) -> tuple[object, ...]:
        """What the verdict depends on, short of numbers that grow: while it stays the same, so does the verdict."""
        return (
            self.role,
            self.complete,
            self._peer[:2],
            self._peer_left,
            self.session.established,
            self.session.alive(now),
            self._learn,
            self._reread_at,
            self.cache.bulk_running,
            len(self.cache) > 0,
            self._excluded > 0,
            len(self.copies.refused),
            self._queued > DUMP_ROOM,
            self.lag(now)[1] > self.settings.lag_limit_s,
            self.problem,
            self.impaired,
        )

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
                holds=self._informed or len(self.cache) > 0,
                learning=bool(self._learn) and self.session.established,
                progress=self._progress(),
                reread_s=None if self._reread_at is None else max(0.0, self._reread_at - now),
                waiting=self._queued if self._queued > DUMP_ROOM else 0,
                refused=collections.Counter(self.copies.refused.values()),
                lag_s=self.lag(now)[1],
                lag_limit_s=self.settings.lag_limit_s,
                problem=self.problem,
                impaired=self._impairments(),
            )
        )

    def _progress(self) -> tuple[int, int] | None:
        """Of the bulk that comes in: flows so far, and about how many it will have (0: unknown)."""
        if self.active or not self.cache.bulk_running:
            return None
        return self.cache.named, self._peer.flows

    def _impairments(self) -> tuple[str, ...]:
        if self.active or not self._excluded:
            return self.impaired
        text = f"{self.session.peer} replicates flows that this node's filter excludes: give both the same filter"
        return (*self.impaired, text)

    def peer_status(self, now: float) -> dict[str, Any]:
        """The peer's part of ``status --json``.

        ``bulk`` says whether the backup of the two, whichever that is, holds the table of the active node; ``table``
        says it in words.
        """
        alive = self.session.alive(now)
        events, age = self.lag(now)
        last = self.session.last_seen
        progress = self._progress()
        if self.active:
            sending = self._bulk_due or (self.dump is not None and self.dump.purpose == BULK)
            complete = bool(self._peer.flags & wire.STATUS_COMPLETE)
            bulk = "complete" if complete else "sending" if sending and alive else "none"
        else:
            receiving = self.cache.bulk_running or self._completing
            bulk = "complete" if self.complete else "receiving" if receiving else "none"
        return {
            "node": self.session.peer,
            "state": "up" if alive else "silent" if self.session.established else "handshake",
            "role": _ROLE_NAMES.get(self._peer.role, "unknown") if alive else "unknown",
            "last_seen_s": None if last is None else round(max(0.0, now - last), 3),
            "lag": {"events": events, "age_s": round(age, 3)},
            "bulk": bulk,
            "table": readiness.table_text(self.active, bulk, progress),
            "progress": None if progress is None else {"flows": progress[0], "expected": progress[1]},
        }

    def external_flows(self) -> Iterator[tuple[Flow, float]]:
        """The external cache: flows and when their replication began (monotonic seconds)."""
        for key, value, extras, since in self.cache.items():
            yield unpack(key, value, extras), since


def _filtering(settings: Settings) -> tuple[object, ...]:
    return settings.filter, settings.ignore, settings.unreplied


def _filter(settings: Settings) -> Filter:
    return Filter(settings.filter, settings.ignore, settings.unreplied)


def _size(job: Job) -> int:
    return len(job.keys) if isinstance(job, Work) else 1


def _pop(keys: collections.deque[bytes], limit: int) -> list[bytes]:
    """The first keys, at most ``limit``; they leave the queue."""
    return [keys.popleft() for dummy in range(min(limit, len(keys)))]


def _is_open(proto: int, state: int | None) -> bool:
    """Neither half-open nor closing, as far as is said."""
    return not state or state == _OPEN.get(proto, state)


def _is_closing(key: bytes, value: bytes) -> bool:
    return key[0] == IPPROTO_TCP and value[-STATE_FROM_END] > TCP_ESTABLISHED


def _timeout(value: bytes) -> int:
    return int.from_bytes(value[-TIMEOUT_FROM_END:-STATE_FROM_END], "big")


def _known_timeout(value: bytes) -> int | None:
    told = _timeout(value)
    return None if told == NO_TIMEOUT else told


def _untimed(value: bytes) -> bytes:
    return value[:-TIMEOUT_FROM_END] + b"\xff\xff\xff\xff" + value[-STATE_FROM_END:]


def _changed_copies(rows: Mapping[bytes, bytes], before: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Which flows changed in more than timer, state and flags, and their values before.

    ``before``: what is stored (value and 4 bytes) of each of the rows, which have one shape.  Usually nothing changed:
    so columns are compared first.
    """
    size = len(next(iter(rows.values())))
    told = size - TIMEOUT_FROM_END  # reply tuple and status
    scale, mark = size - SCALE_FROM_END, size - MARK_FROM_END
    if len(rows) > FEW_ROWS:
        new, old = b"".join(rows.values()), b"".join(before)
        places = (*range(told), scale, *range(mark, size))
        if all(new[place::size] == old[place :: len(before[0])] for place in places):
            return []
    return [
        (key, stored[:size])
        for (key, value), stored in zip(rows.items(), before)
        if value[:told] != stored[:told] or value[scale] != stored[scale] or value[mark:] != stored[mark:size]
    ]
