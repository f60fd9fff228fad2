# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the active node remembers of its flows is what it told, and bulks out of it are as good as the kernel's."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import announced as announced_room
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import peer as peer_room
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import readiness
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.announced import Announced
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.digest import Digest, prints
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import (
    SHAPES,
    TAIL_BYTES,
    Changes,
    Sheet,
    cut,
    pack,
    unpack,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.situation import EXTERNAL_CACHE
from hypothesis import given
from hypothesis import strategies as st
from unit.simulation import Node, Simulation, replicable, tcp, udp, view

Rows = dict[bytes, bytes]


def turned(key: bytes) -> bytes:
    """The reply tuple of a flow that is not translated."""
    shape = SHAPES[len(key)]
    source, target = key[1 : 1 + shape.address], key[1 + shape.address : 1 + 2 * shape.address]
    ports = key[1 + 2 * shape.address :][: shape.l4]
    return target + source + ports[2:] + ports[:2]


@st.composite
def flows(draw: st.DrawFn) -> Rows:
    """Of one shape; some of them are translated, and many have the same tail."""
    shape = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    keys = draw(st.sets(st.binary(min_size=shape.key, max_size=shape.key), max_size=40))
    first = bytes(TAIL_BYTES)
    others = ((), (first[:4] + b"\1" + first[5:], first[:4] + b"\2" + first[5:]), (bytes(range(TAIL_BYTES)),))
    tail = st.sampled_from((first, *draw(st.sampled_from(others))))
    reply = st.none() | st.binary(min_size=shape.reply, max_size=shape.reply)
    return {key: (draw(reply) or turned(key)) + draw(tail) for key in sorted(keys)}


def sheet_of(rows: Rows, repeated: bool = False) -> Sheet:
    """These rows, the first one perhaps once more at the end."""
    pairs = list(rows.items()) + ([next(iter(rows.items()))] if repeated else [])
    joined = b"".join(key + value for key, value in pairs)
    key_len = len(next(iter(rows)))
    return Sheet(key_len, cut(joined, SHAPES[key_len].row))


@given(st.lists(flows(), min_size=1, max_size=4), st.data())
def test_all_is_told_again_as_it_was_told_last_and_the_digest_is_of_that(
    batches: list[Rows], data: st.DataObject
) -> None:
    made = Announced()
    model: Rows = {}
    for dummy in range(data.draw(st.integers(1, 6))):
        rows = data.draw(st.sampled_from(batches))
        if not rows:
            continue
        shape = SHAPES[len(next(iter(rows)))]
        some = {key: rows[key] for key in data.draw(st.lists(st.sampled_from(sorted(rows)), unique=True))}
        step = data.draw(st.sampled_from(("add", "other", "end", "replace", "sheet", "sheet")))
        if step == "other":  # another translation under the same key
            some = {key: bytes(byte ^ 1 for byte in value[: shape.reply]) + value[shape.reply :]
                    for key, value in some.items()}  # fmt: skip
        if step == "end":
            made.discard(some)
            for key in some:
                model.pop(key, None)
            continue
        if step == "sheet":
            repeated = data.draw(st.booleans())
            simple = bool(some) and not repeated and model.keys().isdisjoint(some)
            if some:
                before = (dict(made.table), made.digest.sums[:])
                assert made.add_sheet(sheet_of(some, repeated)) == simple
                assert simple or before == (made.table, made.digest.sums)
            if simple:
                model.update(some)
            continue
        moved = {key for key, value in some.items() if model.get(key, b"")[: shape.reply] != value[: shape.reply]}
        assert set(made.strangers(some, shape.reply)) == moved
        (made.replace if step == "replace" else made.add)(some, shape.reply)
        model.update(some)
    told: Rows = {}
    for key_len, part in made.again(list(made.keys())).items():
        assert all(len(key) == key_len for key in part)
        told.update(part)
    assert told == model == {key: made.value(key) for key in model}
    fresh = Digest()
    for key, value in model.items():
        fresh.add(len(key), (key,), prints((value,), SHAPES[len(key)].reply))
    assert made.digest.sums == fresh.sums
    assert len(made) == len(model)


def test_what_a_flow_does_not_say_stays_and_another_flow_says_all() -> None:
    made = Announced()
    made.put(*pack(tcp(1001, helper="ftp", labels=bytes(16))))
    made.add(dict([pack(tcp(1001, state=k.TCP_FIN_WAIT))[:2]]), 12)
    made.put(*pack(tcp(1001)._replace(state=None, tcp_flags=None, tcp_wscale=None, mark=7)))
    key = tcp(1001).key
    value = made.value(key)
    assert value is not None
    flow = unpack(key, value, made.extras[key])
    assert (flow.helper, flow.labels, flow.state, flow.mark) == ("ftp", bytes(16), k.TCP_FIN_WAIT, 7)
    assert flow.tcp_flags is not None
    made.add(dict([pack(tcp(1001, 40_000))[:2]]), 12)
    assert not made.extras
    made.discard([key])
    assert not any(made.digest.sums) and not len(made) and made.value(key) is None


@pytest.mark.parametrize("differing", [(), (3,), (3, 4), tuple(range(TAIL_BYTES))])
def test_equal_tails_are_one_object(differing: tuple[int, ...]) -> None:
    """However many of their bytes differ, and whether they come together or not."""
    made = Announced()
    for first in (1000, 2000):
        keys = [tcp(port).key for port in range(first, first + 100)]
        tails = [bytes(number % 5 if at in differing else 7 for at in range(TAIL_BYTES)) for number in range(100)]
        rows = {key: turned(key) + tail for key, tail in zip(keys, tails)}
        made.add(rows, SHAPES[13].reply)
        assert {key: made.value(key) for key in keys} == rows
    assert len({id(kept) for kept in made.table.values()}) == (5 if differing else 1)


def test_tails_of_many_kinds_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announced_room, "TAILS", 30)
    made = Announced()
    rows = dict(pack(tcp(1000 + mark, mark=mark))[:2] for mark in range(500))
    for at in range(0, 500, 20):
        made.add({key: rows[key] for key in list(rows)[at : at + 20]}, 12)
        assert len(made._tails) <= 50
    assert made.again(list(made.keys())) == {13: rows}


# --- bulks -----------------------------------------------------------------------------------------------------------


def rich(sim: Simulation) -> None:
    """Flows of all kinds, one with extras, that changed and ended."""
    for port in range(1000, 1040):
        sim.fw1.kernel.open(tcp(port, port + 30_000) if port % 2 else udp(port))
    sim.fw1.kernel.open(tcp(1900, helper="ftp", labels=bytes(16)))
    sim.fw1.kernel.change(tcp(1900).key, labels=b"\1" + bytes(15))
    sim.run(1.0)
    sim.fw1.kernel.change(tcp(1900).key, mark=7)


def same_flows(active: Node, backup: Node) -> bool:
    """The backup's cache says of each flow what the active node's kernel says, timers aside."""
    table = {key: view(flow) for key, flow in active.kernel.table.items() if replicable(flow)}
    cache = {one.key: view(unpack(one.key, one.value, one.extras)) for one in backup.up.cache.items()}
    return table == cache


@pytest.mark.parametrize("mode", ["hot-standby", EXTERNAL_CACHE])
def test_second_bulk_comes_out_of_memory(mode: str) -> None:
    sim = Simulation()
    sim.settings = sim.settings._replace(mode=mode)
    sim.start()
    rich(sim)
    sim.run_until(lambda: sim.fw2.up.complete and same_flows(sim.fw1, sim.fw2))
    dumps = sim.fw1.up.counters["dumps"]
    sim.fw2.kill()
    sim.run(5.0)
    sim.fw1.kernel.close(tcp(1001).key)  # while there is no session
    sim.fw1.kernel.open(tcp(2001))
    sim.fw1.kernel.change(tcp(1003).key, mark=3)
    sim.run(1.0)
    sim.fw2.start(sim.now)
    sim.run_until(lambda: sim.fw2.up.complete)
    assert same_flows(sim.fw1, sim.fw2)
    helper = unpack(*sim.fw2.up.cache.get(tcp(1900).key)[:3])  # type: ignore[index]
    assert (helper.helper, helper.labels, helper.mark) == ("ftp", b"\1" + bytes(15), 7)
    assert sim.fw2.up.cache.get(tcp(1001).key) is None
    sim.fw2.up.flush_external()
    sim.fw2.up.request_bulk(sim.now)
    sim.fw1.kernel.open(tcp(2002))
    sim.run_until(lambda: sim.fw2.up.complete)
    sim.run(1.0)
    assert same_flows(sim.fw1, sim.fw2)
    assert sim.fw1.up.counters["bulks_from_memory"] >= 2
    assert sim.fw1.up.counters["dumps"] == dumps  # the kernel was not asked


@pytest.mark.parametrize("why", ["lost", "asked", "filter", "moved", "flushed", "committed", "not compared"])
def test_bulk_comes_out_of_the_kernel_where_memory_may_be_wrong(why: str) -> None:
    sim = Simulation().start()
    rich(sim)
    sim.converge(sim.fw1, sim.fw2)
    active, backup = sim.fw1, sim.fw2
    assert active.up.source.remembers
    if why == "lost":
        active.kernel.open(tcp(2001))
        active.kernel.lose_events()
    elif why == "asked":
        active.up.resync()
    elif why == "filter":
        active.up.reconfigure(sim.settings._replace(unreplied=True), sim.now)
    elif why == "moved":
        active.set_role(readiness.BACKUP, sim.now)
        backup.set_role(readiness.ACTIVE, sim.now)
        active, backup = backup, active
    elif why == "flushed":
        active.up.flush_kernel()
    elif why == "committed":
        active.up.commit()
    else:
        active.up.reconfigure(sim.settings._replace(compare=False), sim.now)
    sim.turn()
    assert not active.up.source.remembers
    sim.run(10.0)
    if why in ("flushed", "committed", "not compared"):
        backup.kill()
        sim.run(2.0)
        backup.start(sim.now)
        sim.run_until(lambda: backup.up.complete)
    if why == "flushed":
        assert len(backup.up.cache) == len(active.kernel.table) == 0
    assert active.up.counters["bulks_sent"] == (1 if why == "moved" else 2)
    assert active.up.counters["bulks_from_memory"] == 0
    assert active.up.source.remembers == (why != "not compared")  # that bulk is remembered
    sim.converge(active, backup)


def test_events_that_are_lost_while_nobody_listens_make_the_next_bulk_come_out_of_the_kernel() -> None:
    sim = Simulation().start()
    rich(sim)
    sim.converge(sim.fw1, sim.fw2)
    sim.fw2.crash()
    sim.run(5.0)
    sim.fw1.kernel.open(tcp(2001))
    sim.fw1.kernel.lose_events()
    sim.run(20.0)
    sim.fw2.start(sim.now)
    sim.converge(sim.fw1, sim.fw2)
    assert tcp(2001).key in sim.fw2.up.cache
    assert sim.fw1.up.counters["bulks_from_memory"] == 0


def test_memory_is_not_used_while_the_table_has_to_be_read_again() -> None:
    sim = Simulation().start()
    rich(sim)
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.kernel.lose_events()
    sim.run(2.0)
    assert sim.fw1.up.source.remembers
    sim.fw1.kernel.open(tcp(2001))
    sim.fw1.kernel.lose_events()
    sim.run(0.2)
    assert sim.fw1.up.dumps.reread_at is not None  # events go on to be lost: that waits
    sim.fw2.up.flush_external()
    sim.fw2.up.request_bulk(sim.now)
    sim.run_until(lambda: sim.fw2.up.complete)
    assert tcp(2001).key in sim.fw2.up.cache
    assert sim.fw1.up.counters["bulks_from_memory"] == 0


def test_session_that_ends_during_the_first_bulk_leaves_no_gaps_in_memory() -> None:
    sim = Simulation()
    for number in range(3000, 3600):
        sim.fw1.kernel.open(tcp(number))
    sim.fw1.start(sim.now)
    sim.fw2.start(sim.now)
    sim.fw1.set_role(readiness.ACTIVE, sim.now)
    sim.fw2.set_role(readiness.BACKUP, sim.now)
    sim.run_until(lambda: sim.fw1.up.peers[0].bulking)
    sim.fw2.crash()
    sim.run(20.0)
    for number in range(3000, 3010):
        sim.fw1.kernel.close(tcp(number).key)
    sim.run(1.0)
    sim.fw2.start(sim.now)
    sim.converge(sim.fw1, sim.fw2)
    assert same_flows(sim.fw1, sim.fw2)


def test_dump_that_the_peer_has_no_room_for_leaves_no_gaps_in_memory() -> None:
    sim = Simulation().start()
    rich(sim)
    sim.converge(sim.fw1, sim.fw2)
    up = sim.fw1.up
    up.resync()
    up.poll(sim.now)
    assert up.dump is not None and up.peers[0].bulking
    up.peers[0].pending.limit = 50
    for first in (1000, 1040, 1080):
        rows = dict(pack(tcp(port))[:2] for port in range(first, first + 40))
        up.dump_slice(Changes({13: rows}, [], []), sim.now)
    up.dump_finished(True, sim.now)
    assert up.peers[0].bulk_due and not up.peers[0].bulking
    assert up.source.remembers
    assert set(up.source.announced.keys()) == {tcp(port).key for port in range(1000, 1120)}


def small_parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(peer_room, "SORTED_PER_TURN", 7)
    monkeypatch.setattr(peer_room, "DUMP_ROOM", 20)
    sim = Simulation().start()
    rich(sim)
    for number in range(3000, 3300):
        sim.fw1.kernel.open(tcp(number))
    sim.converge(sim.fw1, sim.fw2)
    sim.fw2.kill()
    sim.run(2.0)
    sim.fw2.start(sim.now)
    sim.run_until(lambda: sim.fw1.up.peers[0].telling_again)
    return sim


def test_large_bulk_out_of_memory_goes_in_parts_and_changes_meanwhile_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sim = small_parts(monkeypatch)
    for number in range(3000, 3300, 5):
        sim.fw1.kernel.close(tcp(number).key)
        sim.fw1.kernel.change(tcp(number + 1).key, mark=number)
        sim.turn()
    assert sim.fw1.up.counters["bulks_from_memory"] == 1
    sim.run_until(lambda: sim.fw2.up.complete)
    sim.run(1.0)
    assert same_flows(sim.fw1, sim.fw2)


@pytest.mark.parametrize("why", ["lost", "flushed", "moved", "gone"])
def test_bulk_out_of_memory_that_is_cut_short(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    sim = small_parts(monkeypatch)
    active, backup = sim.fw1, sim.fw2
    active.kernel.open(tcp(2001))
    if why == "lost":
        active.kernel.lose_events()
    elif why == "flushed":
        active.up.flush_kernel()
    elif why == "moved":
        active.set_role(readiness.BACKUP, sim.now)
        assert not active.up.peers[0].telling_again
        backup.set_role(readiness.ACTIVE, sim.now)
        active, backup = backup, active
    else:
        backup.crash()
        sim.run(2.0)
        backup.start(sim.now)
    sim.run(30.0)
    assert not any(node.up.peers[0].telling_again for node in (active, backup))
    sim.converge(active, backup)
