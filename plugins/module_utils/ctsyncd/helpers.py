# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Helpers and their expectations, both sides: what the engine knows of them and what the caller does for it.

Sans-I/O.  The caller feeds :meth:`Helpers.events`, walks through the kernel's expectation table where
:attr:`Helpers.walk` says so, lists the expectations of the flows of :meth:`Helpers.take_asks`, and carries out
:meth:`Helpers.work`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .expectation import Expectation, unpack, unpack_name
from .expectation_replicas import UNSUPPORTED, ExpectationReplicas, Job
from .expectation_source import ExpectationSource
from .flow import Flow
from .replicas import Replicas
from .situation import Question, Situation

SOURCE = "source"  # the walk is for what peers are told
COMPARE = "compare"  # this backup's kernel against what the peer said


class Helpers:
    """``walk``: number and purpose of the walk that is wanted, None if there is none; another number means: anew."""

    def __init__(self, situation: Situation, flows: Replicas) -> None:
        limit = situation.settings.max_expectations if situation.settings.replicate else 0
        self.limit = limit
        self.source = ExpectationSource(limit, situation.counters)
        self.replicas = ExpectationReplicas(limit, situation.hot, situation.counters)
        self.walk: tuple[int, str] | None = None
        self._situation = situation
        self._flows = flows
        self.counters = situation.counters
        self._former: list[tuple[Expectation, float]] = []  # of this node's time as the active one; when they were so
        self._walks = 0
        self._listed: list[Expectation] = []

    # --- sides -------------------------------------------------------------------------------------------------------

    def become_active(self, first: bool) -> None:
        self.walk = None
        self._former = []
        self.source.begin()
        if not first and self._situation.settings.takes_over:
            self.replicas.take_over()

    def become_backup(self) -> None:
        self.walk = None
        now = self._situation.now
        self._former = [(one, now) for one in self.source.expectations(now)]
        self.source.clear()
        self.replicas.clear()

    # --- what a peer says --------------------------------------------------------------------------------------------

    def receive(self, payload: bytes, now: float) -> None:
        """EXPECT.  Raises WireError ``malformed``."""
        one = unpack(payload)
        if not self.limit:
            self._situation.counters["expectations_refused_over_limit"] += 1
        elif self._situation.active:
            if not one.used:
                self.replicas.late(one)
        elif one.master_key in self._flows.cache:  # flows come before their expectations
            self.replicas.store(one, now)
        else:
            self._situation.counters["expectations_refused_without_master"] += 1

    def receive_gone(self, payload: bytes) -> None:
        """EXPECT_GONE.  Raises WireError ``malformed``."""
        unpack_name(payload)
        if not self._situation.active:
            self.replicas.remove(payload)

    def bulk_ended(self) -> None:
        """What the bulk did not name is gone, and so is what lost its master."""
        self._former = []
        self.replicas.end_bulk()
        cache = self._flows.cache
        self.replicas.masters_gone([key for key in self.replicas.masters() if key not in cache])

    def to_give(self, now: float) -> list[Expectation]:
        """What this backup knows, for an active node that lacks it: the peer's, or its own of before."""
        found = {one.name: one for one in self.replicas.waiting(now)}
        for one, at in self._former:
            left = one.timeout - int(now - at)
            if left > 0 and not one.used:
                found.setdefault(one.name, one._replace(timeout=left))
        return list(found.values())

    # --- the kernel --------------------------------------------------------------------------------------------------

    def events(self, changes: Sequence[tuple[Expectation, bool]], lost: bool, now: float) -> None:
        """Expectations that came or are gone, not by this daemon's doing."""
        if self._situation.active:
            self.source.events(changes, lost, now)

    def walked(self, some: Iterable[Expectation], now: float) -> None:
        """A part of the table of expectations, in the walk that is wanted."""
        if self.walk is None:
            return
        if self.walk[1] == SOURCE:
            self.source.walked(some, now)
        else:
            self._listed.extend(some)

    def walk_ended(self, whole: bool, now: float) -> None:
        """The walk is over; ``whole``: nothing is missing."""
        if self.walk is None:
            return
        purpose, self.walk = self.walk[1], None
        if purpose == SOURCE:
            self.source.walk_ended(whole, now)
            return
        if whole:
            cache, settings = self._flows.cache, self._situation.settings
            self.replicas.compare(self._listed, cache.__contains__, settings.park_timeout_s)
        self.replicas.compared(now)
        self._listed = []

    def take_asks(self, limit: int = 1024) -> list[Flow]:
        """Flows whose expectations the caller lists, at most so many at a time, for :meth:`told`."""
        asks = self.source.asks
        return [asks.pop(key) for key in list(asks)[:limit]] if asks else []

    def told(self, master: Flow, listed: Sequence[Expectation] | None, now: float) -> None:
        """The expectations of a flow, None if the kernel does not know it."""
        if self._situation.active:
            self.source.told(master, listed, now)

    def work(self, limit: int) -> list[Job]:
        """What is to be done in the kernel now; the result of each goes to :meth:`result`."""
        settings, now = self._situation.settings, self._situation.now
        settled = not self._flows.busy
        return self.replicas.work(limit, self._held, settings.park_timeout_s, now, settled=settled)

    def _held(self, key: bytes) -> bool:
        """Is there a point in asking the kernel for an expectation of this flow?"""
        flows = self._flows
        if self._situation.active:
            return key not in flows.cache or flows.copies.held(key) or not flows.busy
        return key in flows.cache and flows.copies.held(key)

    def result(self, job: Job, error: int) -> None:
        """0 or the errno."""
        self.replicas.result(job, error)

    # --- time --------------------------------------------------------------------------------------------------------

    def poll(self, now: float) -> dict[bytes, Expectation | None]:
        """What peers must be told: the expectation, or None where it is gone, by name."""
        self.replicas.finished()
        if self._situation.active:
            source = self.source
            source.poll(now, walk=not (self.replicas.busy or self._flows.busy))
            if source.walking and self.walk is None:
                self._begin_walk(SOURCE)
            self._situation.questions.extend(Question(flow, adjustment=True) for flow in source.looks)
            source.looks.clear()
            changes, source.changes = source.changes, {}
            return changes
        if self.walk is None and self.replicas.compare_due(now):
            self._begin_walk(COMPARE)
        return {}

    def _begin_walk(self, purpose: str) -> None:
        self._walks += 1
        self._listed = []
        self.walk = (self._walks, purpose)

    @property
    def busy(self) -> bool:
        """There are flows with helpers on this active node, or something is to be done in the kernel."""
        source = self.source
        return bool(source.masters or source.asks or self.walk is not None or self.replicas.busy)

    def next_deadline(self) -> float:
        """When :meth:`poll` wants to be called; infinity where there is nothing to do."""
        return self.source.next_deadline() if self._situation.active else self.replicas.next_deadline()

    def internal(self, one: Expectation) -> bool:
        """Is this entry of the kernel's table one that this node replicates, and not the peer's?  Zone 0."""
        if self._situation.active:
            return self.source.knows(one)
        return one.name not in self.replicas

    def describe(self) -> dict[str, int]:
        """The part of ``status --json``: how many, by where."""
        return {"internal": len(self.source), "external": len(self.replicas), "helper_flows": self.source.masters}

    @property
    def problem(self) -> str:
        """Why this backup cannot do for the peer's helpers what it should; empty if it can."""
        refused = self.replicas.refusals()
        count = sum(refused[reason] for reason in UNSUPPORTED)
        if self._situation.active or not (count or self._situation.unknown_helpers):
            return ""
        names = ", ".join(sorted(self._situation.unknown_helpers))
        what = f"helpers of the peer's flows ({names})" if names else f"what {count} of the peer's expectations need"
        return f"this node's kernel does not know {what}: load the same helper modules on both nodes"
