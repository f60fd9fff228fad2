# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The tables: what waits to be sent, and the external cache."""

from __future__ import annotations

from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.tables import ExternalCache, Pending
from hypothesis import given
from hypothesis import strategies as st


def test_last_state_wins_and_goes_behind_what_was_queued_before_it() -> None:
    pending = Pending(10)
    for moment, (key, record) in enumerate(((b"a", b"1"), (b"begin", b"B"), (b"b", b"1"), (b"a", b"2"))):
        pending.put(key, record, float(moment))
    assert pending.take(100) == ([b"B", b"1", b"2"], 0.0)
    assert (len(pending), pending.oldest) == (0, None)


def test_take_fills_a_block_and_no_more() -> None:
    pending = Pending(10)
    for number in range(5):
        pending.put(bytes((number,)), b"x" * 40, float(number))
    assert pending.take(100) == ([b"x" * 40] * 2, 0.0)
    assert (len(pending), pending.oldest) == (3, 2.0)
    assert pending.take(119) == ([b"x" * 40] * 2, 2.0)
    assert pending.take(39) == ([b"x" * 40], 4.0)  # longer than a block: alone, and the caller's to refuse


_CHANGES = st.lists(
    st.tuples(st.sampled_from(("put", "put", "put", "drop", "take")), st.integers(0, 4), st.integers(1, 60)),
    max_size=60,
)


@given(_CHANGES)
def test_age_of_the_oldest_change_is_never_understated(changes: list[tuple[str, int, int]]) -> None:
    pending = Pending(100)
    model: dict[int, tuple[bytes, float]] = {}
    for moment, (what, key, size) in enumerate(changes):
        if what == "put":
            since = model.pop(key)[1] if key in model else float(moment)
            model[key] = (bytes((key,)) * size, since)
            pending.put(bytes((key,)), bytes((key,)) * size, float(moment))
        elif what == "drop":
            model.pop(key, None)
            pending.drop(bytes((key,)))
        else:
            records, born = pending.take(size)
            births = [model.pop(record[0])[1] for record in records]
            assert not births or born == min(births)
            assert len(records) == 1 or sum(map(len, records)) <= size
        assert len(pending) == len(model)
        if model:
            assert pending.oldest is not None
            assert pending.oldest <= min(since for _record, since in model.values())
        else:
            assert pending.oldest is None


def test_bulk_finds_what_it_did_not_name() -> None:
    cache = ExternalCache(10)
    for key in (b"named", b"changed", b"stale", b"closed"):
        assert cache.put(key, b"1", 5.0) is not None
    cache.begin_bulk()
    assert cache.bulk_running
    for key in (b"named", b"changed", b"new"):
        cache.put(key, b"2", 9.0)
    cache.pop(b"closed")
    assert cache.end_bulk() == [b"stale"]
    assert not cache.bulk_running
    assert cache.end_bulk() == []  # no bulk, nothing stale
    replica = cache.get(b"named")
    assert replica is not None
    assert (replica.record, replica.since) == (b"2", 5.0)


def test_full_cache_refuses_new_flows_and_keeps_the_old_ones_up_to_date() -> None:
    cache = ExternalCache(2)
    cache.put(b"a", b"1", 0.0)
    cache.put(b"b", b"1", 0.0)
    assert cache.put(b"c", b"1", 1.0) is None
    replica = cache.put(b"a", b"2", 1.0)
    assert replica is not None
    assert replica.record == b"2"
    assert sorted(cache.keys()) == [b"a", b"b"]
