# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine with a filter, and with another one while it runs."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import readiness
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.config import Filter as Selection
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.config import Mark
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import Changes, pack
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.situation import EXTERNAL_CACHE, Settings
from unit.simulation import Node, Simulation, sheets_of, tcp, udp

MARKED = Settings(filter=Selection(marks=(Mark(1, 0xFF),)))
TCP_ONLY = Settings(filter=Selection(protocols=(k.IPPROTO_TCP,)))
UDP_ONLY = Settings(filter=Selection(protocols=(k.IPPROTO_UDP,)))
EXCLUDED = "fw1 replicates flows that this node's filter excludes: give both the same filter"


def keys(node: Node) -> tuple[set[bytes], set[bytes]]:
    """Of the kernel and of the external cache."""
    return set(node.kernel.table), {flow.key for flow, _since in node.up.external_flows()}


@pytest.mark.parametrize(
    ("settings", "leaves"),
    [
        (MARKED, {"mark": 2}),
        (MARKED, {"mark": None}),
        (MARKED._replace(filter=Selection(tcp_states=(k.TCP_ESTABLISHED,))), {"state": k.TCP_FIN_WAIT}),
    ],
)
def test_flow_that_leaves_the_selection_leaves_the_peer_and_may_come_back(
    settings: Settings, leaves: dict[str, Any]
) -> None:
    sim = Simulation(settings=settings).start()
    flow = sim.fw1.kernel.open(tcp(1001, mark=1))
    sim.run(1.0)
    assert keys(sim.fw2) == ({flow.key}, {flow.key})
    sim.fw1.kernel.change(flow.key, **leaves)
    sim.run(1.0)
    assert keys(sim.fw2) == (set(), set())
    sim.fw1.kernel.change(flow.key, mark=1, state=k.TCP_ESTABLISHED)
    sim.run(1.0)
    assert keys(sim.fw2) == ({flow.key}, {flow.key})


def test_flood_with_a_repeated_flow_and_one_of_the_node_itself() -> None:
    sim = Simulation().start()
    flows = [tcp(1001 + number) for number in range(70)]
    own = tcp(2001, 40_000)
    sim.fw1.up.set_addresses([own.orig.src])
    for flow in flows:
        flow = flow._replace(
            orig=flow.orig._replace(src=b"\x0a\0\0\x63"), reply=flow.reply._replace(dst=b"\x0a\0\0\x63")
        )
        sim.fw1.kernel.open(flow)
    first = next(iter(sim.fw1.kernel.table))
    for state in (k.TCP_FIN_WAIT, k.TCP_ESTABLISHED):
        sim.fw1.kernel.change(first, state=state)
    sim.fw1.kernel.open(own)
    rows = [pack(flow._replace(mark=0))[:2] for flow, _ended in sim.fw1.kernel.events]
    sim.fw1.kernel.events.clear()
    (sheet,) = sheets_of(rows)
    assert len(sheet) == 73
    sim.fw1.up.kernel_changes(Changes({}, [], [], 73, sheets=(sheet,)), sim.now)
    sim.run(1.0)
    assert set(sim.fw2.kernel.table) == {key for key, _value in rows} - {own.key}


def test_bulk_and_listing_are_filtered() -> None:
    sim = Simulation(settings=MARKED)
    one, two = tcp(1001, mark=1), tcp(1002, mark=2)
    for flow in (one, two):
        sim.fw1.kernel.open(flow)
    sim.start()
    sim.run(1.0)
    assert keys(sim.fw2) == ({one.key}, {one.key})
    assert (sim.fw1.up.internal(one), sim.fw1.up.internal(two)) == (True, False)


@pytest.mark.parametrize("command", ["resync", "flush_kernel", "lose_events"])
def test_backup_removes_nothing_that_the_filter_excludes(command: str) -> None:
    states = (k.TCP_ESTABLISHED, k.TCP_TIME_WAIT)
    sim = Simulation(settings=Settings(filter=Selection(marks=(Mark(1, 0xFF),), tcp_states=states))).start()
    others = {
        sim.fw2.kernel.open(flow).key
        for flow in (
            tcp(1, mark=2),
            tcp(2, mark=None),
            udp(3),
            tcp(4, mark=1, state=k.TCP_SYN_SENT),
            tcp(5, mark=1, state=k.TCP_LAST_ACK),
        )
    }
    stale = sim.fw2.kernel.open(tcp(6, mark=1)).key
    getattr(sim.fw2.up if command != "lose_events" else sim.fw2.kernel, command)()
    sim.run_until(lambda: stale not in sim.fw2.kernel.table)
    sim.run(1.0)
    assert set(sim.fw2.kernel.table) == others


def test_entry_in_the_way_of_a_replica_is_adopted_though_the_filter_excludes_it() -> None:
    """The former life of the same flow, before it had its mark."""
    sim = Simulation(settings=MARKED)
    sim.fw2.kernel.open(tcp(1001, mark=0))
    sim.fw1.kernel.open(tcp(1001, mark=1))
    sim.start()
    sim.run(1.0)
    assert sim.fw2.kernel.table[tcp(1001).key].mark == 1


def test_event_that_brings_the_mark_but_not_the_state_is_looked_up() -> None:
    sim = Simulation(settings=MARKED).start()
    engine = sim.fw1.up
    told = Changes(
        {},
        [
            tcp(1001, mark=1, state=None),
            tcp(1002, mark=2, state=None),  # not selected anyway
            udp(1003, mark=1, timeout=None),  # has no state
        ],
        [],
    )
    engine.kernel_changes(told, sim.now)
    (unclear,) = engine.take_questions()
    assert (unclear.flow.key, engine.take_questions()) == (tcp(1001).key, [])
    engine.answer(unclear, tcp(1001, mark=1), sim.now)
    sim.run(1.0)
    assert keys(sim.fw2)[1] == {tcp(1001).key, udp(1003).key}
    engine.kernel_changes(Changes({}, [tcp(1001, mark=1, state=None)], []), sim.now)
    Simulation().start().fw1.up.kernel_changes(Changes({}, [tcp(1001, state=None)], []), sim.now)
    assert engine.take_questions() == []


@pytest.mark.parametrize("mode", ["hot-standby", EXTERNAL_CACHE])
@pytest.mark.parametrize("first", ["fw1", "fw2"])
def test_filter_is_exchanged_while_it_runs(first: str, mode: str) -> None:
    """Whichever node is told first: in the end the backup has what the new filter selects and nothing else."""
    old, new = TCP_ONLY._replace(mode=mode), UDP_ONLY._replace(mode=mode)
    sim = Simulation(settings=old).start()
    one, two = sim.fw1.kernel.open(tcp(1001)), sim.fw1.kernel.open(udp(1002))
    sim.run(1.0)
    assert keys(sim.fw2)[1] == {one.key}
    nodes = [sim.nodes[first], sim.fw2 if first == "fw1" else sim.fw1]
    nodes[0].up.reconfigure(new, sim.now)
    sim.run(1.0)
    assert keys(sim.fw2) == (set(), set())
    assert sim.fw2.up.verdict(sim.now).reasons == (EXCLUDED,)
    nodes[1].up.reconfigure(new, sim.now)
    sim.run(1.0)
    assert keys(sim.fw2) == ({two.key} if mode == "hot-standby" else set(), {two.key})
    assert sim.fw2.up.verdict(sim.now).verdict == readiness.READY
    addresses = sim.fw1.up.filter.own
    assert addresses and addresses == sim.fw2.up.filter.own


def test_records_that_the_filter_excludes_are_refused_and_the_reason_goes_with_the_next_bulk() -> None:
    sim = Simulation().start()
    sim.fw2.up.reconfigure(UDP_ONLY, sim.now)
    sim.run(1.0)
    sim.fw1.kernel.open(tcp(1001))
    sim.run(1.0)
    assert keys(sim.fw2) == (set(), set())
    assert sim.fw2.up.counters["refused_by_filter"] == 1
    assert sim.fw2.up.verdict(sim.now).reasons == (EXCLUDED,)
    sim.fw1.up.reconfigure(UDP_ONLY, sim.now)
    sim.run(1.0)
    assert sim.fw2.up.verdict(sim.now) == readiness.Verdict(readiness.READY, (), readiness.OPEN)


def test_same_filter_again_sends_nothing_and_other_limits_hold_at_once() -> None:
    sim = Simulation(settings=Settings(park_timeout_s=1000)).start()
    sim.fw1.kernel.open(udp(1001))
    sim.run(1.0)
    for node in (sim.fw1, sim.fw2):
        node.up.reconfigure(Settings(park_timeout_s=2000, lag_limit_s=0.5), sim.now)
    sim.fw1.kernel.open(udp(1002))
    sim.run(1.0)
    assert sim.fw1.up.counters["bulks_sent"] == 1
    assert [sim.fw2.kernel.table[udp(port).key].timeout for port in (1001, 1002)] == [1000, 2000]
    sim.wire.deaf = "fw2"
    sim.fw1.kernel.open(udp(1003))
    sim.run(0.7)
    assert sim.fw1.up.verdict(sim.now).reasons == ("fw2 lags 0.7 s behind",)


def test_shorter_park_time_does_not_make_a_parked_timer_look_true() -> None:
    sim = Simulation(settings=Settings(park_timeout_s=200_000)).start()
    flow = sim.fw1.kernel.open(tcp(1001, timeout=100_000))
    sim.run(1.0)
    assert sim.fw2.kernel.table[flow.key].timeout == 200_000
    sim.fw2.up.reconfigure(Settings(park_timeout_s=600), sim.now)
    sim.fw1.kill()
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.run(1.0)
    assert sim.fw2.kernel.table[flow.key].timeout == 100_000
