# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One peer: the session with it, what waits to be told to it, what it says of itself, bulks to and from it, the lag."""

from __future__ import annotations

import collections
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

from . import conditions, readiness, wire
from .announced import Announced
from .expectation import Expectation
from .expectation import pack as pack_expectation
from .flow import Flow
from .pending import Encoder, Pending
from .rows import pack
from .session import Session
from .situation import DUMP_ROOM, SORTED_PER_TURN, Situation
from .tables import ExternalCache
from .takeover import timeout_of, untimed

REQUEST_BULK_AFTER_S = 2.0
SPLIT_BRAIN_S = 3.0  # both active for longer: not late flows of the former active node any more
STALLED_S = 1.0  # without room for a bulk, while others wait for theirs
GONE_S = 5.0  # silent for longer: its bulk does not keep its place, not even if nobody else waits for one
LEARN_S = 10.0  # how long an active node without a table waits for a sign that its peer gives it one
LEARN_WITHIN_S = 300.0  # of becoming active; later the peer's table is older than its own

# Steps of an active node towards the table of its peer
_DUE = "due"
_ASKED = "asked"
_RECEIVING = "receiving"

ROLE_CODES = {
    readiness.ACTIVE: wire.ROLE_ACTIVE,
    readiness.BACKUP: wire.ROLE_BACKUP,
    readiness.TRANSITION: wire.ROLE_TRANSITION,
}
ROLE_NAMES = {code: name for name, code in ROLE_CODES.items()}

_UNKNOWN = wire.Status(wire.ROLE_UNKNOWN, 0, 0)


class Peer:
    """``status``: what it said last.  ``spoke_as``: the role in which it says the records that come in now, one of
    wire.ROLE_*.  ``left``: it said that its daemon stops.  ``conditions``: None until it said them in this session.

    ``bulk_due``: this active node has to send it the whole table; ``give_due``: this backup has to.  ``bulking``: the
    running dump is (also) for it.  ``behind``: changes were dropped, it is told no more of them before its bulk begins.
    ``learn``: a step towards its table, where this active node may lack flows."""

    def __init__(self, situation: Situation, session: Session, encoder: Encoder, now: float) -> None:
        self.session = session
        self.pending = Pending(situation.settings.table_limit, encoder)
        self.status = _UNKNOWN
        self.spoke_as = wire.ROLE_UNKNOWN
        self.left = False
        self.conditions: conditions.Conditions | None = None
        self.bulk_due = False
        self.give_due = False
        self.bulking = False
        self.behind = False
        self.learn = ""
        self.learn_until = now
        self._situation = situation
        self._counters = situation.counters
        self._giving: collections.deque[bytes] | None = None  # replicas that it asked for and has not got
        self._again: Iterator[bytes] | None = None  # what it has to be told once more, out of memory
        self._bulk_number = 0
        self._bulk_flows = 0
        self._both_active_since: float | None = None
        self._both_active_at = now  # when it said so last
        self._rose = False  # it became active while this node was
        self._request_at = now
        self._differences: tuple[tuple[Any, ...], tuple[str, ...]] | None = None  # of what they were found, and they
        self._full_since: float | None = None  # there was no room for more of the running dump

    @property
    def name(self) -> str:
        return self.session.peer

    @property
    def established(self) -> bool:
        return self.session.established

    @property
    def active(self) -> bool:
        return self.status.role == wire.ROLE_ACTIVE

    @property
    def replicates(self) -> bool:
        return bool(self.status.flags & wire.STATUS_REPLICATES)

    @property
    def complete(self) -> bool:
        return bool(self.status.flags & wire.STATUS_COMPLETE)

    @property
    def equal(self) -> bool:
        """It says that its table is this active node's."""
        return bool(self.status.flags & wire.STATUS_EQUAL)

    @property
    def differs(self) -> bool:
        """It says that its table is not, and that this is worth an alarm."""
        return bool(self.status.flags & wire.STATUS_DIFFERS)

    @property
    def role_name(self) -> str:
        """Empty if it is not known."""
        return ROLE_NAMES.get(self.status.role, "")

    # --- what it says of itself --------------------------------------------------------------------------------------

    def session_up(self, now: float) -> None:
        """Nothing of an older session is left."""
        self._request_at = now + REQUEST_BULK_AFTER_S
        self.status = _UNKNOWN
        self.conditions = None
        self.spoke_as = wire.ROLE_UNKNOWN
        self._both_active_since = None
        self.give_due = False  # it asks again
        self._begin_anew()
        self.tell_conditions(now)

    def says(self, status: wire.Status, now: float) -> bool:
        """Returns whether packets of this active node's flows may pass there, or may have: it became active, too, or it
        was for a while.  (When the virtual IPs move as they should, the new active node finds it active for a moment.)
        """
        before, long = self.active, self.split_brain(now)
        self.status = status
        self.left = False
        if not self.active:
            self._both_active_since = None
        elif self._situation.active and (self._both_active_since is None or now - self._both_active_at > SPLIT_BRAIN_S):
            self._both_active_since = now
        self._both_active_at = now
        rises = self._situation.active and self.active and not before
        falls = self._situation.active and before and not self.active and (self._rose or long)
        self._rose = rises or (self._rose and self.active)
        return rises or falls

    def says_the_same(self, now: float) -> None:
        """As :meth:`says`, of the same status: nothing changes."""
        self._both_active_at = now

    def differences(self) -> tuple[str, ...]:
        """In what its conditions are not like this node's."""
        if self.conditions is None:
            return ()
        situation = self._situation
        about = (situation.conditions, self.conditions, situation.parameters, situation.settings.same_conditions)
        known = self._differences
        if known is None or any(map(operator.is_not, known[0], about)):
            theirs = conditions.differences(about[0], about[1], about[2], self.name, about[3])
            known = self._differences = (about, theirs)  # asked for every second
        return known[1]

    def leaves(self) -> None:
        self._counters["peer_left"] += 1
        self.left = True
        self.status = _UNKNOWN

    def side_changed(self, now: float) -> None:
        """This node became active or backup: what it says from now on it says as that."""
        self._both_active_since = None
        self._rose = False
        self.bulk_due = self._situation.active
        self.give_due = self.behind = False
        self.stop_bulk()
        if self.established:
            self.mark(self._role_record(), now)
        else:
            self.pending.clear()

    def split_brain(self, now: float) -> bool:
        """Both nodes are active, and not just for a moment."""
        return self._both_active_since is not None and now - self._both_active_since > SPLIT_BRAIN_S

    def alive(self, now: float) -> bool:
        return self.session.alive(now)

    def gone(self, now: float) -> bool:
        """Silent, and not just for a moment, as one is that is very busy."""
        seen = self.session.last_seen
        return not self.alive(now) and (seen is None or now - seen > GONE_S)

    # --- what is told to it ------------------------------------------------------------------------------------------

    def fits(self, changes: int) -> bool:
        """Is there room for so many changes?  If not, all that wait are dropped, and a bulk replaces them."""
        if len(self.pending) + changes <= self.pending.limit:
            return True
        self._counters["pending_overflows"] += 1
        self._begin_anew()
        self.behind = self.bulk_due = self._situation.active
        return False

    def _begin_anew(self) -> None:
        """Nothing waits to be told but the role of this node; the beginning of a running bulk is lost, too."""
        self.pending.clear()
        self.stop_bulk()
        self.behind = False
        self.pending.mark(self._role_record(), self._situation.now)

    def _role_record(self) -> bytes:
        return wire.encode_role(ROLE_CODES.get(self._situation.side, wire.ROLE_UNKNOWN))

    def mark(self, record: bytes, now: float) -> None:
        if self.fits(1):
            self.pending.mark(record, now)

    def tell_conditions(self, now: float) -> None:
        if self._situation.settings.replicate:
            self.mark(wire.encode_conditions(self._situation.conditions), now)

    def send_pending(self, now: float) -> None:
        session = self.session
        while self.pending.waits and session.credit() > 0:
            block, count, born = self.pending.take(session.block_bytes)
            if not count:
                break
            session.send_block(block, count, born, now)

    def lag(self, now: float) -> tuple[int, float]:
        """Changes that it has not acknowledged, and the age of the oldest in seconds."""
        sent, oldest = self.session.lag()
        waiting = self.pending.oldest
        times = [moment for moment in (oldest, waiting) if moment is not None]
        return sent + len(self.pending), max(0.0, now - min(times)) if times else 0.0

    # --- bulks to it -------------------------------------------------------------------------------------------------

    def begin_bulk(self, now: float) -> None:
        self.bulking = True
        self.behind = False
        self._full_since = self._again = None
        self._bulk_number += 1
        self._bulk_flows = 0
        self.tell_conditions(now)  # they may have waited with changes that were dropped
        self.mark(wire.encode_bulk_begin(self._bulk_number), now)

    def count_bulk(self, flows: int) -> None:
        self._bulk_flows += flows

    def end_bulk(self, now: float) -> None:
        self.mark(wire.encode_bulk_end(self._bulk_number, self._bulk_flows), now)

    def bulk_sent(self, now: float) -> int:
        """All of this active node's table is told; returns how many flows were told."""
        self.bulking = False
        self._again = None
        self.end_bulk(now)
        return self._bulk_flows

    def stop_bulk(self) -> None:
        """The running dump is not for it any more, and what it was given so far is worth nothing."""
        self.bulking = False
        self._giving = self._again = None

    @property
    def has_room(self) -> bool:
        """For more of a dump."""
        return len(self.pending) < DUMP_ROOM

    def set_back(self) -> None:
        """Its bulk is cut short and begins again: after those of others, or when it is heard of."""
        self._counters["bulks_set_back"] += 1
        if self._giving is None:
            self.bulk_due = True
        else:
            self.give_due = True
        self.stop_bulk()

    def stalled(self, now: float) -> bool:
        """The running dump waits for it, and has waited for long."""
        if not self.bulking or self.has_room:
            self._full_since = None
            return False
        if self._full_since is None:
            self._full_since = now
        return now - self._full_since > STALLED_S

    # --- bulks to it without a dump ----------------------------------------------------------------------------------

    @property
    def telling_again(self) -> bool:
        """A bulk out of memory is under way."""
        return self._again is not None

    def begin_again(self, announced: Announced, now: float) -> None:
        """Tell it all that was told, and go on with :meth:`tell_again`."""
        self.begin_bulk(now)
        self.bulking = False
        if self.bulk_due:  # not even the beginning fitted
            return
        self._again = announced.keys()

    def tell_again(self, announced: Announced, now: float) -> bool:
        """The next part, if there is room for it; True where it was the last one and :meth:`bulk_sent` is due.

        Flows that changed meanwhile are told as they are now.
        """
        if self._again is None or not self.has_room:
            return False
        keys = list(itertools.islice(self._again, SORTED_PER_TURN))
        rows, extras = announced.again(keys), announced.extras
        if not self.fits(len(keys) + 1):
            return False
        for key_len, part in rows.items():
            self.count_bulk(len(part))
            if extras:
                for key in extras.keys() & part.keys():
                    self.pending.put_flow(key, part.pop(key), extras[key], now)
            self.pending.put_rows(key_len, part, now)
        return len(keys) < SORTED_PER_TURN

    # --- tables that it lacks ----------------------------------------------------------------------------------------

    @property
    def giving(self) -> bool:
        """It is being sent the replicas that it asked for."""
        return self._giving is not None

    def begin_giving(self, cache: ExternalCache, now: float) -> None:
        self.give_due = False
        self.begin_bulk(now)
        self._giving = collections.deque(cache.keys())

    def give_rows(self, key_len: int, rows: dict[bytes, bytes], cache: ExternalCache, now: float) -> None:
        """What the cache does not know; a timer that may be parked says nothing of the flow."""
        table, parked = cache.table, self._situation.settings.park_timeout_s
        others = {
            key: value if timeout_of(value) < parked else untimed(value)
            for key, value in self._situation.filter.select_rows(key_len, rows).items()
            if key not in table
        }
        if others and self.fits(len(others)):
            self._bulk_flows += len(others)
            self.pending.put_rows(key_len, others, now)

    def give_flow(self, flow: Flow, cache: ExternalCache, now: float) -> None:
        if self._situation.filter.matches(flow) and flow.key not in cache and self.fits(1):
            self._bulk_flows += 1
            if flow.timeout is not None and flow.timeout >= self._situation.settings.park_timeout_s:
                flow = flow._replace(timeout=None)
            self.pending.put_flow(*pack(flow), now)

    def give(self, cache: ExternalCache, expected: Callable[[float], list[Expectation]], now: float) -> None:
        """Send it some of the replicas that it asked for; the bulk ends when cache and kernel are through, with what is
        ``expected``, behind all flows."""
        if self._giving is None or not self.has_room:
            return
        rows: dict[int, dict[bytes, bytes]] = {}
        room = self.pending.limit - len(self.pending) - 1
        for dummy in range(min(len(self._giving), SORTED_PER_TURN, room)):
            replica = cache.get(self._giving.popleft())
            if replica is None:
                continue
            self._bulk_flows += 1
            if replica.extras:
                self.pending.put_flow(replica.key, replica.value, replica.extras, now)
            else:
                rows.setdefault(len(replica.key), {})[replica.key] = replica.value
        for key_len, part in rows.items():
            self.pending.put_rows(key_len, part, now)
        if not self._giving and not self.bulking:
            self._giving = None
            for one in expected(now):
                self.pending.put_expectation(one.name, pack_expectation(one), now)
            self.end_bulk(now)

    # --- bulks from it -----------------------------------------------------------------------------------------------

    def request_bulk(self, now: float) -> None:
        """Ask it for its whole table."""
        self._request_at = now + REQUEST_BULK_AFTER_S
        self.mark(wire.tlv(wire.RECORD_BULK_REQUEST), now)

    def may_be_asked(self, now: float) -> bool:
        """Is it time to ask it for the table that it, the active node, has?"""
        return self.active and now >= self._request_at and self.alive(now)

    def begin_learning(self, now: float) -> None:
        self.learn = _DUE
        self.learn_until = now + LEARN_S

    def learn_again(self, active_for_s: float, now: float) -> None:
        """A new session: what was asked for is lost."""
        if self.learn:
            self.learn = _DUE if active_for_s < LEARN_WITHIN_S else ""
            self.learn_until = now + LEARN_S

    def learn_more(self, now: float) -> None:
        """An active node whose table may lack flows gets them from its peer, once, before it tells its own table."""
        if not self.learn or not self.established:
            return
        if now < self._situation.bulks_from:
            self.learn_until = self._situation.bulks_from + LEARN_S
            return
        if self.learn == _DUE and self.status.role == wire.ROLE_BACKUP:
            if self.replicates:
                self.learn = _ASKED
                self.learn_until = now + LEARN_S
                self.request_bulk(now)
            else:
                self.learn = ""
        elif now >= self.learn_until:
            self._counters["tables_not_learned"] += 1
            self.learn = ""

    def teaches(self, now: float) -> bool:
        """It sends flows: those that were asked for?"""
        if self.learn not in (_ASKED, _RECEIVING):
            return False
        self.learn_until = now + LEARN_S
        return True

    def teaching_begins(self) -> None:
        if self.learn == _ASKED:
            self.learn = _RECEIVING

    def teaching_ends(self) -> None:
        if self.learn == _RECEIVING:
            self._counters["tables_learned"] += 1
            self.learn = ""

    # --- output ------------------------------------------------------------------------------------------------------

    def tell(self, now: float) -> list[bytes]:
        """Datagrams with the changes that wait."""
        if not self.pending.waits:
            return []
        self.send_pending(now)
        return self.session.take()

    def poll(self, now: float) -> list[bytes]:
        """Datagrams to send to it now."""
        if self.pending.waits:
            self.send_pending(now)
        return self.session.poll(now)

    def next_deadline(self) -> float:
        """When :meth:`poll` or :meth:`learn_more` want to be called next."""
        deadline = self.session.next_deadline()
        return min(deadline, self.learn_until) if self.learn and self.established else deadline

    def condition(self, now: float) -> tuple[object, ...]:
        """What the verdict depends on, short of numbers that grow."""
        return (
            self.status[:2],
            self.conditions,
            self.left,
            self.established,
            self.alive(now),
            self.learn,
            self.split_brain(now),
            self.lag(now)[1] > self._situation.settings.lag_limit_s,
        )

    def silent_s(self, now: float) -> float | None:
        last = self.session.last_seen
        return None if last is None else max(0.0, now - last)

    def standing(self, now: float) -> dict[str, str]:
        alive = self.alive(now)
        return {
            "state": "up" if alive else "silent" if self.established else "handshake",
            "role": self.role_name or "unknown" if alive else "unknown",
        }

    def describe(
        self, bulk: str, progress: tuple[int, int] | None, equality: dict[str, Any], now: float
    ) -> dict[str, Any]:
        """Its part of ``status --json``.  ``bulk``: has it the table of the active node, or this node its?

        ``equality``: are the tables equal?
        """
        events, age = self.lag(now)
        silent = self.silent_s(now)
        return {
            "node": self.name,
            **self.standing(now),
            "last_seen_s": None if silent is None else round(silent, 3),
            "lag": {"events": events, "age_s": round(age, 3)},
            "bulk": bulk,
            "table": readiness.table_text(self._situation.active, bulk, progress) if bulk else "a backup, too",
            "equality": equality,
            "progress": None if progress is None else {"flows": progress[0], "expected": progress[1]},
        }
