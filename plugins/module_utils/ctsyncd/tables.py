# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon's tables: changes that wait to be sent, and the external cache (the peer's flows).

There is no internal cache: the kernel's table is it.  Records are compact bytes (``wire.encode_flow``).
"""

from __future__ import annotations

import collections
from collections.abc import Iterator


class Pending:
    """Changes that wait for credit, in order, the last state of a flow only.

    Bulk marks travel in the same order as the flows.  ``oldest`` is when the oldest change that still waits came up.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.oldest: float | None = None
        # not a dict: to find the first entry of one it walks over all that were removed before
        self._records: collections.OrderedDict[bytes, tuple[bytes, float]] = collections.OrderedDict()
        self._moved: float | None = None  # the oldest birth among changes that moved to the end

    def __len__(self) -> int:
        return len(self._records)

    @property
    def full(self) -> bool:
        return len(self._records) >= self.limit

    def put(self, key: bytes, record: bytes, now: float) -> None:
        """Add or replace the change of ``key``.  It moves to the end: what was queued before it stays before it."""
        replaced = self._records.pop(key, None)
        since = now
        if replaced is not None:
            since = replaced[1]
            self._moved = since if self._moved is None else min(self._moved, since)
        self._records[key] = (record, since)
        if self.oldest is None:
            self.oldest = now

    def get(self, key: bytes) -> bytes | None:
        """The record of ``key`` that waits."""
        waiting = self._records.get(key)
        return None if waiting is None else waiting[0]

    def drop(self, key: bytes) -> None:
        """Forget the change of ``key``, if one waits."""
        if self._records.pop(key, None) is not None:
            self._find_oldest()

    def take(self, size: int) -> tuple[list[bytes], float]:
        """Remove the first records that fit into ``size`` bytes; returns them and when the oldest came up.

        A record that does not fit by itself is returned alone; the caller decides.
        """
        out: list[bytes] = []
        born = None
        for key in list(self._first(size)):
            record, since = self._records.pop(key)
            born = since if born is None else min(born, since)
            out.append(record)
        self._find_oldest()
        return out, born if born is not None else 0.0

    def _find_oldest(self) -> None:
        """The first change is the oldest, unless one moved to the end; then the age is at most overstated."""
        if not self._records:
            self.oldest = self._moved = None
            return
        first = next(iter(self._records.values()))[1]
        self.oldest = first if self._moved is None else min(first, self._moved)

    def _first(self, size: int) -> Iterator[bytes]:
        used = 0
        for key, (record, _since) in self._records.items():
            used += len(record)
            if used > size and used != len(record):
                return
            yield key

    def clear(self) -> None:
        self._records.clear()
        self.oldest = self._moved = None


class Replica:
    """An entry of the external cache.

    ``record``: the last state the peer sent; ``since``: when its replication began (monotonic seconds);
    ``injected``: the kernel holds it (hot standby); ``asked``: the record that the kernel is asked to make it of.
    """

    __slots__ = ("asked", "injected", "record", "since")

    def __init__(self, record: bytes, since: float) -> None:
        self.record = record
        self.since = since
        self.injected = False
        self.asked: bytes | None = None


class ExternalCache:
    """The flows of the peer, by flow key, with what the running bulk has named so far."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._replicas: dict[bytes, Replica] = {}
        self._named: set[bytes] | None = None

    def __len__(self) -> int:
        return len(self._replicas)

    def __contains__(self, key: bytes) -> bool:
        return key in self._replicas

    def get(self, key: bytes) -> Replica | None:
        return self._replicas.get(key)

    def keys(self) -> list[bytes]:
        return list(self._replicas)

    def items(self) -> list[tuple[bytes, Replica]]:
        """A snapshot: the table may change while a caller walks through it."""
        return list(self._replicas.items())

    def put(self, key: bytes, record: bytes, now: float) -> Replica | None:
        """Store the newest record of a flow; None where the table is full."""
        replica = self._replicas.get(key)
        if replica is None:
            if len(self._replicas) >= self.limit:
                return None
            replica = self._replicas[key] = Replica(record, now)
        else:
            replica.record = record
        if self._named is not None:
            self._named.add(key)
        return replica

    def pop(self, key: bytes) -> Replica | None:
        if self._named is not None:
            self._named.discard(key)
        return self._replicas.pop(key, None)

    def clear(self) -> None:
        self._replicas.clear()
        self._named = None

    def begin_bulk(self) -> None:
        """From now on note which flows the peer names."""
        self._named = set()

    def end_bulk(self) -> list[bytes]:
        """Keys that the bulk did not name: stale.  The caller removes them."""
        named, self._named = self._named, None
        return [] if named is None else [key for key in self._replicas if key not in named]

    @property
    def bulk_running(self) -> bool:
        return self._named is not None
