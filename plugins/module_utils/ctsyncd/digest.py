# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Digests of tables: are two of them equal, and if not, in which part, and how?

A flow belongs to one of ``BUCKETS`` buckets.  The digest of a bucket is a sum over its flows, an exact number: order
does not matter, and a flow that goes leaves nothing behind.  Of a flow it takes k, the CRC-32 of the key, with p, the
most significant byte of the CRC-32 of the reply tuple, added to its most significant byte without carry.  The digest of
a table is a hash of those of all buckets: CRCs are linear, and two flows here and two others there may well have the
same sum of k, but not in the same buckets.

So the digest covers key, zone and translation, the parts of a flow that never change while it lives: nothing is
computed when its state changes.  A single difference in translation hides behind p with a probability of 1/256.
:class:`States` covers all, at moments.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from zlib import crc32

from .constants import IPS_ASSURED, IPS_SEEN_REPLY
from .rows import FLAGS_FROM_END, SHAPES, STATE_FROM_END, STATUS_FROM_END, TAIL_BYTES, TIMEOUT_FROM_END

BUCKETS = 1024
FINE_BUCKETS = 65_536  # of the sums of states
ALL = frozenset(range(BUCKETS))
_LAST = BUCKETS - 1
_LAST_FINE = FINE_BUCKETS - 1
SUM = (1 << 64) - 1  # sums are told modulo 2^64
_PRINT = 0xFF000000
_TOLD = struct.Struct(f"!{BUCKETS}Q")
_FEW = 16  # rows up to which prints are computed one by one
_TOGETHER = 64  # flows that come in one by one and are added together

# Bits of the status that a packet of the flow sets, and an event tells
_STATUS_BITS = bytes(bits & (IPS_SEEN_REPLY | IPS_ASSURED) for bits in range(256))


def bucket(key: bytes) -> int:
    """Which bucket a flow belongs to."""
    return crc32(key) & _LAST


def in_buckets(keys: Iterable[bytes], buckets: Collection[int]) -> Iterator[bytes]:
    """Those of the keys that belong to the buckets."""
    if len(buckets) == BUCKETS:
        return iter(keys)
    return (key for key in keys if crc32(key) & _LAST in buckets)


# --- prints of reply tuples ------------------------------------------------------------------------------------------


def _tables(size: int) -> tuple[bytes, list[bytes]]:
    """The print of so many zeros, and for each byte what its values change of it: a CRC is linear."""
    zeros = crc32(bytes(size))
    changes = [
        bytes((crc32(bytes(at) + bytes((value,)) + bytes(size - 1 - at)) ^ zeros) >> 24 for value in range(256))
        for at in range(size)
    ]
    return bytes((zeros >> 24,)), changes


_TABLES = {size: _tables(size) for size in sorted({shape.reply for shape in SHAPES.values()})}


def prints(values: Collection[bytes], reply: int) -> Sequence[int]:
    """p of each of these values, that begin with ``reply`` bytes of reply tuple and have one length.

    Column by column: that costs a fifth of a CRC for each.
    """
    count = len(values)
    if count <= _FEW:
        return [crc32(value[:reply]) >> 24 for value in values]
    joined = b"".join(values)
    return printed(joined, len(joined) // count, range(reply))


def printed(joined: bytes, width: int, places: Sequence[int]) -> bytes:
    """p of rows of ``width`` bytes.  ``places``: where in a row each byte of the reply tuple stands."""
    return printed_columns([joined[at::width] for at in places])


def printed_columns(reply: Sequence[bytes]) -> bytes:
    """p of rows whose reply tuples have these columns."""
    zeros, tables = _TABLES[len(reply)]
    count = len(reply[0])
    found = int.from_bytes(zeros * count, "little")
    for column, table in zip(reply, tables):
        found ^= int.from_bytes(column.translate(table), "little")
    return found.to_bytes(count, "little")


# --- tables ----------------------------------------------------------------------------------------------------------


@functools.cache
def _starts(key_len: int) -> list[int]:
    """For each p what the CRC of a key of this length must go on from to come out with p in its first byte as well.

    A CRC is linear in what it goes on from, too; so this is the solution of 32 linear equations over GF(2).
    """
    zeros = bytes(key_len)
    basis: dict[int, tuple[int, int]] = {}  # by the highest bit of an effect: it, and what has it

    def reduced(effect: int, cause: int) -> tuple[int, int]:
        while effect and effect.bit_length() in basis:
            other, its_cause = basis[effect.bit_length()]
            effect, cause = effect ^ other, cause ^ its_cause
        return effect, cause

    for bit in range(32):
        effect, cause = reduced(crc32(zeros, 1 << bit) ^ crc32(zeros), 1 << bit)
        basis[effect.bit_length()] = effect, cause
    return [reduced(p << 24, 0)[1] for p in range(256)]


def numbers(key_len: int, keys: Iterable[bytes], found: Iterable[int]) -> Iterator[int]:
    """What the digest takes of each flow.  ``found``: the :func:`prints`.  Its bucket is in the lowest bits."""
    return map(crc32, keys, map(_starts(key_len).__getitem__, found))


def number_of(key: bytes, reply: bytes) -> int:
    """The same of one flow."""
    return crc32(key) ^ crc32(reply) & _PRINT


class Digest:
    """The digests of the buckets of a table that somebody else keeps: ``sums``, exact; told modulo 2^64."""

    __slots__ = ("_single", "_sums")

    def __init__(self) -> None:
        self._sums = [0] * BUCKETS
        self._single: list[tuple[bytes, bytes]] = []  # that came in and are not in the sums yet: key and reply tuple

    @property
    def sums(self) -> list[int]:
        if self._single:
            self._settle()
        return self._sums

    def _settle(self) -> None:
        single, self._single, sums = self._single, [], self._sums
        for key, reply in single:
            number = number_of(key, reply)
            sums[number & _LAST] += number

    def add_single(self, key: bytes, reply: bytes) -> None:
        """One flow came in.  It is looked at with others that come so, or when somebody asks: that costs less."""
        self._single.append((key, reply))
        if len(self._single) >= _TOGETHER:
            self._settle()

    def add(self, key_len: int, keys: Iterable[bytes], found: Iterable[int]) -> None:
        """Flows of one shape came in.  ``found``: the :func:`prints` of their reply tuples."""
        sums = self._sums
        for number in numbers(key_len, keys, found):
            sums[number & _LAST] += number

    def remove(self, key_len: int, keys: Iterable[bytes], found: Iterable[int]) -> None:
        """They went, as they came."""
        sums = self._sums
        for number in numbers(key_len, keys, found):
            sums[number & _LAST] -= number

    @property
    def total(self) -> int:
        """The digest of the whole table: 64 bits."""
        return int.from_bytes(blake2b(_TOLD.pack(*map(SUM.__and__, self.sums)), digest_size=8).digest(), "big")

    def told(self) -> list[int]:
        """Those of all buckets, modulo 2^64."""
        return list(map(SUM.__and__, self.sums))


# --- states ----------------------------------------------------------------------------------------------------------


class States:
    """What a node knows of the flows of a table, states included, between two places in the stream of changes.

    One node reads its kernel, the other its cache, and neither does it in a moment.  So the flows are summed up in fine
    buckets, and those in which any flow changes in between are *touched*: they are left out on both sides.
    """

    __slots__ = ("_sums", "_touched", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self._sums: dict[int, int] = {}  # of fine buckets that are not empty: a small table costs little
        self._touched = bytearray(FINE_BUCKETS)

    def touch(self, keys: Iterable[bytes]) -> None:
        """A record told of these flows."""
        touched = self._touched
        for number in map(crc32, keys):
            touched[number & _LAST_FINE] = 1

    def add(self, key_len: int, rows: Mapping[bytes, bytes]) -> None:
        """Flows of one shape as they are: key to value (what is behind the value does not matter)."""
        sums = self._sums
        numbers = list(map(crc32, rows))
        for number, printed in zip(numbers, map(crc32, state_parts(key_len, rows.values()), numbers)):
            at = number & _LAST_FINE
            sums[at] = sums.get(at, 0) + printed * printed & SUM

    def totals(self) -> list[int]:
        """For each bucket the sum over its fine buckets that were not touched, modulo 2^64."""
        touched, totals = self._touched, [0] * BUCKETS
        for at, value in self._sums.items():
            if not touched[at]:
                totals[at & _LAST] += value
        return [total & SUM for total in totals]

    @property
    def clean(self) -> int:
        """Fine buckets that were not touched."""
        return self._touched.count(0)


def differing(own: Sequence[int], first: int, others: Sequence[int]) -> list[int]:
    """Which buckets from ``first`` on have other sums than these."""
    return [at for at, (one, other) in enumerate(zip(own[first:], others), first) if one != other]


def state_parts(key_len: int, values: Collection[bytes]) -> Iterator[bytes]:
    """Of values of one shape: what must be the same on both nodes.

    That is reply tuple, the bits SEEN_REPLY and ASSURED of the status, state, scales and mark; all else is zero: what
    packets change without an event (timer, flags), and what is each node's own.
    """
    if not values:
        return iter(())
    size = SHAPES[key_len].reply + TAIL_BYTES
    joined = bytearray().join([value[:size] for value in values])
    blank = bytes(len(values))
    low = size - STATUS_FROM_END + 1
    joined[low::size] = joined[low::size].translate(_STATUS_BITS)
    timeout = range(size - TIMEOUT_FROM_END, size - STATE_FROM_END)
    for at in (size - STATUS_FROM_END, *timeout, size - FLAGS_FROM_END):
        joined[at::size] = blank
    parts = bytes(joined)
    return (parts[at : at + size] for at in range(0, len(parts), size))


# --- what differs ----------------------------------------------------------------------------------------------------

MISSING = "missing"
LEFT_OVER = "left_over"
TRANSLATION = "translation"
STATE = "state"
KERNEL_MISSING = "kernel_missing"
KERNEL_LEFT_OVER = "kernel_left_over"
KERNEL_DIFFERS = "kernel_differs"

KINDS = (MISSING, LEFT_OVER, TRANSLATION, STATE, KERNEL_MISSING, KERNEL_LEFT_OVER, KERNEL_DIFFERS)
"""In the order of the REPORT record, see docs/protocol.md."""

SHOWN = 1000  # flows that are named, at most, over all kinds


class Differences:
    """What a comparison found: how many flows of each kind, and the keys of the first ones."""

    __slots__ = ("counts", "flows", "keys")

    def __init__(self, flows: int = 0) -> None:
        self.flows = flows  # compared
        self.counts = dict.fromkeys(KINDS, 0)
        self.keys: list[tuple[str, bytes]] = []

    def __bool__(self) -> bool:
        return any(self.counts.values())

    def note(self, kind: str, keys: Collection[bytes]) -> None:
        self.counts[kind] += len(keys)
        self.keys.extend((kind, key) for key in itertools.islice(keys, SHOWN - len(self.keys)))


def compare_rows(
    key_len: int, rows: Mapping[bytes, bytes], table: Mapping[bytes, bytes]
) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Keys of rows that the table lacks, has with another translation, and has in another state."""
    known = [key for key in rows if key in table]
    missing = [key for key in rows if key not in table] if len(known) != len(rows) else []
    translated: list[bytes] = []
    changed: list[bytes] = []
    reply = SHAPES[key_len].reply
    here = state_parts(key_len, [table[key] for key in known])
    there = state_parts(key_len, [rows[key] for key in known])
    for key, own, other in zip(known, here, there):
        if own != other:
            (translated if own[:reply] != other[:reply] else changed).append(key)
    return missing, translated, changed
