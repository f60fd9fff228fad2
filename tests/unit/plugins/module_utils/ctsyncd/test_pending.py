# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What waits to be sent: whatever comes in between what goes out, the receiver ends with the same table."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import pending as pendings
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import rows, wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.pending import Pending
from hypothesis import given
from hypothesis import strategies as st

ROOM = 465  # the smallest block that the configuration allows


class Receiver:
    """A table, as docs/protocol.md says what the records mean; the marks that came, with the table at that time."""

    def __init__(self) -> None:
        self.table: dict[bytes, tuple[bytes, bytes]] = {}
        self.marks: list[tuple[bytes, dict[bytes, tuple[bytes, bytes]]]] = []

    def row(self, key: bytes, value: bytes) -> None:
        self.table[key] = value, self._extras(key, value)

    def flow(self, key: bytes, value: bytes, extras: bytes) -> None:
        kept = self._extras(key, value)
        if key in self.table:
            value = rows.merge_value(self.table[key][0], value)
        self.table[key] = value, rows.merge_extras(kept, extras)

    def _extras(self, key: bytes, value: bytes) -> bytes:
        old, extras = self.table.get(key, (b"", b""))
        return extras if old[: -rows.TAIL_BYTES] == value[: -rows.TAIL_BYTES] else b""

    def gone(self, key: bytes) -> None:
        self.table.pop(key, None)

    def mark(self, record: bytes) -> None:
        self.marks.append((record, dict(self.table)))

    def block(self, records: bytes) -> int:
        """Apply a block; returns how many changes it held."""
        changes = 0
        for kind, payload in wire.iter_tlv(records):
            if kind == wire.RECORD_ROWS:
                for key, value in wire.iter_rows(*wire.decode_rows(payload)):
                    changes += 1
                    self.row(key, value)
            elif kind == wire.RECORD_GONE:
                for key in wire.split_keys(*wire.decode_gone(payload)):
                    changes += 1
                    self.gone(key)
            elif kind == wire.RECORD_FLOW:
                changes += 1
                self.flow(*wire.decode_flow_record(payload))
            else:
                changes += 1
                self.mark(wire.tlv(kind, payload))
        return changes


def key(number: int) -> bytes:
    """Keys of three shapes."""
    length = (13, 37, 16)[number % 3]
    zone = b"\0\7\1" if length == 16 else b""
    return (b"\6" + bytes((number,)) * (length - 1 - len(zone))) + zone


def value(number: int, life: int, seed: int, partial: bool = False) -> bytes:
    """A value; in one life a flow keeps its reply tuple.  Without partial, all is said."""
    chance = random.Random(seed)
    tail = rows.TAIL.pack(
        chance.randrange(1 << 16),
        rows.NO_TIMEOUT if partial and chance.random() < 0.5 else chance.randrange(1000),
        0 if partial and chance.random() < 0.5 else chance.randrange(1, 10),
        rows.NO_SCALE if partial and chance.random() < 0.5 else chance.randrange(0xEE),
        chance.randrange(256),
        chance.randrange(1 << 32),
    )
    return bytes((number, life)) * (rows.SHAPES[len(key(number))].reply // 2) + tail


def sheet_of(table: dict[bytes, bytes]) -> rows.Sheet:
    key_len = len(next(iter(table)))
    return rows.Sheet(
        key_len, rows.cut(b"".join(one + state for one, state in table.items()), rows.SHAPES[key_len].row)
    )


class Step(NamedTuple):
    what: str
    number: int
    seed: int


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(("row", "row", "rows", "sheet", "flow", "partial", "gone", "gone", "mark", "take", "take")),
        st.integers(0, 11),
        st.integers(0, 2**32 - 1),
    ),
    max_size=80,
)
EXTRAS = (b"", b"\1\2ab", b"\2\3ftp", b"\1\1c\2\4sane")


@given(STEPS)
def test_blocks_in_order_give_the_table_that_the_changes_in_order_give(steps: list[Step]) -> None:
    pending, sent, wanted = Pending(1000), Receiver(), Receiver()
    lives: dict[int, int] = {}
    taken = 0
    for moment, (what, number, seed) in enumerate(steps):
        now, life = float(moment), lives.get(number, 0)
        if what in ("row", "rows"):
            numbers = [number] if what == "row" else [n for n in range(12) if n % 3 == number % 3]
            new = {key(n): value(n, lives.get(n, 0), seed + n) for n in numbers}
            pending.put_rows(len(key(number)), new, now)
            for one, state in new.items():
                wanted.row(one, state)
        elif what == "sheet":
            new = {key(n): value(n, lives.get(n, 0), seed + n) for n in range(12) if n % 3 == number % 3}
            new = {one: state for one, state in new.items() if one not in wanted.table}
            if new:
                pending.put_sheet(sheet_of(new), now)
            for one, state in new.items():
                wanted.row(one, state)
        elif what in ("flow", "partial"):
            state, extras = value(number, life, seed, what == "partial"), EXTRAS[seed % 4]
            pending.put_flow(key(number), state, extras, now)
            wanted.flow(key(number), state, extras)
        elif what == "gone":
            numbers = {number, seed % 12}
            pending.remove([key(n) for n in numbers], now)
            for n in numbers:
                wanted.gone(key(n))
                lives[n] = lives.get(n, 0) + 1
        elif what == "mark":
            record = wire.encode_bulk_begin(seed)
            pending.mark(record, now)
            wanted.mark(record)
        else:
            before = len(pending)
            records, changes, _born = pending.take(ROOM)
            assert len(records) <= ROOM
            assert sent.block(records) == changes == before - len(pending)
            taken += changes
        assert (pending.oldest is None) == (len(pending) == 0)
    while len(pending):
        records, changes, _born = pending.take(ROOM)
        assert 0 < len(records) <= ROOM
        assert sent.block(records) == changes
    assert sent.table == wanted.table
    assert sent.marks == wanted.marks
    assert pending.take(ROOM) == (b"", 0, 0.0)
    assert pending.too_long == 0


@given(st.lists(st.sampled_from(("put", "gone", "take", "mark")), max_size=60))
def test_age_of_the_oldest_change_is_never_understated(steps: list[str]) -> None:
    pending, waiting = Pending(1000), {}
    for moment, what in enumerate(steps):
        number = moment % 200
        if what == "put":
            pending.put_rows(13, {key(0)[:12] + bytes((number,)): value(0, 0, 1)}, float(moment))
            waiting[number] = moment
        elif what == "gone":
            pending.remove([key(0)[:12] + bytes((number,))], float(moment))
            waiting[number] = moment
        elif what == "mark":
            pending.mark(wire.tlv(99, bytes((number,))), float(moment))
            waiting[number] = moment
        else:
            records, _changes, born = pending.take(ROOM)
            for kind, payload in wire.iter_tlv(records):
                for one in (
                    [payload]
                    if kind == 99
                    else [k for k, _v in wire.iter_rows(*wire.decode_rows(payload))]
                    if kind == wire.RECORD_ROWS
                    else wire.split_keys(*wire.decode_gone(payload))
                ):
                    assert born <= waiting.pop(one[-1])
        assert len(pending) == len(waiting)
        if waiting:
            assert pending.oldest is not None
            assert pending.oldest <= min(waiting.values())
        else:
            assert pending.oldest is None


def random_rows(count: int, seed: int = 1) -> dict[bytes, bytes]:
    chance = random.Random(seed)
    return {b"\6" + chance.randbytes(12): chance.randbytes(12) + value(0, 0, 5)[12:] for _ in range(count)}


@pytest.mark.parametrize("sheets", [False, True])
@pytest.mark.parametrize("room", [ROOM, 1353, 9000])
def test_blocks_are_full_and_encoded_about_once(room: int, sheets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    real = wire.RowColumns.encode

    def counting(many: wire.RowColumns, start: int, end: int) -> bytes:
        encoded.append(1)
        return real(many, start, end)

    monkeypatch.setattr(wire.RowColumns, "encode", counting)
    pending, receiver, table = Pending(1 << 20), Receiver(), random_rows(20_000)
    if sheets:
        pending.put_sheet(sheet_of(table), 0.0)
    else:
        pending.put_rows(13, table, 0.0)
    sizes = []
    while len(pending):
        records, changes, born = pending.take(room)
        assert changes == receiver.block(records)
        assert born == 0.0
        sizes.append(len(records))
    assert {one: state for one, (state, _extras) in receiver.table.items()} == table
    assert min(sizes[2:-1]) > 0.85 * room
    assert max(sizes) <= room
    assert 0.9 * len(sizes) < len(encoded) <= 1.1 * len(sizes) + 5


def test_what_changes_again_while_it_waits_is_sent_once() -> None:
    pending, receiver = Pending(100), Receiver()
    for seed in range(5):
        pending.put_rows(13, {key(0): value(0, 0, seed), key(3): value(3, 0, seed)}, float(seed))
    assert (len(pending), pending.oldest, pending.full) == (2, 0.0, False)
    records, changes, born = pending.take(ROOM)
    assert (receiver.block(records), changes, born) == (2, 2, 0.0)
    assert receiver.table[key(0)] == (value(0, 0, 4), b"")


def test_what_is_on_its_way_is_not_changed() -> None:
    """A generation that is half sent takes nothing any more: the newer state follows it."""
    pending, receiver, table = Pending(100_000), Receiver(), random_rows(1000)
    pending.put_rows(13, table, 1.0)
    receiver.block(pending.take(ROOM)[0])
    last = list(table)[-1]
    pending.put_rows(13, {last: value(0, 0, 77)}, 2.0)
    pending.remove([next(iter(table))], 3.0)
    assert (len(pending), pending.oldest) == (1000 - len(receiver.table) + 2, 1.0)
    while len(pending):
        receiver.block(pending.take(ROOM)[0])
    assert receiver.table[last][0] == value(0, 0, 77)
    assert len(receiver.table) == 999


def test_a_record_that_no_block_can_hold_is_dropped_and_counted() -> None:
    pending, receiver = Pending(100), Receiver()
    long = b"".join(bytes((200, 250)) + bytes(250) for _ in range(3))
    pending.put_flow(key(0), value(0, 0, 1), b"\1\2ab", 0.0)
    pending.put_flow(key(1), value(1, 0, 1), long, 0.0)
    pending.put_flow(key(3), value(3, 0, 1), b"", 0.0)
    while len(pending):
        records, changes, _born = pending.take(ROOM)
        assert receiver.block(records) == changes
    assert receiver.table.keys() == {key(0), key(3)}
    assert pending.too_long == 1


def test_full_and_clear() -> None:
    pending = Pending(10)
    pending.put_rows(13, random_rows(9), 0.0)
    assert not pending.full
    pending.mark(wire.encode_bulk_begin(1), 1.0)
    assert pending.full
    pending.take(pendings.FIXED_BYTES + 60)
    pending.put_rows(13, random_rows(9, 2), 2.0)
    pending.clear()
    assert (len(pending), pending.oldest, pending.take(ROOM)) == (0, None, (b"", 0, 0.0))
    pending.put_rows(13, {}, 3.0)
    pending.remove([], 3.0)
    assert (len(pending), pending.oldest) == (0, None)
