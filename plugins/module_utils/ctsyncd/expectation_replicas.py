# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A peer's expectations on this node: what it said, and what the kernel is asked to make of it.

Sans-I/O.  In hot standby the kernel holds each of them once it holds its master, with a parked timer: no packet passes
a backup, so nothing uses them up, but the helper's timer, which a request cannot set, would end them.  True timers
come back at take-over.  What is missing in the kernel by then (it goes with its master, for one) is made again, and
every ``RECONCILE_S`` before.
"""

from __future__ import annotations

import collections
import errno
from collections.abc import Iterable, Iterator
from typing import Callable, NamedTuple

from . import expectation as codec
from .expectation import Expectation

RECONCILE_S = 10.0  # between two comparisons with the kernel, or more where there is much to compare:
COMPARED_PER_S = 100  # so many a second on average
RETRY_MAX_S = 600.0  # the wait before what the kernel refused is tried again doubles up to this

MAKE = "make"
REMAKE = "remake"  # what is there with this tuple goes first
TIMER = "timer"
REMOVE = "remove"

# What the kernel's answer to MAKE means, as named in the counters expectations_refused_*
_REASONS = {
    errno.ENOENT: "without_master",
    errno.EOPNOTSUPP: "unknown_helper",
    errno.EINVAL: "unknown_function",
    errno.EBUSY: "taken",
    errno.EALREADY: "taken",
    errno.EMFILE: "table_full",
}
UNSUPPORTED = ("unknown_helper", "unknown_function")


class Job(NamedTuple):
    """One thing to do in the kernel.  ``timeout``: seconds."""

    operation: str
    expectation: Expectation
    timeout: int

    def messages(self) -> list[bytes]:
        """The requests, in order; the first may fail in REMAKE.  Raises NetlinkError if it cannot be expressed."""
        one = self.expectation
        if self.operation == TIMER:
            return [codec.set_timer(one, self.timeout)]
        if self.operation == REMOVE:
            return [codec.delete(one)]
        made = [codec.create(one), codec.set_timer(one, self.timeout)]
        return [codec.delete(one), *made] if self.operation == REMAKE else made


class _Replica:
    """``at``: when the peer said so; ``since``: when it said so first (monotonic seconds)."""

    __slots__ = ("at", "expectation", "since")

    def __init__(self, expectation: Expectation, at: float, since: float) -> None:
        self.expectation = expectation
        self.at = at
        self.since = since

    def left(self, now: float) -> int:
        """Seconds that it may still wait for its flow."""
        return self.expectation.timeout - int(now - self.at)


class ExpectationReplicas:
    """The expectations of a peer.

    ``limit``: so many are kept at most.  ``hot``: the kernel holds them before a take-over.  ``refused``: those that
    the kernel does not take, and why.
    """

    def __init__(self, limit: int, hot: bool, counters: collections.Counter[str]) -> None:
        self.limit = limit
        self.refused: dict[bytes, str] = {}
        self._hot = hot
        self._counters = counters
        self._table: dict[bytes, _Replica] = {}
        self._of: dict[bytes, set[bytes]] = {}  # names by the key of their master
        self._unnamed: set[bytes] | None = None
        self._wanted: dict[bytes, str] = {}  # operation by name, in order
        self._doomed: dict[bytes, Expectation] = {}
        self._late: collections.deque[Expectation] = collections.deque()
        self._own: set[bytes] = set()  # late ones that the kernel is asked to make: they are this node's, no replicas
        self._asked = 0
        self._compare_at = 0.0
        self._retry_at = 0.0
        self._retry_s = RECONCILE_S
        self._taking = False
        self._more = False  # the last piece of work was not all

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, name: bytes) -> bool:
        return name in self._table

    def items(self) -> Iterator[tuple[Expectation, float]]:
        """Expectations and when their replication began (monotonic seconds)."""
        for one in list(self._table.values()):
            yield one.expectation, one.since

    def waiting(self, now: float) -> list[Expectation]:
        """Those whose flows may still come, with what is left of their time."""
        found = []
        for one in self._table.values():
            left = one.left(now)
            if left > 0 and not one.expectation.used:
                found.append(one.expectation._replace(timeout=left))
        return found

    def clear(self) -> None:
        self._table.clear()
        self._of.clear()
        self._wanted.clear()
        self._doomed.clear()
        self._late.clear()
        self._own.clear()
        self.refused.clear()
        self._unnamed = None
        self._taking = self._more = False

    # --- what the peer says ------------------------------------------------------------------------------------------

    def store(self, one: Expectation, now: float) -> None:
        """It is so now."""
        name = one.name
        before = self._table.get(name)
        if self._unnamed:
            self._unnamed.discard(name)
        if before is None:
            if one.used:
                return
            if len(self._table) >= self.limit:
                self._counters["expectations_refused_over_limit"] += 1
                return
            self._counters["expectations_stored"] += 1
            self._of.setdefault(one.master_key, set()).add(name)
            self._doomed.pop(name, None)
            self._table[name] = _Replica(one, now, now)
            self._want(name, MAKE)
            return
        old, before.expectation, before.at = before.expectation, one, now
        if old.lasting == one.lasting:
            return
        if old.master_key != one.master_key:
            self._forget(name, old.master_key)
            self._of.setdefault(one.master_key, set()).add(name)
        self._want(name, REMAKE)

    def late(self, one: Expectation) -> None:
        """This node is active: what the former active one saw last is made at once."""
        if len(self._late) < self.limit:
            self._late.append(one)

    def remove(self, name: bytes) -> None:
        """It is gone."""
        replica = self._table.pop(name, None)
        if replica is None:
            return
        self._forget(name, replica.expectation.master_key)
        if self._wanted.pop(name, REMAKE) != MAKE and self._hot and name not in self.refused:
            self._doomed[name] = replica.expectation
        self.refused.pop(name, None)

    def masters_gone(self, keys: Iterable[bytes]) -> None:
        """Flows ended; the kernel removes the expectations of a flow with it."""
        if not self._of:
            return
        for key in keys:
            for name in self._of.pop(key, ()):
                self._table.pop(name, None)
                self._wanted.pop(name, None)
                self.refused.pop(name, None)

    def masters(self) -> list[bytes]:
        """Keys of the flows that have expectations."""
        return list(self._of)

    def begin_bulk(self) -> None:
        self._unnamed = set(self._table)

    def end_bulk(self) -> None:
        """What the bulk did not name is gone."""
        unnamed, self._unnamed = self._unnamed, None
        for name in unnamed or ():
            self.remove(name)

    def _forget(self, name: bytes, master: bytes) -> None:
        names = self._of.get(master)
        if names is not None:
            names.discard(name)
            if not names:
                del self._of[master]

    def _want(self, name: bytes, operation: str) -> None:
        if self._hot or self._taking:
            self._wanted[name] = MAKE if self._wanted.get(name) == MAKE else operation
        self.refused.pop(name, None)

    # --- take-over ---------------------------------------------------------------------------------------------------

    def take_over(self) -> None:
        """True timers; what the kernel does not hold is made."""
        self._taking = True
        self._doomed.clear()
        for name in self._table:
            self._wanted[name] = TIMER if self._hot and self._wanted.get(name, TIMER) == TIMER else REMAKE

    def commit(self) -> int:
        """Have the kernel hold those that it does not hold; returns how many."""
        missing = [name for name in self._table if not self._hot or name in self.refused]
        self.refused.clear()
        for name in missing:
            self._wanted[name] = REMAKE
        return len(missing)

    @property
    def busy(self) -> bool:
        """Something is to be done in the kernel as soon as that is possible."""
        return self._more or bool(self._taking and self._wanted) or bool(self._doomed or self._late or self._asked)

    # --- the kernel --------------------------------------------------------------------------------------------------

    def work(
        self, limit: int, held: Callable[[bytes], bool], parked_s: int, now: float, *, settled: bool = True
    ) -> list[Job]:
        """At most ``limit`` things to do now; each result goes to :meth:`result`.

        ``held``: does the kernel hold this flow?  ``settled``: no flow waits to be put there.  ``parked_s``: timer of a
        replica before a take-over.
        """
        self._more = False
        if not (self._wanted or self._doomed or self._late):
            return []
        jobs = []
        for name in list(self._doomed)[:limit]:
            jobs.append(Job(REMOVE, self._doomed.pop(name), 0))
        while self._late and settled and len(jobs) < limit:  # its master may be one that waits
            one = self._late.popleft()
            self._own.add(one.name)
            jobs.append(Job(MAKE, one, max(1, one.timeout)))
        for name, operation in list(self._wanted.items()):
            if len(jobs) >= limit:
                break
            replica = self._table.get(name)
            if replica is None:
                del self._wanted[name]
                continue
            one = replica.expectation
            if operation != TIMER and not held(one.master_key):
                continue
            del self._wanted[name]
            left = replica.left(now)
            if self._taking and left <= 0:
                jobs.append(Job(REMOVE, one, 0))
            elif operation == TIMER or not one.used:
                jobs.append(
                    Job(operation, one, max(parked_s, left) if self._hot and not self._taking else max(1, left))
                )
        self._asked += len(jobs)
        self._more = len(jobs) >= limit
        return jobs

    def result(self, job: Job, error: int) -> None:
        """What came of a job: 0 or the errno."""
        self._asked -= 1
        name = job.expectation.name
        if job.operation == REMOVE:
            if not error:
                self._counters["expectations_removed"] += 1
        elif job.operation == TIMER:
            if error == errno.ENOENT and name in self._table and not job.expectation.used:
                self._wanted[name] = MAKE
        elif not error:
            self._counters["expectations_made"] += 1
            if name not in self._table and not self._taking and self._hot and name not in self._own:
                self._doomed[name] = job.expectation  # it ended meanwhile
        elif error == errno.EEXIST:
            if name in self._table and job.operation == MAKE:
                self._wanted[name] = REMAKE
        else:
            reason = _REASONS.get(error) or errno.errorcode.get(error, str(error)).lower()
            self._counters[f"expectations_refused_{reason}"] += 1
            if name in self._table:
                self.refused[name] = reason
        if job.operation == MAKE:
            self._own.discard(name)

    def finished(self) -> bool:
        """The take-over is through: what the kernel holds now is this node's own.  True once."""
        if not self._taking or self._wanted or self._asked:
            return False
        self.clear()
        return True

    # --- comparison --------------------------------------------------------------------------------------------------

    def compare_due(self, now: float) -> bool:
        """Is it time to compare with the kernel's table?"""
        return bool(self._table) and self._hot and not self._taking and now >= self._compare_at

    def next_deadline(self) -> float:
        return self._compare_at if self._table and self._hot and not self._taking else float("inf")

    def compare(self, listed: Iterable[Expectation], replicated: Callable[[bytes], bool], parked_s: int) -> None:
        """The kernel's whole table.  ``replicated``: is this flow (its key, without a zone) one of the peer's?"""
        there = {one.name: one for one in listed}
        names = {_bare_name(name): name for name in self._table}
        for bare, one in there.items():
            name = names.get(bare)
            if name is not None and 2 * one.timeout < parked_s:
                self._wanted.setdefault(name, TIMER)
            elif name is None and replicated(one.master_key):
                self._counters["expectations_stale"] += 1
                self._doomed[bare] = one
        for bare, name in names.items():
            if bare not in there and name not in self.refused and not self._table[name].expectation.used:
                self._wanted.setdefault(name, MAKE)

    def compared(self, now: float) -> None:
        """The comparison is over; what was refused gets another chance now and then."""
        self._compare_at = now + max(RECONCILE_S, len(self._table) / COMPARED_PER_S)
        if not self.refused:
            self._retry_s = RECONCILE_S
            self._retry_at = now
        elif now >= self._retry_at:
            self._retry_s = min(self._retry_s * 2, RETRY_MAX_S)
            self._retry_at = now + self._retry_s
            for name in list(self.refused):
                self._want(name, REMAKE)

    def refusals(self) -> collections.Counter[str]:
        """How many the kernel does not take, by reason."""
        return collections.Counter(self.refused.values())


def _bare_name(name: bytes) -> bytes:
    """An expectation's name with zone 0, as the kernel tells it."""
    return b"\0\0" + name[2:]
