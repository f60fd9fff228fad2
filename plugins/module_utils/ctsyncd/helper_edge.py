# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon's hands for :mod:`helpers`: expectation events, walks, requests.  Nothing is opened if the limit is 0."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from . import expectation_sockets
from .errors import NetlinkError
from .expectation_replicas import REMAKE, Job
from .helpers import Helpers
from .netlink import RequestSocket
from .service import LimitedLog

EVENTS_PER_TURN = 1024
SLICES_PER_TURN = 1  # of a walk, about 100 expectations
JOBS_PER_TURN = 256
ASKS_PER_TURN = 64
SLICES_OF_ONE = 64  # of the walk through one flow's expectations: all that it can have


class HelperEdge:
    """Sockets of expectations, and the calls between them and the engine's :class:`Helpers`."""

    def __init__(self, helpers: Helpers, requests: RequestSocket, log: LimitedLog) -> None:
        self._helpers = helpers
        self._requests = requests
        self._log = log
        self._events = expectation_sockets.EventSocket((requests.portid,)) if helpers.limit else None
        self._walk: expectation_sockets.Walk | None = None
        self._number = 0  # of the walk
        self.malformed = 0  # entries of walks that could not be decoded

    @property
    def events(self) -> expectation_sockets.EventSocket | None:
        """What to wait for; None if expectations are not replicated."""
        return self._events

    @property
    def counters(self) -> dict[str, int]:
        return {"expectations_malformed": self.malformed + (self._events.malformed if self._events else 0)}

    def statistics(self) -> dict[str, int]:
        """Counters of expectations and helpers."""
        names = ("expectation", "sequence_adjustments", "helper_flows", "degraded_without")
        found = {name: count for name, count in self._helpers.counters.items() if name.startswith(names)}
        return dict(sorted({**found, **self.counters}.items()))

    @property
    def busy(self) -> bool:
        """A walk is not over, or is wanted."""
        return self._helpers.walk is not None or bool(self._helpers.source.asks)

    def close(self) -> None:
        self._end_walk()
        if self._events is not None:
            self._events.close()

    def read_events(self, now: float) -> None:
        if self._events is not None:
            found = self._events.read(EVENTS_PER_TURN)
            self._helpers.events(found.changes, found.lost, now)

    def turn(self, now: float) -> None:
        """Carry out what the engine wants."""
        helpers = self._helpers
        if helpers.walk is not None or self._walk is not None:
            self._feed_walk(now)
        for master in helpers.take_asks(ASKS_PER_TURN):
            try:
                with expectation_sockets.Walk(master) as walk:
                    listed = walk.read(SLICES_OF_ONE)
                helpers.told(master, listed, now)
            except (OSError, NetlinkError) as error:
                if getattr(error, "errno", None) != errno.ENOENT:
                    self._log.warning("expectations", now, "listing the expectations of a flow: %s", error)
                helpers.told(master, None, now)
        jobs = helpers.work(JOBS_PER_TURN)
        if jobs:
            self._carry_out(jobs)

    def _feed_walk(self, now: float) -> None:
        wanted = self._helpers.walk
        if wanted is None:
            self._end_walk()
            return
        whole = False
        try:
            if self._walk is None or self._number != wanted[0]:
                self._end_walk()
                self._walk, self._number = expectation_sockets.Walk(), wanted[0]
            self._helpers.walked(self._walk.read(SLICES_PER_TURN), now)
            if not self._walk.done:
                return
            whole = not self._walk.interrupted
        except (OSError, NetlinkError) as error:
            self._log.warning("expectations", now, "reading the kernel's table of expectations: %s", error)
        self._end_walk()
        self._helpers.walk_ended(whole, now)

    def _end_walk(self) -> None:
        if self._walk is not None:
            self.malformed += self._walk.malformed
            self._walk.close()
            self._walk = None

    def _carry_out(self, jobs: list[Job]) -> None:
        """All in one go; the answer to a job is the one to what makes or changes the expectation."""
        messages: list[bytes] = []
        places: dict[int, int] = {}  # of the decisive message of each job
        results = [0] * len(jobs)
        for index, (job, requests) in enumerate(self._expressed(jobs, results)):
            if requests:
                places[len(messages) + (job.operation == REMAKE)] = index
                messages += requests
        for place, number in self._requests.inject(messages):
            if place in places:
                results[places[place]] = number
        for job, number in zip(jobs, results):
            self._helpers.result(job, number)

    @staticmethod
    def _expressed(jobs: list[Job], results: list[int]) -> Iterator[tuple[Job, list[bytes]]]:
        for index, job in enumerate(jobs):
            try:
                yield job, job.messages()
            except NetlinkError as error:  # the peer sent what this kernel's interface cannot express
                results[index] = error.errno or errno.EINVAL
                yield job, []
