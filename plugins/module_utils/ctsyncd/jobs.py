# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Requests to the kernel, one by one or many of one kind, and the queue in which they wait."""

from __future__ import annotations

import collections
import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple, Union

from .ctnetlink import flow_of_key
from .flow import Flow
from .rows import SHAPES, unpack

CREATE = "create"
UPDATE = "update"
TIMER = "timer"  # an update of the timer alone
LOOSEN = "loosen"  # packets of this TCP connection are not dropped for their position any more
DELETE = "delete"

WORK_SIZE = 1024  # rows in one piece of work


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
        if first == 0 and end >= len(self.keys):
            return self
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


def size_of(job: Job) -> int:
    """Flows in it."""
    return len(job.keys) if isinstance(job, Work) else 1


class JobQueue:
    """What the kernel is to be asked, in order.  ``waiting``: flows in it.

    Values may come with something behind them, as the external cache stores them: so the queue holds no copies of them.
    Jobs go out with values alone.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self._jobs: collections.deque[Job] = collections.deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def clear(self) -> None:
        self._jobs.clear()
        self.waiting = 0

    def push(self, job: Job) -> None:
        self.waiting += size_of(job)
        self._jobs.append(job)

    def ask(self, operation: str, key: bytes, flow: Flow, timeout: int | None = None, attempt: int = 0) -> None:
        self.push(Request(operation, key, flow, timeout, attempt))

    def work(
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
                self.work(operation, some_keys, some_values, list(itertools.compress(timeouts, mask)), attempt)
            return
        for key_len in lengths:
            last = self._jobs[-1] if self._jobs else None
            if (
                isinstance(last, Work)
                and (last.operation, last.key_len, last.attempt) == (operation, key_len, attempt)
                and len(last.keys) + len(keys) <= WORK_SIZE
            ):
                self.waiting += len(keys)
                last.keys.extend(keys)
                last.values.extend(values)
                last.timeouts.extend(timeouts)
                return
            work = Work(operation, key_len, list(keys), list(values), list(timeouts), attempt)
            for first in range(0, len(work.keys), WORK_SIZE):
                self.push(work.part(first, first + WORK_SIZE))

    def take(self, limit: int) -> list[Job]:
        """The first jobs, for at most ``limit`` flows; they leave the queue."""
        out: list[Job] = []
        room = limit
        while self._jobs and room > 0:
            job = self._jobs[0]
            size = size_of(job)
            if isinstance(job, Work) and size > room:
                self._jobs[0] = job.part(room, size)
                job, size = job.part(0, room), room
            else:
                self._jobs.popleft()
            self.waiting -= size
            room -= size
            if isinstance(job, Work) and job.values:
                values = list(map(operator.itemgetter(slice(SHAPES[job.key_len].value)), job.values))
                job = Work(job.operation, job.key_len, job.keys, values, job.timeouts, job.attempt)
            out.append(job)
        return out
