# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The external cache, what is noted of the kernel's copies, and what a replica costs."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.tables import Copies, ExternalCache, Replica
from hypothesis import given
from hypothesis import strategies as st


def test_bulk_finds_what_it_did_not_name() -> None:
    cache = ExternalCache(10, started=3.0)
    cache.add_rows(dict.fromkeys((b"named", b"changed", b"stale", b"closed"), b"1"), 5.0)
    cache.begin_bulk()
    assert cache.bulk_running
    cache.replace_rows({b"named": b"2"}, ())
    cache.put(b"changed", b"2", b"", 9.0)
    cache.add_rows({b"new": b"2"}, 9.0)
    assert cache.named == 3
    cache.take([b"closed"])
    assert cache.named == 3
    assert cache.end_bulk() == [b"stale"]
    assert not cache.bulk_running
    assert cache.end_bulk() == []  # no bulk, nothing stale
    assert cache.get(b"named") == Replica(b"named", b"2", b"", 5.0)
    assert cache.get(b"new") == Replica(b"new", b"2", b"", 9.0)


def test_full_cache_refuses_new_flows_and_keeps_the_old_ones_up_to_date() -> None:
    cache = ExternalCache(2)
    assert cache.add_rows({b"a": b"1", b"b": b"1", b"c": b"1"}, 0.0) == {b"a": b"1", b"b": b"1"}
    assert not cache.put(b"d", b"1", b"", 1.0)
    assert cache.put(b"a", b"2", b"", 1.0)
    assert [replica[:2] for replica in cache.items()] == [(b"a", b"2"), (b"b", b"1")]


def test_extras_are_kept_of_those_that_have_some() -> None:
    cache = ExternalCache(9)
    cache.put(b"a", b"1", b"extras", 0.0)
    cache.replace_rows({b"a": b"2"}, ())
    assert cache.get(b"a") == Replica(b"a", b"2", b"extras", 0.0)
    cache.put(b"a", b"3", b"", 4.0)
    assert (cache.get(b"a"), cache.extras) == (Replica(b"a", b"3", b"", 0.0), {})


def test_table_may_change_under_a_walk() -> None:
    cache = ExternalCache(9)
    cache.add_rows({b"a": b"1", b"b": b"1", b"c": b"1"}, 0.0)
    walk = cache.items()
    assert next(walk).key == b"a"
    cache.take([b"b"])
    cache.add_rows({b"d": b"1"}, 0.0)
    assert [replica.key for replica in walk] == [b"c"]


def test_walk_through_a_large_table_takes_each_once_and_few_in_advance() -> None:
    cache = ExternalCache(100_000)
    keys = [b"key %6d" % number for number in range(50_000)]
    cache.add_rows(dict.fromkeys(keys, bytes(25)), 0.0)
    tracemalloc.start()
    walk = cache.items()
    seen = [next(walk).key]
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 50_000
    cache.take(keys[:10_000])  # others came in their place, with the same keys
    cache.add_rows(dict.fromkeys(keys[:10_000], bytes(25)), 0.0)
    cache.take(keys[10_000:20_000])
    seen += [replica.key for replica in walk]
    assert len(seen) == len(set(seen))
    assert set(seen) - set(seen[:1]) == set(keys) - set(keys[10_000:20_000]) - set(seen[:1])


_KEYS = st.lists(st.sampled_from((b"a", b"b", b"c")), min_size=1, unique=True)
_STEPS = st.lists(
    st.tuples(st.sampled_from(("ask", "hold", "lose", "forget")), _KEYS) | st.tuples(st.just("refuse"), _KEYS),
    max_size=30,
)


@given(st.booleans(), _STEPS)
def test_copies_keep_exceptions_only(normally: bool, steps: list[tuple[str, list[bytes]]]) -> None:
    copies = Copies(normally)
    model: dict[bytes, str] = {}
    for what, keys in steps:
        if what == "refuse":
            for key in keys:
                copies.refuse(key, 12)
        else:
            getattr(copies, what)(keys)
        for key in keys:
            if what == "forget":
                model.pop(key, None)
            else:
                model[key] = what
        usual = {"hold"} if normally else {"lose", "refuse"}
        assert copies.settled == all(state in usual for state in model.values())
        for key, state in model.items():
            assert copies.held(key) == (state == "hold")
            assert (key in copies.asked) == (state == "ask")
        assert not copies.refused.keys() - model.keys()
        assert all(key in copies.refused for key, state in model.items() if state == "refuse")
        assert not any(key in copies.refused for key, state in model.items() if state == "hold")


def _grown(make: Any) -> float:
    """Bytes for each of 50,000 flows."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = make()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert kept
    return grown / 50_000


def test_settled_replica_costs_one_entry_of_one_dict() -> None:
    chance = random.Random(1)

    def fill() -> Any:
        cache, copies = ExternalCache(100_000), Copies(True)
        for _block in range(50):
            rows = {chance.randbytes(13): chance.randbytes(25) for dummy in range(1000)}
            cache.add_rows(rows, 1.0)
            copies.ask(list(rows))
            copies.hold(list(rows))
        return cache, copies

    assert _grown(fill) < 190
