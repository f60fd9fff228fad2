# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine when events are lost for long, when both nodes are active, and when the node that knows less is active."""

from __future__ import annotations

import errno

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import peer as peers
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import readiness
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import SeqAdj, Tuple
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.peer import (
    GONE_S,
    LEARN_S,
    SPLIT_BRAIN_S,
    Peer,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.situation import (
    EXTERNAL_CACHE,
    HOT_STANDBY,
    Settings,
)
from unit.simulation import Node, Simulation, address, tcp, udp

KERNEL_TIMEOUTS = {"tcp_timeout_established": 432_000, "udp_timeout": 40, "udp_timeout_stream": 150}


def opened(node: Node, ports: range) -> set[bytes]:
    return {node.kernel.open(tcp(port, port + 30_000) if port % 2 else udp(port)).key for port in ports}


# --- lost events -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("committed", [True, False])
def test_what_a_classic_backup_committed_is_made_again_if_it_may_be_gone(committed: bool) -> None:
    """Somebody empties its kernel's table, and not all of that is heard."""
    sim = Simulation(settings=Settings(mode=EXTERNAL_CACHE)).start()
    keys = opened(sim.fw1, range(1000, 1040))
    sim.run(1.0)
    kernel = sim.fw2.kernel
    if committed:
        assert sim.fw2.up.commit() == len(keys)
        sim.run(1.0)
    assert kernel.table.keys() == (keys if committed else set())
    for key in sorted(kernel.table)[:20]:
        kernel.table.pop(key)
    kernel.lose_events()
    sim.run(1.0)
    assert kernel.table.keys() == (keys if committed else set())


@pytest.mark.parametrize("every_s", [0.02, 0.5, 7.0])
def test_table_arrives_though_events_are_lost_all_the_time(every_s: float) -> None:
    """Each loss asks for the table again, and must not cut off the one that is on its way."""
    sim = Simulation()
    keys = opened(sim.fw1, range(1000, 1400))
    sim.fw1.role = readiness.ACTIVE
    sim.fw1.start(sim.now)
    sim.fw2.start(sim.now)
    sim.run_until(lambda: sim.fw1.up.dump)
    reasons = set()
    end = sim.now + 60.0
    while sim.now < end:
        sim.fw1.kernel.lose_events()
        sim.run(every_s)
        reasons.update(sim.fw1.up.verdict(sim.now).reasons)
    assert sim.fw2.up.complete
    assert set(sim.fw2.kernel.table) == keys
    # 5, 10, 20 and 40 s, and the time that reading takes
    assert 3 <= sim.fw1.up.counters["bulks_sent"] <= 6
    assert any(reason.startswith("kernel events were lost: the table is read again") for reason in reasons)
    sim.fw1.kernel.table.pop(tcp(1001).key)  # what was lost with the last events
    sim.fw1.kernel.table[tcp(2001).key] = tcp(2001)
    sim.converge(sim.fw1, sim.fw2)


def test_first_loss_is_made_good_for_at_once() -> None:
    sim = Simulation().start()
    opened(sim.fw1, range(1000, 1010))
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.kernel.table[tcp(2001).key] = tcp(2001)
    sim.fw1.kernel.lose_events()
    sim.run(1.0)
    assert tcp(2001).key in sim.fw2.kernel.table


def test_backup_that_loses_events_all_the_time_becomes_complete_and_goes_on_comparing() -> None:
    sim = Simulation()
    opened(sim.fw1, range(1000, 1100))
    sim.fw1.role = readiness.ACTIVE
    sim.fw1.start(sim.now)
    sim.fw2.start(sim.now)
    for _number in range(1000):
        sim.fw2.kernel.lose_events()
        sim.run(0.02)
    assert sim.fw2.up.complete
    assert "kernel events were lost" in sim.fw2.up.verdict(sim.now).reasons[0]
    assert sim.fw2.up.counters["dumps"] <= 5
    del sim.fw2.kernel.table[tcp(1001).key]
    sim.converge(sim.fw1, sim.fw2)


def test_queue_that_overflows_cuts_the_bulk_short_and_another_one_follows() -> None:
    sim = Simulation().start()
    opened(sim.fw1, range(1000, 1100))
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.up.resync()
    sim.run_until(lambda: sim.fw1.up.dump)
    sim.fw1.up.peers[0].pending.limit = len(sim.fw1.up.peers[0].pending) + 1
    opened(sim.fw1, range(2000, 2100))
    sim.turn()
    assert sim.fw1.up.counters["pending_overflows"] >= 1
    sim.fw1.up.peers[0].pending.limit = 100_000
    sim.converge(sim.fw1, sim.fw2)


# --- a bulk that waits -----------------------------------------------------------------------------------------------


def in_bulk(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    """fw1 is in the middle of its bulk for fw2, which gives no credit any more."""
    monkeypatch.setattr(peers, "DUMP_ROOM", 10)
    sim = Simulation()
    opened(sim.fw1, range(1000, 1100))
    sim.fw1.role = readiness.ACTIVE
    sim.fw1.start(sim.now)
    sim.fw2.start(sim.now)
    sim.run_until(lambda: len(sim.fw2.up.cache) > 10)
    monkeypatch.setattr(sim.fw1.up.peers[0].session, "credit", lambda: 0)
    sim.run(0.5)
    assert sim.fw1.up.dump and not sim.fw1.up.dump_room
    return sim


def test_table_is_read_again_though_a_bulk_waits_for_a_peer_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = in_bulk(monkeypatch)
    sim.wire.cut = True
    sim.fw1.kernel.lose_events()
    opened(sim.fw1, range(2000, 2010))
    for port in (1001, 1099, 2001):  # fw2 was told of it, was not yet, and never heard of it
        sim.fw1.kernel.close(tcp(port).key)
    sim.run(GONE_S + 3.0)
    assert sim.fw1.up.idle and sim.fw1.up.dumps.reread_at is None
    sim.fw1.kernel.table[tcp(3001).key] = tcp(3001)  # and without an event
    sim.fw1.kernel.lose_events()
    monkeypatch.undo()
    sim.converge(sim.fw1, sim.fw2)
    assert len(sim.fw2.kernel.table) == 108
    assert sim.fw1.up.counters["bulks_set_back"] == 1


def test_flush_does_not_wait_for_a_bulk_for_a_peer_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = in_bulk(monkeypatch)
    sim.fw2.kill()
    sim.fw1.up.flush_kernel()
    sim.run(GONE_S + 3.0)
    assert sim.fw1.up.idle
    assert not sim.fw1.kernel.table


def test_bulk_goes_on_after_a_short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = in_bulk(monkeypatch)
    sim.wire.cut = True
    sim.run(GONE_S - 1.0)
    monkeypatch.undo()
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw1.up.counters["bulks_set_back"] == 0
    assert sim.fw1.up.counters["bulks_sent"] == 1


def test_reread_that_waits_for_a_bulk_does_not_keep_the_loop_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = in_bulk(monkeypatch)
    sim.fw1.kernel.lose_events()
    sim.run(30.0)  # fw2 is alive, so its bulk keeps its place
    reread_at = sim.fw1.up.dumps.reread_at
    assert reread_at is not None and reread_at < sim.now < sim.fw1.up.next_deadline()
    monkeypatch.undo()
    sim.converge(sim.fw1, sim.fw2)


# --- refused ---------------------------------------------------------------------------------------------------------


def test_refused_flows_are_tried_again_without_reading_the_table() -> None:
    sim = Simulation().start()
    opened(sim.fw1, range(1000, 1010))
    full = sim.fw1.kernel.open(tcp(2001))
    sim.fw2.kernel.refuse[full.key] = errno.ENOMEM
    stale = tcp(9, 40_000)
    sim.fw2.kernel.table[stale.key] = stale
    taken = sim.fw1.kernel.open(tcp(2003, 40_000))
    sim.run(1.0)
    dumps = sim.fw2.up.counters["dumps"]
    sim.fw2.kernel.refuse.clear()
    sim.run(15.0)
    assert {full.key, taken.key} <= set(sim.fw2.kernel.table)
    assert stale.key not in sim.fw2.kernel.table
    assert sim.fw2.up.counters["dumps"] == dumps
    sim.converge(sim.fw1, sim.fw2)


def test_entry_in_the_way_that_the_peer_has_too_or_the_filter_excludes_is_not_removed() -> None:
    sim = Simulation().start()
    own = tcp(9, 40_000)
    own = own._replace(orig=own.orig._replace(src=address("192.168.1.2")))  # this node's own connection
    sim.fw2.kernel.table[own.key] = own
    sim.fw1.kernel.open(tcp(1001, 40_000))
    sim.fw1.kernel.open(tcp(1003, 50_000))
    replica = tcp(1005, 50_000)  # two flows of the peer with the same translation: a restart in between, say
    sim.fw1.kernel.table[replica.key] = replica
    sim.fw1.up.resync()
    sim.run(70.0)
    assert own.key in sim.fw2.kernel.table
    assert len({tcp(1003).key, tcp(1005).key} & set(sim.fw2.kernel.table)) == 1
    assert sim.fw2.up.counters["stale_removed"] == 0


# --- commands --------------------------------------------------------------------------------------------------------


def test_scheduled_flush_in_classic_mode_empties_the_backups_kernel_of_what_it_replicates() -> None:
    sim = Simulation(settings=Settings(mode=EXTERNAL_CACHE)).start()
    opened(sim.fw1, range(1000, 1010))
    own = tcp(9)._replace(orig=Tuple(address("192.168.1.3"), address("192.168.1.2"), b"\1\1\0\x16"))
    own = own._replace(reply=Tuple(own.orig.dst, own.orig.src, b"\0\x16\1\1"))
    for flow in (own, tcp(2001), udp(2002)):
        sim.fw2.kernel.table[flow.key] = flow
    sim.converge(sim.fw1, sim.fw2)
    sim.fw2.up.purge_later(sim.now)
    sim.run(59.0)
    assert len(sim.fw2.kernel.table) == 3
    sim.run(3.0)
    assert set(sim.fw2.kernel.table) == {own.key}
    assert len(sim.fw2.up.cache) == 10


# --- both active -----------------------------------------------------------------------------------------------------


def test_of_two_active_nodes_none_takes_flows_of_the_other_and_the_one_that_yields_adopts() -> None:
    sim = Simulation().start()
    opened(sim.fw1, range(1000, 1010))
    sim.converge(sim.fw1, sim.fw2)
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.fw1.kernel.open(tcp(2001))
    sim.run(2.0)
    assert tcp(2001).key in sim.fw2.kernel.table  # for a moment both are active at every move
    sim.run(3.0)
    sim.fw1.kernel.open(tcp(2003))
    sim.fw1.up.resync()
    sim.fw2.kernel.open(tcp(2005))
    sim.run(2.0)
    assert tcp(2003).key not in sim.fw2.kernel.table
    assert tcp(2005).key not in sim.fw1.kernel.table
    assert sim.fw2.up.counters["refused_split_brain"] >= 10
    assert sim.fw1.up.counters["refused_split_brain"] >= 1
    for node, other in ((sim.fw1, "fw2"), (sim.fw2, "fw1")):
        assert node.up.counters["split_brains"] == 1
        assert node.up.take_alarms() == [f"split brain: {other} is active too"]
        assert f"{other} is active too: split brain" in node.up.verdict(sim.now).reasons
    sim.fw1.set_role(readiness.BACKUP, sim.now)
    sim.converge(sim.fw2, sim.fw1)
    assert tcp(2005).key in sim.fw1.kernel.table
    assert tcp(2003).key not in sim.fw1.kernel.table  # of the history that lost
    assert sim.fw1.up.take_alarms() == ["the split brain is over: this node yielded"]
    assert sim.fw2.up.take_alarms() == ["the split brain is over"]


def liberal(node: Node) -> set[bytes]:
    return {
        key
        for key, flow in node.kernel.table.items()
        if all(flags & k.TCP_FLAG_BE_LIBERAL for flags in flow.tcp_flags or (0,))
    }


@pytest.mark.parametrize("seconds", [1.0, 6.0])
def test_connections_that_passed_through_the_other_active_node_are_loosened(seconds: float) -> None:
    """A node that was cut off, or frozen, wins the virtual IPs back: it has not seen what passed meanwhile."""
    sim = Simulation().start()
    own = {sim.fw1.kernel.open(tcp(port)).key for port in range(1000, 1010)}
    sim.fw1.kernel.open(udp(7))
    sim.converge(sim.fw1, sim.fw2)
    assert liberal(sim.fw1) == set()
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.run(seconds)
    assert liberal(sim.fw1) == own  # at once: packets may take this way and that
    late = sim.fw1.kernel.open(tcp(2001)).key
    sim.run(0.5)
    assert late not in liberal(sim.fw1)
    sim.fw2.set_role(readiness.BACKUP, sim.now)
    sim.converge(sim.fw1, sim.fw2)
    assert late in liberal(sim.fw1)
    assert sim.fw1.up.counters["kernel_loosened"] == 10 + 11


@pytest.mark.parametrize("seconds", [1.0, 6.0, 60.0])
def test_connections_that_passed_through_a_node_that_was_not_heard_as_active_are_loosened(seconds: float) -> None:
    """It took over and yielded again while nothing came through the sync link, or while this node was frozen."""
    sim = Simulation().start()
    own = {sim.fw1.kernel.open(tcp(port)).key for port in range(1000, 1010)}
    sim.converge(sim.fw1, sim.fw2)
    sim.wire.cut = True
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.run(seconds)
    sim.fw2.set_role(readiness.BACKUP, sim.now)
    sim.run(0.5)
    sim.wire.cut = False
    sim.converge(sim.fw1, sim.fw2)
    assert liberal(sim.fw1) == own
    assert sim.fw1.up.counters["kernel_loosened"] == 10


def test_a_hand_over_loosens_nothing() -> None:
    """For a moment both are active at every move; a table is not read for that."""
    sim = Simulation().start()
    opened(sim.fw1, range(1000, 1010))
    sim.converge(sim.fw1, sim.fw2)
    for old, new in ((sim.fw1, sim.fw2), (sim.fw2, sim.fw1)):
        loosened = new.up.counters["kernel_loosened"]
        new.set_role(readiness.ACTIVE, sim.now)
        sim.run(0.001)
        old.set_role(readiness.BACKUP, sim.now)
        sim.converge(new, old)
        assert new.up.counters["kernel_loosened"] == loosened == 0


def test_without_replication_nothing_is_loosened() -> None:
    sim = Simulation(settings=Settings(replicate=False))
    opened(sim.fw1, range(1000, 1010))
    sim.fw1.role = readiness.ACTIVE
    sim.fw1.start(sim.now)
    sim.fw2.start(sim.now)
    sim.run(2.0)
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.run(5.0)
    assert liberal(sim.fw1) == set()


@pytest.mark.parametrize("split_s", [1.0, 6.0])
def test_late_flows_are_taken_but_not_those_of_another_history(split_s: float) -> None:
    """What the former active node says after it yielded, of the time when it was active."""
    sim = Simulation().start()
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.run(split_s)
    sim.wire.deaf = "fw2"
    sim.fw1.kernel.open(tcp(2001))
    sim.run(0.1)
    sim.fw1.set_role(readiness.BACKUP, sim.now)
    sim.wire.deaf = ""
    sim.run(0.4)  # until the block is sent again
    assert (tcp(2001).key in sim.fw2.kernel.table) == (split_s < SPLIT_BRAIN_S)
    sim.converge(sim.fw2, sim.fw1)


@pytest.mark.parametrize("winner", ["fw1", "fw2"])
@pytest.mark.parametrize("new_sessions", [False, True])
def test_partition_heals_without_mixing_two_histories(winner: str, new_sessions: bool) -> None:
    """Both serve for a minute without hearing of each other; then one yields and becomes the other's equal."""
    sim = Simulation().start()
    shared = opened(sim.fw1, range(1000, 1020))
    sim.converge(sim.fw1, sim.fw2)
    sim.wire.cut = True
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    own = {"fw1": opened(sim.fw1, range(2000, 2010)), "fw2": opened(sim.fw2, range(3000, 3010))}
    sim.fw1.kernel.change(tcp(1001).key, state=k.TCP_LAST_ACK)  # one node knows that it ends, the other does not
    sim.run(60.0)
    if new_sessions:
        for node in sim.nodes.values():
            node.kill()
            node.start(sim.now)
    sim.heal()
    sim.run(6.0)  # both are active, and hear each other
    loser = "fw2" if winner == "fw1" else "fw1"
    for name in sim.nodes:
        assert not own["fw1" if name == "fw2" else "fw2"] & sim.nodes[name].kernel.table.keys()
        assert sim.nodes[name].up.counters["split_brains"] == 1
    before = dict(sim.nodes[winner].kernel.table)
    sim.nodes[loser].set_role(readiness.BACKUP, sim.now)
    sim.converge(sim.nodes[winner], sim.nodes[loser])
    assert sim.nodes[winner].kernel.table.keys() == before.keys() == shared | own[winner]
    assert sim.nodes[loser].kernel.table.keys() == shared | own[winner]


def test_flapping_loses_no_session_and_starts_no_storm_of_bulks() -> None:
    sim = Simulation().start()
    keys = opened(sim.fw1, range(1000, 1040))
    sim.converge(sim.fw1, sim.fw2)
    before = sum(node.up.counters["bulks_sent"] + node.up.counters["bulks_given"] for node in sim.nodes.values())
    for turn in range(24):
        active = sim.fw2 if turn % 2 == 0 else sim.fw1
        sim.move(active)
        keys |= opened(active, range(2000 + turn, 2001 + turn))
        sim.run(0.3 + turn % 5)
        assert keys <= active.kernel.table.keys()
    for node in sim.nodes.values():
        assert any("come and go" in reason for reason in node.up.verdict(sim.now).reasons)
        assert node.up.counters["bulks_held_back"]
        assert sum("changed sides" in alarm for alarm in node.up.take_alarms()) == 1
    bulks = sum(node.up.counters["bulks_sent"] + node.up.counters["bulks_given"] for node in sim.nodes.values())
    assert bulks - before <= 12  # without damping: one for each of 24 changes, and as many for those that ask
    sim.converge(sim.fw1, sim.fw2)
    assert keys <= sim.fw1.kernel.table.keys()


# --- the node that knows less is active ------------------------------------------------------------------------------


def blackout(sim: Simulation) -> set[bytes]:
    """fw1 lost power; fw2 served for a moment; then fw1, that knows nothing, gets the virtual IPs."""
    sim.start()
    keys = opened(sim.fw1, range(1000, 1040))
    sim.fw1.kernel.change(tcp(1001).key, labels=b"\1" * 16, seqadj=(SeqAdj(1, 0, 5), SeqAdj(0, 0, 0)))
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.crash()
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.run(5.0)
    keys |= opened(sim.fw2, range(2000, 2010))
    sim.fw1.role = readiness.ACTIVE
    sim.fw1.start(sim.now)
    sim.fw1.up.set_conditions("", KERNEL_TIMEOUTS, sim.now)
    sim.fw2.set_role(readiness.BACKUP, sim.now)
    return keys


def test_active_node_without_a_table_learns_that_of_its_peer_before_it_tells_its_own() -> None:
    sim = Simulation()
    keys = blackout(sim)
    said = []
    for _number in range(200):
        sim.turn()
        said += sim.fw1.up.verdict(sim.now).reasons
        assert keys <= set(sim.fw2.kernel.table)  # nothing is lost on the way
    assert "this node may lack flows: fw2 is asked for what it holds" in said
    sim.converge(sim.fw1, sim.fw2)
    assert set(sim.fw1.kernel.table) == keys
    assert sim.fw1.up.counters["tables_learned"] == 1
    held = sim.fw1.kernel.table
    assert held[tcp(1001).key].labels == b"\1" * 16
    assert held[tcp(1003).key].timeout == 432_000  # as at a take-over
    assert held[udp(1000).key].timeout == 40
    assert sim.fw1.up.counters["bulks_sent"] == 1
    bulks = sim.fw2.up.counters["bulks_given"]
    sim.run(30.0)
    assert sim.fw2.up.counters["bulks_given"] == bulks == 1  # once


def test_without_learning_the_sessions_of_the_blackout_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(Peer, "learn_more", lambda self, _now: setattr(self, "learn", ""))
    sim = Simulation()
    blackout(sim)
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw1.kernel.table == sim.fw2.kernel.table == {}


@pytest.mark.parametrize("mode", [HOT_STANDBY, EXTERNAL_CACHE])
def test_complete_backup_gives_a_rebooted_active_node_its_cache(mode: str) -> None:
    """The virtual IPs came back so fast that the backup never had them."""
    sim = Simulation(settings=Settings(mode=mode)).start()
    keys = opened(sim.fw1, range(1000, 1040))
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.kernel.change(tcp(1001).key, state=k.TCP_TIME_WAIT, timeout=100)
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.crash()
    sim.run(0.5)
    sim.fw1.role = readiness.ACTIVE
    sim.fw1.start(sim.now)
    sim.fw1.up.set_conditions("", KERNEL_TIMEOUTS, sim.now)
    sim.converge(sim.fw1, sim.fw2)
    assert set(sim.fw1.kernel.table) == keys
    assert (sim.fw1.kernel.table[tcp(1001).key].state, sim.fw1.kernel.table[tcp(1001).key].timeout) == (
        k.TCP_TIME_WAIT,
        100,
    )
    assert sim.fw1.kernel.table[udp(1000).key].timeout == 40


def test_own_flows_are_kept_when_the_peers_table_comes() -> None:
    sim = Simulation()
    blackout(sim)
    mine = tcp(1003, 7, mark=5)
    sim.fw1.kernel.open(mine)
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw1.kernel.table[mine.key].reply == mine.reply
    assert sim.fw1.up.counters["kept_own"] == 1


def test_take_over_while_not_ready_asks_the_former_active_node() -> None:
    sim = Simulation()
    keys = opened(sim.fw1, range(1000, 1200))
    sim.fw1.role = readiness.ACTIVE
    sim.fw1.start(sim.now)
    sim.fw2.start(sim.now)
    sim.run_until(lambda: len(sim.fw2.up.cache) > 50)
    assert not sim.fw2.up.complete
    sim.move(sim.fw2)
    sim.converge(sim.fw2, sim.fw1)
    assert set(sim.fw2.kernel.table) == keys


def test_restarted_daemon_on_the_active_node_and_a_short_loss_of_the_virtual_ips_ask_nobody() -> None:
    """The kernel's table is the truth: what the peer still has in addition ended."""
    sim = Simulation().start()
    opened(sim.fw1, range(1000, 1010))
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.kill()
    sim.fw1.kernel.close(tcp(1001).key)
    sim.fw1.start(sim.now)
    sim.converge(sim.fw1, sim.fw2)
    sim.fw1.set_role(readiness.BACKUP, sim.now)
    sim.fw1.kernel.close(tcp(1003).key)
    sim.run(0.5)
    sim.fw1.set_role(readiness.ACTIVE, sim.now)
    sim.converge(sim.fw1, sim.fw2)
    assert len(sim.fw1.kernel.table) == len(sim.fw2.kernel.table) == 8
    assert sim.fw2.up.counters["bulks_given"] == 0


@pytest.mark.parametrize("cut", [True, False])
def test_peer_that_gives_nothing_holds_up_the_own_table_for_a_bounded_time_only(cut: bool) -> None:
    sim = Simulation()
    blackout(sim)
    sim.run_until(lambda: sim.fw1.up.peers[0].learn == "asked")
    sim.wire.deaf = "fw2" if cut else ""
    if not cut:
        sim.fw2.kill()
        sim.run(2.0)
        sim.fw2.crash()
        sim.fw2.start(sim.now)
    sim.run(LEARN_S + 3.0)
    assert sim.fw1.up.peers[0].learn == ""
    sim.heal()
    opened(sim.fw1, range(5000, 5010))
    sim.run(3.0)
    sim.converge(sim.fw1, sim.fw2)


@pytest.mark.parametrize("booted", [True, False])
def test_node_with_replication_off_learns_nothing_and_nothing_stays_due(booted: bool) -> None:
    sim = Simulation()
    sim.fw1.start(sim.now)  # this one replicates
    sim.settings = Settings(replicate=False)
    sim.fw2.booted = booted
    sim.fw2.role = readiness.ACTIVE if booted else readiness.BACKUP
    sim.fw2.start(sim.now)
    sim.run(2.0)
    sim.move(sim.fw2)
    sim.run(LEARN_S + 5.0)
    assert sim.fw1.up.counters["bulks_requested"] == 0
    assert sim.fw2.up.calm
    assert sim.fw2.up.next_deadline() > sim.now


# --- what keepalived and people are told -----------------------------------------------------------------------------


def test_of_two_that_are_not_ready_the_one_with_flows_has_the_better_grade() -> None:
    sim = Simulation().start()
    opened(sim.fw1, range(1000, 1010))
    sim.converge(sim.fw1, sim.fw2)
    assert sim.fw2.up.verdict(sim.now).gate == readiness.OPEN
    sim.fw1.crash()
    sim.fw1.role = readiness.BACKUP
    sim.fw1.start(sim.now)
    sim.run(2.0)
    assert sim.fw1.up.verdict(sim.now).gate == readiness.KNOWS_NOTHING
    assert sim.fw2.up.verdict(sim.now).gate == readiness.KNOWS_SOME  # the new session made it incomplete
    assert sim.fw2.up.verdict(sim.now).verdict == readiness.NOT_READY


def test_progress_of_the_table_that_comes_in_is_said() -> None:
    sim = Simulation()
    opened(sim.fw1, range(1000, 1600))
    sim.start()
    sim.fw2.kill()
    sim.run(2.0)
    sim.fw1.up.source.doubt()  # so it comes out of the kernel, which takes a while
    sim.fw2.start(sim.now)
    sim.run_until(lambda: sim.fw2.up.cache.bulk_running and len(sim.fw2.up.cache) > 100)
    status = sim.fw2.up.peer_status(sim.now)[0]
    assert status["bulk"] == "receiving"
    assert status["progress"] == {"flows": len(sim.fw2.up.cache), "expected": 600}
    assert status["table"] == f"its table is coming in: {len(sim.fw2.up.cache)} of about 600 flows"
    (reason,) = sim.fw2.up.verdict(sim.now).reasons
    assert f"receiving, {len(sim.fw2.up.cache)} of about 600 flows so far (if fw1 fails, this node serves" in reason
    assert sim.fw1.up.peer_status(sim.now)[0]["table"] == "is being sent the table"
