# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Connections that just came up, where nearly all are over soon after: they are told one window later, if ever.

A window leaves out what comes up and is over within it, and yet it ends somewhere: a connection of six milliseconds has
one chance in three to be alive then.  To tell of it, of its closing and of its end costs the peer three changes of its
kernel's table, and both nodes more than all else.  Where such connections are many, those that come up wait until the
next reading: what is over by then is not told.  Where more than some live on nothing waits.
"""

from __future__ import annotations

import itertools
from collections.abc import Container

from .columns import Gathering
from .constants import IPPROTO_TCP, TCP_ESTABLISHED, TCP_LAST_ACK
from .rows import STATE_FROM_END, Changes

MANY = 16  # that come up within a window: of fewer nothing is learned
FEW = 4  # that come up within a window: they need not wait, whatever others did
SAMPLE = 32  # of which is seen how they fare, before any has to wait
BEGINS = (
    0.75  # share of those that are over by the next reading, on average over about four, from which others wait ...
)
ENDS = 0.5  # ... and down to which they go on to wait
_AVERAGED = 0.25


class Newcomers:
    """``waiting``: those that are not told yet, as Changes have rows; no more than one reading gives."""

    def __init__(self) -> None:
        self.waiting: dict[int, dict[bytes, bytes]] = {}
        self._sample: list[bytes] = []  # some that came up last
        self._over = 0.0  # share of those that were over by the next reading, on average
        self._on = False

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    def forget(self) -> None:
        """Nothing is told."""
        self.waiting = {}
        self._sample = []

    def sift(self, changes: Changes, known: Container[bytes], pause: bool = False) -> Changes:
        """Which of these changes, and of what waited, are to be told now.

        ``known``: keys of the flows that the peers were told of.  ``pause``: nothing shall wait now.
        """
        if changes.events < MANY and not (self.waiting or self._sample or self._over or self._on):
            return changes
        if changes.sheets:
            if not (self.waiting or self._sample or _closing(changes)):
                return changes  # a flood of new ones
            changes = changes.settled()
        if self._sample or self.waiting or self._over:
            self._look_back(changes)
        if self.waiting:
            changes = _behind(self.waiting, changes)
        before, self.waiting, self._sample = self.waiting, {}, []
        if pause or changes.more:
            return changes
        count = 0
        rows: dict[int, dict[bytes, bytes]] = {}
        for key_len, table in changes.rows.items():
            if not self._on:
                if len(table) >= MANY and _some_over(table):
                    latest = itertools.islice(reversed(table), SAMPLE)
                    self._sample += _fresh({key: table[key] for key in latest}, known)
                continue
            held = before.get(key_len, {})
            fresh = [key for key in _fresh(table, known) if key not in held]
            count += len(fresh)
            if fresh:
                self.waiting[key_len] = {key: table[key] for key in fresh}
                table = {key: value for key, value in table.items() if key not in self.waiting[key_len]}
            rows[key_len] = table
        if not self._on or count <= FEW:
            self.waiting = {}
            return changes
        return changes._replace(rows=rows)

    def _look_back(self, changes: Changes) -> None:
        """How did those fare that came up before?"""
        seen = self._sample
        if self.waiting:
            seen = list(itertools.chain.from_iterable(self.waiting.values()))
        if len(seen) < MANY:
            self._over = self._over * (1 - _AVERAGED) if self._over > 0.01 else 0.0
        else:
            gone, rows = set(changes.gone), changes.rows
            over = 0
            for key in seen:
                value = rows.get(len(key), _NONE).get(key)
                over += key in gone if value is None else not _alive(value)
            self._over += (over / len(seen) - self._over) * _AVERAGED
        self._on = self._over >= (ENDS if self._on else BEGINS)


_NONE: dict[bytes, bytes] = {}  # stays empty


def _alive(value: bytes) -> bool:
    return TCP_ESTABLISHED <= value[-STATE_FROM_END] <= TCP_LAST_ACK


def _some_over(table: dict[bytes, bytes]) -> bool:
    """Is a connection over among the first few?  Where short ones are many, most of those are."""
    return max([value[-STATE_FROM_END] for value in itertools.islice(table.values(), FEW)]) > TCP_LAST_ACK


def _fresh(table: dict[bytes, bytes], known: Container[bytes]) -> list[bytes]:
    """TCP connections that came up, and nobody was told of."""
    return [
        key
        for key, value in table.items()
        if TCP_ESTABLISHED <= value[-STATE_FROM_END] <= TCP_LAST_ACK and key[0] == IPPROTO_TCP and key not in known
    ]


_NOT_OVER = bytes(range(TCP_LAST_ACK + 1))


def _closing(changes: Changes) -> bool:
    """Are there TCP connections that are over among what is in columns?"""
    for sheet in changes.sheets:
        if IPPROTO_TCP in sheet.columns[0] and sheet.columns[-STATE_FROM_END].translate(None, _NOT_OVER):
            return True
    return False


def _behind(waiting: dict[int, dict[bytes, bytes]], changes: Changes) -> Changes:
    """All together, in the order in which it happened."""
    found = Gathering()
    found.rows = {key_len: dict(table) for key_len, table in waiting.items()}
    for key in changes.gone:
        found.end(key)
    for key_len, table in changes.rows.items():
        found.rows.setdefault(key_len, {}).update(table)
    for flow in changes.flows:
        found.flow(flow)
    return found.changes(changes.events, changes.lost, changes.more)
