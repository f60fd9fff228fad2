# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Changes that wait to be sent: the last state of a flow only, packed into blocks of columns when there is credit.

Changes stand in *generations*.  The last generation is open and takes what comes up; a mark closes it, and so does
:meth:`Pending.take` when it begins to send it.  What a generation holds is sent in this order: ends, flows, rows,
expectations, the mark.  So the receiver, that applies one after the other, ends with what it would have after all
changes one by one.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from . import rows as shapes
from . import wire

FIXED_BYTES = 60  # about what a record of columns costs besides what grows with its rows
FIRST_GUESS_BYTES = 12.0  # a row, before one was seen
REMEMBERED = 64  # records that several peers may be told, with what they were made of: some 10 KB each
AHEAD_ROWS = 1024  # whose columns are looked at together, besides those of the next record
SLACK_BYTES = 200  # less room than this, or than an eighth of a block, is not worth another record of columns


class _Generation:
    """Changes between two marks."""

    __slots__ = ("born", "expectations", "flows", "gone", "mark", "rows", "sheets")

    def __init__(self, born: float) -> None:
        self.born = born
        self.gone: dict[int, dict[bytes, None]] = {}  # by length of the key; a dict for its order
        self.flows: dict[bytes, tuple[bytes, bytes]] = {}
        self.rows: dict[int, dict[bytes, bytes]] = {}
        self.sheets: list[shapes.Sheet] = []  # more rows; no flow is in here twice
        self.expectations: dict[bytes, bytes] = {}  # records by name
        self.mark: bytes | None = None

    def __len__(self) -> int:
        gone = sum([len(keys) for keys in self.gone.values()])
        rows = sum(map(len, self.rows.values())) + sum(map(len, self.sheets))
        return gone + rows + len(self.flows) + len(self.expectations) + (self.mark is not None)

    def settle(self) -> None:
        """What is in sheets becomes rows: what follows may be about the same flows."""
        if self.sheets:
            for sheet in self.sheets:
                self.rows.setdefault(sheet.key_len, {}).update(sheet.rows())
            self.sheets = []

    def single(self) -> tuple[int, bytes] | None:
        """Length of the key and the row, if there is one row and nothing else."""
        if len(self.rows) != 1 or self.gone or self.flows or self.sheets or self.expectations or self.mark is not None:
            return None
        key_len, rows = next(iter(self.rows.items()))
        return (key_len, b"".join(*rows.items())) if len(rows) == 1 else None


class Encoder:
    """Makes records of columns.  ``guesses``: how many bytes a row took lately, by kind of record and length of keys.

    Where several peers are told the same it is encoded once: of the latest records it remembers what they were made of.
    """

    def __init__(self, peers: int) -> None:
        self.guesses: dict[tuple[int, int], float] = {}
        self._known: dict[tuple[object, ...], bytes] | None = {} if peers > 1 else None

    def encode(self, kind: int, key_len: int, joined: bytes) -> bytes:
        """A record of rows (RECORD_ROWS) or keys (RECORD_GONE), all of one shape and joined."""
        encode = wire.encode_rows if kind == wire.RECORD_ROWS else wire.encode_gone
        if self._known is None:
            return wire.tlv(kind, encode(key_len, joined))
        return self._remember(self._known, (kind, key_len, joined), lambda: wire.tlv(kind, encode(key_len, joined)))

    def encode_part(self, source: tuple[object, ...], many: wire.RowColumns, start: int, end: int) -> bytes:
        """A record of the rows from ``start`` to ``end``.  ``source``: equal where it would be of the same rows."""
        if self._known is None:
            return wire.tlv(wire.RECORD_ROWS, many.encode(start, end))
        return self._remember(self._known, source, lambda: wire.tlv(wire.RECORD_ROWS, many.encode(start, end)))

    @staticmethod
    def _remember(
        known: dict[tuple[object, ...], bytes], source: tuple[object, ...], make: Callable[[], bytes]
    ) -> bytes:
        record = known.get(source)
        if record is None:
            if len(known) >= REMEMBERED:
                known.pop(next(iter(known)))
            record = known[source] = make()
        return record


class _Columns:
    """Keys or rows of one shape on their way out."""

    __slots__ = ("_at", "_encoder", "_many", "_parts", "_source", "_width", "left", "rest", "shape")

    def __init__(self, encoder: Encoder, kind: int, key_len: int, source: Iterator[bytes], left: int) -> None:
        self._encoder = encoder
        self.shape = (kind, key_len)
        self.left = left  # changes
        self.rest = b""  # joined rows that were taken from the source ...
        self._at = 0  # ... of which so many are sent
        self._many: wire.RowColumns | None = None  # the same as columns, where they are more than one record takes
        rows = kind == wire.RECORD_ROWS
        self._width = shapes.SHAPES[key_len].row if rows else key_len
        self._parts = 2 if rows else 1  # of a row in the source: key and value, or the key alone
        self._source = source

    def fill(self, room: int) -> tuple[bytes, int]:
        """A record of as many rows as fit, and how many these are; (b"", 0) if not one fits."""
        guesses = self._encoder.guesses
        guess = guesses.get(self.shape, FIRST_GUESS_BYTES)
        count = min(self.left, wire.MAX_ROWS, max(1, int((room - FIXED_BYTES) / guess)))
        self._read(count)
        while True:
            record = self._encode(count)
            if len(record) <= room:
                break
            if count == 1:
                return b"", 0
            count = max(1, min(count - 1, int(count * 0.97 * (room - FIXED_BYTES) / (len(record) - FIXED_BYTES))))
        if count < self.left and 2 * len(record) > min(room, 50 * guess):
            guesses[self.shape] = max(1.0, (len(record) - FIXED_BYTES) / count * 1.02)
        self._at += count
        self.left -= count
        return record, count

    def skip(self) -> None:
        """Forget the first row."""
        self._at += 1
        self.left -= 1

    def _read(self, count: int) -> None:
        """Have so many rows; of rows that more than one record takes some more, to look at their columns once."""
        missing = count - len(self.rest) // self._width + self._at
        if missing <= 0:
            return
        ahead = self.shape[0] == wire.RECORD_ROWS and count < self.left
        if ahead:
            missing += AHEAD_ROWS
        taken = b"".join(itertools.islice(self._source, missing * self._parts))
        self.rest = self.rest[self._at * self._width :] + taken
        self._at = 0
        self._many = wire.RowColumns(self.shape[1], shapes.cut(self.rest, self._width)) if ahead else None

    def _encode(self, count: int) -> bytes:
        start, end = self._at, self._at + count
        joined = self.rest[start * self._width : end * self._width]
        if self._many is None:
            return self._encoder.encode(*self.shape, joined)
        return self._encoder.encode_part((*self.shape, joined), self._many, start, end)


class _Sheet(_Columns):
    """A sheet on its way out."""

    __slots__ = ("_rows", "_sheet")

    def __init__(self, encoder: Encoder, sheet: shapes.Sheet) -> None:
        super().__init__(encoder, wire.RECORD_ROWS, sheet.key_len, iter(()), len(sheet))
        self._sheet = sheet
        self._rows = wire.RowColumns(sheet.key_len, sheet.columns)

    def _read(self, count: int) -> None:
        """They are here."""

    def _encode(self, count: int) -> bytes:
        start, end = self._at, self._at + count
        return self._encoder.encode_part((self._sheet, start, end), self._rows, start, end)


class _Singles:
    """Records that are ready, one by one: flows and the mark."""

    __slots__ = ("_next", "_source", "left")

    def __init__(self, records: Iterator[bytes], left: int) -> None:
        self.left = left
        self._source = records
        self._next: bytes | None = None

    def fill(self, room: int) -> tuple[bytes, int]:
        """As many records as fit, and how many these are."""
        out: list[bytes] = []
        while self.left:
            record = next(self._source) if self._next is None else self._next
            room -= len(record)
            if room < 0:
                self._next = record
                break
            self._next = None
            self.left -= 1
            out.append(record)
        return b"".join(out), len(out)

    def skip(self) -> None:
        self._next = None
        self.left -= 1


class Pending:
    """Changes that wait for credit, at most about ``limit`` (the caller asks ``full`` before a batch, not for each).

    ``oldest`` is when the oldest change that still waits came up, or a little before; None when none waits.  A flow
    whose reply tuple changes ended in between: say so with :meth:`remove` first.  ``too_long`` counts records that
    were dropped because no block could hold them.
    """

    def __init__(self, limit: int, encoder: Encoder | None = None) -> None:
        self.limit = limit
        self._encoder = encoder or Encoder(1)
        self.too_long = 0
        self._closed: collections.deque[_Generation] = collections.deque()
        self._open: _Generation | None = None
        self._stages: collections.deque[_Columns | _Singles] = collections.deque()  # of the generation being sent
        self._born = 0.0  # of that generation
        self._waiting = 0  # changes in closed generations, that being sent included

    def __len__(self) -> int:
        return self._waiting + (len(self._open) if self._open is not None else 0)

    @property
    def waits(self) -> bool:
        """Is there anything?  An open generation is never empty."""
        return self._open is not None or self._waiting > 0

    @property
    def full(self) -> bool:
        return len(self) >= self.limit

    @property
    def oldest(self) -> float | None:
        if self._stages:
            return self._born
        if self._closed:
            return self._closed[0].born
        return None if self._open is None else self._open.born

    def clear(self) -> None:
        self._closed.clear()
        self._stages.clear()
        self._open = None
        self._waiting = 0

    # --- changes come in ---------------------------------------------------------------------------------------------

    def put_rows(self, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        """The flows are so now: key to value, complete."""
        if not rows:
            return
        generation = self._opened(now)
        generation.settle()
        table = generation.rows
        known = table.get(key_len)
        if known is None:
            table[key_len] = dict(rows)
        else:
            known.update(rows)

    def put_sheet(self, sheet: shapes.Sheet, now: float) -> None:
        """The same for flows that nothing is waiting of, each of which is there once."""
        self._opened(now).sheets.append(sheet)

    def put_flow(self, key: bytes, value: bytes, extras: bytes, now: float) -> None:
        """The flow is so now.  What it does not say is as before.  Raises WireError ``malformed`` for bad extras."""
        generation = self._opened(now)
        generation.settle()
        rows = generation.rows.get(len(key), {})
        known, before = rows.get(key), generation.flows.get(key)
        if before is not None:
            known, extras = known or before[0], shapes.merge_extras(before[1], extras)
        if known is not None:
            value = shapes.merge_value(known, value)
        generation.flows[key] = value, extras
        rows.pop(key, None)

    def remove(self, keys: Collection[bytes], now: float) -> None:
        """The flows ended: what waits of them is forgotten, their end is told."""
        if not keys:
            return
        generation = self._opened(now)
        generation.settle()
        lengths = dict.fromkeys(map(len, keys))
        for length in lengths:
            some = keys if len(lengths) == 1 else [key for key in keys if len(key) == length]
            waiting: dict[bytes, Any]
            for waiting in (generation.rows.get(length, {}), generation.flows):
                if waiting and not waiting.keys().isdisjoint(some):
                    for key in some:
                        waiting.pop(key, None)
            generation.gone.setdefault(length, {}).update(dict.fromkeys(some))

    def put_expectation(self, name: bytes, payload: bytes | None, now: float) -> None:
        """The expectation of this name is so now; None: it is gone.  Goes behind the flows, its master's among them."""
        record = wire.tlv(wire.RECORD_EXPECT_GONE, name) if payload is None else wire.tlv(wire.RECORD_EXPECT, payload)
        self._opened(now).expectations[name] = record

    def mark(self, record: bytes, now: float) -> None:
        """A whole record that goes behind all that came before it and before all that comes after."""
        self._opened(now).mark = record
        self._close()

    def _opened(self, now: float) -> _Generation:
        if self._open is None:
            self._open = _Generation(now)
        return self._open

    def _close(self) -> None:
        if self._open is not None:
            self._waiting += len(self._open)
            self._closed.append(self._open)
            self._open = None

    # --- blocks go out -----------------------------------------------------------------------------------------------

    def take(self, room: int) -> tuple[bytes, int, float]:
        """The next block: its records (at most ``room`` bytes), how many changes, when the oldest came up.

        ``(b"", 0, 0.0)`` if nothing waits.
        """
        if self._open is not None and not self._stages and not self._closed:
            single = self._open.single()  # so it is on a quiet node: at once, not in stages
            record = self._encoder.encode(wire.RECORD_ROWS, *single) if single is not None else b""
            if record and len(record) <= room:
                born, self._open = self._open.born, None
                return record, 1, born
        out: list[bytes] = []
        changes, born = 0, 0.0
        left = room
        while self._stages or self._begin():
            stage = self._stages[0]
            record, count = stage.fill(left)
            if count:
                if not out:
                    born = self._born
                out.append(record)
                left -= len(record)
                changes += count
                self._waiting -= count
            elif not out:
                self._drop(stage)
            if not stage.left:
                self._stages.popleft()
            elif out and (not count or left < max(SLACK_BYTES, room // 8)):
                break
        return b"".join(out), changes, born

    def _begin(self) -> bool:
        """Begin to send the next generation; False if there is none."""
        if not self._closed:
            self._close()
        while self._closed and not self._stages:
            self._stage(self._closed.popleft())
        return bool(self._stages)

    def _stage(self, generation: _Generation) -> None:
        self._born = generation.born
        stages = self._stages
        for key_len, keys in generation.gone.items():
            stages.append(_Columns(self._encoder, wire.RECORD_GONE, key_len, iter(keys), len(keys)))
        if generation.flows:
            flows = (
                wire.tlv(wire.RECORD_FLOW, wire.encode_flow_record(key, *flow))
                for key, flow in generation.flows.items()
            )
            stages.append(_Singles(flows, len(generation.flows)))
        for key_len, rows in generation.rows.items():
            if rows:
                parts = itertools.chain.from_iterable(rows.items())
                stages.append(_Columns(self._encoder, wire.RECORD_ROWS, key_len, parts, len(rows)))
        stages.extend(_Sheet(self._encoder, sheet) for sheet in generation.sheets)
        if generation.expectations:
            stages.append(_Singles(iter(generation.expectations.values()), len(generation.expectations)))
        if generation.mark is not None:
            stages.append(_Singles(iter((generation.mark,)), 1))

    def _drop(self, stage: _Columns | _Singles) -> None:
        """Nothing fits into an empty block: the first record never will."""
        self.too_long += 1
        self._waiting -= 1
        stage.skip()
