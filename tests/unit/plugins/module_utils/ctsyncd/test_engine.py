# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine: two of them on model kernels must agree after whatever happened."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import readiness, source, takeover, wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow, SeqAdj, Tuple
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.jobs import CREATE, DELETE, TIMER, UPDATE, Work
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.pending import Pending
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import Changes, pack, unpack
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.situation import EXTERNAL_CACHE, Settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from unit.simulation import NATTED, VIP, Node, Simulation, address, replicable, tcp, udp
from unit.traffic_rules import FLOWS, PORTS, Events, thorough

PARKED = 86_400
ADJUSTED = (SeqAdj(100, 0, 5), SeqAdj(0, 0, 0))


def busy(simulation: Simulation, ports: range = range(1000, 1040)) -> Simulation:
    """Traffic of all kinds on fw1."""
    kernel = simulation.fw1.kernel
    for port in ports:
        kernel.open(tcp(port, port + 30_000) if port % 2 else udp(port))
    return simulation


def rows_record(flow: Flow) -> bytes:
    key, value, _extras = pack(flow)
    return wire.tlv(wire.RECORD_ROWS, wire.encode_rows(len(key), key + value))


def operations(node: Node) -> list[str]:
    return [request.operation for request in node.kernel.done]


# --- replication -----------------------------------------------------------------------------------------------------


def test_flows_are_replicated_with_their_translation_and_go_when_they_close() -> None:
    sim = Simulation().start()
    busy(sim)
    sim.converge(sim.fw1, sim.fw2)
    assert len(sim.fw2.kernel.table) == 40
    replica = sim.fw2.kernel.table[tcp(1001).key]
    assert replica.reply == Tuple(address("192.168.1.3"), address(VIP), b"\0\x16" + (31_001).to_bytes(2, "big"))
    assert replica.timeout == 431_999  # longer than a parked timer: never shortened
    assert sim.fw2.kernel.table[udp(1000).key].timeout == PARKED
    for flow in (tcp(1001), udp(1000)):
        sim.fw1.kernel.close(flow.key)
    sim.converge(sim.fw1, sim.fw2)
    assert len(sim.fw2.kernel.table) == 38
    assert sim.fw2.up.counters["stale_removed"] == 0


def test_table_that_was_there_before_the_daemons_is_sent_as_a_bulk() -> None:
    sim = Simulation()
    busy(sim).start()
    sim.converge(sim.fw1, sim.fw2)
    assert len(sim.fw2.kernel.table) == 40


def test_updates_keep_what_the_kernel_does_not_repeat() -> None:
    """Labels and sequence adjustment come with one event and are missing in the next."""
    sim = Simulation().start()
    flow = sim.fw1.kernel.open(tcp(1001))
    sim.run(0.5)
    sim.fw1.kernel.change(flow.key, labels=b"\1" * 16)
    sim.fw1.kernel.change(flow.key, seqadj=ADJUSTED)
    sim.run(0.5)
    sim.fw1.kernel.change(flow.key, mark=9)
    sim.converge(sim.fw1, sim.fw2)
    replica = sim.fw2.kernel.table[flow.key]
    assert (replica.labels, replica.seqadj, replica.mark) == (b"\1" * 16, ADJUSTED, 9)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("port", [40_000, 50_000])
def test_new_flow_with_the_key_of_one_that_just_ended_inherits_nothing(known: bool, port: int) -> None:
    """End and beginning wait together for the link: the end must not be overtaken."""
    sim = Simulation().start()
    old = sim.fw1.kernel.open(tcp(1001, 40_000, labels=b"\1" * 16, seqadj=ADJUSTED))
    if known:
        sim.converge(sim.fw1, sim.fw2)
    sim.fw1.kernel.close(old.key)
    new = sim.fw1.kernel.open(tcp(1001, port))
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw2.kernel.table[new.key].reply == new.reply
    assert (sim.fw2.kernel.table[new.key].labels, sim.fw2.kernel.table[new.key].seqadj) == (None, None)


LABELLED = {"labels": b"\1" * 16}


def half_open(port: int, **extras: Any) -> Flow:
    return tcp(port, state=k.TCP_SYN_SENT, **extras)._replace(status=k.IPS_CONFIRMED | NATTED)


def establish(sim: Simulation, ports: range) -> None:
    for port in ports:
        sim.fw1.kernel.change(tcp(port).key, state=k.TCP_ESTABLISHED, status=tcp(port).status)


@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize("told", ["by its event", "by the table"])
def test_what_a_flow_got_before_it_was_replicated_goes_with_it(count: int, told: str) -> None:
    """The kernel tells labels, masters and adjustments once: here with the first packet."""
    sim, ports = Simulation(), range(1001, 1001 + count)
    if told == "by its event":
        sim.start()
    for port in ports:
        sim.fw1.kernel.open(half_open(port, **LABELLED, seqadj=ADJUSTED))
    sim.fw1.kernel.open(udp(1000, replied=False, **LABELLED))
    if told == "by the table":
        sim.start()
    sim.run(0.5)
    assert not sim.fw2.kernel.table
    establish(sim, ports)
    sim.fw1.kernel.change(udp(1000).key, status=udp(1000).status)
    sim.converge(sim.fw1, sim.fw2)
    assert len(sim.fw2.kernel.table) == count + 1
    assert {flow.labels for flow in sim.fw2.kernel.table.values()} == {b"\1" * 16}
    assert not sim.fw1.up.source.early


def test_what_a_flow_got_ends_with_it() -> None:
    sim = Simulation().start()
    for port in (1001, 1002):
        sim.fw1.kernel.open(half_open(port, **LABELLED))
        sim.run(0.1)
        sim.fw1.kernel.close(tcp(port).key)
    sim.run(0.1)
    assert not sim.fw1.up.source.early
    sim.fw1.kernel.open(tcp(1001))
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw2.kernel.table[tcp(1001).key].labels is None


def test_what_is_kept_of_early_flows_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "EARLY_FLOWS", 3)
    sim, ports = Simulation().start(), range(1001, 1006)
    for port in ports:
        sim.fw1.kernel.open(half_open(port, **LABELLED))
    sim.run(0.1)
    establish(sim, ports)
    sim.run(1.0)
    assert sim.fw1.up.counters["early_extras_dropped"] == 2
    labels = [sim.fw2.kernel.table[tcp(port).key].labels for port in ports]
    assert labels == [None, None, *[b"\1" * 16] * 3]
    sim.fw1.up.resync()
    sim.converge(sim.fw1, sim.fw2)


def test_change_while_the_table_is_read_costs_no_extras() -> None:
    """The event of a change is newer than what the table says of the flow, but does not repeat its labels."""
    sim, ports = Simulation(), range(1001, 1101)
    for port in ports:
        sim.fw1.kernel.open(tcp(port, **LABELLED))
    sim.fw1.role = readiness.ACTIVE
    sim.fw1.start(sim.now)
    sim.fw2.start(sim.now)
    sim.run_until(lambda: sim.fw1.up.dump is not None)
    for port in ports:
        sim.fw1.kernel.change(tcp(port).key, mark=9)
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw1.up.counters["bulks_sent"] == 1


def test_change_that_overtakes_the_kernel_is_not_lost() -> None:
    """ASSURED arrives while the replica is still being made."""
    sim = Simulation().start()
    flow = sim.fw1.kernel.open(udp(1000))
    sim.fw2.requests_per_turn = 0
    sim.run(0.5)
    sim.fw1.kernel.change(flow.key, status=flow.status | k.IPS_ASSURED)
    sim.run(0.5)
    assert flow.key not in sim.fw2.kernel.table
    sim.fw2.requests_per_turn = 1
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw2.kernel.table[flow.key].assured


def test_half_open_and_own_flows_are_never_sent() -> None:
    sim = Simulation().start()
    kernel = sim.fw1.kernel
    half_open = kernel.open(tcp(1001, state=k.TCP_SYN_SENT))
    kernel.open(udp(1000, replied=False))
    kernel.open(tcp(1002)._replace(orig=Tuple(address("192.168.1.2"), address("192.168.1.3"), b"\1\1\0\x16")))
    to_vip = Tuple(address("192.168.1.3"), address(VIP), b"\1\2\0\x16")
    kernel.open(tcp(1003)._replace(orig=to_vip, reply=Tuple(to_vip.dst, to_vip.src, b"\0\x16\1\2")))
    kernel.open(tcp(1004)._replace(proto=k.IPPROTO_VRRP))
    multicast = Tuple(address("192.168.0.3"), address("224.0.0.251"), b"\1\1\1\1")
    kernel.open(udp(1)._replace(family=k.AF_INET, orig=multicast, reply=multicast._replace(src=b"\xc0\xa8\0\4")))
    kernel.change(half_open.key, state=k.TCP_SYN_RECV)
    sim.run(2.0)
    assert sim.fw1.up.counters["events"] == 7
    counters = sim.fw2.up.counters  # role; conditions, twice; begin and end of the bulk
    assert counters["records_received"] - counters["digests_equal"] == 5
    kernel.change(half_open.key, state=k.TCP_ESTABLISHED)
    kernel.change(udp(1000).key, status=k.IPS_CONFIRMED | k.IPS_SEEN_REPLY)
    sim.run(2.0)
    assert set(sim.fw2.kernel.table) == {half_open.key, udp(1000).key}
    kernel.change(half_open.key, state=k.TCP_SYN_SENT)  # the client takes its port again, out of TIME_WAIT
    sim.run(1.0)
    assert set(sim.fw2.kernel.table) == {udp(1000).key}


def test_connection_that_was_over_before_it_was_told_is_not_told() -> None:
    """It began and came to TIME_WAIT within one window.  What was told is told to its end."""
    sim = Simulation().start()
    kernel = sim.fw1.kernel
    told = kernel.open(tcp(1001))
    sim.run(1.0)
    short = [kernel.open(tcp(port)) for port in range(2000, 2010)]
    for flow in (*short, told):
        kernel.change(flow.key, state=k.TCP_TIME_WAIT, timeout=120)
    sim.run(1.0)
    assert {flow.key: flow.state for flow, _since in sim.fw2.up.external_flows()} == {told.key: k.TCP_TIME_WAIT}
    received = sim.fw2.up.counters["records_received"]
    for flow in short:
        kernel.close(flow.key)
    sim.run(1.0)
    assert sim.fw2.up.counters["records_received"] == received
    kernel.close(told.key)
    sim.run(1.0)
    assert len(sim.fw2.up.cache) == 0


@pytest.mark.parametrize("noticed", [True, False])
def test_key_that_was_announced_once_is_judged_anew(noticed: bool) -> None:
    sim = Simulation().start()
    flow = sim.fw1.kernel.open(udp(1000))
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.kernel.close(flow.key)
    if not noticed:
        sim.fw1.kernel.lose_events()
    sim.run(1.0)
    sim.fw1.kernel.open(udp(1000, replied=False))
    sim.run(1.0)
    assert len(sim.fw2.up.cache) == 0


def test_unreplied_flows_and_ignored_networks_follow_the_settings() -> None:
    sim = Simulation(settings=Settings(unreplied=True, ignore=("192.168.1.0/29", "fd00:c0de:9::/64"))).start()
    sim.fw1.kernel.open(tcp(1001))
    sim.fw1.kernel.open(udp(1000, replied=False))
    sim.run(1.0)
    assert set(sim.fw2.kernel.table) == {udp(1000).key}


def test_flows_with_this_nodes_addresses_are_not_accepted() -> None:
    """A peer with another idea of the addresses (or a captured one) must not open the firewall's own services."""
    sim = Simulation().start()
    end = sim.fw1.up.peers[0].session
    evil = tcp(1001)._replace(orig=Tuple(address("192.168.1.3"), address("192.168.0.2"), b"\1\1\0\x16"))
    evil = evil._replace(reply=Tuple(evil.orig.dst, evil.orig.src, b"\0\x16\1\1"))
    garbage = wire.tlv(wire.RECORD_ROWS, b"garbage") + wire.tlv(99, b"of a later version")
    good = rows_record(tcp(1002))
    end.send_block(rows_record(evil) + garbage + good, 4, sim.now, sim.now)
    end.send_block(good + b"\1\xff\xff", 1, sim.now, sim.now)
    sim.run(1.0)
    assert set(sim.fw2.kernel.table) == {tcp(1002).key}
    counters = sim.fw2.up.counters
    assert counters["refused_own_addresses"] == 1
    assert counters["skipped_unknown_record"] == 1
    assert counters["records_malformed"] == 2


def test_replication_off_sends_nothing_and_touches_nothing() -> None:
    sim = busy(Simulation(settings=Settings(replicate=False)))
    sim.fw1.role = readiness.ACTIVE
    sim.fw1.start(sim.now)
    sim.fw2.start(sim.now)
    sim.fw2.kernel.open(tcp(9))
    sim.run(10.0)
    assert sim.fw2.kernel.done == sim.fw1.kernel.done == []
    assert len(sim.fw2.up.cache) == 0
    verdict = (readiness.NOT_READY, ("replication is off",), readiness.KNOWS_NOTHING, False)
    assert sim.fw2.up.verdict(sim.now) == verdict
    assert sim.fw1.up.verdict(sim.now).verdict == readiness.DEGRADED


def test_node_with_replication_off_ignores_a_peer_that_replicates() -> None:
    sim = busy(Simulation())
    sim.fw1.role = readiness.ACTIVE
    sim.fw1.start(sim.now)
    sim.settings = Settings(replicate=False)
    sim.fw2.start(sim.now)
    sim.fw2.kernel.open(tcp(9))
    sim.run(10.0)
    assert sim.fw2.kernel.done == []
    assert set(sim.fw2.kernel.table) == {tcp(9).key}
    assert sim.fw2.up.counters["ignored_replication_off"] > 0
    assert "replication is off on fw2" in sim.fw1.up.verdict(sim.now).reasons[0]


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_tables_converge_through_a_bad_wire(seed: int) -> None:
    sim = Simulation(seed).start()
    sim.wire.loss, sim.wire.duplication, sim.wire.corruption, sim.wire.jitter_s = 0.3, 0.2, 0.05, 0.05
    kernel = sim.fw1.kernel
    for number in range(600):
        port = 1000 + sim.chance.randrange(120)
        flow = tcp(port, 20_000 + number) if port % 2 else udp(port)
        if flow.key not in kernel.table:
            kernel.open(flow)
        elif sim.chance.random() < 0.5:
            kernel.close(flow.key)
        else:
            kernel.change(flow.key, mark=number)
        sim.run(0.01)
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw2.up.peers[0].session.counters["dropped_auth_failed"] > 0
    assert sim.fw2.up.counters["stale_removed"] == 0  # no repair was needed: nothing was lost


@pytest.mark.parametrize("restarted", ["fw1", "fw2"])
def test_changes_while_a_daemon_is_down_arrive_after_its_restart(restarted: str) -> None:
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    node = sim.nodes[restarted]
    node.kill()
    sim.run(5.0)
    sim.fw1.kernel.close(tcp(1001).key)
    sim.fw1.kernel.close(udp(1002).key)
    sim.fw1.kernel.open(tcp(2001))
    sim.fw1.kernel.close(tcp(1003).key)
    sim.fw1.kernel.open(tcp(1003, 50_000))  # the same flow with another translation
    sim.run(1.0)
    node.start(sim.now)
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw2.up.counters["stale_removed"] == 2
    assert tcp(2001).key in sim.fw2.kernel.table


def test_restarted_backup_adopts_its_entries_instead_of_making_them_again() -> None:
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    sim.fw2.kill()
    sim.fw2.kernel.done.clear()
    sim.fw2.start(sim.now)
    sim.converge(sim.fw1, sim.fw2)
    assert DELETE not in operations(sim.fw2)
    assert sim.fw2.up.counters["adopted"] == 40


def test_silent_link_heals_without_a_new_session_or_bulk() -> None:
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    sim.wire.cut = True
    sim.fw1.kernel.close(tcp(1001).key)
    sim.fw1.kernel.open(tcp(2001))
    sim.run(30.0)
    events, age = sim.fw1.up.lag(sim.now)
    assert events in (2, 3)  # the changes, and a digest if one was due before the silence was seen
    assert 29.0 <= age <= 30.05  # a turn of the simulation takes up to 50 ms
    assert sim.fw1.up.verdict(sim.now).verdict == readiness.DEGRADED
    assert sim.fw2.up.verdict(sim.now).verdict == readiness.DEGRADED
    assert not sim.fw2.up.verdict(sim.now).gate  # complete, if old: it may take over
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw1.up.counters["bulks_sent"] == 1
    assert sim.fw1.up.peers[0].session.counters["sessions"] == 1


def test_overrun_on_the_active_node_repairs_what_was_missed() -> None:
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.kernel.close(tcp(1001).key)
    sim.fw1.kernel.open(tcp(2001))
    sim.fw1.kernel.events.clear()
    sim.run(2.0)
    assert sim.differences(sim.fw1, sim.fw2)
    sim.fw1.kernel.lose_events()
    sim.converge(sim.fw1, sim.fw2)


def test_too_many_changes_for_the_queue_become_a_bulk() -> None:
    sim = Simulation().start()
    sim.fw1.up.peers[0].pending = Pending(50)
    sim.wire.cut = True
    busy(sim, range(1000, 9000))  # the window of the link (512 blocks) takes most of them
    sim.run(5.0)
    assert sim.fw1.up.counters["pending_overflows"] > 0
    assert len(sim.fw1.up.peers[0].pending) <= 50
    sim.fw1.up.peers[0].pending.limit = 100_000
    sim.converge(sim.fw1, sim.fw2)
    assert len(sim.fw2.kernel.table) == 8000


def test_full_external_cache_is_counted_and_bounded() -> None:
    sim = Simulation().start()
    sim.fw2.up.cache.limit = 10
    busy(sim)
    sim.run(3.0)
    assert len(sim.fw2.up.cache) == len(sim.fw2.kernel.table) == 10
    assert sim.fw2.up.counters["external_cache_full"] >= 30  # and again when what is missing was told again
    judged = sim.fw2.up.verdict(sim.now)
    full = "the external cache is full (10 flows): others of fw1 are not here"
    assert judged.verdict == readiness.DEGRADED
    assert full in judged.reasons
    for key in list(sim.fw1.kernel.table)[5:]:
        sim.fw1.kernel.close(key)
    sim.run(120.0)
    assert full not in sim.fw2.up.verdict(sim.now).reasons
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw2.up.verdict(sim.now).verdict == readiness.READY


def test_external_cache_has_room_for_twice_what_this_kernel_may_hold() -> None:
    sim = Simulation(settings=Settings(table_limit=10)).start()
    for limit, room in ((0, 10), (4, 10), (30, 60), (1 << 31, 1 << 26)):
        sim.fw2.up.set_conditions("", {"max": limit}, sim.now)
        assert sim.fw2.up.cache.limit == sim.fw2.up.peers[0].pending.limit == room
    sim.fw1.up.set_conditions("", {"max": 1000}, sim.now)
    sim.fw2.up.set_conditions("", {"max": 15}, sim.now)
    busy(sim)
    sim.run(3.0)
    assert len(sim.fw2.up.cache) == 30
    assert sim.fw2.up.counters["external_cache_full"] >= 10


def test_interrupted_dumps_are_begun_again() -> None:
    sim = busy(Simulation().start())
    engine = sim.fw1.up
    for destination, node in ((engine.resync, sim.fw1), (sim.fw2.up.resync, sim.fw2)):
        sim.converge(sim.fw1, sim.fw2)
        destination()
        sim.run_until(lambda node=node: node.up.dump)
        number = node.up.dump.number if node.up.dump else 0
        node.up.dump_finished(False, sim.now)
        sim.run_until(lambda node=node, number=number: node.up.dump and node.up.dump.number > number)
    sim.converge(sim.fw1, sim.fw2)


# --- the backup's kernel ---------------------------------------------------------------------------------------------


def test_reconciling_removes_what_is_too_much_and_restores_what_is_missing() -> None:
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    kernel = sim.fw2.kernel
    kernel.table[tcp(9).key] = tcp(9)  # behind the daemon's back
    for key in (tcp(1001).key, udp(1002).key):
        del kernel.table[key]
    kernel.table[tcp(1003).key] = tcp(1003, 7)
    own = tcp(1004)._replace(orig=Tuple(address("192.168.1.3"), address("192.168.1.2"), b"\1\1\0\x16"))
    own = own._replace(reply=Tuple(own.orig.dst, own.orig.src, b"\0\x16\1\1"))
    kernel.table[own.key] = own
    sim.fw2.up.resync()
    sim.run(2.0)
    assert kernel.table.pop(own.key) == own  # the operator's SSH session
    sim.converge(sim.fw1, sim.fw2)
    counters = sim.fw2.up.counters
    assert (counters["stale_removed"], counters["replicas_restored"], counters["replaced"]) == (1, 2, 1)


def test_flow_that_begins_while_the_kernel_is_read_is_not_made_twice() -> None:
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    sim.fw2.kernel.done.clear()
    sim.fw2.up.resync()
    sim.run_until(lambda: sim.fw2.up.dump)
    record = rows_record(sim.fw1.kernel.open(tcp(2001)))
    # at once: the simulated wire is slower than the simulated dump
    sim.fw2.up._receive_records(sim.fw2.up.peers[0], record, sim.now)
    sim.converge(sim.fw1, sim.fw2)
    assert operations(sim.fw2) == [CREATE]


def test_adopted_entry_that_is_further_than_the_peers_keeps_its_status() -> None:
    """Status bits cannot be cleared: EBUSY."""
    sim = Simulation()
    sim.fw1.kernel.open(udp(1000))
    ahead = udp(1000)._replace(status=udp(1000).status | k.IPS_ASSURED)
    sim.fw2.kernel.table[ahead.key] = ahead
    sim.start()
    sim.run(1.0)
    assert sim.fw2.up.counters["status_kept"] == 1
    assert sim.fw2.kernel.table[ahead.key] == ahead._replace(timeout=PARKED)
    assert sim.fw2.up.verdict(sim.now).verdict == readiness.READY


def test_replica_that_somebody_deletes_comes_back() -> None:
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    sim.fw2.kernel.close(tcp(1001).key)
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw2.up.counters["replicas_restored"] == 1


def test_flushed_kernel_of_the_backup_is_filled_again_by_the_next_bulk() -> None:
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    sim.fw2.up.flush_kernel()
    sim.run(1.0)
    assert sim.fw2.kernel.table == {}
    sim.fw2.up.request_bulk(sim.now)
    sim.converge(sim.fw1, sim.fw2)


def test_resync_of_an_incomplete_backup_does_not_empty_its_kernel() -> None:
    """Alone after a restart, the kernel's entries are all there is of the peer's table."""
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.kill()
    sim.fw2.kill()
    sim.fw2.start(sim.now)
    sim.fw2.up.resync()
    sim.fw2.kernel.lose_events()
    sim.run(5.0)
    assert len(sim.fw2.kernel.table) == 40


def test_flushed_external_cache_is_asked_for_again() -> None:
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw2.up.flush_external() == 40
    assert sim.fw2.up.verdict(sim.now).gate
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw1.up.counters["bulks_requested"] == 1


def test_entry_in_the_way_is_replaced_on_the_backup() -> None:
    sim = Simulation().start()
    sim.fw2.kernel.table[tcp(1001).key] = tcp(1001, 7)  # a stray packet made it
    sim.fw1.kernel.open(tcp(1001, 40_000))
    sim.converge(sim.fw1, sim.fw2)
    assert operations(sim.fw2) == [CREATE, DELETE, CREATE]


def test_reply_tuple_that_is_taken_by_a_stale_entry_is_refused_and_healed_by_the_next_bulk() -> None:
    sim = Simulation().start()
    sim.fw2.kernel.table[tcp(9).key] = tcp(9, 40_000)
    sim.fw1.kernel.open(tcp(1001, 40_000))
    sim.run(2.0)
    assert "the kernel refuses 1 flows (1: their translated addresses" in sim.fw2.up.verdict(sim.now).reasons[0]
    assert sim.fw2.up.counters["kernel_refused_create_eexist"] == 1
    sim.fw2.up.request_bulk(sim.now)
    sim.converge(sim.fw1, sim.fw2)


@pytest.mark.parametrize(
    ("changes", "counter", "reasons"),
    [
        (
            {"helper": "pptp"},
            "degraded_without_helper",
            (
                "this node's kernel does not know helpers of the peer's flows (pptp): load the same helper modules on"
                " both nodes",
            ),
        ),
        ({"master": tcp(21).orig, "master_proto": k.IPPROTO_TCP}, "degraded_without_master", ()),
    ],
)
def test_replica_without_its_helper_or_master_is_better_than_none(
    changes: dict[str, Any], counter: str, reasons: tuple[str, ...]
) -> None:
    sim = Simulation().start()
    sim.fw1.kernel.open(tcp(1001)._replace(**changes))
    sim.run(1.0)
    assert tcp(1001).key in sim.fw2.kernel.table
    assert sim.fw2.up.counters[counter] == 1
    verdict = sim.fw2.up.verdict(sim.now)
    assert verdict.verdict == (readiness.DEGRADED if reasons else readiness.READY)
    assert verdict.reasons == reasons


def test_what_the_kernel_refuses_is_said_and_tried_again() -> None:
    sim = Simulation().start()
    flow = sim.fw1.kernel.open(tcp(1001))
    sim.fw2.kernel.refuse[flow.key] = errno.ENOMEM
    sim.run(1.0)
    assert sim.fw2.up.counters["kernel_refused_create_enomem"] == 1
    verdict = sim.fw2.up.verdict(sim.now)
    assert verdict.verdict == readiness.DEGRADED
    assert verdict.reasons == ("the kernel refuses 1 flows (1: its table is full (net.netfilter.nf_conntrack_max))",)
    sim.fw2.kernel.refuse.clear()
    sim.fw2.up.resync()
    sim.converge(sim.fw1, sim.fw2)


def test_refused_flows_are_tried_again_less_and_less_often_and_harm_no_other() -> None:
    """A full table: it takes what comes when there is room again, without a command or a bulk."""
    sim = Simulation().start()
    refused = [sim.fw1.kernel.open(tcp(port)) for port in range(1001, 1011)]
    sim.fw2.kernel.refuse.update((flow.key, errno.ENOMEM) for flow in refused)
    busy(sim, range(2000, 2010))
    sim.run(60.0)
    counters = sim.fw2.up.counters
    assert len(sim.fw2.kernel.table) == 10
    assert counters["refused_tried_again"] == 20  # after 10 and 30 seconds
    assert counters["kernel_refused_create_enomem"] == 30
    sim.fw2.kernel.refuse.clear()
    sim.run(30.0)
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw2.up.verdict(sim.now).verdict == readiness.READY
    assert counters["bulks_received"] == 1
    dumps = counters["dumps"]
    sim.run(200.0)
    assert counters["dumps"] == dumps


def test_stale_entry_in_the_way_goes_with_the_next_attempt() -> None:
    sim = Simulation().start()
    flow = tcp(1001, 40_000)
    stale = tcp(2001, 40_000)
    sim.fw2.kernel.table[stale.key] = stale
    sim.fw1.kernel.open(flow)
    sim.run(1.0)
    assert flow.key not in sim.fw2.kernel.table
    sim.run(20.0)
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw2.kernel.table[flow.key].reply == flow.reply


# --- taking over -----------------------------------------------------------------------------------------------------


def test_take_over_makes_nothing_and_sets_true_states_closing_flows_first() -> None:
    sim = busy(Simulation().start())
    closing = [sim.fw1.kernel.open(tcp(port)) for port in (3001, 3002)]
    sim.run(0.5)
    for flow in closing:
        sim.fw1.kernel.change(flow.key, state=k.TCP_TIME_WAIT, timeout=120)
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw2.kernel.table[closing[0].key].state == k.TCP_ESTABLISHED
    sim.fw1.kill()
    sim.fw2.kernel.done.clear()
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.run(2.0)
    assert operations(sim.fw2) == [UPDATE] * 2 + [TIMER] * 20
    for flow in closing:
        assert sim.fw2.kernel.table[flow.key].state == k.TCP_TIME_WAIT
        assert sim.fw2.kernel.table[flow.key].timeout == 120
    assert sim.fw2.kernel.table[udp(1000).key].timeout == 30
    assert sim.fw2.kernel.table[tcp(1001).key].timeout == 431_999
    assert len(sim.fw2.up.cache) == 0


KERNEL_TIMEOUTS = {"tcp_timeout_established": 432_000, "udp_timeout": 40, "udp_timeout_stream": 150, "gre_timeout": 50}


@pytest.mark.parametrize("injected", [True, False])
def test_take_over_never_gives_an_open_flow_less_than_its_protocols_time(injected: bool) -> None:
    """What the record says was left when the flow last made an event; packets may have refreshed it since."""
    sim = Simulation().start()
    kernel = sim.fw1.kernel
    assured = k.IPS_CONFIRMED | k.IPS_SEEN_REPLY | k.IPS_ASSURED
    wanted = {
        kernel.open(tcp(1001, timeout=200_000)).key: 432_000,
        kernel.open(tcp(1002, timeout=50)).key: 432_000,
        kernel.open(tcp(1003, timeout=500_000)).key: 500_000,  # set by a timeout policy
        kernel.open(tcp(1004, state=k.TCP_LAST_ACK, timeout=100)).key: 100,
        kernel.open(udp(1005, timeout=3)).key: 40,
        kernel.open(udp(1006)._replace(timeout=3, status=assured)).key: 150,
        kernel.open(udp(1007)._replace(proto=k.IPPROTO_GRE, timeout=600)).key: PARKED,  # of a fixed timer
        kernel.open(udp(1008)._replace(proto=k.IPPROTO_ICMPV6, timeout=7)).key: 7,  # this kernel does not say
    }
    sim.converge(sim.fw1, sim.fw2)
    if not injected:
        sim.fw2.kernel.table.clear()
        sim.fw2.kernel.table.ends.clear()
        sim.fw2.up.copies.lose(sim.fw2.up.cache.keys())
    sim.fw1.kill()
    sim.fw2.up.set_conditions("", KERNEL_TIMEOUTS, sim.now)
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.run(1.0)
    held = {key: flow.timeout for key, flow in sim.fw2.kernel.table.items()}
    if injected:
        wanted[tcp(1001).key] = 200_000  # longer than a parked timer: left as it is
    assert held == wanted


def test_take_over_of_a_large_table_does_not_stop_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked through in parts, and still closing flows come first."""
    monkeypatch.setattr(takeover, "SORTED_PER_TURN", 3)
    sim = Simulation().start()
    open_ones = [sim.fw1.kernel.open(tcp(port, timeout=100)) for port in range(1001, 1021)]
    closing = [sim.fw1.kernel.open(tcp(port, state=k.TCP_LAST_ACK, timeout=90)) for port in (2001, 2002)]
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.kill()
    engine = sim.fw2.up
    sim.fw2.kernel.done.clear()
    engine.set_role(readiness.ACTIVE, sim.now)
    turns = [engine.kernel_work(5) for dummy in range(6)]
    assert not any(turns)  # nothing but looking so far
    while not engine.idle:
        jobs = engine.kernel_work(5)
        assert sum(len(job.keys) if isinstance(job, Work) else 1 for job in jobs) <= 5
        for job in jobs:
            engine.kernel_results(job, sim.fw2.kernel.carry_out(job))
    done = sim.fw2.kernel.done
    assert [request.key for request in done[:2]] == [flow.key for flow in closing]
    assert {request.key for request in done[2:]} == {flow.key for flow in open_ones}
    assert len(done) == 22


def test_flow_that_ends_while_others_get_their_timers_is_not_brought_back() -> None:
    """Packets pass from the moment the virtual IPs are here; the true timers follow at their leisure."""
    sim = Simulation().start()
    flows = [sim.fw1.kernel.open(tcp(port, timeout=100)) for port in range(1001, 1021)]
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.kill()
    sim.fw2.requests_per_turn = 1
    sim.fw2.up.set_conditions("", KERNEL_TIMEOUTS, sim.now)
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    kernel = sim.fw2.kernel
    kernel.change(flows[18].key, state=k.TCP_TIME_WAIT, timeout=120)
    kernel.close(flows[19].key)
    del kernel.table[flows[0].key]  # its event comes too late
    sim.run(2.0)
    assert len(kernel.table) == 18
    assert {flow.timeout for flow in kernel.table.values()} == {432_000, 120}
    assert kernel.table[flows[18].key].timeout == 120
    assert sim.fw2.up.idle
    assert len(sim.fw2.up.cache) == 0


def test_long_timer_that_ran_down_on_the_backup_is_renewed_at_the_take_over() -> None:
    """The peer's packets refreshed the original for days while the replica's timer ran."""
    sim = Simulation().start()
    flow = sim.fw1.kernel.open(tcp(1001))
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.kill()
    sim.now += 431_000
    sim.fw2.kernel.table[flow.key] = flow._replace(timeout=999)
    sim.fw2.up.set_conditions("", KERNEL_TIMEOUTS, sim.now)
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.run(1.0)
    assert sim.fw2.kernel.table[flow.key].timeout == 432_000


def test_replica_that_was_under_way_at_the_take_over_gets_its_true_timer() -> None:
    sim = Simulation().start()
    sim.fw2.requests_per_turn = 0
    busy(sim)
    sim.run(1.0)
    sim.fw1.kill()
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.fw2.requests_per_turn = 256
    sim.run(2.0)
    assert len(sim.fw2.kernel.table) == 40
    assert {flow.timeout for flow in sim.fw2.kernel.table.values()} == {30, 431_999}


def test_take_over_in_classic_mode_commits_the_external_cache() -> None:
    sim = busy(Simulation(settings=Settings(mode=EXTERNAL_CACHE)).start())
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw2.kernel.table == {}
    sim.fw1.kill()
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.run(1.0)
    assert operations(sim.fw2) == [CREATE] * 40
    assert {flow.timeout for flow in sim.fw2.kernel.table.values()} == {30, 431_999}


def test_classic_mode_without_automatic_commit_waits_for_the_command() -> None:
    sim = busy(Simulation(settings=Settings(mode=EXTERNAL_CACHE, commit_at_takeover=False)).start())
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.kill()
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.fw2.kernel.table[tcp(1001).key] = tcp(1001, 31_001)  # came back to life by itself
    sim.run(1.0)
    assert operations(sim.fw2) == []
    assert sim.fw2.up.commit() == 40
    sim.run(1.0)
    assert len(sim.fw2.kernel.table) == 40
    assert sim.fw2.up.counters["kept_own"] == 1


def test_what_happens_unheard_during_a_classic_commit_is_told_after_it() -> None:
    """New and changed entries are not listened to then: the kernel makes entries in half the time."""
    sim = busy(Simulation(settings=Settings(mode=EXTERNAL_CACHE)).start())
    sim.converge(sim.fw1, sim.fw2)
    assert (sim.fw1.up.follows, sim.fw2.up.follows) == (True, False)
    sim.fw2.requests_per_turn = 1
    sim.fw1.set_role(readiness.BACKUP, sim.now)
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.run_until(lambda: len(sim.fw2.kernel.table) == 5)
    heard = sim.fw2.up.counters["events"]
    new, ended = sim.fw2.kernel.open(tcp(3000)), next(iter(sim.fw2.kernel.table))
    sim.fw2.kernel.change(new.key, mark=9)
    sim.fw2.kernel.close(ended)
    sim.turn()
    assert not sim.fw2.up.follows
    assert sim.fw2.up.counters["events"] == heard + 1  # ends are always told
    sim.run_until(lambda: sim.fw2.up.follows)
    sim.run_until(lambda: sim.fw1.up.complete)
    replica = sim.fw1.up.cache.get(new.key)
    assert replica is not None and unpack(replica.key, replica.value).mark == 9
    assert ended not in sim.fw1.up.cache
    assert ended not in sim.fw2.kernel.table
    assert set(sim.fw1.up.cache.table) == set(sim.fw2.kernel.table)
    sim.fw2.kernel.open(tcp(3001))
    sim.run(1.0)
    assert tcp(3001).key in sim.fw1.up.cache


def test_who_listens_to_new_entries() -> None:
    sim = Simulation().start()
    assert (sim.fw1.up.follows, sim.fw2.up.follows) == (True, False)
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    assert sim.fw2.up.follows  # from the first moment: in hot standby nothing is committed
    sim.fw2.set_role(readiness.TRANSITION, sim.now)
    assert sim.fw2.up.follows
    sim.fw2.set_role(readiness.BACKUP, sim.now)
    assert not sim.fw2.up.follows
    silent = Simulation(settings=Settings(replicate=False))
    silent.fw1.role = readiness.ACTIVE
    silent.fw1.start(silent.now)
    assert not silent.fw1.up.follows


def test_changing_sides_and_back_twice() -> None:
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    active, backup = sim.fw1, sim.fw2
    for number in range(4):
        sim.move(backup)
        active, backup = backup, active
        active.kernel.open(tcp(5000 + number))
        active.kernel.close(tcp(1001 + 2 * number).key)
        active.kernel.change(udp(1000).key, status=active.kernel.table[udp(1000).key].status | k.IPS_ASSURED)
        sim.converge(active, backup)
        assert len(backup.kernel.table) == 40
    assert {flow.timeout for flow in sim.fw1.kernel.table.values()} <= {30, 431_999}


def test_changes_that_waited_at_the_move_reach_the_new_active_node() -> None:
    """fw1 lost the virtual IPs with changes unsent; fw2 is still the one to have them."""
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    sim.wire.cut = True
    sim.fw1.kernel.open(tcp(2001))
    sim.run(0.2)
    sim.fw1.set_role(readiness.BACKUP, sim.now)
    sim.wire.cut = False
    sim.run(3.0)
    assert tcp(2001).key in sim.fw2.kernel.table
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.converge(sim.fw2, sim.fw1)
    assert tcp(2001).key in sim.fw1.kernel.table


def test_late_flow_of_the_former_active_node_comes_back_to_it() -> None:
    """It arrives when the new active node has sent its table already."""
    sim = Simulation().start()
    sim.run(3.0)
    sim.wire.deaf = "fw2"
    sim.fw1.kernel.open(udp(1000))
    sim.run(0.2)
    sim.move(sim.fw2)
    sim.run_until(lambda: sim.fw1.up.complete)
    assert len(sim.fw1.kernel.table) == 0  # fw2's table did not have it
    sim.converge(sim.fw2, sim.fw1)
    assert len(sim.fw1.kernel.table) == len(sim.fw2.kernel.table) == 1


def test_two_active_nodes_say_so_and_the_one_that_yields_adopts_the_others_table() -> None:
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    sim.wire.cut = True
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.run(2.0)
    sim.fw1.kernel.open(tcp(2001))
    sim.fw2.kernel.open(tcp(2002))
    sim.fw2.kernel.close(tcp(1001).key)
    sim.wire.cut = False
    sim.run(3.0)
    for node in (sim.fw1, sim.fw2):
        assert any("split brain" in reason for reason in node.up.verdict(sim.now).reasons)
    sim.fw1.set_role(readiness.BACKUP, sim.now)
    sim.converge(sim.fw2, sim.fw1)


def test_transition_keeps_the_side() -> None:
    sim = busy(Simulation().start())
    sim.fw1.set_role(readiness.TRANSITION, sim.now)
    sim.fw1.kernel.open(tcp(2001))
    sim.run(1.0)
    assert tcp(2001).key in sim.fw2.kernel.table
    bulks = sim.fw1.up.counters["bulks_sent"]
    sim.fw1.set_role(readiness.ACTIVE, sim.now)
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw1.up.counters["bulks_sent"] == bulks


def test_backup_whose_peer_says_goodbye_stays_ready_to_take_over() -> None:
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.up.peers[0].session.say_bye()
    sim.turn()
    sim.fw1.kill()
    sim.run(3.0)
    assert sim.fw2.up.counters["peer_left"] == 1
    verdict = sim.fw2.up.verdict(sim.now)
    assert (verdict.verdict, verdict.gate) == (readiness.DEGRADED, False)
    assert len(sim.fw2.kernel.table) == 40


def test_status_for_people() -> None:
    sim = busy(Simulation().start())
    sim.converge(sim.fw1, sim.fw2)
    status = sim.fw1.up.peer_status(sim.now)[0]
    assert (status["node"], status["state"], status["role"], status["bulk"]) == ("fw2", "up", "backup", "complete")
    assert status["table"] == "holds the whole table"
    assert status["lag"] == {"events": 0, "age_s": 0.0}
    assert sim.fw2.up.peer_status(sim.now)[0]["bulk"] == "complete"
    assert sim.fw2.up.peer_status(sim.now)[0]["table"] == "its whole table is here"
    sim.wire.cut = True
    sim.run(5.0)
    assert sim.fw1.up.peer_status(sim.now)[0]["state"] == "silent"


# --- everything at once ----------------------------------------------------------------------------------------------


class Pair(Events):
    """Traffic, a bad wire, restarts, overruns, moved virtual IPs and operators, in any order."""

    @initialize(seed=st.integers(0, 2**32 - 1))
    def begin(self, seed: int) -> None:
        self.sim = Simulation(seed).start()
        self.active, self.backup = self.sim.fw1, self.sim.fw2
        self.flushed = False

    @rule(loss=st.sampled_from((0.0, 0.3, 0.7)), jitter=st.sampled_from((0.0, 0.1)), cut=st.sampled_from((0, 0, 0, 1)))
    def wire_changes(self, loss: float, jitter: float, cut: int) -> None:
        self.sim.wire.loss, self.sim.wire.duplication, self.sim.wire.jitter_s = loss, loss / 2, jitter
        self.sim.wire.corruption = loss / 10
        self.sim.wire.cut = bool(cut)

    @rule(number=st.integers(0, 500))
    def somebody_replays(self, number: int) -> None:
        to, datagram = self.sim.wire.sent[number % len(self.sim.wire.sent)]
        self.sim.wire.inject(to, datagram, self.sim.now)

    @rule(seconds=st.sampled_from((0.003, 0.05, 0.5, 3.0)))
    def time_passes(self, seconds: float) -> None:
        self.sim.run(seconds)

    @rule(what=st.sampled_from(("resync", "request", "flush external", "flush kernel", "overrun")))
    def operator_acts_on_the_backup(self, what: str) -> None:
        engine = self.backup.up
        if what == "resync":
            engine.resync()
        elif what == "request":
            engine.request_bulk(self.sim.now)
        elif what == "flush external":
            engine.flush_external()
        elif what == "flush kernel":
            self.flushed = True
            engine.flush_kernel()
        else:
            self.backup.kernel.lose_events()

    @rule(port=PORTS)
    def entry_of_the_backup_vanishes(self, port: int) -> None:
        key = self.flow(port).key
        if key in self.backup.kernel.table:
            self.backup.kernel.close(key)

    @precondition(lambda self: self.backup.up.complete)
    @rule(overlap=st.booleans())
    def virtual_ips_move(self, overlap: bool) -> None:
        if overlap:
            self.backup.set_role(readiness.ACTIVE, self.sim.now)
            self.sim.run(0.05)
            self.active.set_role(readiness.BACKUP, self.sim.now)
        else:
            self.sim.move(self.backup)
        self.active, self.backup = self.backup, self.active

    @invariant()
    def bounds_hold(self) -> None:
        if not hasattr(self, "sim"):
            return
        for node in (self.active, self.backup):
            assert len(node.up.cache) <= FLOWS
            assert node.up.peers[0].session.credit() >= 0
            assert not any(name.startswith("kernel_refused") for name in node.up.counters if "eexist" not in name)
        for flow, _since in self.backup.up.external_flows():
            assert replicable(flow)

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.heal()
            if not self.backup.up.complete:
                self.sim.run(5.0)
            if self.flushed:  # a flushed kernel stays so until somebody asks for its entries
                self.backup.up.resync()
            self.sim.converge(self.active, self.backup)


Pair.TestCase.settings = thorough(40)
TestPair = Pair.TestCase


def test_work_for_the_kernel_hurries_on_a_backup_only() -> None:
    sim = Simulation().start()
    assert not sim.fw2.up.hurried
    sim.fw1.up.kernel_changes(Changes({}, [tcp(1000)], [], 1), sim.now)
    for datagram in sim.fw1.up.tell(sim.now)[0]:
        sim.fw2.up.receive(0, datagram, sim.now)
    assert sim.fw2.up.hurried and not sim.fw1.up.hurried
    sim.fw2.up.replicas.loosen_flow(tcp(1001))
    sim.fw2.up.set_role("active", sim.now)
    assert sim.fw2.up.replicas.jobs and not sim.fw2.up.hurried
