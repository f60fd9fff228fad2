# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine: kernel events, the peer's datagrams, roles and commands in; datagrams and work for the kernel out.

Sans-I/O: no socket, no clock.  The daemon feeds it and carries out what :meth:`Engine.poll`,
:meth:`Engine.kernel_work`, :meth:`Engine.take_questions` and :attr:`Engine.dump` ask for.  Times are monotonic seconds
given by the caller.

The active node sends every change of every flow worth replicating (:mod:`source`).  The backup stores it in the
external cache and, in hot standby, has the kernel hold it at once (:mod:`replicas`).  Who is active is decided
elsewhere (keepalived); the engine is told.  It conducts: roles, who gets which record, which dump is read what for,
what a node knows and how ready it is.  Flows are rows (:mod:`rows`), and nearly all are handled many at a time.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from . import conditions, readiness, wire
from .checker import EQUAL, Checker
from .dumps import AUDIT, BULK, COMPARE, FLUSH, GIVE, KERNEL, LOOSEN, PACED, RECONCILE, Dump, Dumps
from .errors import WireError
from .expectation import Expectation
from .expectation import pack as pack_expectation
from .filters import Filter
from .flow import Flow
from .helpers import Helpers
from .jobs import Job
from .peer import ROLE_CODES, Peer
from .pending import Pending
from .prover import Prover
from .replicas import Replicas
from .rows import SHAPES, Changes, unpack
from .session import BlockReceived, PeerLeft, Session, SessionUp, StatusReceived
from .situation import DUMP_ROOM, Question, Settings, Situation, filter_of, filtering
from .source import Source
from .tables import Copies, ExternalCache
from .verification import Verification

PURGE_AFTER_S = 60.0


class Engine:
    """State replication with one peer, as seen from one node."""

    def __init__(self, settings: Settings, session: Session, now: float) -> None:
        self.role = readiness.TRANSITION
        self.role_since = now
        self.problem = ""  # what stops replication: the node cannot become ready
        self.impaired: tuple[str, ...] = ()  # what an operator should mend, but does not stop it
        self.complete = False
        self.cold_start = False  # of the kernel's table nothing is known: the node booted, it did not go on
        self.situation = Situation(settings, now)
        self.dumps = Dumps()
        self.peer = Peer(self.situation, self.dumps, session, now)
        self.replicas = Replicas(self.situation, self.dumps, now)
        self.helpers = Helpers(self.situation, self.replicas)
        self.source = Source(self.situation, self.dumps, self.peer, self.helpers.source)
        self.prover = Prover(self.situation, self.dumps, self.peer, self.source, now)
        self.checker = Checker(self.situation, self.dumps, self.peer, self.replicas, now)
        self._completing = False
        self._informed = False  # this node's table is as good as any: complete, or its own
        self._purge_at: float | None = None

    # --- the rooms, as callers know them -----------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        return self.situation.settings

    @property
    def counters(self) -> collections.Counter[str]:
        return self.situation.counters

    @property
    def filter(self) -> Filter:
        return self.situation.filter

    @property
    def session(self) -> Session:
        return self.peer.session

    @property
    def pending(self) -> Pending:
        return self.peer.pending

    @property
    def cache(self) -> ExternalCache:
        return self.replicas.cache

    @property
    def copies(self) -> Copies:
        return self.replicas.copies

    @property
    def dump(self) -> Dump | None:
        return self.dumps.current

    def reconfigure(self, settings: Settings, now: float) -> None:
        """Other settings from now on; ``mode``, ``replicate`` and the limits of tables stay what they were.

        Where the filter is another one the active node sends its whole table again, and the peer removes what is not in
        it.  A backup removes the replicas that are excluded now (nobody else would) and asks for the whole table.
        """
        situation = self.situation
        old, situation.settings = situation.settings, settings
        self.replicas.takeover.parked_at_most(settings.park_timeout_s)
        if filtering(old) == filtering(settings):
            return
        own = situation.filter.own
        situation.filter = filter_of(settings)
        situation.filter.own = own
        if self.active:
            self.helpers.source.begin()
            self.peer.bulk_due = True
            return
        self.replicas.refilter()
        if self.peer.established:
            self.peer.request_bulk(now)

    # --- role --------------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        return self.situation.active

    def set_role(self, role: str, now: float) -> None:
        """The kernel says who holds the virtual IPs: all of them (active), none (backup), some (transition)."""
        if role == self.role:
            return
        self.role = role
        self.role_since = now
        self.counters["role_changes"] += 1
        if role in (readiness.TRANSITION, self.situation.side):
            return
        first = not self.situation.side
        self.situation.take_side(role)
        self.peer.side_changed()
        if role == readiness.ACTIVE:
            self._become_active(first, now)
        else:
            self._become_backup()
        self._nothing_compared(now)

    def _nothing_compared(self, now: float) -> None:
        self.prover.reset(now)
        self.checker.reset(now)

    def _become_active(self, first: bool, now: float) -> None:
        """The virtual IPs are here.  In hot standby the kernel holds the flows already: nothing stands in the way.

        What follows sets true states and timers, closing flows first; then the peer is told the whole table.  Where
        this node may lack flows it learns from the peer first, what it can.
        """
        self._drop_dumps()
        self.cache.end_bulk()
        self.source.forget()
        self._purge_at = None
        if not (self._informed or self.complete or (first and not self.cold_start)):
            self.peer.begin_learning(now)
        self._informed = True
        self.complete = False
        self._completing = self.replicas.adopting = False
        if not first and self.settings.takes_over:
            self.replicas.takeover.begin()
        self.helpers.become_active(first)
        self.peer.bulk_due = True

    def _become_backup(self) -> None:
        """The virtual IPs are gone.  This node's flows belong to the new active node now; its bulk says which."""
        self._drop_dumps()
        self.peer.bulk_due = False
        self.source.forget()
        self.replicas.clear()
        self.helpers.become_backup()
        self.complete = False
        self._completing = False
        if self.peer.learn:  # it never knew all
            self._informed = False
            self.peer.learn = ""
        if not self.peer.established:
            self.peer.pending.clear()

    def set_conditions(self, ruleset: str, parameters: Mapping[str, int], now: float) -> None:
        """This node's ruleset fingerprint, and its sysctls net.netfilter.nf_conntrack_NAME by NAME."""
        self.replicas.takeover.timeouts = parameters
        own = conditions.own(ruleset, parameters)
        if own != self.situation.conditions:
            self.situation.conditions = own
            self.situation.parameters = tuple(parameters)
            if self.peer.established:
                self.peer.tell_conditions(now)

    # --- kernel: events ----------------------------------------------------------------------------------------------

    def set_addresses(self, own: Iterable[bytes]) -> None:
        """Addresses of this node, virtual IPs included (packed): flows that begin or end here are not replicated."""
        self.filter.own = frozenset(own)

    def kernel_changes(self, changes: Changes, now: float) -> None:
        """What conntrack events said that this daemon did not cause."""
        self.counters["events"] += changes.events
        if not self.active:
            if changes.gone:
                self.replicas.vanished(changes.gone)
        else:
            if self.replicas.takeover.running:
                self.replicas.forget_ended(changes)
            if self.helpers.source.masters:
                self.helpers.source.ended(changes.gone)
            if self.source.telling:
                self.source.changed(changes, now)
        if changes.lost:
            self.counters["overruns"] += 1
            self.dumps.events_lost(now)

    @property
    def follows(self) -> bool:
        """Does it matter which entries of the kernel are new or changed?  Those that end are always told.

        Not on a backup.  Not either while an active node puts its external cache into the kernel, if its whole table is
        read for the peer after that: what was new or changed meanwhile is in it.  Where nobody listens the kernel makes
        an entry in about half the time.
        """
        situation = self.situation
        if not situation.active or not situation.settings.replicate:
            return False
        return situation.hot or not (self.peer.bulk_due and self.replicas.takeover.running)

    def take_questions(self) -> list[Question]:
        """What the kernel must be asked; the caller gives what it finds to :meth:`answer`."""
        found, self.situation.questions = self.situation.questions, []
        return found

    def answer(self, question: Question, found: Flow | None, now: float) -> None:
        """The kernel's entry, None if there is none."""
        if question.replica:
            if not self.active:
                self.replicas.in_the_way(question.replica, found)
        elif not self.active or not self.source.telling:
            pass
        elif found is None:
            if question.adjustment:
                self.helpers.source.ended((question.flow.key,))
        elif not question.adjustment or self.helpers.source.adjusted(found):
            self.source.judge(found, now)  # an event did not say enough

    def internal(self, flow: Flow) -> bool:
        """Does this entry of the kernel belong to the internal cache: replicated, and not the peer's?"""
        return self.filter.matches(flow) and (self.active or flow.key not in self.cache)

    # --- kernel: dumps -----------------------------------------------------------------------------------------------

    @property
    def dump_room(self) -> bool:
        """May the running dump be read on?"""
        if self.dumps.runs(COMPARE) and not self.prover.room:
            return False
        return len(self.peer.pending) < DUMP_ROOM and self.replicas.jobs.waiting < DUMP_ROOM

    @property
    def dump_paced(self) -> bool:
        """The running dump is to be read slowly, and what it costs told to :meth:`dump_cost`."""
        return self.dumps.runs(*PACED)

    def dump_cost(self, seconds: float) -> None:
        """So much time of a core a part of a paced dump took."""
        self.dumps.spend(seconds)

    def dump_slice(self, changes: Changes, now: float) -> None:
        """Entries of the dump that :attr:`dump` asks for."""
        if self.dump is None:
            return
        purpose, source, replicas, peer = self.dump.purpose, self.source, self.replicas, self.peer
        for key_len, rows in changes.rows.items():
            if purpose == BULK:
                source.bulk_rows(key_len, rows, now)
            elif purpose == RECONCILE:
                replicas.reconcile_rows(key_len, rows)
            elif purpose == FLUSH:
                replicas.flush_rows(key_len, rows)
            elif purpose == LOOSEN:
                replicas.loosen_rows(key_len, rows)
            elif purpose in (AUDIT, COMPARE):
                self.prover.rows(purpose, key_len, rows, now)
            elif purpose == KERNEL:
                self.checker.kernel_rows(key_len, rows)
            else:
                peer.give_rows(key_len, rows, self.cache, now)
        for flow in changes.flows:
            if purpose == BULK:
                source.bulk_flow(flow, now)
            elif purpose == RECONCILE:
                replicas.reconcile_flow(flow)
            elif purpose == FLUSH:
                replicas.flush_flow(flow)
            elif purpose == LOOSEN:
                replicas.loosen_flow(flow)
            elif purpose in (AUDIT, COMPARE):
                self.prover.flow(purpose, flow, now)
            elif purpose == KERNEL:
                self.checker.kernel_flow(flow)
            else:
                peer.give_flow(flow, self.cache, now)

    def dump_finished(self, consistent: bool, now: float) -> None:
        """The dump came to its end.  ``consistent``: the kernel's table did not move under it (NLM_F_DUMP_INTR)."""
        purpose = self.dumps.finished(now)
        if not purpose:
            return
        if purpose in PACED:
            if purpose == KERNEL:
                self.checker.kernel_finished(consistent, now)
            else:
                self.prover.finished(purpose, consistent, now)
            self.dumps.seen = set()
            return
        self.counters["dumps"] += 1
        if not consistent and purpose != FLUSH:
            self.counters["dumps_interrupted"] += 1
        if purpose == BULK:
            if consistent:
                self._tell_expectations({one.name: one for one in self.helpers.source.expectations(now)}, now)
                self.peer.bulk_sent(now)
            else:
                self.peer.bulk_due = True
        elif purpose == LOOSEN and not consistent:
            self.dumps.want(LOOSEN)
        elif purpose == RECONCILE:
            if consistent:
                self.replicas.reconciled()
            else:
                self.dumps.want(RECONCILE)
        elif purpose == GIVE and not consistent:
            self.peer.stop_giving()
            self.dumps.want(GIVE)
        self.dumps.seen = set()

    def _drop_dumps(self) -> None:
        self.dumps.drop()
        self.peer.stop_giving()

    def _next_dump(self, now: float) -> None:
        peer, dumps = self.peer, self.dumps
        if (
            self.active
            and peer.bulk_due
            and not peer.learn
            and not self.replicas.busy
            and peer.established
            and not dumps.runs(BULK)  # a running one comes to its end first
        ):
            peer.bulk_due = False
            if self.settings.replicate:
                dumps.want(BULK)
        begun = dumps.begin()
        if begun is None:
            return
        if begun.purpose == KERNEL:
            self.checker.kernel_begins()
        elif begun.purpose in PACED:
            self.prover.begin(begun.purpose, now)
        elif begun.purpose in (BULK, GIVE):
            self.prover.reset(now)
            self.source.begin_bulk()
            peer.begin_bulk(now)
            self.counters["bulks_sent" if begun.purpose == BULK else "bulks_given"] += 1
            if begun.purpose == GIVE:
                peer.begin_giving(self.cache)

    # --- kernel: work ------------------------------------------------------------------------------------------------

    @property
    def overloaded(self) -> bool:
        """The kernel is behind: the link should not be read now (the peer's credit runs out, it waits)."""
        return self.replicas.overloaded

    def kernel_work(self, limit: int) -> list[Job]:
        """Requests for at most ``limit`` flows, to be carried out now, one piece after the other.

        The result of each piece goes to :meth:`kernel_results`.
        """
        return self.replicas.kernel_work(limit)

    def kernel_results(self, job: Job, failures: Collection[tuple[int, int]]) -> None:
        """What a piece of work came to: index in it and errno of what failed."""
        late = self.replicas.results(job, failures)
        if late:
            self.source.announce_late(late, job, self.situation.now)

    # --- the peer ----------------------------------------------------------------------------------------------------

    def receive(self, datagram: bytes, now: float, link: int = 0) -> None:
        """A datagram from the peer's address on a link."""
        for event in self.peer.session.receive(datagram, now, link):
            if isinstance(event, BlockReceived):
                self._receive_records(event.records, now)
            elif isinstance(event, StatusReceived):
                if self.peer.says(event.status, now) and self.settings.replicate:
                    self.dumps.want(LOOSEN)
                if self.peer.active and not self.active:
                    self._informed = False  # flows go on there without this node
            elif isinstance(event, SessionUp):
                self._session_up(now)
            elif isinstance(event, PeerLeft):
                self.peer.leaves()

    def _session_up(self, now: float) -> None:
        peer = self.peer
        peer.session_up(now)
        self._nothing_compared(now)
        self.source.forget()
        self.cache.end_bulk()
        self._completing = False
        self.dumps.stop(BULK, GIVE)  # the peer has not heard of its beginning
        if self.active:
            peer.bulk_due = True
            peer.learn_again(now - self.role_since, now)
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
                keys = wire.split_keys(key_len, joined)
                self.checker.told(keys)
                self.replicas.delete(keys)
                self.helpers.replicas.masters_gone(keys)
        elif kind == wire.RECORD_EXPECT:
            if not self.active or self._accept_late(1, now):
                self.helpers.receive(payload, now)
        elif kind == wire.RECORD_EXPECT_GONE:
            self.helpers.receive_gone(payload)
        elif kind == wire.RECORD_BULK_BEGIN:
            wire.decode_bulk_begin(payload)
            if self.active:
                self.peer.teaching_begins()
            else:
                self._completing = False
                self.checker.reset(now)
                self.replicas.begin_bulk()
                self.helpers.replicas.begin_bulk()
        elif kind == wire.RECORD_BULK_END:
            wire.decode_bulk_end(payload)
            if self.active:
                self.peer.teaching_ends()
            elif self.cache.bulk_running:
                self._bulk_ended()
        elif kind == wire.RECORD_BULK_REQUEST:
            self._bulk_requested()
        elif kind == wire.RECORD_CONDITIONS:
            self.peer.conditions = wire.decode_conditions(payload)
        elif wire.RECORD_DIGEST <= kind <= wire.RECORD_REPORT:
            self._receive_comparison(kind, payload, now)
        else:
            self.counters["skipped_unknown_record"] += 1

    def _receive_comparison(self, kind: int, payload: bytes, now: float) -> None:
        checker, prover = self.checker, self.prover
        checker.complete = self.complete
        if kind == wire.RECORD_DIGEST:
            checker.digest(*wire.decode_digest(payload), now)
        elif kind == wire.RECORD_BUCKETS_REQUEST:
            prover.buckets_requested(now)
        elif kind == wire.RECORD_BUCKETS:
            _number, first, sums = wire.decode_sums(payload)
            checker.buckets_told(first, sums, now)
        elif kind == wire.RECORD_COMPARE_REQUEST:
            prover.compare(wire.decode_compare(payload), now)
        elif kind == wire.RECORD_COMPARE_BEGIN:
            checker.begin(wire.decode_compare(payload), now)
        elif kind == wire.RECORD_COMPARE_ROWS:
            key_len, joined = wire.decode_rows(payload)
            rows = dict(wire.iter_rows(key_len, joined))
            checker.named(len(joined) // SHAPES[key_len].row)
            passed = self.filter.passing_rows(key_len, rows)
            checker.rows(key_len, self.filter.selected_rows(key_len, passed), now)
        elif kind == wire.RECORD_COMPARE_FLOW:
            key, value, extras = wire.decode_flow_record(payload)
            flow = unpack(key, value, extras)
            checker.named(1)
            if self.filter.passes_through(flow) and self.filter.selects(flow):
                checker.flow(key, value, extras, now)
        elif kind == wire.RECORD_COMPARE_END:
            checker.end(*wire.decode_bulk_end(payload), now)
        elif kind == wire.RECORD_STATES_BEGIN:
            checker.states_begin(wire.decode_number(payload), now)
        elif kind == wire.RECORD_STATES:
            checker.states_told(*wire.decode_sums(payload), now)
        else:
            prover.reported(wire.decode_report(payload), now)

    def _bulk_requested(self) -> None:
        self.counters["bulks_requested"] += 1
        if not self.active:
            if not self.dumps.runs(GIVE):
                self.dumps.want(GIVE)
        elif not self.dumps.runs(BULK):  # else it is on its way
            self.peer.bulk_due = True

    def _bulk_ended(self) -> None:
        """What the bulk did not name goes; then this kernel's table is compared with the cache."""
        self.replicas.end_bulk()
        self.helpers.bulk_ended()
        self.counters["bulks_received"] += 1
        self._completing = True
        if self.situation.hot:
            self.dumps.want(RECONCILE)

    def _receive_rows(self, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        if self.checker.listens:
            self.checker.told(rows)
        passed = self.filter.passing_rows(key_len, rows)
        if len(passed) != len(rows):
            self.counters["refused_own_addresses"] += len(rows) - len(passed)
        chosen = self.filter.selected_rows(key_len, passed)
        if len(chosen) != len(passed):
            self.replicas.exclude([key for key in passed if key not in chosen])
        if not chosen:
            return
        if not self.active:
            self.replicas.store_rows(chosen, now)
        elif self._accept_late(len(chosen), now):
            self.replicas.take_late_rows(chosen)

    def _receive_flow(self, key: bytes, value: bytes, extras: bytes, now: float) -> None:
        flow = unpack(key, value, extras)
        self.checker.told((key,))
        if not self.filter.passes_through(flow):
            self.counters["refused_own_addresses"] += 1
        elif not self.filter.selects(flow):
            self.replicas.exclude([key])
        elif not self.active:
            self.replicas.store_flow(key, value, extras, now)
        elif self._accept_late(1, now):
            self.replicas.take_late_flow(key, value, flow)

    def _accept_late(self, count: int, now: float) -> bool:
        """May an active node take flows from its peer?"""
        self.peer.teaches(now)
        if self.peer.split_brain(now):
            self.counters["refused_split_brain"] += count
            return False
        return True

    # --- commands ----------------------------------------------------------------------------------------------------

    def commit(self) -> int:
        """Put every flow of the external cache that the kernel does not hold into the kernel; returns how many."""
        waiting = self.copies.lacking(self.cache.table)
        self.replicas.takeover.add(waiting)
        self.helpers.replicas.commit()
        return len(waiting)

    def flush_external(self) -> int:
        """Forget the external cache (the kernel keeps its entries); returns how many entries it had."""
        forgotten = len(self.cache)
        self.replicas.forget_all()
        self.helpers.replicas.clear()
        if not self.active:
            self.complete = self._completing = False
        return forgotten

    def flush_kernel(self) -> None:
        """Remove from this node's kernel every flow that the engine would replicate."""
        self.dumps.want(FLUSH)

    def resync(self) -> None:
        """Read the kernel's table again: the active node sends it, a backup compares it with its external cache."""
        if self.active:
            self.peer.bulk_due = True
        elif self.situation.hot and (self.complete or self._completing):
            self.dumps.want(RECONCILE)

    def request_bulk(self, now: float) -> None:
        """Ask the peer for its whole table."""
        self.peer.request_bulk(now)

    def purge_later(self, now: float) -> None:
        """In ``PURGE_AFTER_S`` remove entries from this backup's kernel that the peer does not have; in the classic
        mode all that it would replicate, for there the peer's are in the external cache."""
        if self._purge_at is None:
            self._purge_at = now + PURGE_AFTER_S

    def _purge(self) -> None:
        self._purge_at = None
        if self.situation.hot or self.active:
            self.resync()
        else:
            self.flush_kernel()

    def verify(self, now: float) -> Verification:
        """Compare all flows of both nodes, and what the backup's kernel holds.  Nothing is repaired."""
        if self.active:
            return self.prover.verify(now)
        self.checker.complete = self.complete
        return self.checker.verify(now)

    def refusals(self) -> int:
        """Requests that the kernel refused so far."""
        return sum(count for name, count in self.counters.items() if name.startswith("kernel_refused_"))

    @property
    def idle(self) -> bool:
        """Nothing is under way towards the kernel."""
        return not (self.replicas.busy or self.dumps.urgent or self.helpers.replicas.busy)

    # --- output ------------------------------------------------------------------------------------------------------

    def poll(self, now: float) -> list[bytes]:
        """Datagrams to send to the peer now."""
        self.situation.now = now
        self._housekeeping(now)
        changes = self.helpers.poll(now)
        if changes:
            self._tell_expectations(changes, now)
        self.peer.session.set_status(self._status())
        self.peer.give(self.cache, now)
        return self.peer.poll(now)

    def next_deadline(self) -> float:
        """When :meth:`poll` wants to be called next (monotonic seconds)."""
        deadline = min(self.peer.next_deadline(), self.prover.next_deadline(), self.checker.next_deadline())
        for moment in (self._purge_at, self.replicas.refused_at, self.dumps.reread_at):
            if moment is not None and moment < deadline:
                deadline = moment
        return min(deadline, self.helpers.next_deadline())

    def _tell_expectations(self, changes: Mapping[bytes, Expectation | None], now: float) -> None:
        if self.source.telling and self.peer.fits(len(changes)):
            for name, one in changes.items():
                self.peer.pending.put_expectation(name, None if one is None else pack_expectation(one), now)

    def _housekeeping(self, now: float) -> None:
        replicas, dumps = self.replicas, self.dumps
        if self._purge_at is not None and now >= self._purge_at:
            self._purge()
        if replicas.refused_at is not None and now >= replicas.refused_at:
            replicas.retry_refused(now)
        if dumps.reread_at is not None and dumps.reread_due(now):
            self.resync()
        if self.peer.learn:
            self.peer.learn_more(now)
        if self.active and self.settings.takes_over and len(self.cache) and not replicas.busy:
            replicas.forget_all()  # these flows are this node's own now
        if self._completing and not dumps.urgent and not replicas.busy:
            self._completing = False
            self.complete = self._informed = True
        if (
            not self.active
            and self.settings.replicate
            and not self.complete
            and not self._completing
            and not self.cache.bulk_running
            and self.peer.may_be_asked(now)
        ):
            self.peer.request_bulk(now)
        self.prover.poll(now)
        self.checker.complete = self.complete
        self.checker.poll(now)
        self._next_dump(now)

    def _status(self) -> wire.Status:
        flags = wire.STATUS_REPLICATES if self.settings.replicate else 0
        if self.complete:
            flags |= wire.STATUS_COMPLETE
            if self.checker.state == EQUAL:
                flags |= wire.STATUS_EQUAL
            elif self.checker.alarm(self.situation.now):
                flags |= wire.STATUS_DIFFERS
        flows = len(self.source.announced) if self.active else len(self.cache)
        if self.dumps.runs(BULK):
            flows = max(flows, self.peer.bulk_last)
        return wire.Status(ROLE_CODES.get(self.role, wire.ROLE_UNKNOWN), flags, flows)

    # --- what people and keepalived want to know ---------------------------------------------------------------------

    def lag(self, now: float) -> tuple[int, float]:
        """Changes that the peer has not acknowledged, and the age of the oldest in seconds."""
        return self.peer.lag(now)

    def condition(self, now: float) -> tuple[object, ...]:
        """What the verdict depends on, short of numbers that grow: while it stays the same, so does the verdict."""
        return (
            self.role,
            self.complete,
            self.peer.condition(now),
            self.dumps.reread_at,
            self.cache.bulk_running,
            len(self.cache) > 0,
            self.replicas.excluded > 0,
            len(self.copies.refused),
            self.overloaded,
            bool(self.checker.alarm(now)),
            self.problem,
            self.impaired,
            self.situation.conditions,
            self.helpers.problem,
        )

    def verdict(self, now: float) -> readiness.Verdict:
        peer, reread_at = self.peer, self.dumps.reread_at
        return readiness.judge(
            readiness.Facts(
                role=self.role if not self.active or self.role == readiness.BACKUP else readiness.ACTIVE,
                replicate=self.settings.replicate,
                peer=peer.name,
                session=peer.established,
                peer_alive=peer.session.alive(now),
                peer_left=peer.left,
                peer_silent_s=peer.silent_s(now),
                peer_role=peer.role_name,
                peer_replicates=peer.replicates,
                peer_complete=peer.complete,
                complete=self.complete,
                holds=self._informed or len(self.cache) > 0,
                learning=bool(peer.learn) and peer.established,
                progress=self._progress(),
                reread_s=None if reread_at is None else max(0.0, reread_at - now),
                waiting=self.replicas.jobs.waiting if self.overloaded else 0,
                refused=collections.Counter(self.copies.refused.values()),
                lag_s=self.lag(now)[1],
                lag_limit_s=self.settings.lag_limit_s,
                problem=self.problem,
                impaired=self._impairments(),
                differences=self.differences(),
            )
        )

    def differences(self) -> tuple[str, ...]:
        """In what the peer's rules, limits and timers are not like this node's: some of the verdict's reasons."""
        return self.peer.differences()

    def _progress(self) -> tuple[int, int] | None:
        """Of the bulk that comes in: flows so far, and about how many it will have (0: unknown)."""
        if self.active or not self.cache.bulk_running:
            return None
        return self.cache.named, self.peer.status.flows

    def _impairments(self) -> tuple[str, ...]:
        found = list(self.impaired)
        if self.helpers.problem:
            found.append(self.helpers.problem)
        if self.active:
            if self.peer.differs:
                found.append(f"the table of {self.peer.name} differs from this node's: see ctsyncd verify")
            return tuple(found)
        if self.replicas.excluded:
            found.append(
                f"{self.peer.name} replicates flows that this node's filter excludes: give both the same filter"
            )
        alarm = self.checker.alarm(self.situation.now)
        if alarm:
            found.append(alarm)
        return tuple(found)

    def peer_status(self, now: float) -> dict[str, Any]:
        """The peer's part of ``status --json``.

        ``bulk`` says whether the backup of the two, whichever that is, holds the table of the active node; ``table``
        says it in words.
        """
        peer = self.peer
        if self.active:
            sending = peer.bulk_due or self.dumps.runs(BULK)
            bulk = "complete" if peer.complete else "sending" if sending and peer.session.alive(now) else "none"
        else:
            receiving = self.cache.bulk_running or self._completing
            bulk = "complete" if self.complete else "receiving" if receiving else "none"
        equality = self.prover.describe() if self.active else self.checker.describe(now)
        return peer.describe(bulk, self._progress(), equality, now)

    def external_flows(self) -> Iterator[tuple[Flow, float]]:
        """The external cache: flows and when their replication began (monotonic seconds)."""
        return self.replicas.flows()
