# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which dumps of the kernel's table are wanted, what for, and when the table is read again after lost events.

One dump runs at a time.  What is done with its entries is the business of the room that wanted it.
"""

from __future__ import annotations

import collections
from typing import NamedTuple

BULK = "bulk"  # the active node's table for a peer
RECONCILE = "reconcile"  # this backup's kernel against the external cache
FLUSH = "flush"  # out of this kernel with all that is replicated
GIVE = "give"  # this backup's table for an active node that lacks it
LOOSEN = "loosen"  # this active node's TCP connections, some packets of which passed through the peer
AUDIT = "audit"  # the active node's kernel against what it told
COMPARE = "compare"  # flows of the active node for a comparison with a backup's
KERNEL = "kernel"  # now and then: this backup's kernel against the external cache

PACED = (AUDIT, COMPARE, KERNEL)  # nobody waits for them: they are read slowly

SHARE = 0.01  # of a core, that paced dumps may cost on average ...
QUIET_SHARE = 0.001  # ... and where nothing has changed since the one before
QUIET_MAX_S = 600.0  # between two of them, at most, where only that share is to be kept to

CROWD = 2_000  # changes within about a second: there is better to do than to read the table
CALM_S = 5.0  # so long after a crowd of changes a paced dump begins
PATIENCE_S = 600.0  # so long it waits for calm, at most

REREAD_S = 5.0  # before the table is read again where events go on to be lost; doubles
REREAD_MAX_S = 60.0


class Dump(NamedTuple):
    """A kernel dump that the engine wants; a new ``number`` means: begin again."""

    number: int
    purpose: str


class Dumps:
    """The dump that runs and those that wait.

    ``seen``: keys that the running dump need not tell of any more.  ``reread_at``: events were lost, the table is read
    again then (monotonic seconds).  ``changes``: of flows, so far.
    """

    def __init__(self) -> None:
        self.current: Dump | None = None
        self.seen: set[bytes] = set()
        self.reread_at: float | None = None
        self.changes = 0
        self._number = 0
        self._queue: collections.deque[str] = collections.deque()
        self._reread_wait_s = REREAD_S
        self._lost_at: float | None = None  # when events were lost last
        self._spent_s = 0.0
        self._crowd = 0  # changes since _counted_from
        self._counted_from = 0.0
        self._crowded_at = float("-inf")

    def runs(self, *purposes: str) -> bool:
        """Does a dump for one of these purposes run?"""
        return self.current is not None and self.current.purpose in purposes

    @property
    def wanted(self) -> bool:
        """A dump runs or waits."""
        return self.current is not None or bool(self._queue)

    @property
    def urgent(self) -> bool:
        """One runs or waits that is not paced."""
        if self.current is None and not self._queue:  # as nearly always
            return False
        if self.current is not None and self.current.purpose not in PACED:
            return True
        return any(purpose not in PACED for purpose in self._queue)

    def want(self, purpose: str) -> None:
        if purpose not in self._queue:
            self._queue.append(purpose)

    def begin(self) -> Dump | None:
        """Begin the next one that waits, if none runs; returns it if one begins."""
        if self.current is not None or not self._queue:
            return None
        self._number += 1
        purpose = next((one for one in self._queue if one not in PACED), self._queue[0])
        self._queue.remove(purpose)
        self.current = Dump(self._number, purpose)
        self.seen = set()
        self._spent_s = 0.0
        return self.current

    def stop(self, *purposes: str) -> None:
        """The running one, if it is for one of these purposes, is of no use any more."""
        if self.runs(*purposes):
            self.current = None

    def cancel(self, *purposes: str) -> None:
        """Dumps for these purposes are wanted no more."""
        self.stop(*purposes)
        for purpose in purposes:
            if purpose in self._queue:
                self._queue.remove(purpose)

    def spend(self, seconds: float) -> None:
        """What the running dump has cost of a core."""
        self._spent_s += seconds

    def pause(self, least_s: float, quiet: bool = False) -> float:
        """After the dump that ran last: seconds before the next one like it, so that they cost ``SHARE`` at most.

        ``quiet``: nothing has changed since the one before, and the less often the table is read the better.
        """
        wait = max(least_s, self._spent_s / SHARE)
        return max(wait, min(self._spent_s / QUIET_SHARE, QUIET_MAX_S)) if quiet else wait

    # --- calm --------------------------------------------------------------------------------------------------------

    def changed(self, changes: int, now: float) -> None:
        """So many flows of this node's tables have changed."""
        if now - self._counted_from >= 1.0:
            self._counted_from, self._crowd = now, 0
        self.changes += changes
        self._crowd += changes
        if self._crowd >= CROWD:
            self._crowded_at = now

    def calm(self, now: float, due: float) -> bool:
        """May a paced dump that was due at a time begin, or go on?  In a flood it would only get in the way; but not
        for ever."""
        return now - self._crowded_at >= CALM_S or now - due >= PATIENCE_S

    def finished(self, now: float) -> str:
        """The running one came to its end; returns its purpose, or nothing if none runs."""
        if self.current is None:
            return ""
        purpose, self.current = self.current.purpose, None
        if purpose in (BULK, RECONCILE) and self.reread_at is not None:
            self.reread_at = max(self.reread_at, now + REREAD_S)
        return purpose

    def drop(self) -> None:
        """Nothing of what was wanted makes sense any more."""
        self.current = None
        self._queue.clear()
        self.seen = set()
        self.reread_at = None

    # --- lost events -------------------------------------------------------------------------------------------------

    @property
    def rereading(self) -> bool:
        """The table is read, or is about to be."""
        return self.runs(BULK, RECONCILE) or BULK in self._queue or RECONCILE in self._queue

    @property
    def next_reread(self) -> float | None:
        """When the table is read again; not known while it is read already."""
        return None if self.rereading else self.reread_at

    def events_lost(self, now: float) -> None:
        """The kernel's table is read again: at once, or later where events go on to be lost."""
        calm = self._lost_at is None or now - self._lost_at > REREAD_MAX_S
        self._lost_at = now
        if calm:
            self._reread_wait_s = REREAD_S
        if self.reread_at is not None:
            return
        if calm and not self.rereading:
            self.reread_at = now
            return
        self.reread_at = now + self._reread_wait_s
        self._reread_wait_s = min(self._reread_wait_s * 2, REREAD_MAX_S)

    def reread_due(self, now: float) -> bool:
        """Must the table be read again now?  True once for each time."""
        if self.reread_at is None or now < self.reread_at or self.rereading:
            return False
        self.reread_at = None
        return True
