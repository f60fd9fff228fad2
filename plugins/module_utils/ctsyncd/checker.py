# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The backup's side of equality: is its table the active node's, and its kernel's the same?  What is not, it mends.

What the active node says in the stream of changes (:mod:`prover`) is compared with the external cache.  Where digests
or sums of states differ, the flows of the buckets that differ are asked for, compared and stored.  Now and then the
kernel's table is read and compared with the external cache, which is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from . import wire
from .constants import IPPROTO_TCP, IPS_ASSURED, IPS_SEEN_REPLY, TCP_ESTABLISHED
from .digest import (
    ALL,
    BUCKETS,
    KERNEL_DIFFERS,
    KERNEL_LEFT_OVER,
    KERNEL_MISSING,
    KINDS,
    LEFT_OVER,
    MISSING,
    STATE,
    TRANSLATION,
    Differences,
    States,
    compare_rows,
    differing,
    in_buckets,
)
from .dumps import KERNEL, Dumps
from .flow import Flow
from .peer import Peer
from .replicas import Replicas
from .rows import MARK_FROM_END, NO_SCALE, SCALE_FROM_END, SHAPES, STATE_FROM_END, STATUS_FROM_END, pack
from .situation import Situation
from .verification import Verification

UNKNOWN = "unknown"
EQUAL = "equal"
DIFFERS = "differs"

KERNEL_S = 30.0  # between two looks at this node's kernel, at least ...
CONFIRM_S = 3.0  # ... or, where something is to be confirmed
ANSWER_S = 10.0  # so long an answer is waited for
REPAIR_S = 5.0  # after a repair in vain, before the next; doubles
REPAIR_MAX_S = 600.0
BROKEN_OFF_S = 3600.0  # without anything of a comparison: longer than the largest table is read, with all its rests
VAIN = 3  # repairs after which it is an alarm
PATIENCE_S = 60.0  # so long tables may differ before it is one
WALK = 2_000  # flows of the external cache that are summed up at once ...
WALK_EVERY_S = 0.01
WALK_LEFT = 50_000  # ... and when the sums of the other node are here, at most
MISSED = 131_072  # replicas that one look at the kernel misses if it has not got them
GHOSTS = 65_536  # entries of the kernel that wait to be confirmed

_KEPT_BITS = IPS_SEEN_REPLY | IPS_ASSURED


class _Comparison:
    """One that comes in.  ``unnamed``: keys of the buckets that the active node has not named."""

    def __init__(self, told: wire.Compare, unnamed: set[bytes], repairs: bool, now: float) -> None:
        self.told = told
        self.heard_at = now
        self.unnamed = unnamed
        self.repairs = repairs
        self.named = 0  # flows that were told, filtered out or not
        self.found = Differences()


class Checker:
    """Towards one peer.  ``state``: what the last digest came to, and since when."""

    def __init__(self, situation: Situation, dumps: Dumps, peer: Peer, replicas: Replicas, now: float) -> None:
        self.state = UNKNOWN
        self.since = now
        self.buckets = 0  # that differed when it was last looked
        self.complete = False  # the external cache is what the active node told, and no bulk is under way
        self.verification: Verification | None = None
        self._situation = situation
        self._counters = situation.counters
        self._dumps = dumps
        self._peer = peer
        self._replicas = replicas
        self._running: _Comparison | None = None
        self._asked_until = now  # for buckets or a repair
        self._vain = 0
        self._try_at = now
        self._repaired = False  # since the tables were equal
        self._differing: list[int] = []
        self._states: States | None = None
        self._totals: list[int] | None = None
        self._walk: list[bytes] = []
        self._walk_at = now
        # this node's kernel
        self._kernel_at = now + KERNEL_S
        self._quiet = False  # when the last look began, nothing had changed since the one before began
        self._changes = -1  # of flows, when it began
        self._looks = 0
        self._unseen: set[bytes] = set()
        self._ghosts: set[bytes] = set()  # seen once
        self._found_ghosts: set[bytes] = set()
        self._report: tuple[wire.Compare, Differences] | None = None  # to be completed with what the kernel holds
        self._waiting_for_kernel = False  # for that, because another dump is more urgent

    # --- life --------------------------------------------------------------------------------------------------------

    def follow(self, peer: Peer, now: float) -> None:
        """The replicas are those of this peer from now on."""
        self._peer = peer
        self.reset(now)

    def reset(self, now: float) -> None:
        """A bulk begins, the session or the side is another one."""
        self._set(UNKNOWN, now)
        self._running = None
        self._asked_until = now
        self._vain = 0
        self._repaired = False
        self._try_at = now
        self._end_states()
        self._dumps.cancel(KERNEL)
        self._unseen, self._ghosts, self._found_ghosts = set(), set(), set()
        self._report = None
        self._waiting_for_kernel = False
        if self.verification is not None:
            self.verification.give_up("a whole table came, or the session or the role changed: ask again")
            self.verification = None

    def _set(self, state: str, now: float) -> None:
        if state != self.state:
            self.state, self.since = state, now
        if state != DIFFERS:
            self.buckets = 0

    @property
    def _compares(self) -> bool:
        return self._situation.settings.compare

    @property
    def able(self) -> bool:
        return not self._situation.active and self.complete and not self._replicas.cache.bulk_running

    def poll(self, now: float) -> None:
        if self._dumps.urgent and self._dumps.runs(KERNEL):  # it is not what anybody waits for
            self._dumps.cancel(KERNEL)
            self._kernel_at = now + CONFIRM_S
            self._waiting_for_kernel = self._report is not None
        elif self._report is None and self._dumps.runs(KERNEL) and not self._dumps.calm(now, self._kernel_at):
            self._dumps.cancel(KERNEL)
            self._counters["kernel_looks_put_off"] += 1
        if self._situation.active or not self.able:
            return
        if self._waiting_for_kernel and not self._dumps.wanted:
            self._waiting_for_kernel = False
            self._dumps.want(KERNEL)
        if self._walk and now >= self._walk_at:
            self._walk_on(WALK)
            self._walk_at = now + WALK_EVERY_S
        if (
            self._compares
            and now >= self._kernel_at
            and self._dumps.calm(now, self._kernel_at)
            and self._situation.hot
            and self._report is None
            and not self._dumps.wanted
            and not self._replicas.busy
            and self._peer.established
        ):
            self._dumps.want(KERNEL)

    def idle_until(self) -> float:
        """Until when :meth:`poll` does nothing, if nothing changes and no dump is wanted."""
        if not self.able:
            return float("inf")
        if self._walk or self._waiting_for_kernel or self.state == DIFFERS:  # which is an alarm after a while
            return 0.0
        return self._kernel_at if self._compares and self._situation.hot else float("inf")

    def next_deadline(self) -> float:
        """Only what cannot wait for the next heartbeat."""
        return self._walk_at if self._walk else float("inf")

    def alarm(self, now: float) -> str:
        """What the verdict says of it; nothing if all is well, or being repaired."""
        if self.state != DIFFERS or (self._vain < VAIN and now - self.since < PATIENCE_S):
            return ""
        vain = f", repaired {self._vain} times in vain" if self._vain else ""
        part = f" in {self.buckets} of {BUCKETS} parts" if self.buckets else ""
        return f"the table differs from that of {self._peer.name}{part} for {now - self.since:.0f} s{vain}"

    def describe(self, now: float) -> dict[str, Any]:
        """For ``status --json``: ``state``, since when, and in how many of how many parts the tables differ."""
        return {
            "state": self.state,
            "since_s": round(now - self.since, 3),
            "buckets": self.buckets,
            "of": BUCKETS,
            "vain": self._vain,
        }

    # --- digests -----------------------------------------------------------------------------------------------------

    def digest(self, flows: int, total: int, now: float) -> None:
        """What the active node told until now."""
        if not self.able:
            return
        cache = self._replicas.cache
        if flows == len(cache) and total == cache.digest.total:
            self._counters["digests_equal"] += 1
            self._set(EQUAL, now)
            self._vain = 0
            self._repaired = False
            return
        self._counters["digests_differed"] += 1
        self._set(DIFFERS, now)
        if self._running is not None and now - self._running.heard_at > BROKEN_OFF_S:
            self._break_off()
        if self._running is not None or now < self._asked_until:
            return
        if self._repaired:
            self._repaired = False
            self._vain += 1
            self._try_at = now + min(REPAIR_S * 2**self._vain, REPAIR_MAX_S)
            self._counters["repairs_in_vain"] += 1
        if self._compares and now >= self._try_at:
            self._asked_until = now + ANSWER_S
            self._differing = []
            self._peer.mark(wire.tlv(wire.RECORD_BUCKETS_REQUEST), now)

    def buckets_told(self, first: int, sums: tuple[int, ...], now: float) -> None:
        if not self.able:
            return
        if first == 0:
            self._differing = []
        self._differing += differing(self._replicas.cache.digest.told(), first, sums)
        if first + len(sums) == BUCKETS:
            self.buckets = len(self._differing)
            self._asked_until = now
            self._ask_repair(self._differing, now)

    def _ask_repair(self, buckets: Iterable[int], now: float) -> None:
        wanted = frozenset(buckets)
        if wanted and self._compares and self._running is None and now >= max(self._asked_until, self._try_at):
            self._counters["repairs_asked"] += 1
            self._asked_until = now + ANSWER_S
            compare = wire.Compare(0, wire.COMPARE_REPAIR, wanted)
            self._peer.mark(wire.encode_compare(wire.RECORD_COMPARE_REQUEST, compare), now)

    # --- states ------------------------------------------------------------------------------------------------------

    def states_begin(self, number: int, now: float) -> None:
        self._end_states()
        self._break_off()  # an active node does not begin an audit while it compares
        if self.able:
            self._states = States(number)
            self._walk = self._replicas.cache.keys()
            self._walk_at = now

    def _end_states(self) -> None:
        self._states, self._totals, self._walk = None, None, []

    def _walk_on(self, count: int) -> None:
        if self._states is None:
            return
        table = self._replicas.cache.table
        shapes: dict[int, dict[bytes, bytes]] = {}
        for key in self._walk[-count:]:
            value = table.get(key)
            if value is not None:
                shapes.setdefault(len(key), {})[key] = value
        del self._walk[-count:]
        for key_len, rows in shapes.items():
            self._states.add(key_len, rows)

    def states_told(self, number: int, first: int, sums: tuple[int, ...], now: float) -> None:
        states = self._states
        if not self.able or states is None or states.number != number:
            return
        if len(self._walk) > WALK_LEFT:
            self._counters["states_not_compared"] += 1
            self._end_states()
            return
        if self._totals is None:
            self._walk_on(len(self._walk) or 1)
            self._totals = states.totals()
            self._differing = []
        self._differing += differing(self._totals, first, sums)
        if first + len(sums) == BUCKETS:
            self._counters["states_compared"] += 1
            self._counters["states_differed"] += len(self._differing)
            self._end_states()
            self._ask_repair(self._differing, now)

    # --- the stream --------------------------------------------------------------------------------------------------

    def told(self, keys: Iterable[bytes]) -> None:
        """A record of a change names these flows."""
        if self._states is not None:
            self._states.touch(keys)
        if self._running is not None:
            self._running.unnamed.difference_update(keys)

    @property
    def listens(self) -> bool:
        """Must it be :meth:`told`?"""
        return self._states is not None or self._running is not None

    def begin(self, told: wire.Compare, now: float) -> None:
        """The flows of these buckets are told as the active node's kernel has them."""
        if not self.able:
            return
        self._end_states()
        repairs = bool(told.flags & wire.COMPARE_REPAIR) and self._compares
        self._running = _Comparison(told, set(in_buckets(self._replicas.cache.table, told.buckets)), repairs, now)
        self._asked_until = now
        self._progress(now)

    def named(self, flows: int, now: float) -> None:
        """A record of the comparison told so many flows."""
        if self._running is not None:
            self._running.named += flows
            self._running.heard_at = now

    def rows(self, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        """Those of a record that this node's filter lets pass."""
        running = self._running
        if running is None:
            return
        self._compare(running, key_len, rows, now)
        if running.repairs:
            self._replicas.store_rows(rows, now)

    def flow(self, key: bytes, value: bytes, extras: bytes, now: float) -> None:
        running = self._running
        if running is None:
            return
        self._compare(running, len(key), {key: value}, now)
        if running.repairs:
            self._replicas.store_flow(key, value, extras, now)

    def _compare(self, running: _Comparison, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        running.unnamed.difference_update(rows)
        running.found.flows += len(rows)
        for kind, keys in zip((MISSING, TRANSLATION, STATE), compare_rows(key_len, rows, self._replicas.cache.table)):
            running.found.note(kind, keys)
        self._progress(now)

    def end(self, number: int, flows: int, now: float) -> None:
        """All was told: so many flows."""
        running = self._running
        if running is None or running.told.number != number or flows == wire.COMPARE_BROKEN_OFF:
            self._break_off()
            return
        if running.named != flows:  # a record could not be sent or read: what is left over may be what it told
            self._break_off(lost=True)
            return
        self._running = None
        left = [key for key in running.unnamed if key in self._replicas.cache]
        running.found.note(LEFT_OVER, left)
        for kind, count in running.found.counts.items():
            self._counters[f"compared_{kind}"] += count
        if running.repairs:
            self._replicas.delete(left)
            self._repaired = True
            self._counters["repairs_done"] += 1
        if running.told.flags & wire.COMPARE_REPORT or self._verifies(number):
            self._report = (running.told, running.found)
            if self._situation.hot:
                self._dumps.cancel(KERNEL)
                self._dumps.want(KERNEL)
            else:
                self._tell_report(now)

    def _break_off(self, lost: bool = False) -> None:
        """Of the comparison that comes in, if one does, there is no end: nothing is left over."""
        running, self._running = self._running, None
        if running is None:
            return
        self._counters["comparisons_incomplete"] += 1
        if self.verification is None or not self._verifies(running.told.number) or running.told.flags:
            return
        if lost:
            self.verification.give_up("a part of what the other node told was lost: ask again")
        else:
            self.verification.give_up("the other node broke it off: ask again")

    def _progress(self, now: float) -> None:
        if self.verification is not None:
            self.verification.goes_on(now)

    # --- this node's kernel ------------------------------------------------------------------------------------------

    def kernel_begins(self) -> None:
        held, table = self._replicas.copies.held, self._replicas.cache.table
        self._looks += 1
        self._quiet, self._changes = self._changes == self._dumps.changes, self._dumps.changes
        self._found_ghosts = set()
        parts = 1 if self._report is not None else len(table) // MISSED + 1
        part = self._looks % parts
        settled = self._replicas.copies.settled
        self._unseen = {key for key in table if hash(key) % parts == part and (settled or held(key))}

    def kernel_rows(self, key_len: int, rows: Mapping[bytes, bytes]) -> None:
        replicas = self._replicas
        table, held = replicas.cache.table, replicas.copies.held
        known = [key for key in rows if key in table]
        if len(known) != len(rows):
            unknown = {key: value for key, value in rows.items() if key not in table}
            ghosts = self._situation.filter.concerned_rows(key_len, unknown)
            room = GHOSTS - len(self._found_ghosts)
            self._found_ghosts.update(list(ghosts)[:room])
        self._unseen.difference_update(known)
        wrong = [key for key in known if _copy_differs(rows[key], table[key], SHAPES[key_len].reply, key[0])]
        wrong = [key for key in wrong if held(key)]
        if not wrong:
            return
        if self._report is not None:
            self._report[1].note(KERNEL_DIFFERS, wrong)
            return
        self._counters["kernel_mended"] += len(wrong)
        reply = SHAPES[key_len].reply
        replicas.mend(
            [key for key in wrong if rows[key][:reply] != table[key][:reply]],
            [key for key in wrong if rows[key][:reply] == table[key][:reply]],
        )

    def kernel_flow(self, flow: Flow) -> None:
        key, value, _extras = pack(flow)
        self.kernel_rows(len(key), {key: value})

    def kernel_finished(self, consistent: bool, now: float) -> None:
        replicas = self._replicas
        table, held, seen = replicas.cache.table, replicas.copies.held, self._dumps.seen
        missing = [key for key in self._unseen if key in table and held(key) and key not in seen]
        ghosts = {key for key in self._found_ghosts if key not in table}
        self._unseen, self._found_ghosts = set(), set()
        if self._report is None:
            self._kernel_at = now + self._dumps.pause(KERNEL_S, self._quiet)
        if not consistent:
            if self._report is not None:
                self._dumps.want(KERNEL)
            return
        if self._report is not None:
            self._report[1].note(KERNEL_MISSING, missing)
            self._report[1].note(KERNEL_LEFT_OVER, ghosts)
            self._tell_report(now)
            return
        self._counters["kernel_looks"] += 1
        confirmed = [key for key in ghosts if key in self._ghosts]
        self._ghosts = ghosts.difference(confirmed)
        if self._ghosts:
            self._kernel_at = now + self._dumps.pause(CONFIRM_S)
        self._counters["kernel_ghosts_removed"] += len(confirmed)
        self._counters["kernel_missing_made"] += len(missing)
        replicas.remove_ghosts(confirmed)
        replicas.make_again(missing)

    # --- what an operator asks for -----------------------------------------------------------------------------------

    def verify(self, now: float) -> Verification:
        """Have all flows compared, and nothing repaired."""
        found = Verification(now)
        if not self.able or not self._peer.active or not self._peer.session.alive(now):
            found.give_up(self._why_unable(now))
        elif self.verification is not None and not self.verification.done:
            found.give_up("another verify runs: ask again")
        else:
            self._looks += 1
            found.number = self._looks
            self.verification = found
            compare = wire.Compare(found.number, 0, ALL)
            self._peer.mark(wire.encode_compare(wire.RECORD_COMPARE_REQUEST, compare), now)
        return found

    def _why_unable(self, now: float) -> str:
        if not self._peer.established:
            return f"no session with {self._peer.name}"
        if not self._peer.session.alive(now):
            return f"{self._peer.name} is silent"
        if not self._peer.active:
            return f"{self._peer.name} is not active"
        return f"the table of {self._peer.name} is not complete here yet"

    def _verifies(self, number: int) -> bool:
        return self.verification is not None and self.verification.number == number

    def _tell_report(self, now: float) -> None:
        if self._report is None:
            return
        (compare, found), self._report = self._report, None
        if self._verifies(compare.number) and not compare.flags:
            verification, self.verification = self.verification, None
            if verification is not None:
                verification.finish(found)
        elif compare.flags & wire.COMPARE_REPORT:
            keys = [(KINDS.index(kind), key) for kind, key in found.keys]
            report = wire.Report(compare.number, found.flows, tuple(found.counts.values()), keys)
            self._peer.mark(wire.encode_report(report, self._peer.session.block_bytes), now)


def _copy_differs(kernel: bytes, replica: bytes, reply: int, proto: int) -> bool:
    """Is the kernel's entry not what a replica must be?  States follow only where that matters for a take-over."""
    if kernel[:reply] != replica[:reply]:
        return True
    size = len(kernel)
    status = size - STATUS_FROM_END + 1
    state, scale, mark = size - STATE_FROM_END, size - SCALE_FROM_END, size - MARK_FROM_END
    return bool(
        replica[status] & ~kernel[status] & _KEPT_BITS
        or kernel[mark:] != replica[mark:size]
        or (proto == IPPROTO_TCP and replica[state] == TCP_ESTABLISHED != kernel[state])
        or (replica[scale] not in (NO_SCALE, kernel[scale]))
    )
