# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The flows that the active node told of, as it told them last: so it can tell all of them again by itself.

To read an entry out of the kernel costs it about 3.5 µs, more than all the rest of a bulk.  To remember it costs next
to nothing where the flow is not translated: its reply tuple is its original one turned round, and what is left of the
value (status, timer, state, ...) many flows have in common.  Such a flow takes its key and its place in the table.  A
translated one takes 64 bytes more.
"""

from __future__ import annotations

import collections
import itertools
import operator
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from zlib import crc32

from .digest import Digest, printed, printed_columns, prints
from .rows import SHAPES, TAIL_BYTES, Sheet, cut, cutter, interleave, merge_extras, merge_value

FEW = 16  # rows up to which they are handled one by one
TAILS = 16_384  # that flows have in common, at most (100 bytes each)

_split_tails = cutter(TAIL_BYTES)


class _Form:
    """Rows of one shape.  ``turned``: which byte of the key each byte of the reply tuple is if it is not translated.

    ``parts``: the same as parts of the key.
    """

    __slots__ = ("key", "parts", "reply", "tuples", "turned")

    def __init__(self, key_len: int) -> None:
        shape = SHAPES[key_len]
        source, target, ports = 1, 1 + shape.address, 1 + 2 * shape.address
        middle, end = ports + shape.l4 // 2, ports + shape.l4
        self.parts = (slice(target, ports), slice(source, target), slice(middle, end), slice(ports, middle))
        self.turned = [place for part in self.parts for place in range(key_len)[part]]
        self.key = key_len
        self.reply = shape.reply
        self.tuples = struct.Struct(f"{shape.reply}s").iter_unpack


_FORMS = {key_len: _Form(key_len) for key_len in SHAPES}
_TURNED = {key_len: form.parts for key_len, form in _FORMS.items()}


def _reply(key: bytes) -> bytes:
    """The reply tuple of a flow that is not translated."""
    target, source, reply_port, port = _TURNED[len(key)]
    return key[target] + key[source] + key[reply_port] + key[port]


def _replies(keys: Collection[bytes], form: _Form) -> bytes:
    """Those of many flows of one shape, joined."""
    joined = b"".join(keys)
    out = bytearray(len(keys) * form.reply)
    for at, place in enumerate(form.turned):
        out[at :: form.reply] = joined[place :: form.key]
    return bytes(out)


def _translations(keys: Sequence[bytes], values: Sequence[bytes], form: _Form) -> bytes:
    """A byte for each of these flows, of one shape, given by columns: 0 where it is not translated."""
    marks, count = 0, len(keys[0])
    for here, place in zip(values, form.turned):
        there = keys[place]
        if here != there:
            marks |= int.from_bytes(here, "little") ^ int.from_bytes(there, "little")
    return marks.to_bytes(count, "little") if marks else bytes(count)


def _prints(keys: Collection[bytes], kept: Sequence[bytes], form: _Form) -> Sequence[int]:
    """The prints of the reply tuples of flows of one shape that are kept so (see :class:`Announced`)."""
    if len(keys) > FEW:
        plain = list(map(len, kept)).count(TAIL_BYTES)
        if plain == len(keys):
            return printed(b"".join(keys), form.key, form.turned)
        if not plain:
            return prints(kept, form.reply)
    return [
        crc32(_reply(key) if len(value) == TAIL_BYTES else value[: form.reply]) >> 24 for key, value in zip(keys, kept)
    ]


class Announced:
    """Flows by key.  ``complete``: they are all that is to be told, as they are now.

    So it is from the end of a dump of the kernel's table on, as long as no event is missed.

    In ``table`` stands the tail of the value where the flow is not translated, else all of it.
    """

    __slots__ = ("_tails", "complete", "digest", "extras", "table")

    def __init__(self) -> None:
        self.complete = False
        self.table: dict[bytes, bytes] = {}
        self.extras: dict[bytes, bytes] = {}
        self.digest = Digest()
        self._tails: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, key: bytes) -> bool:
        return key in self.table

    def clear(self) -> None:
        """Nothing was told."""
        self.complete = False
        self.table = {}
        self.extras = {}
        self.digest = Digest()
        self._tails = {}

    # --- flows as they are kept --------------------------------------------------------------------------------------

    def value(self, key: bytes) -> bytes | None:
        """How the flow was told."""
        kept = self.table.get(key)
        return _reply(key) + kept if kept is not None and len(kept) == TAIL_BYTES else kept

    def _kept(
        self, columns: Sequence[bytes], values: Callable[[], list[bytes]], marks: bytes, reply: int
    ) -> list[bytes]:
        """What stands for the values that have these columns in the table.  ``marks``: see :func:`_translations`."""
        plain = marks.count(0)
        if plain == len(marks):
            return self._shared(columns[reply:])
        found = values()
        if plain:
            tails = self._tails
            for at, mark in enumerate(marks):
                if not mark:
                    tail = found[at][reply:]
                    found[at] = tails.setdefault(tail, tail)
        return found

    def _shared(self, columns: Sequence[bytes]) -> list[bytes]:
        """The tails that have these columns, equal ones as one object.

        Those of a flood often differ in a single byte, that of a timer, or in none at all: a look at their columns
        spares looking each of them up.
        """
        tails, count = self._tails, len(columns[0])
        several = [at for at, column in enumerate(columns) if column != column[:1] * count]
        first = bytes([column[0] for column in columns])
        if not several:
            return [tails.setdefault(first, first)] * count
        if len(several) > 1:
            found = _split_tails(interleave(columns))
            return list(map(tails.setdefault, found, found))
        at = several[0]
        known = {}
        for byte in set(columns[at]):
            tail = first[:at] + bytes((byte,)) + first[at + 1 :]
            known[byte] = tails.setdefault(tail, tail)
        return list(map(known.__getitem__, columns[at]))

    def _moved(self, rows: Mapping[bytes, bytes], marks: bytes, reply: int) -> list[bytes]:
        """Which of these flows are known with another translation."""
        found = []
        for key, before, mark in zip(rows, map(self.table.get, rows), marks):
            if before is None:
                continue
            translated = len(before) != TAIL_BYTES
            if translated != (mark != 0) or (translated and before[:reply] != rows[key][:reply]):
                found.append(key)
        return found

    # --- changes -----------------------------------------------------------------------------------------------------

    def add(self, rows: Mapping[bytes, bytes], reply: int) -> None:
        """Flows of one shape are told of: key to value, complete.  ``reply``: size of their reply tuples (bytes)."""
        if not rows:
            return
        if len(self._tails) > TAILS:
            self._tails = {}
        if len(rows) <= FEW:
            self._add_few(rows, reply)
            return
        table = self.table
        fresh: Mapping[bytes, bytes] = rows
        form = _FORMS[len(next(iter(rows)))]
        columns = cut(b"".join(rows.values()), reply + TAIL_BYTES)
        marks = _translations(cut(b"".join(rows), form.key), columns, form)
        kept = self._kept(columns, lambda: list(rows.values()), marks, reply)
        if not table.keys().isdisjoint(rows):
            moved = self._moved(rows, marks, reply)
            if moved:
                self.discard(moved)
            fresh = {key: value for key, value in rows.items() if key not in table}
            if fresh:
                columns = cut(b"".join(fresh.values()), reply + TAIL_BYTES)
        if fresh:
            self.digest.add(form.key, fresh, printed_columns(columns[:reply]))
        table.update(zip(rows, kept))

    def add_sheet(self, sheet: Sheet) -> bool:
        """The same for flows that are all new; False, with nothing done, if one was told of before or a key repeats."""
        if len(self._tails) > TAILS:
            self._tails = {}
        table, keys, form = self.table, sheet.keys, _FORMS[sheet.key_len]
        columns = sheet.columns[form.key :]
        marks = _translations(sheet.columns, columns, form)
        kept = self._kept(columns, lambda: sheet.values, marks, form.reply)
        before = len(table)
        collections.deque(map(table.setdefault, keys, kept), maxlen=0)  # in one step: are they new, and there they are
        added = len(table) - before
        if added != len(keys):
            for key in list(itertools.islice(reversed(table), added)):  # the last ones in a dict are the latest
                del table[key]
            return False
        self.digest.add(form.key, keys, printed_columns(columns[: form.reply]))
        return True

    def _add_few(self, rows: Mapping[bytes, bytes], reply: int) -> None:
        table, tails = self.table, self._tails
        target, source, reply_port, port = _TURNED[len(next(iter(rows)))]
        for key, value in rows.items():
            kept = value
            if value.startswith(key[target] + key[source] + key[reply_port] + key[port]):
                tail = value[reply:]
                kept = tails.setdefault(tail, tail)
            before = table.get(key)
            if before is not None and before is not kept:
                size = len(before)
                if size != len(kept) or (size != TAIL_BYTES and before[:reply] != value[:reply]):
                    self.discard((key,))
                    before = None
            if before is None:
                self.digest.add_single(key, value[:reply])
            table[key] = kept

    def put(self, key: bytes, value: bytes, extras: bytes) -> None:
        """The flow is so now.  What is not said is as before.  Raises WireError ``malformed`` for bad extras."""
        before = self.value(key)
        if before is not None and before[:-TAIL_BYTES] == value[:-TAIL_BYTES]:
            value = merge_value(before, value)
            extras = merge_extras(self.extras.get(key, b""), extras)
        self.add({key: value}, len(value) - TAIL_BYTES)
        if extras:
            self.extras[key] = extras
        else:
            self.extras.pop(key, None)

    def discard(self, keys: Iterable[bytes]) -> None:
        """Their end is told."""
        table = self.table
        known = list(filter(table.__contains__, dict.fromkeys(keys)))
        if not known:
            return
        values = list(map(table.pop, known))
        lengths = set(map(len, known))
        for key_len in lengths:
            gone, kept = known, values
            if len(lengths) > 1:
                gone = [key for key in known if len(key) == key_len]
                kept = [value for key, value in zip(known, values) if len(key) == key_len]
            self.digest.remove(key_len, gone, _prints(gone, kept, _FORMS[key_len]))
        if self.extras:
            for key in known:
                self.extras.pop(key, None)

    def replace(self, rows: Mapping[bytes, bytes], reply: int) -> None:
        """Flows of one shape are told of as they really are: known ones, too, with another translation."""
        self.discard(self.strangers(rows, reply))
        self.add(rows, reply)

    def strangers(self, rows: Mapping[bytes, bytes], reply: int) -> list[bytes]:
        """Which of these flows, of one shape, were never told of, or with another translation."""
        if not rows:
            return []
        table = self.table
        unknown = [key for key in rows if key not in table]
        form = _FORMS[len(next(iter(rows)))]
        columns = cut(b"".join(rows.values()), reply + TAIL_BYTES)
        return unknown + self._moved(rows, _translations(cut(b"".join(rows), form.key), columns, form), reply)

    # --- all again ---------------------------------------------------------------------------------------------------

    def keys(self) -> Iterator[bytes]:
        """All of them.  The table may change under a caller that goes through them: 8 bytes per flow as long as that
        lasts."""
        return iter(list(self.table))

    def again(self, keys: Sequence[bytes]) -> dict[int, dict[bytes, bytes]]:
        """Those of these flows that are still there, as they were told last: by length of the key, key to value."""
        lengths = set(map(len, keys))
        if len(lengths) == 1:
            return {length: self._again(keys, _FORMS[length]) for length in lengths}
        return {length: self._again([key for key in keys if len(key) == length], _FORMS[length]) for length in lengths}

    def _again(self, keys: Sequence[bytes], form: _Form) -> dict[bytes, bytes]:
        values = list(map(self.table.get, keys, itertools.repeat(b"")))
        sizes = list(map(len, values))
        plain = list(map(TAIL_BYTES.__eq__, sizes))
        untranslated = list(itertools.compress(keys, plain))
        replies = itertools.chain.from_iterable(form.tuples(_replies(untranslated, form)))
        out = dict(zip(untranslated, map(operator.add, replies, itertools.compress(values, plain))))
        if len(out) < len(keys):
            translated = list(map(TAIL_BYTES.__lt__, sizes))
            out.update(zip(itertools.compress(keys, translated), itertools.compress(values, translated)))
        return out
