# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Digests: equal for equal tables in any order, different for others, natural patterns of ports included."""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
import tracemalloc
import zlib

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import digest, wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.announced import Announced
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.digest import Digest, States
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import SHAPES, pack
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.tables import ExternalCache
from hypothesis import given
from hypothesis import strategies as st
from unit.simulation import tcp


def row(port: int, nat_port: int | None = None, **changes: object) -> tuple[bytes, bytes]:
    return pack(tcp(port, nat_port, **changes))[:2]  # type: ignore[arg-type]


def of(rows: dict[bytes, bytes]) -> Digest:
    made = Digest()
    for key_len, shape in SHAPES.items():
        some = {key: value for key, value in rows.items() if len(key) == key_len}
        if some:
            made.add(key_len, some, digest.prints(some.values(), shape.reply))
    return made


def total_of(sums: list[int]) -> int:
    """As docs/protocol.md has it."""
    packed = struct.pack("!1024Q", *(one % 2**64 for one in sums))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "big")


def test_the_rule_of_the_document() -> None:
    key, value = row(1001, 40_000)
    number, low = zlib.crc32(key), zlib.crc32(value[:12]) >> 24
    made = of({key: value})
    assert {at: one for at, one in enumerate(made.sums) if one} == {number % 1024: number ^ low << 24}
    assert made.total == total_of(made.sums)
    assert Digest().total == total_of([0] * 1024) != made.total
    assert digest.bucket(key) == number % 1024
    assert wire.BUCKETS == digest.BUCKETS == 1024
    assert len(digest.KINDS) == wire.REPORT_COUNTS


def shapes_of_rows() -> st.SearchStrategy[dict[bytes, bytes]]:
    def rows(key_len: int) -> st.SearchStrategy[dict[bytes, bytes]]:
        shape = SHAPES[key_len]
        key = st.binary(min_size=key_len, max_size=key_len)
        return st.dictionaries(key, st.binary(min_size=shape.value, max_size=shape.value), max_size=40)

    return st.sampled_from(sorted(SHAPES)).flatmap(rows)


@given(shapes_of_rows(), st.randoms())
def test_columns_and_single_rows_have_the_same_prints(rows: dict[bytes, bytes], chance: random.Random) -> None:
    for key, value in rows.items():
        reply = SHAPES[len(key)].reply
        (one,) = digest.prints((value,), reply)
        assert one == zlib.crc32(value[:reply]) >> 24
    if rows:
        reply = SHAPES[len(next(iter(rows)))].reply
        prints = digest.prints(rows.values(), reply)
        assert list(prints) == [zlib.crc32(v[:reply]) >> 24 for v in rows.values()]
        numbers = [zlib.crc32(key) ^ zlib.crc32(value[:reply]) >> 24 << 24 for key, value in rows.items()]
        assert list(digest.numbers(len(next(iter(rows))), rows, prints)) == numbers
        assert [digest.number_of(key, value[:reply]) for key, value in rows.items()] == numbers
    pairs = list(rows.items())
    chance.shuffle(pairs)
    piecewise = Digest()
    for key, value in pairs:
        piecewise.add(len(key), (key,), digest.prints((value,), SHAPES[len(key)].reply))
    assert piecewise.sums == of(rows).sums
    for key, value in pairs:
        piecewise.remove(len(key), (key,), digest.prints((value,), SHAPES[len(key)].reply))
    assert not any(piecewise.sums)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_flows_that_come_one_by_one_are_added_before_anybody_looks(count: int) -> None:
    """However many there are, and though some of them are gone by then."""
    rows = {number.to_bytes(13, "big"): number.to_bytes(SHAPES[13].value, "little") for number in range(count)}
    one_by_one, gone = Digest(), list(rows)[::3]
    for key, value in rows.items():
        one_by_one.add_single(key, value[: SHAPES[13].reply])
    one_by_one.remove(13, gone, digest.prints([rows[key] for key in gone], SHAPES[13].reply))
    rest = of({key: value for key, value in rows.items() if key not in gone})
    assert (one_by_one.total, one_by_one.told(), one_by_one.sums) == (rest.total, rest.told(), rest.sums)


@given(shapes_of_rows(), st.data())
def test_both_nodes_come_to_the_same_digest(rows: dict[bytes, bytes], data: st.DataObject) -> None:
    """Whatever came and went on both, in their different ways to keep it."""
    announced, cache = Announced(), ExternalCache(1000)
    if not rows:
        return
    reply = SHAPES[len(next(iter(rows)))].reply
    for dummy in range(data.draw(st.integers(1, 6))):
        some = data.draw(st.lists(st.sampled_from(sorted(rows)), unique=True))
        if data.draw(st.booleans()):
            announced.add({key: rows[key] for key in some}, reply)
            cache.add_rows({key: rows[key] for key in some if key not in cache}, 0.0)
        else:
            announced.discard(some)
            assert set(cache.take(some)) <= set(some)
        assert announced.digest.sums == cache.digest.sums
        assert len(announced) == len(cache)
    cache.clear()
    announced.clear()
    assert not any(announced.digest.sums + cache.digest.sums)


def test_another_translation_is_another_digest_and_is_noticed() -> None:
    announced, cache = Announced(), ExternalCache(10)
    key, value = row(1001, 40_000)
    other = row(1001, 40_001)[1]
    announced.add({key: value}, 12)
    cache.put(key, value, b"", 0.0)
    cache.put(key, other, b"", 0.0)
    assert announced.digest.sums != cache.digest.sums
    assert announced.strangers({key: other}, 12) == [key]
    announced.replace({key: other}, 12)
    assert announced.digest.sums == cache.digest.sums
    cache.replace_rows({key: value}, [(key, other)])
    assert announced.digest.sums != cache.digest.sums


def test_a_change_of_the_state_costs_nothing() -> None:
    announced = Announced()
    key, value = row(1001)
    announced.add({key: value}, 12)
    before = announced.digest.total
    announced.add({key: row(1001, state=k.TCP_TIME_WAIT)[1]}, 12)
    assert announced.digest.total == before


def key_of(source: int, port: int, service: int = 22) -> bytes:
    return bytes((6, 10, 0, 0, source, 192, 168, 1, 3)) + struct.pack("!HH", port, service)


def test_natural_patterns_do_not_hide_behind_each_other() -> None:
    """Of two clients and two ports the flows on one diagonal, or on the other: all sums of bytes are the same."""
    for one, two in itertools.combinations(range(1, 40), 2):
        for first, second in ((1024, 1025), (1024, 1280), (40_000, 40_001), (50_000, 60_000)):
            lost = {key_of(one, first): bytes(25), key_of(two, second): bytes(25)}
            instead = {key_of(one, second): bytes(25), key_of(two, first): bytes(25)}
            assert of(lost).total != of(instead).total
    runs = [{key_of(1, first + at): bytes(25) for at in (0, 4, 5)} for first in range(1024, 2048)]
    others = [{key_of(1, first + at): bytes(25) for at in (1, 2, 6)} for first in range(1024, 2048)]
    assert all(of(one).total != of(two).total for one, two in zip(runs, others))


def test_any_port_of_one_byte_of_difference_is_another_print() -> None:
    """Translations to the same address and a port that differs in its last or first byte."""
    base = row(1001, 40_000)[1][:12]
    for place in (10, 11):
        for delta in range(1, 256):
            other = base[:place] + bytes((base[place] ^ delta,)) + base[place + 1 :]
            assert zlib.crc32(base) >> 24 != zlib.crc32(other) >> 24


def test_keys_of_buckets() -> None:
    keys = [key_of(1, port) for port in range(1000, 3000)]
    some = frozenset(range(100))
    assert list(digest.in_buckets(keys, digest.ALL)) == keys
    assert list(digest.in_buckets(keys, some)) == [key for key in keys if zlib.crc32(key) % 1024 < 100]
    assert digest.differing([1, 2, 3, 4], 1, (2, 9, 4)) == [2]


# --- states ---


def summed(rows: dict[bytes, bytes], touched: tuple[bytes, ...] = ()) -> list[int]:
    states = States(1)
    states.add(13, rows)
    states.touch(touched)
    return states.totals()


def test_states_see_what_must_be_the_same_and_nothing_else() -> None:
    key, value = row(1001)
    plain = summed({key: value})
    assert [at for at, one in enumerate(plain) if one] == [digest.bucket(key)]
    for changes in ({"state": k.TCP_TIME_WAIT}, {"mark": 1}, {"tcp_wscale": (7, 8)}):
        assert summed({key: row(1001, **changes)[1]}) != plain
    assert summed({key: row(1001, 40_000)[1]}) != plain
    unassured = tcp(1001)._replace(status=tcp(1001).status & ~k.IPS_ASSURED)
    assert summed({key: pack(unassured)[1]}) != plain
    for changes in ({"timeout": 5}, {"tcp_flags": (3, 3)}):
        assert summed({key: row(1001, **changes)[1]}) == plain
    assert summed({key: pack(tcp(1001)._replace(status=tcp(1001).status | 0x200))[1]}) == plain
    assert summed({key: value + b"since"}) == plain


def test_what_is_touched_is_left_out_on_both_sides() -> None:
    rows = dict(row(port) for port in range(1000, 1400))
    key = tcp(1001).key
    changed = {**rows, key: row(1001, state=k.TCP_TIME_WAIT)[1]}
    gone = {one: value for one, value in rows.items() if one != key}
    assert summed(rows) != summed(changed)
    assert summed(rows, (key,)) == summed(changed, (key,)) == summed(gone, (key,)) != summed(rows)
    assert digest.differing(summed(rows), 0, summed(changed)) == [digest.bucket(key)]
    states = States(1)
    states.touch([key])
    assert states.clean == digest.FINE_BUCKETS - 1


def test_rows_are_compared_flow_by_flow() -> None:
    rows = dict(row(port) for port in range(1000, 1020))
    table = {key: value + bytes(4) for key, value in rows.items()}
    assert digest.compare_rows(13, rows, table) == ([], [], [])
    del table[tcp(1001).key]
    table[tcp(1002).key] = row(1002, 40_000)[1] + bytes(4)
    table[tcp(1003).key] = row(1003, state=k.TCP_LAST_ACK)[1] + bytes(4)
    assert digest.compare_rows(13, rows, table) == ([tcp(1001).key], [tcp(1002).key], [tcp(1003).key])


def test_differences_are_counted_and_the_first_are_named() -> None:
    found = digest.Differences()
    assert not found
    keys = [key_of(1, port) for port in range(1500)]
    found.note(digest.MISSING, keys[:10])
    found.note(digest.STATE, keys)
    assert found
    assert (found.counts[digest.MISSING], found.counts[digest.STATE]) == (10, 1500)
    assert found.keys == [
        *((digest.MISSING, key) for key in keys[:10]),
        *((digest.STATE, key) for key in keys[: digest.SHOWN - 10]),
    ]


@pytest.mark.parametrize("table", [set, Announced])
def test_announced_flow_costs_little_more_than_in_a_set(table: type) -> None:
    """Bytes for each of 100,000 flows, not translated, beside the key."""
    chance = random.Random(1)
    keys = [chance.randbytes(13) for dummy in range(100_000)]
    tail = row(1001)[1][12:]
    tracemalloc.start()
    made = table()
    for at in range(0, len(keys), 250):
        some = keys[at : at + 250]
        if isinstance(made, Announced):
            made.add({key: key[5:9] + key[1:5] + key[11:13] + key[9:11] + tail for key in some}, 12)
        else:
            made.update(some)
    grown = tracemalloc.get_traced_memory()[0] / 100_000
    tracemalloc.stop()
    assert len(made) == 100_000
    assert grown < (60 if table is Announced else 50), grown
