# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine: kernel events, the peers' datagrams, roles and commands in; datagrams and work for the kernel out.

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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
from .newcomers import Newcomers
from .peer import ROLE_CODES, SPLIT_BRAIN_S, Peer
from .pending import Encoder
from .prover import Prover
from .replicas import Replicas
from .rows import SHAPES, Changes, unpack
from .session import BlockReceived, PeerLeft, Session, SessionUp, StatusReceived
from .situation import DUMP_ROOM, Question, Settings, Situation, filter_of, filtering
from .source import Source
from .tables import Copies, ExternalCache
from .verification import Verification

PURGE_AFTER_S = 60.0
SLEEP_S = 10.0  # a poll is needed so often in any case
TABLE_ROOM = 2  # the external cache has room for so many times what this kernel's table may hold: a peer's may be more
TABLE_LIMIT_MAX = 1 << 26
FLAPPING_S = 60.0  # within which too many changes of the side are flapping
FLAPS = 4
FLAPS_COUNTED = 16
FLAP_HOLD_S = 2.0  # bulks wait so long; doubles with each further change
FLAP_HOLD_MAX_S = 30.0


class Engine:
    """State replication with the other nodes, as seen from one node.

    ``leader``: the peer whose replicas this backup holds: the active node, or the one that was active last.  An only
    peer always is it.
    """

    def __init__(self, settings: Settings, sessions: Sequence[Session], now: float) -> None:
        self.role = readiness.TRANSITION
        self.role_since = now
        self.problem = ""  # what stops replication: the node cannot become ready
        self.impaired: tuple[str, ...] = ()  # what an operator should mend, but does not stop it
        self.complete = False
        self.cold_start = False  # of the kernel's table nothing is known: the node booted, it did not go on
        self.situation = Situation(settings, now)
        self.dumps = Dumps()
        encoder = Encoder(len(sessions))
        self.peers = tuple(Peer(self.situation, session, encoder, now) for session in sessions)
        self.leader = self.peers[0] if len(self.peers) == 1 else None
        self.replicas = Replicas(self.situation, self.dumps, now)
        self.helpers = Helpers(self.situation, self.replicas)
        self.source = Source(self.situation, self.dumps, self.peers, self.helpers.source)
        self.newcomers = Newcomers()
        self.provers = [Prover(self.situation, self.dumps, peer, self.source, now) for peer in self.peers]
        self.checker = Checker(self.situation, self.dumps, self.peers[0], self.replicas, now)
        self._completing = False
        self._informed = False  # this node's table is as good as any: complete, or its own
        self._predecessor: Peer | None = None  # was active before this node: its late flows are taken
        self._active_since = now
        self._bulk_flows = 0  # of the last one that was sent
        self._changes: collections.deque[float] = collections.deque(maxlen=FLAPS_COUNTED)  # of the side: when
        self._flapping = False
        self._split = False
        self._purge_at: float | None = None
        self._stirred = True  # something came in that the next poll must look at
        self._calm = False  # the last poll left nothing to be done
        self._alive: list[bool] = []  # the peers, then
        self._chores_at = now  # when something is due besides what sessions have to say
        self._polled_at = now
        self._changes_polled = 0
        self._sleeps_until: float | None = None  # until then no poll is needed if nothing changes; None: not known yet

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
        self._stirred = True
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
            self.resync()
            return
        self.replicas.refilter()
        if self.leader is not None and self.leader.established:
            self.leader.request_bulk(now)

    # --- role --------------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        return self.situation.active

    def set_role(self, role: str, now: float) -> None:
        """The kernel says who holds the virtual IPs: all of them (active), none (backup), some (transition)."""
        if role == self.role:
            return
        self._stirred = True
        self.role = role
        self.role_since = now
        self.counters["role_changes"] += 1
        if role in (readiness.TRANSITION, self.situation.side):
            return
        first = not self.situation.side
        self.situation.take_side(role)
        self._side_changed(first, now)
        if role == readiness.ACTIVE:
            self._become_active(first, now)
        else:
            self._become_backup(now)
        self._nothing_compared(now)

    def _nothing_compared(self, now: float) -> None:
        for prover in self.provers:
            prover.reset(now)
        self.checker.reset(now)

    def _side_changed(self, first: bool, now: float) -> None:
        """Where roles change too often, bulks wait: changes go on to be replicated, and nothing is removed."""
        self._drop_dumps()
        self.release_newcomers(now)  # late flows for the node that is active now
        self.newcomers.forget()
        self.source.forget()
        self._predecessor = None
        if first:
            return
        self._changes.append(now)
        often = sum(now - moment < FLAPPING_S for moment in self._changes)
        if often < FLAPS:
            return
        hold = min(FLAP_HOLD_S * (1 << (often - FLAPS)), FLAP_HOLD_MAX_S)
        self.situation.bulks_from = now + hold
        self.counters["bulks_held_back"] += 1
        if not self._flapping:
            self._flapping = True
            self.situation.alarms.append(
                f"this node changed sides {often} times within {FLAPPING_S:.0f} s: bulks are held back"
            )

    def release_newcomers(self, now: float) -> None:
        """Have those told that wait to see whether they end at once."""
        waiting, self.newcomers.waiting = self.newcomers.waiting, {}
        if waiting:
            self.source.changed(Changes(waiting, [], []), now)

    def _become_active(self, first: bool, now: float) -> None:
        """The virtual IPs are here.  In hot standby the kernel holds the flows already: nothing stands in the way.

        What follows sets true states and timers, closing flows first; then the peers are told the whole table.  Where
        this node may lack flows it learns from each peer first, what it can.
        """
        self._active_since = now
        if not first:
            self._predecessor = self.leader
        if len(self.peers) > 1:
            self.leader = None
        self.cache.end_bulk()
        self._purge_at = None
        knows = self._informed or self.complete or (first and not self.cold_start)
        lacks = self.settings.replicate and not knows
        for peer in self.peers:
            peer.side_changed(now)
            if lacks:
                peer.begin_learning(now)
        self._informed = True
        self.complete = False
        self._completing = self.replicas.adopting = False
        if not first and self.settings.takes_over:
            self.replicas.takeover.begin()
        self.helpers.become_active(first)

    def _become_backup(self, now: float) -> None:
        """The virtual IPs are gone.  This node's flows belong to the new active node now; its bulk says which."""
        if any(peer.learn for peer in self.peers):  # it never knew all
            self._informed = False
        rivals = [peer for peer in self.peers if peer.split_brain(now)]
        for peer in self.peers:
            if rivals:  # what this node did meanwhile is another history
                peer.pending.clear()
            peer.learn = ""
            peer.side_changed(now)
        self.replicas.clear()
        self.helpers.become_backup()
        self.complete = False
        self._completing = False
        self._watch_split_brain(now)
        self._follow_anyone(now)

    # --- who is active -----------------------------------------------------------------------------------------------

    def _follow(self, peer: Peer) -> None:
        """This backup holds the replicas of this peer from now on; its bulk says which of those here are stale."""
        self._informed = False  # flows go on there without this node
        if peer is self.leader:
            return
        self.leader = peer
        self.checker.follow(peer, self.situation.now)
        self.cache.end_bulk()
        self._completing = self.complete = False
        self.dumps.stop(RECONCILE)
        self.counters["leaders_followed"] += 1

    def _follow_anyone(self, now: float) -> None:
        """If no active node is followed, follow one."""
        if self.active or (self.leader is not None and self.leader.active and self.leader.alive(now)):
            return
        for peer in self.peers:
            if peer.active and peer.alive(now):
                self._follow(peer)
                return

    def _peer_says(self, peer: Peer, status: wire.Status, now: float) -> None:
        claims = status.role == wire.ROLE_ACTIVE and not peer.active
        if peer.says(status, now) and self.settings.replicate:
            self.dumps.want(LOOSEN)
        self._watch_split_brain(now)
        if self.active:
            if peer is self._predecessor and (
                peer.complete or (peer.active and now - self._active_since > SPLIT_BRAIN_S)
            ):
                self._predecessor = None  # it has all of this node's table; or it goes on by itself
        elif claims or (peer.active and peer is self.leader):
            self._follow(peer)  # the one that became active last
        else:
            self._follow_anyone(now)

    def _watch_split_brain(self, now: float) -> None:
        """Count and tell each time that two nodes are active at once, and not just for a moment."""
        rivals = [peer.name for peer in self.peers if peer.active and peer.split_brain(now) and peer.alive(now)]
        split = bool(self.active and rivals)
        if split and not self._split:
            self.counters["split_brains"] += 1
            self.situation.alarms.append(f"split brain: {' and '.join(rivals)} is active too")
        elif self._split and not split:
            self.situation.alarms.append("the split brain is over" + ("" if self.active else ": this node yielded"))
        self._split = split

    def set_conditions(self, ruleset: str, parameters: Mapping[str, int], now: float) -> None:
        """This node's ruleset fingerprint, and its sysctls net.netfilter.nf_conntrack_NAME by NAME."""
        self.replicas.takeover.timeouts = parameters
        limit = max(self.settings.table_limit, min(TABLE_ROOM * parameters.get("max", 0), TABLE_LIMIT_MAX))
        self.cache.limit = limit
        for peer in self.peers:
            peer.pending.limit = limit
        own = conditions.own(ruleset, parameters)
        if own != self.situation.conditions:
            self._stirred = True
            self.situation.conditions = own
            self.situation.parameters = tuple(parameters)
            for peer in self.peers:
                if peer.established:
                    peer.tell_conditions(now)

    # --- kernel: events ----------------------------------------------------------------------------------------------

    def set_addresses(self, own: Iterable[bytes]) -> None:
        """Addresses of this node, virtual IPs included (packed): flows that begin or end here are not replicated."""
        self.filter.own = frozenset(own)

    def kernel_changes(self, changes: Changes, now: float) -> None:
        """What conntrack events said that this daemon did not cause."""
        counters, active = self.situation.counters, self.situation.active
        counters["events"] += changes.events
        if changes.events:
            self.dumps.changed(changes.events, now)
        if changes.flows or changes.lost or not active:
            self._stirred = True
        if not active:
            if changes.gone:
                self.replicas.vanished(changes.gone)
        else:
            if self.replicas.takeover.running:
                changes = changes.settled()
                self.replicas.forget_ended(changes)
            if self.helpers.source.masters:
                self.helpers.source.ended(changes.gone)
            if self.source.telling:
                told = self.newcomers.sift(changes, self.source.announced.table, self._tables_compared)
                if self.newcomers.waiting:
                    counters["newcomers_held"] += len(self.newcomers)
                self.source.changed(told, now)
            else:
                self.newcomers.forget()
        if changes.lost:
            self.source.doubt()
            counters["overruns"] += 1
            self.dumps.events_lost(now)
            if not (active or self.situation.hot):  # what was committed may be gone, and nobody compares
                self.replicas.vanished(self.cache.table)

    @property
    def _tables_compared(self) -> bool:
        """Is the kernel's table held against what the peer was told?"""
        source = self.source
        return self.dumps.runs(BULK) or source.touched is not None or source.states is not None

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
        if situation.hot or not self.replicas.takeover.running or self.source.announced.complete:
            return True
        return not all(peer.bulk_due for peer in self.peers)

    def take_questions(self) -> list[Question]:
        """What the kernel must be asked; the caller gives what it finds to :meth:`answer`."""
        found, self.situation.questions = self.situation.questions, []
        return found

    def answer(self, question: Question, found: Flow | None, now: float) -> None:
        """The kernel's entry, None if there is none."""
        self._stirred = True
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
        if not all(prover.room for prover in self.provers if prover.comparing):
            return False
        return self.replicas.jobs.waiting < DUMP_ROOM and all(p.has_room for p in self.peers if p.bulking)

    @property
    def dump_paced(self) -> bool:
        """The running dump is to be read slowly, and what it costs told to :meth:`dump_cost`."""
        return self.dumps.runs(*PACED)

    def dump_cost(self, seconds: float) -> None:
        """So much time of a core a part of a paced dump took."""
        self.dumps.spend(seconds)

    @property
    def _auditor(self) -> Prover:
        """The one that the running dump is for."""
        return next((prover for prover in self.provers if prover.wants), self.provers[0])

    def dump_slice(self, changes: Changes, now: float) -> None:
        """Entries of the dump that :attr:`dump` asks for."""
        if self.dump is None:
            return
        purpose, source, replicas = self.dump.purpose, self.source, self.replicas
        given = [peer for peer in self.peers if peer.bulking] if purpose == GIVE else ()
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
                self._auditor.rows(purpose, key_len, rows, now)
            elif purpose == KERNEL:
                self.checker.kernel_rows(key_len, rows)
            else:
                for peer in given:
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
                self._auditor.flow(purpose, flow, now)
            elif purpose == KERNEL:
                self.checker.kernel_flow(flow)
            else:
                for peer in given:
                    peer.give_flow(flow, self.cache, now)

    def dump_finished(self, consistent: bool, now: float) -> None:
        """The dump came to its end.  ``consistent``: the kernel's table did not move under it (NLM_F_DUMP_INTR)."""
        self._stirred = True
        purpose = self.dumps.finished(now)
        if not purpose:
            return
        if purpose in PACED:
            if purpose == KERNEL:
                self.checker.kernel_finished(consistent, now)
            else:
                self._auditor.finished(purpose, consistent, now)
            self.dumps.seen = set()
            return
        self.counters["dumps"] += 1
        if not consistent and purpose != FLUSH:
            self.counters["dumps_interrupted"] += 1
        bulking = [peer for peer in self.peers if peer.bulking]
        if purpose == FLUSH:
            self.source.doubt()  # this daemon hears no events of what it does itself
        if purpose == BULK and consistent:
            self.source.bulk_read()
            self._bulk_told(bulking, now)
        for peer in bulking:
            if not peer.bulking:
                continue  # it is told all, or that did not fit
            if purpose == BULK:
                peer.stop_bulk()
                peer.bulk_due = True
            elif consistent:
                peer.bulking = False
            else:
                peer.stop_bulk()
                peer.give_due = True
        if purpose == LOOSEN and not consistent:
            self.dumps.want(LOOSEN)
        elif purpose == RECONCILE and consistent:
            self.replicas.reconciled()
        elif purpose == RECONCILE:
            self.dumps.want(RECONCILE)
        self.dumps.seen = set()

    def _bulk_told(self, peers: Sequence[Peer], now: float) -> None:
        """They are told all flows: expectations come last, and the end."""
        self._tell_expectations({one.name: one for one in self.helpers.source.expectations(now)}, peers, now)
        for peer in peers:
            if peer.bulking or peer.telling_again:  # else they did not fit
                self._bulk_flows = peer.bulk_sent(now)

    def _drop_dumps(self) -> None:
        self.dumps.drop()
        for peer in self.peers:
            peer.stop_bulk()

    def _bulk_for_all(self) -> None:
        for peer in self.peers:
            peer.bulk_due = True

    def _due(self, now: float) -> list[Peer]:
        """The peers that a bulk is due for and can be sent to now."""
        if not self.settings.replicate:
            return []
        return [peer for peer in self.peers if peer.bulk_due and not peer.learn and peer.alive(now)]

    def _to_be_given(self, now: float) -> list[Peer]:
        """The peers that asked this backup for its table and are heard of."""
        return [peer for peer in self.peers if peer.give_due and peer.alive(now)]

    def _next_dump(self, now: float) -> None:
        dumps = self.dumps
        if dumps.runs(BULK, GIVE):
            self._look_for_stalled(now)
        if not dumps.urgent:  # else it comes to its end first
            if not self.active:
                if self._to_be_given(now):
                    dumps.want(GIVE)
            elif not self.replicas.busy and now >= self.situation.bulks_from and self._due(now):
                if self.source.remembers:
                    self._tell_again(now)
                else:
                    dumps.want(BULK)
        begun = dumps.begin()
        if begun is None:
            return
        if begun.purpose == KERNEL:
            self.checker.kernel_begins()
        elif begun.purpose in PACED:
            for prover in self.provers:
                prover.begin(begun.purpose, now)
        elif begun.purpose in (BULK, GIVE):
            self._begin_bulk(begun.purpose, now)

    def _tell_again(self, now: float) -> None:
        """Tell the peers that a bulk is due for what was told before."""
        for peer in self._due(now):
            self.provers[self.peers.index(peer)].reset(now)
            peer.bulk_due = False
            peer.begin_again(self.source.announced, now)
            self.counters["bulks_sent"] += 1
            self.counters["bulks_from_memory"] += 1

    def _begin_bulk(self, purpose: str, now: float) -> None:
        for prover in self.provers:
            prover.reset(now)
        due = self._due(now) if purpose == BULK else self._to_be_given(now)[:1]
        if not due:
            self.dumps.stop(purpose)
        elif purpose == BULK:
            for peer in due:
                peer.bulk_due = False
            self.source.begin_bulk(due, now)
            if self.replicas.busy:
                self.source.doubt()  # what this daemon changes in the kernel it hears nothing of
            self.counters["bulks_sent"] += 1
        else:
            due[0].begin_giving(self.cache, now)
            self.counters["bulks_given"] += 1

    def _look_for_stalled(self, now: float) -> None:
        """A dump waits for the slowest peer that it is for; but nobody else waits for that one for long, and nothing
        for one that is gone."""
        stalled = [peer for peer in self.peers if peer.stalled(now)]
        bulking = [peer for peer in self.peers if peer.bulking]
        others = len(stalled) < len(bulking) or any(
            peer not in bulking and (peer.bulk_due or peer.give_due) and peer.alive(now) for peer in self.peers
        )
        reread = self.dumps.reread_at is not None and now >= self.dumps.reread_at and len(self.peers) > 1
        for peer in stalled:
            if others or reread or peer.gone(now):
                peer.set_back()
                bulking.remove(peer)
        if not bulking:
            self.dumps.stop(BULK, GIVE)

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
        self._stirred = True
        late = self.replicas.results(job, failures)
        if late:
            self.source.announce_late(late, job, self.situation.now)

    # --- the peers ---------------------------------------------------------------------------------------------------

    def receive(self, number: int, datagram: bytes, now: float, link: int = 0) -> None:
        """A datagram from the address of peer ``number``, in the order of the sessions, on a link."""
        peer = self.peers[number]
        for event in peer.session.receive(datagram, now, link):
            if isinstance(event, StatusReceived):
                if event.status is peer.status and self._knows(peer, now):  # as nearly always
                    peer.says_the_same(now)
                    self._informed = self._informed and not peer.active
                    continue
                self._sleeps_until = now
                self._stirred |= event.status[:2] != peer.status[:2]
                self._peer_says(peer, event.status, now)
                continue
            self._stirred = True
            if isinstance(event, BlockReceived):
                self._receive_records(peer, event.records, now)
            elif isinstance(event, SessionUp):
                self._session_up(peer, now)
            elif isinstance(event, PeerLeft):
                peer.leaves()
                self._follow_anyone(now)

    def _knows(self, peer: Peer, now: float) -> bool:
        """One node is active, and the backups follow it, as before: then nothing comes of a status."""
        if self._split or self._predecessor is not None:
            return False
        if self.situation.active:
            return not peer.active
        leader = self.leader
        return peer is leader if peer.active else leader is not None and leader.active and leader.alive(now)

    def _session_up(self, peer: Peer, now: float) -> None:
        peer.session_up(now)
        if peer is self._predecessor:
            self._predecessor = None
        if self.active:
            peer.bulk_due = True
        self.provers[self.peers.index(peer)].reset(now)
        if peer is self.leader:
            self.checker.reset(now)
        if not self.source.announced.complete and not any(
            other.established for other in self.peers if other is not peer
        ):
            self.source.forget()
        if self.active:
            peer.learn_again(now - self.role_since, now)
        elif peer is self.leader:
            self.cache.end_bulk()
            self._completing = self.complete = False

    def _receive_records(self, peer: Peer, records: bytes, now: float) -> None:
        try:
            for kind, payload in wire.iter_tlv(records):
                self.counters["records_received"] += 1
                try:
                    self._receive_record(peer, kind, payload, now)
                except WireError as error:
                    self.counters["records_" + error.kind] += 1
        except WireError as error:  # where the next record begins is unknown
            self.counters["records_" + error.kind] += 1

    def _receive_record(self, peer: Peer, kind: int, payload: bytes, now: float) -> None:
        if not self.settings.replicate:
            self.counters["ignored_replication_off"] += 1
        elif kind == wire.RECORD_ROWS:
            key_len, joined = wire.decode_rows(payload)
            rows = dict(wire.iter_rows(key_len, joined))
            self.dumps.changed(len(rows), now)
            if self._takes(peer, len(rows), now):
                self._receive_rows(key_len, rows, now)
        elif kind == wire.RECORD_FLOW:
            key, value, extras = wire.decode_flow_record(payload)
            self.dumps.changed(1, now)
            if self._takes(peer, 1, now):
                self._receive_flow(key, value, extras, now)
        elif kind == wire.RECORD_GONE:
            key_len, joined = wire.decode_gone(payload)
            if self._led_by(peer):
                keys = wire.split_keys(key_len, joined)
                self.dumps.changed(len(keys), now)
                self.checker.told(keys)
                self.replicas.delete(keys)
                self.helpers.replicas.masters_gone(keys)
        elif kind == wire.RECORD_EXPECT:
            if self._takes(peer, 1, now):
                self.helpers.receive(payload, now)
        elif kind == wire.RECORD_EXPECT_GONE:
            if self.active or self._led_by(peer):
                self.helpers.receive_gone(payload)
        elif kind == wire.RECORD_BULK_BEGIN:
            wire.decode_bulk_begin(payload)
            if self.active:
                peer.teaching_begins()
            elif self._led_by(peer):
                self._completing = False
                self.checker.reset(now)
                self.replicas.begin_bulk()
                self.helpers.replicas.begin_bulk()
        elif kind == wire.RECORD_BULK_END:
            wire.decode_bulk_end(payload)
            if self.active:
                peer.teaching_ends()
            elif self._led_by(peer) and self.cache.bulk_running:
                self._bulk_ended()
        elif kind == wire.RECORD_BULK_REQUEST:
            self._bulk_requested(peer)
        elif kind == wire.RECORD_CONDITIONS:
            peer.conditions = wire.decode_conditions(payload)
        elif kind == wire.RECORD_ROLE:
            peer.spoke_as = wire.decode_role(payload)
            if peer.spoke_as == wire.ROLE_ACTIVE and not self.active:
                self._follow(peer)  # before its status says so
            elif peer.spoke_as == wire.ROLE_ACTIVE and not peer.active:
                self.dumps.want(LOOSEN)  # it was active beside this node, and has yielded before its status was heard
        elif wire.RECORD_DIGEST <= kind <= wire.RECORD_REPORT:
            self._receive_comparison(peer, kind, payload, now)
        else:
            self.counters["skipped_unknown_record"] += 1

    def _receive_comparison(self, peer: Peer, kind: int, payload: bytes, now: float) -> None:
        checker, prover = self.checker, self.provers[self.peers.index(peer)]
        checker.complete = self.complete
        if kind == wire.RECORD_BUCKETS_REQUEST:
            prover.buckets_requested(now)
        elif kind == wire.RECORD_COMPARE_REQUEST:
            prover.compare(wire.decode_compare(payload), now)
        elif kind == wire.RECORD_REPORT:
            prover.reported(wire.decode_report(payload), now)
        elif not self._led_by(peer):
            self.counters["refused_not_leader"] += 1
        elif kind == wire.RECORD_DIGEST:
            checker.digest(*wire.decode_digest(payload), now)
        elif kind == wire.RECORD_BUCKETS:
            _number, first, sums = wire.decode_sums(payload)
            checker.buckets_told(first, sums, now)
        elif kind == wire.RECORD_COMPARE_BEGIN:
            checker.begin(wire.decode_compare(payload), now)
        elif kind == wire.RECORD_COMPARE_ROWS:
            key_len, joined = wire.decode_rows(payload)
            rows = dict(wire.iter_rows(key_len, joined))
            checker.named(len(joined) // SHAPES[key_len].row, now)
            passed = self.filter.passing_rows(key_len, rows)
            checker.rows(key_len, self.filter.selected_rows(key_len, passed), now)
        elif kind == wire.RECORD_COMPARE_FLOW:
            key, value, extras = wire.decode_flow_record(payload)
            flow = unpack(key, value, extras)
            checker.named(1, now)
            if self.filter.passes_through(flow) and self.filter.selects(flow):
                checker.flow(key, value, extras, now)
        elif kind == wire.RECORD_COMPARE_END:
            checker.end(*wire.decode_bulk_end(payload), now)
        elif kind == wire.RECORD_STATES_BEGIN:
            checker.states_begin(wire.decode_number(payload), now)
        else:
            checker.states_told(*wire.decode_sums(payload), now)

    def _led_by(self, peer: Peer) -> bool:
        """Does this backup hold the replicas of this peer, and does it say what comes in now as an active node?"""
        return not self.active and peer is self.leader and peer.spoke_as != wire.ROLE_BACKUP

    def _takes(self, peer: Peer, flows: int, now: float) -> bool:
        """Are flows of this peer wanted?  An active node takes those that it asked for, and late ones of the node that
        was active before, as long as that does not go on by itself: two histories are never mixed."""
        if self.active:
            if peer.teaches(now):
                return True
            if peer is self._predecessor and not (peer.active and now - self._active_since > SPLIT_BRAIN_S):
                return True
            self.counters["refused_split_brain"] += flows
            return False
        if self._led_by(peer):
            return True
        self.counters["refused_not_leader"] += flows
        return False

    def _bulk_requested(self, peer: Peer) -> None:
        self.counters["bulks_requested"] += 1
        if peer.bulking or peer.telling_again:
            return  # it is on its way
        if self.active:
            peer.bulk_due = True
        else:
            peer.give_due = True

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
        else:
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
        else:
            self.replicas.take_late_flow(key, value, flow)

    # --- commands ----------------------------------------------------------------------------------------------------

    def commit(self) -> int:
        """Put every flow of the external cache that the kernel does not hold into the kernel; returns how many."""
        self._stirred = True
        self.source.doubt()  # this daemon hears no events of what it does itself
        waiting = self.copies.lacking(self.cache.table)
        self.replicas.takeover.add(waiting)
        self.helpers.replicas.commit()
        return len(waiting)

    def flush_external(self) -> int:
        """Forget the external cache (the kernel keeps its entries); returns how many entries it had."""
        self._stirred = True
        forgotten = len(self.cache)
        self.replicas.forget_all()
        self.helpers.replicas.clear()
        if not self.active:
            self.complete = self._completing = False
        return forgotten

    def flush_kernel(self) -> None:
        """Remove from this node's kernel every flow that the engine would replicate."""
        self._stirred = True
        self.source.doubt()
        self.dumps.want(FLUSH)

    def resync(self) -> None:
        """Read the kernel's table again: the active node sends it, a backup compares it with its external cache."""
        self._stirred = True
        if self.active:
            self.source.doubt()
            self._bulk_for_all()
        elif self.situation.hot and (self.complete or self._completing):
            self.dumps.want(RECONCILE)

    def request_bulk(self, now: float) -> None:
        """Ask the active node for its whole table."""
        self._stirred = True
        if self.leader is not None:
            self.leader.request_bulk(now)

    def purge_later(self, now: float) -> None:
        """In ``PURGE_AFTER_S`` remove entries from this backup's kernel that the peer does not have; in the classic
        mode all that it would replicate, for there the peer's are in the external cache."""
        self._stirred = True
        if self._purge_at is None:
            self._purge_at = now + PURGE_AFTER_S

    def _purge(self) -> None:
        self._purge_at = None
        if self.situation.hot or self.active:
            self.resync()
        else:
            self.flush_kernel()

    def verify(self, now: float, number: int = 0) -> Verification:
        """Compare all flows of both nodes, and what the backup's kernel holds.  Nothing is repaired.

        Of an active node with the peer of this number; a backup is compared with the active node.
        """
        self._stirred = True
        if self.active:
            return self.provers[number].verify(now)
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

    def poll(self, now: float) -> list[list[bytes]]:
        """Datagrams to send now, for each of the peers."""
        self.situation.now = now
        self._housekeeping(now)
        changes = self.helpers.poll(now)
        if changes and self.source.telling:
            self._tell_expectations(changes, self.peers, now)
        status = self._status()
        out = []
        for peer in self.peers:
            peer.session.set_status(status)
            peer.give(self.cache, self.helpers.to_give, now)
            if peer.telling_again and peer.tell_again(self.source.announced, now):
                self._bulk_told((peer,), now)
            out.append(peer.poll(now))
        self._stirred = False
        self._calm = self._nothing_to_do()
        self._alive = [peer.alive(now) for peer in self.peers]
        self._chores_at = self._next_chore()
        self._polled_at, self._sleeps_until = now, None
        self._changes_polled = self.dumps.changes
        return out

    def tell(self, now: float) -> list[list[bytes]]:
        """Datagrams with the changes that wait, and nothing else; :meth:`poll` or :meth:`talk` come after it."""
        self.situation.now = now
        return [peer.tell(now) for peer in self.peers]

    def talk(self, now: float) -> list[list[bytes]]:
        """The sessions' part of :meth:`poll`: datagrams with the changes that wait, signs of life, acknowledgements."""
        self.situation.now = now
        return [peer.poll(now) for peer in self.peers]

    def resting(self, now: float) -> bool:
        """Since the last :meth:`poll` nothing came in but changes of flows and signs of life, nothing is being
        done, and nothing is due: then :meth:`talk` does all that there is to do.

        What is not urgent has no deadline and waits for a poll: there must be one every second all the same, unless
        the engine :meth:`sleeps`.
        """
        if self._stirred or not self._calm or now >= self._chores_at or self.situation.questions:
            return False
        for peer, alive in zip(self.peers, self._alive):
            if peer.bulk_due or peer.session.alive(now) is not alive:
                return False
        return True

    def sleeps(self, now: float) -> bool:
        """While it is :meth:`resting`: has nothing at all changed since the last :meth:`poll`, is every change
        acknowledged, and nothing due that has no deadline?  Then the poll of this second can be left out."""
        if self._sleeps_until is None:
            self._sleeps_until = self._sleep(now)
        if now >= self._sleeps_until or self.dumps.changes != self._changes_polled or self.situation.alarms:
            return False
        return not [peer for peer in self.peers if peer.session.in_flight or peer.pending.waits]

    def _sleep(self, now: float) -> float:
        """Until when there is nothing to be done for a poll, if nothing comes in."""
        if self.active:
            waits = self._predecessor is not None or True in [peer.active for peer in self.peers]
        else:
            waits = self.settings.replicate and not self.complete
        if waits or self._split or self._flapping or self.cache.full_at is not None:
            return now
        proving = [prover.idle_until(now) for prover in self.provers]
        return min([self._polled_at + SLEEP_S, self.checker.idle_until(), *proving])

    def _nothing_to_do(self) -> bool:
        dumps, helpers = self.dumps, self.helpers
        if dumps.wanted or self.replicas.busy or helpers.busy or any(prover.busy for prover in self.provers):
            return False
        return not any(peer.learn or peer.giving or peer.telling_again for peer in self.peers)

    @property
    def hurried(self) -> bool:
        """This backup has :meth:`kernel_work`, which comes first.  On an active node it is telling that does."""
        return bool(self.replicas.jobs) and not self.situation.active

    @property
    def calm(self) -> bool:
        """The last :meth:`poll` left nothing to be done."""
        return self._calm

    @property
    def nothing_to_tell(self) -> bool:
        """No change waits to be told to a peer."""
        return not [peer for peer in self.peers if peer.pending.waits]

    def take_alarms(self) -> list[str]:
        """What an operator should find in the log."""
        found, self.situation.alarms = self.situation.alarms, []
        return found

    def next_deadline(self) -> float:
        """When :meth:`poll` wants to be called next (monotonic seconds)."""
        return min([self._next_chore(), *[peer.next_deadline() for peer in self.peers]])

    def rests_until(self) -> float:
        """The same while it is :meth:`resting`; then it costs less."""
        return min([self._chores_at, *[peer.session.next_deadline() for peer in self.peers]])

    def _next_chore(self) -> float:
        deadline = min(self.checker.next_deadline(), *[prover.next_deadline() for prover in self.provers])
        for moment in (self._purge_at, self.replicas.refused_at, self.dumps.reread_at and self.dumps.next_reread):
            if moment is not None and moment < deadline:
                deadline = moment
        if self._flapping and self.situation.bulks_from > self.situation.now:
            deadline = min(deadline, self.situation.bulks_from)
        return min(deadline, self.helpers.next_deadline())

    @staticmethod
    def _tell_expectations(changes: Mapping[bytes, Expectation | None], peers: Iterable[Peer], now: float) -> None:
        for peer in peers:
            if peer.established and not peer.behind and peer.fits(len(changes)):
                for name, one in changes.items():
                    peer.pending.put_expectation(name, None if one is None else pack_expectation(one), now)

    def _housekeeping(self, now: float) -> None:
        replicas, dumps = self.replicas, self.dumps
        if self._purge_at is not None and now >= self._purge_at:
            self._purge()
        if replicas.refused_at is not None and now >= replicas.refused_at:
            replicas.retry_refused(now)
        if dumps.reread_at is not None and dumps.reread_due(now):
            self.resync()
        for peer in self.peers:
            if peer.learn:
                peer.learn_more(now)
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
            and self.leader is not None
            and self.leader.may_be_asked(now)
        ):
            self.leader.request_bulk(now)
        if self._split:
            self._watch_split_brain(now)
        if self._flapping and now - self._changes[-1] > FLAPPING_S:
            self._flapping = False
            self.situation.alarms.append("this node does not change sides any more")
        for prover in self.provers:
            prover.poll(now)
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
            flows = max(flows, self._bulk_flows)
        return wire.Status(ROLE_CODES.get(self.role, wire.ROLE_UNKNOWN), flags, flows)

    # --- what people and keepalived want to know ---------------------------------------------------------------------

    def lag(self, now: float) -> tuple[int, float]:
        """Changes that peers have not acknowledged, and the age of the oldest in seconds."""
        lags = [peer.lag(now) for peer in self.peers]
        return sum([events for events, _age in lags]), max([age for _events, age in lags])

    def condition(self, now: float) -> tuple[object, ...]:
        """What the verdict depends on, short of numbers that grow: while it stays the same, so does the verdict."""
        return (
            self.role,
            self.complete,
            self._informed,
            self.leader,
            [peer.condition(now) for peer in self.peers],
            self.dumps.reread_at,
            self.cache.bulk_running,
            len(self.cache) > 0,
            self.replicas.excluded > 0,
            len(self.copies.refused),
            self.cache.full(now),
            self.overloaded,
            bool(self.checker.alarm(now)),
            self._flapping,
            len(self.situation.alarms),
            self.problem,
            self.impaired,
            self.situation.conditions,
            self.helpers.problem,
        )

    def verdict(self, now: float) -> readiness.Verdict:
        reread_at = self.dumps.reread_at
        return readiness.judge(
            readiness.Facts(
                role=self.role if not self.active or self.role == readiness.BACKUP else readiness.ACTIVE,
                replicate=self.settings.replicate,
                peers=tuple(self._facts(peer, now) for peer in self.peers),
                leader=None if self.leader is None else self.peers.index(self.leader),
                complete=self.complete,
                holds=self._informed or len(self.cache) > 0,
                progress=self._progress(),
                reread_s=None if reread_at is None else max(0.0, reread_at - now),
                waiting=self.replicas.jobs.waiting if self.overloaded else 0,
                refused=collections.Counter(self.copies.refused.values()),
                full=self.cache.limit if self.cache.full(now) else 0,
                lag_limit_s=self.settings.lag_limit_s,
                flapping=self._flapping,
                problem=self.problem,
                impaired=self._impairments(),
                differences=self.differences(),
            )
        )

    @staticmethod
    def _facts(peer: Peer, now: float) -> readiness.PeerFacts:
        return readiness.PeerFacts(
            name=peer.name,
            session=peer.established,
            alive=peer.alive(now),
            left=peer.left,
            silent_s=peer.silent_s(now),
            role=peer.role_name,
            replicates=peer.replicates,
            complete=peer.complete,
            learning=bool(peer.learn) and peer.established,
            lag_s=peer.lag(now)[1],
        )

    def differences(self) -> tuple[str, ...]:
        """In what the rules, limits and timers of an active node and its backup are not alike, this node being either:
        some of the verdict's reasons."""
        others = self.peers if self.active else (self.leader,) if self.leader is not None else ()
        return tuple(text for peer in others for text in peer.differences())

    def _progress(self) -> tuple[int, int] | None:
        """Of the bulk that comes in: flows so far, and about how many it will have (0: unknown)."""
        if self.active or self.leader is None or not self.cache.bulk_running:
            return None
        return self.cache.named, self.leader.status.flows

    def _impairments(self) -> tuple[str, ...]:
        found = list(self.impaired)
        if self.helpers.problem:
            found.append(self.helpers.problem)
        if self.active:
            for peer in self.peers:
                if peer.differs:
                    found.append(f"the table of {peer.name} differs from this node's: see ctsyncd verify")
            return tuple(found)
        if self.leader is not None and self.replicas.excluded:
            found.append(
                f"{self.leader.name} replicates flows that this node's filter excludes: give both the same filter"
            )
        alarm = self.checker.alarm(self.situation.now)
        if alarm:
            found.append(alarm)
        return tuple(found)

    def peer_status(self, now: float) -> list[dict[str, Any]]:
        """The peers' part of ``status --json``.

        ``bulk`` says whether the backup of two nodes, whichever that is, holds the table of the active node; ``table``
        says it in words.  Of two backups nothing is said.
        """
        return [
            peer.describe(*self._tables(peer, now), self._equality(prover, peer, now), now)
            for peer, prover in zip(self.peers, self.provers)
        ]

    def peer_notes(self, now: float) -> list[dict[str, str]]:
        """Of :meth:`peer_status` what is worth a note when it changes; it costs less."""
        return [{"node": peer.name, **peer.standing(now), "bulk": self._tables(peer, now)[0]} for peer in self.peers]

    def _equality(self, prover: Prover, peer: Peer, now: float) -> dict[str, Any]:
        return self.checker.describe(now) if not self.active and peer is self.leader else prover.describe()

    def _tables(self, peer: Peer, now: float) -> tuple[str, tuple[int, int] | None]:
        if self.active:
            sending = peer.bulk_due or peer.bulking or peer.telling_again
            return "complete" if peer.complete else "sending" if sending and peer.alive(now) else "none", None
        if peer is not self.leader:
            return "", None
        receiving = self.cache.bulk_running or self._completing
        return "complete" if self.complete else "receiving" if receiving else "none", self._progress()

    def external_flows(self) -> Iterator[tuple[Flow, float]]:
        """The external cache: flows and when their replication began (monotonic seconds)."""
        return self.replicas.flows()
