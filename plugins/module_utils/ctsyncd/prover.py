# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The active side of equality: what a backup needs to know to see that its table is this node's, and to mend it.

* A *digest* of all that was told goes into the stream of changes, as often as they come.  What is before it in the
  stream the backup has then, what is behind it, not yet: so both speak of the same moment.
* In an *audit*, now and then, the kernel's table is read and compared with what was told.  Its sums, states included,
  go to the backup, too.
* In a *comparison* the flows of some buckets are told as the kernel has them: those that differ, to be repaired, or
  all of them, because an operator wants to know.

All of it waits for what is urgent, and an audit or a repair costs at most a hundredth of a core (see :mod:`dumps`).
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from . import wire
from .digest import ALL, BUCKETS, Differences, States, bucket, in_buckets
from .digest import KINDS as DIFFERENCES
from .dumps import AUDIT, COMPARE, Dumps
from .flow import Flow
from .peer import Peer
from .rows import SHAPES, pack
from .situation import DUMP_ROOM, Situation
from .source import Source
from .verification import Verification

DIGEST_S = 0.9  # between two digests while flows come and go: one with each poll of a quiet second
DIGEST_IDLE_S = 10.0
AUDIT_S = 30.0  # between two audits, at least
HOLD_S = 0.3  # longer than an event takes to get here: what was read of the kernel is told when they are in
ROOM = 32  # changes that may wait while a comparison is told
UNSEEN = 131_072  # keys that one audit misses if the kernel has not got them
STRANGERS = 10_000  # flows that one audit finds untold
RESTARTS = 5  # of a comparison whose dump was not consistent
REQUESTS = 4  # comparisons that wait
FIRST_ROWS = 64  # in a record; later as many as fit


class _Comparison:
    """One that runs.  ``unconfirmed``: keys that were told of and that the kernel has not named (repairs only)."""

    def __init__(self, wanted: wire.Compare, unconfirmed: set[bytes]) -> None:
        self.wanted = wanted
        self.unconfirmed = unconfirmed
        self.flows = 0
        self.held: collections.deque[tuple[float, int, dict[bytes, bytes], list[tuple[bytes, bytes, bytes]]]] = (
            collections.deque()
        )
        self.read_at: float | None = None  # when the dump came to its end
        self.restarts = 0
        self.rows = FIRST_ROWS

    @property
    def repairs(self) -> bool:
        return bool(self.wanted.flags & wire.COMPARE_REPAIR)


class Prover:
    """Towards one peer.  ``wants``: the purpose of the dump that it has asked for, or that runs for it.

    Of several peers one is audited, or compared with, at a time.
    """

    def __init__(self, situation: Situation, dumps: Dumps, peer: Peer, source: Source, now: float) -> None:
        self.verification: Verification | None = None
        self.wants = ""
        self._auditing = False
        self._situation = situation
        self._counters = situation.counters
        self._dumps = dumps
        self._peer = peer
        self._source = source
        self._number = 0
        self._digest_at = now
        self._idle_at = now
        self._told: tuple[int, int] | None = None  # the last digest
        self._audit_at = now + AUDIT_S
        self._quiet = False  # when the last audit began, nothing had changed since the one before began
        self._changes = -1  # of flows, when it began
        self._unseen: set[bytes] = set()
        self._strangers: dict[bytes, bytes] = {}
        self._audits = 0
        self._settle_at: float | None = None  # when the audit that was read can be told
        self._repair_at = now
        self._wanted: collections.deque[wire.Compare] = collections.deque()
        self._running: _Comparison | None = None

    # --- life --------------------------------------------------------------------------------------------------------

    def reset(self, now: float) -> None:
        """A bulk begins, the session or the side is another one: nothing that was under way makes sense."""
        if self.wants:
            self._dumps.cancel(AUDIT, COMPARE)
        self._told = None
        self._digest_at = now + DIGEST_S
        self._wanted.clear()
        self._break_off(now)
        self._stop()
        if self.verification is not None:
            self.verification.give_up("the whole table is sent, or the session or the role changed: ask again")
            self.verification = None

    def _break_off(self, now: float) -> None:
        """The peer must not wait for the end of the comparison that runs.  A bulk, a new session or another side say so
        by themselves."""
        running, peer = self._running, self._peer
        if running is None:
            return
        if running.repairs:
            self._repair_at = max(self._repair_at, now + self._dumps.pause(0.0))
        if self._situation.active and self._source.telling and peer.established and not peer.bulk_due:
            peer.mark(wire.encode_compare_end(running.wanted.number, wire.COMPARE_BROKEN_OFF), now)

    def _stop(self) -> None:
        if self._auditing:
            self._source.states = None
        if self._running is not None:
            self._source.touched = None
        self.wants = ""
        self._auditing = False
        self._running = None
        self._settle_at = None
        self._unseen = set()
        self._strangers = {}

    def able(self, now: float) -> bool:
        """Is there a backup that has what it was told, and no other table under way?"""
        peer = self._peer
        return (
            self._situation.active
            and self._source.telling
            and peer.session.alive(now)
            and peer.status.role == wire.ROLE_BACKUP
            and peer.complete
            and not peer.bulk_due
            and not peer.telling_again
            and not peer.learn
            and not self._dumps.urgent
        )

    @property
    def _compares(self) -> bool:
        return self._situation.settings.compare

    @property
    def _busy(self) -> bool:
        return self._running is not None or self._auditing

    @property
    def busy(self) -> bool:
        """Something is being compared, or is to be."""
        return self._busy or bool(self._wanted)

    @property
    def comparing(self) -> bool:
        """Does the running dump wait for it?"""
        return self._running is not None and self._dumps.runs(COMPARE)

    def poll(self, now: float) -> None:
        if now < self._digest_at and now < self._audit_at and not (self._auditing or self._running or self._wanted):
            return  # as in nearly every turn
        if not self.able(now):
            if self._busy or self._wanted:
                self.reset(now)
            return
        if self._compares and now >= self._digest_at and len(self._peer.pending) < DUMP_ROOM:
            self._tell_digest(now)
        if self.wants == AUDIT and self._settle_at is None and not self._dumps.calm(now, self._audit_at):
            self._dumps.cancel(AUDIT)
            self._counters["audits_put_off"] += 1
            self._stop()
        if self._settle_at is not None and now >= self._settle_at:
            self._tell_audit(now)
        if self._running is not None:
            self._tell_held(now)
        others = self._source.states is not None or self._source.touched is not None
        if self._busy or others or self._dumps.wanted:
            return
        if self._next(now) is not None:
            self.wants = COMPARE
            self._dumps.want(COMPARE)
        elif self._compares and now >= self._audit_at and self._dumps.calm(now, self._audit_at):
            self.wants = AUDIT
            self._dumps.want(AUDIT)

    def idle_until(self, now: float) -> float:
        """Until when :meth:`poll` does nothing, if nothing changes and nothing is being compared."""
        if not self._compares or not self.able(now):
            return float("inf")
        announced = self._source.announced
        told = (len(announced), announced.digest.total) == self._told
        return min(self._idle_at if told else self._digest_at, self._audit_at)

    def next_deadline(self) -> float:
        """Only what cannot wait for the next heartbeat."""
        deadline = float("inf") if self._settle_at is None else self._settle_at
        running = self._running
        if running is not None and running.held:
            if len(self._peer.pending) < DUMP_ROOM:  # else an acknowledgement comes first
                deadline = min(deadline, running.held[0][0] + HOLD_S)
        elif running is not None and running.read_at is not None:
            deadline = min(deadline, running.read_at + HOLD_S)
        return deadline

    def describe(self) -> dict[str, Any]:
        """For ``status --json``: what the peer says of it."""
        peer = self._peer
        state = "equal" if peer.equal else "differs" if peer.differs else "unknown"
        return {"state": state, "since_s": None, "buckets": None, "of": BUCKETS, "vain": None}

    # --- digests -----------------------------------------------------------------------------------------------------

    def _tell_digest(self, now: float) -> None:
        announced = self._source.announced
        digest = (len(announced), announced.digest.total)
        self._digest_at = now + DIGEST_S
        if digest == self._told and now < self._idle_at:
            return
        self._told = digest
        self._idle_at = now + DIGEST_IDLE_S
        self._counters["digests_sent"] += 1
        self._peer.mark(wire.encode_digest(*digest), now)

    def buckets_requested(self, now: float) -> None:
        if self.able(now):
            self._number += 1
            self._tell_sums(wire.RECORD_BUCKETS, self._number, self._source.announced.digest.told(), now)

    def _tell_sums(self, kind: int, number: int, sums: Sequence[int], now: float) -> None:
        for first in range(0, BUCKETS, wire.BUCKETS_TOLD):
            self._peer.mark(wire.encode_sums(kind, number, first, sums[first : first + wire.BUCKETS_TOLD]), now)

    # --- requests ----------------------------------------------------------------------------------------------------

    def compare(self, wanted: wire.Compare, now: float) -> None:
        """The peer wants these flows to be compared."""
        repairs = wanted.flags & wire.COMPARE_REPAIR
        if not self.able(now) or (repairs and not self._compares):
            self._counters["comparisons_refused"] += 1
            return
        for at, waiting in enumerate(self._wanted):
            if repairs and waiting.flags == wanted.flags:  # one repair does for both
                self._wanted[at] = waiting._replace(buckets=waiting.buckets | wanted.buckets)
                return
        if len(self._wanted) >= REQUESTS:
            self._counters["comparisons_refused"] += 1
        else:
            self._wanted.append(wanted)

    def _next(self, now: float) -> wire.Compare | None:
        """The first that need not wait: a repair that pauses lets others pass."""
        for wanted in self._wanted:
            if not wanted.flags & wire.COMPARE_REPAIR or now >= self._repair_at:
                return wanted
        return None

    def verify(self, now: float) -> Verification:
        """Have all flows compared, and nothing repaired."""
        found = Verification(now)
        if not self.able(now):
            found.give_up(self._why_unable(now))
        elif self.verification is not None and not self.verification.done:
            found.give_up("another verify runs: ask again")
        else:
            self._number += 1
            found.number = self._number
            self.verification = found
            self._wanted.appendleft(wire.Compare(self._number, wire.COMPARE_REPORT, ALL))
        return found

    def _why_unable(self, now: float) -> str:
        peer = self._peer
        if not (self._source.telling and peer.established):
            return f"no session with {peer.name}, or replication is off"
        if not peer.session.alive(now):
            return f"{peer.name} is silent"
        if peer.status.role != wire.ROLE_BACKUP:
            return f"{peer.name} is not a backup"
        if peer.learn:
            return f"this node may lack flows: {peer.name} is asked for what it holds"
        return f"the table is being sent to {peer.name}: ask again"

    def reported(self, report: wire.Report, now: float) -> None:
        found = self.verification
        if found is not None and found.number == report.number:
            self.verification = None
            differences = Differences(report.flows)
            differences.counts = dict(zip(DIFFERENCES, report.counts))
            differences.keys = [(DIFFERENCES[kind], key) for kind, key in report.keys]
            found.finish(differences)

    # --- dumps -------------------------------------------------------------------------------------------------------

    def begin(self, purpose: str, now: float) -> None:
        """The dump for an audit or a comparison begins."""
        if purpose != self.wants:
            return
        announced = self._source.announced
        if purpose == AUDIT:
            self._auditing = True
            self._number += 1
            self._audits += 1
            self._quiet, self._changes = self._changes == self._dumps.changes, self._dumps.changes
            self._source.states = States(self._number)
            self._strangers = {}
            parts = len(announced) // UNSEEN + 1
            part = self._audits % parts
            self._unseen = {key for key in announced.table if hash(key) % parts == part}
            self._peer.mark(wire.encode_number(wire.RECORD_STATES_BEGIN, self._number), now)
        elif self._running is None:
            wanted = self._next(now)
            if wanted is None:
                return
            self._wanted.remove(wanted)
            repairs = wanted.flags & wire.COMPARE_REPAIR
            unconfirmed = set(in_buckets(announced.table, wanted.buckets)) if repairs else set()
            self._running = _Comparison(wanted, unconfirmed)
            self._source.touched = set()
            self._counters["comparisons"] += 1
            self._peer.mark(wire.encode_compare(wire.RECORD_COMPARE_BEGIN, wanted), now)

    @property
    def room(self) -> bool:
        """May the comparison's dump be read on?"""
        return len(self._peer.pending) < ROOM

    def rows(self, purpose: str, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        """What the dump found."""
        chosen = self._source.chosen(key_len, rows)
        if not chosen:
            return
        if purpose == AUDIT:
            self._audit(key_len, chosen)
        elif self._running is not None:
            wanted = set(in_buckets(chosen, self._running.wanted.buckets))
            if wanted:
                some = {key: value for key, value in chosen.items() if key in wanted}
                self._running.held.append((now, key_len, some, []))

    def flow(self, purpose: str, flow: Flow, now: float) -> None:
        key, value, extras = pack(flow)
        running = self._running
        if not self._source.keeps(flow):
            return
        if purpose == AUDIT:
            self._audit(len(key), {key: value})
        elif running is not None and bucket(key) in running.wanted.buckets:
            running.held.append((now, len(key), {}, [(key, value, extras)]))

    def finished(self, purpose: str, consistent: bool, now: float) -> None:
        """All was read."""
        if purpose == AUDIT:
            self._audit_at = now + self._dumps.pause(AUDIT_S, self._quiet)
            if consistent:
                self._settle_at = now + HOLD_S
            else:
                self._stop()
        elif self._running is not None:
            running = self._running
            if consistent:
                running.read_at = now
            elif running.restarts < RESTARTS:
                again = _Comparison(running.wanted, running.unconfirmed)
                again.restarts = running.restarts + 1
                self._running = again
                self._source.touched = set()
                self._peer.mark(wire.encode_compare(wire.RECORD_COMPARE_BEGIN, running.wanted), now)
                self._dumps.want(COMPARE)
            else:
                self._counters["comparisons_given_up"] += 1
                self._break_off(now)
                self._stop()
                self._told = None
                found = self.verification
                if found is not None and running.wanted.flags & wire.COMPARE_REPORT:
                    found.give_up("the kernel's table did not hold still: ask again")
            if running.repairs:
                self._repair_at = now + self._dumps.pause(0.0)

    # --- audits ------------------------------------------------------------------------------------------------------

    def _audit(self, key_len: int, rows: Mapping[bytes, bytes]) -> None:
        states = self._source.states
        if states is None:
            return
        states.add(key_len, rows)
        self._unseen.difference_update(rows)
        for key in self._source.announced.strangers(rows, SHAPES[key_len].reply):
            if len(self._strangers) < STRANGERS:
                self._strangers[key] = rows[key]

    def _tell_audit(self, now: float) -> None:
        """All events of what happened before the end of the dump are in: what is untold now was missed."""
        states, announced = self._source.states, self._source.announced
        if states is None:
            return
        untold = [
            key for key, value in self._strangers.items() if announced.strangers({key: value}, SHAPES[len(key)].reply)
        ]
        ghosts = [key for key in self._unseen if key in announced]
        self._tell_sums(wire.RECORD_STATES, states.number, states.totals(), now)
        self._stop()
        self._counters["audits"] += 1
        if untold or ghosts:
            self._counters["audits_untold"] += len(untold)
            self._counters["audits_ghosts"] += len(ghosts)
            self._number += 1
            suspects = frozenset(map(bucket, untold + ghosts))
            self.compare(wire.Compare(self._number, wire.COMPARE_REPAIR, suspects), now)

    # --- comparisons -------------------------------------------------------------------------------------------------

    def _tell_held(self, now: float) -> None:
        """Tell what was read long enough ago; of what changed since, its event says more."""
        running, touched = self._running, self._source.touched
        if running is None or touched is None:
            return
        while running.held and running.held[0][0] + HOLD_S <= now and len(self._peer.pending) < DUMP_ROOM:
            _read, key_len, rows, flows = running.held.popleft()
            rows = {key: value for key, value in rows.items() if key not in touched}
            flows = [flow for flow in flows if flow[0] not in touched]
            for told in (rows, {key: value for key, value, _extras in flows}):
                running.flows += len(told)
                if running.repairs and told:
                    running.unconfirmed.difference_update(told)
                    self._source.tell_untold(key_len, told, now)
            if rows:
                if running.repairs:
                    self._source.announced.add(rows, SHAPES[key_len].reply)
                self._tell_rows(running, key_len, rows, now)
            for key, value, extras in flows:
                if running.repairs:
                    self._source.announced.put(key, value, extras)
                record = wire.encode_flow_record(key, value, extras)
                self._peer.mark(wire.tlv(wire.RECORD_COMPARE_FLOW, record), now)
            if self.verification is not None:
                self.verification.goes_on(now)
            if self._running is None:  # what waited did not fit, and all begins anew
                return
        if running.read_at is not None and not running.held and running.read_at + HOLD_S <= now:
            ghosts = [key for key in running.unconfirmed if key not in touched and key in self._source.announced]
            self._counters["ghosts_ended"] += len(ghosts)
            self._source.end(ghosts, now)
            self._peer.mark(wire.encode_compare_end(running.wanted.number, running.flows), now)
            self._stop()
            self._told = None

    def _tell_rows(self, running: _Comparison, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        joined = b"".join([key + value for key, value in rows.items()])
        width, room = SHAPES[key_len].row, self._peer.session.block_bytes - wire.TLV_BYTES
        while joined:
            count = min(running.rows, len(joined) // width)
            payload = wire.encode_rows(key_len, joined[: count * width])
            if len(payload) > room and count > 1:
                running.rows = max(1, min(count - 1, count * room // len(payload)))
                continue
            if count == running.rows:
                running.rows = max(1, min(wire.MAX_ROWS, count * room * 9 // (len(payload) * 10)))
            self._peer.mark(wire.tlv(wire.RECORD_COMPARE_ROWS, payload), now)
            joined = joined[count * width :]
