# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The external cache (the peer's flows), and what is known of the kernel's copies of them.

There is no internal cache: the kernel's table is it.  A replica costs one entry of one dict, two objects of bytes; all
else is kept of exceptions only: of few flows (extras), or for a short time (what is under way to the kernel).
"""

from __future__ import annotations

import itertools
import operator
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from .digest import Digest, prints
from .rows import TAIL_BYTES

_SINCE = struct.Struct("!I")
SINCE_BYTES = 4

FULL_S = 60.0
"""After a flow found no room the table counts as full for so long: comparisons ask for what is missing more often."""

WALK_WHOLE = 4096  # replicas up to which a walk takes all keys at once, in the order in which they came
WALK_PARTS = 16  # of a larger table ...
WALK_KEYS = 24_576  # ... or more, so that about so many keys are in each ...
WALK_PARTS_MAX = 64  # ... but each of them looks at all keys (80 ns a key)


class Replica(NamedTuple):
    """A flow of the peer.  ``since``: when its replication began (monotonic seconds)."""

    key: bytes
    value: bytes
    extras: bytes
    since: float


class ExternalCache:
    """The flows of the peer, by key, with what the running bulk has not named yet.

    In ``table`` stands the value and, behind it, in 4 bytes the seconds from ``started`` to the first replication.
    ``digest`` is that of the table.  ``limit``: flows for which there is room; ``full_at``: when there was none for
    another one last (monotonic seconds).
    """

    def __init__(self, limit: int, started: float = 0.0) -> None:
        self.limit = limit
        self.full_at: float | None = None
        self.table: dict[bytes, bytes] = {}
        self.extras: dict[bytes, bytes] = {}
        self.digest = Digest()
        self._started = started
        self._unnamed: set[bytes] | None = None

    def __len__(self) -> int:
        return len(self.table)

    def full(self, now: float) -> bool:
        """Are flows of the peer missing here for want of room?

        What was missed comes again with the next comparison, so there is room for all of them when none was turned away
        for a while.
        """
        return self.full_at is not None and now - self.full_at < FULL_S

    def __contains__(self, key: bytes) -> bool:
        return key in self.table

    def value(self, key: bytes) -> bytes | None:
        stored = self.table.get(key)
        return None if stored is None else stored[:-SINCE_BYTES]

    def stored(self, keys: Iterable[bytes]) -> list[bytes]:
        """The values of keys that are all in the table, with ``SINCE_BYTES`` behind each: no copies."""
        return list(map(self.table.__getitem__, keys))

    def get(self, key: bytes) -> Replica | None:
        stored = self.table.get(key)
        return None if stored is None else self._replica(key, stored)

    def _replica(self, key: bytes, stored: bytes) -> Replica:
        since = self._started + _SINCE.unpack_from(stored, len(stored) - SINCE_BYTES)[0]
        return Replica(key, stored[:-SINCE_BYTES], self.extras.get(key, b""), since)

    def keys(self) -> list[bytes]:
        """A snapshot of 8 bytes per flow: the table may change while a caller walks through it."""
        return list(self.table)

    def items(self) -> Iterator[Replica]:
        """All replicas that are still there when their turn comes, each of them once.

        The table may change under the walk.  That is why it takes keys in advance: not all of them, which would cost 8
        bytes per flow as long as it lasts, but of a large table those of a part of the hashes.
        """
        count = len(self.table)
        parts = 1 if count <= WALK_WHOLE else max(WALK_PARTS, min(count // WALK_KEYS, WALK_PARTS_MAX))
        for part in range(parts):
            for key in [key for key in self.table if hash(key) % parts == part]:
                stored = self.table.get(key)
                if stored is not None:
                    yield self._replica(key, stored)

    def add_rows(self, rows: Mapping[bytes, bytes], now: float) -> Mapping[bytes, bytes]:
        """Store flows of one shape that are not here yet; returns those for which there was room."""
        room = self.limit - len(self.table)
        if len(rows) > room:
            self.full_at = now
            rows = dict(itertools.islice(rows.items(), max(0, room)))
        if rows:
            self.table.update(zip(rows, map(operator.add, rows.values(), itertools.repeat(self._since(now)))))
            if len(rows) == 1:
                for key, value in rows.items():
                    self.digest.add_single(key, value[:-TAIL_BYTES])
                return rows
            values = rows.values()
            self.digest.add(len(next(iter(rows))), rows, prints(values, len(next(iter(values))) - TAIL_BYTES))
        return rows

    def replace_rows(self, rows: Mapping[bytes, bytes], changed: Iterable[tuple[bytes, bytes]]) -> None:
        """Newer values of flows that are all here; extras stay, and so does the beginning of the replication.

        ``changed``: of those of them whose translation may have changed, the key and the value that is here.
        """
        for key, value in changed:
            self._translate(key, value, rows[key])
        table = self.table
        table.update({key: value + table[key][-SINCE_BYTES:] for key, value in rows.items()})
        self.name(rows)

    def put(self, key: bytes, value: bytes, extras: bytes, now: float) -> bool:
        """Store the newest state of a flow; False where the table is full."""
        stored = self.table.get(key)
        if stored is None and len(self.table) >= self.limit:
            self.full_at = now
            return False
        if stored is None:
            self.digest.add(len(key), (key,), prints((value,), len(value) - TAIL_BYTES))
        else:
            self._translate(key, stored, value)
        self.table[key] = value + (self._since(now) if stored is None else stored[-SINCE_BYTES:])
        if extras:
            self.extras[key] = extras
        else:
            self.extras.pop(key, None)
        self.name((key,))
        return True

    def _translate(self, key: bytes, before: bytes, now: bytes) -> None:
        reply = len(now) - TAIL_BYTES
        if before[:reply] != now[:reply]:
            self.digest.remove(len(key), (key,), prints((before,), reply))
            self.digest.add(len(key), (key,), prints((now,), reply))

    def take(self, keys: Iterable[bytes]) -> list[bytes]:
        """Forget flows; returns those that were here."""
        known = list(filter(self.table.__contains__, dict.fromkeys(keys)))
        values = list(map(self.table.pop, known))
        lengths = set(map(len, known))
        for key_len in lengths:
            gone, theirs = known, values
            if len(lengths) > 1:
                gone = [key for key in known if len(key) == key_len]
                theirs = [value for key, value in zip(known, values) if len(key) == key_len]
            self.digest.remove(key_len, gone, prints(theirs, len(theirs[0]) - TAIL_BYTES - SINCE_BYTES))
        if self.extras:
            for key in known:
                self.extras.pop(key, None)
        self.name(known)
        return known

    def clear(self) -> None:
        self.table = {}
        self.extras = {}
        self.digest = Digest()
        self.full_at = None
        self._unnamed = None

    def _since(self, now: float) -> bytes:
        return _SINCE.pack(min(max(0, int(now - self._started)), 0xFFFFFFFF))

    # --- bulk --------------------------------------------------------------------------------------------------------

    def begin_bulk(self) -> None:
        """From now on note which flows the peer names."""
        self._unnamed = set(self.table)

    def name(self, keys: Iterable[bytes]) -> None:
        if self._unnamed:
            self._unnamed.difference_update(keys)

    def end_bulk(self) -> list[bytes]:
        """Keys that the bulk did not name: stale.  The caller removes them."""
        unnamed, self._unnamed = self._unnamed, None
        return [key for key in self.table if key in unnamed] if unnamed else []

    @property
    def bulk_running(self) -> bool:
        return self._unnamed is not None

    @property
    def named(self) -> int:
        """Flows that the running bulk, or an event since it began, has named."""
        return len(self.table) - len(self._unnamed or ())


class Copies:
    """Which replicas the kernel holds.  ``normally``: one of which nothing is noted is held (hot standby), or not.

    ``asked``: the kernel is asked to make or take over the entry, and has not answered.  ``outdated``: of these, what
    it was asked to make it of (value and extras), where that is not the replica's newest state.  ``refused``: what the
    kernel does not take, and the errno.
    """

    def __init__(self, normally: bool) -> None:
        self.asked: set[bytes] = set()
        self.outdated: dict[bytes, tuple[bytes, bytes]] = {}
        self.refused: dict[bytes, int] = {}
        self._normally = normally
        self._others: set[bytes] = set()

    @property
    def settled(self) -> bool:
        """No exception is noted: all replicas are held (hot standby), or none."""
        return not (self.asked or self._others)

    def held(self, key: bytes) -> bool:
        return key not in self.asked and (key in self._others) != self._normally

    def lacking(self, keys: Collection[bytes]) -> list[bytes]:
        """Those that the kernel does not hold yet."""
        asked, others, normally = self.asked, self._others, self._normally
        if not asked and not others:
            return [] if normally else list(keys)
        return [key for key in keys if key in asked or (key in others) == normally]

    def ask(self, keys: Iterable[bytes]) -> None:
        """The kernel is asked to hold them."""
        self.asked.update(keys)
        if self.outdated:
            for key in keys:
                self.outdated.pop(key, None)

    def hold(self, keys: Iterable[bytes]) -> None:
        """The kernel holds them."""
        self.asked.difference_update(keys)
        if not self.asked:
            self.asked.clear()  # a set of nothing still has the room that it once needed
        if self._normally:
            self._others.difference_update(keys)
        else:
            self._others.update(keys)
        if self.refused:
            for key in keys:
                self.refused.pop(key, None)

    def lose(self, keys: Iterable[bytes]) -> None:
        """The kernel does not hold them, and nothing is under way."""
        self.asked.difference_update(keys)
        if self._normally:
            self._others.update(keys)
        else:
            self._others.difference_update(keys)
        if self.outdated:
            for key in keys:
                self.outdated.pop(key, None)

    def refuse(self, key: bytes, error: int) -> None:
        self.lose((key,))
        self.refused[key] = error

    def forget(self, keys: Iterable[bytes]) -> None:
        """They are replicas no more."""
        self.asked.difference_update(keys)
        self._others.difference_update(keys)
        if self.outdated or self.refused:
            for key in keys:
                self.outdated.pop(key, None)
                self.refused.pop(key, None)

    def clear(self) -> None:
        self.asked = set()
        self.outdated = {}
        self.refused = {}
        self._others = set()
