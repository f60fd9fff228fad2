# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One active node and two backups: each has its own session, queue, bulk and lag, and all agree in the end."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import peer as peers
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import readiness, situation, wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.dumps import GIVE
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.expectation import Expectation
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import SeqAdj
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.pending import Encoder, Pending
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import Changes, pack
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from unit.plugins.module_utils.ctsyncd.test_helpers import control
from unit.plugins.module_utils.ctsyncd.test_helpers import foreseen as expected_of
from unit.simulation import Node, Simulation, in_sheets, replicable, tcp, udp
from unit.traffic_rules import FLOWS, Events, thorough

ADJUSTED = (SeqAdj(100, 0, 5), SeqAdj(0, 0, 0))


def opened(node: Node, ports: range) -> set[bytes]:
    """Traffic of all kinds; its keys."""
    return {node.kernel.open(tcp(port, port + 30_000) if port % 2 else udp(port)).key for port in ports}


def trio(**changes: Any) -> Simulation:
    """fw1 active, fw2 and fw3 complete."""
    return Simulation(nodes=3, **changes).start()


def third(sim: Simulation) -> Node:
    return sim.nodes["fw3"]


def part(sim: Simulation, *pairs: tuple[Node, Node]) -> None:
    sim.wire.parted.update(frozenset((one.name, two.name)) for one, two in pairs)


# --- replication -----------------------------------------------------------------------------------------------------


def test_both_backups_become_equal_and_all_three_are_ready() -> None:
    sim = Simulation(nodes=3)
    keys = opened(sim.fw1, range(1000, 1020))  # before the daemons: by bulk
    sim.start()
    keys |= opened(sim.fw1, range(2000, 2020))
    sim.fw1.kernel.change(tcp(2001).key, labels=b"\1" * 16, seqadj=ADJUSTED)
    sim.converge(sim.fw1, sim.fw2, third(sim))
    assert sim.fw2.kernel.table.keys() == third(sim).kernel.table.keys() == keys
    assert sim.fw1.up.counters["bulks_sent"] == 1  # one dump for both
    for key in [tcp(1001).key, udp(2000).key]:
        sim.fw1.kernel.close(key)
    sim.converge(sim.fw1, sim.fw2, third(sim))
    assert len(third(sim).kernel.table) == 38
    status = sim.fw1.up.peer_status(sim.now)
    assert [(one["node"], one["bulk"], one["lag"]["events"]) for one in status] == [
        ("fw2", "complete", 0),
        ("fw3", "complete", 0),
    ]
    of_fw3 = third(sim).up.peer_status(sim.now)
    assert [one["table"] for one in of_fw3] == ["its whole table is here", "a backup, too"]


def test_extras_that_came_early_reach_both_backups_also_while_one_gets_a_bulk() -> None:
    sim = trio()
    sim.nodes["fw3"].kill()
    flow = sim.fw1.kernel.open(tcp(1001, state=k.TCP_SYN_SENT, helper="ftp"))
    sim.run(0.5)
    third(sim).start(sim.now)
    sim.run_until(lambda: sim.fw1.up.dump)
    sim.fw1.kernel.change(flow.key, state=k.TCP_ESTABLISHED, helper=None)
    sim.converge(sim.fw1, sim.fw2, third(sim))
    for node in (sim.fw2, third(sim)):
        assert node.kernel.table[flow.key].helper == "ftp"


@pytest.mark.parametrize("sheets", [False, True])
def test_what_both_are_told_is_encoded_once(sheets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode, part = wire.encode_rows, wire.RowColumns.encode
    monkeypatch.setattr(wire, "encode_rows", lambda key_len, joined: calls.append(1) or encode(key_len, joined))
    monkeypatch.setattr(wire.RowColumns, "encode", lambda many, *at: calls.append(1) or part(many, *at))
    costs = {}
    for nodes in (2, 3):
        sim = Simulation(nodes=nodes, payload=1400).start()
        calls.clear()
        for start in range(0, 2000, 100):
            rows = dict(pack(tcp(1000 + start + n, 3000 + start + n))[:2] for n in range(100))
            changes = Changes({13: rows}, [], [], 100, False, False)
            sim.fw1.up.kernel_changes(in_sheets(changes) if sheets else changes, sim.now)
            out = sim.fw1.up.poll(sim.now)
            assert len({sum(map(len, some)) for some in out}) == 1  # as many bytes for each
            for number, some in enumerate(out):
                for datagram in some:
                    sim.wire.send(sim.peers("fw1")[number], datagram, sim.now, "fw1")
            sim.run(0.02)
        costs[nodes] = len(calls)
    assert costs[2] == costs[3] > 0


def test_encoder_remembers_a_bounded_number_of_records() -> None:
    shared = Encoder(2)
    queues = [Pending(1000, shared) for _number in range(2)]
    for port in range(500):
        key, value, _extras = pack(tcp(1000 + port))
        blocks = []
        for queue in queues:
            queue.put_rows(13, {key: value}, 0.0)
            blocks.append(queue.take(1400))
        assert blocks[0] == blocks[1]
    assert len(shared._known or ()) <= 64
    assert Encoder(1)._known is None


# --- a slow or dead peer ---------------------------------------------------------------------------------------------


def test_dead_peer_delays_nobody_and_is_named() -> None:
    sim = trio()
    keys = opened(sim.fw1, range(1000, 1020))
    sim.converge(sim.fw1, sim.fw2, third(sim))
    part(sim, (sim.fw1, third(sim)), (sim.fw2, third(sim)))
    keys |= opened(sim.fw1, range(2000, 2020))
    sim.run(5.0)
    assert sim.fw2.kernel.table.keys() == keys
    assert sim.fw2.up.verdict(sim.now).verdict == readiness.READY
    judged = sim.fw1.up.verdict(sim.now)
    assert judged.verdict == readiness.DEGRADED
    assert len(judged.reasons) == 1 and judged.reasons[0].startswith("fw3 is silent for ")
    sim.fw1.up.resync()  # and a bulk in the middle of it
    sim.run(3.0)
    assert sim.fw2.up.counters["bulks_received"] == 2
    sim.converge(sim.fw1, sim.fw2, third(sim))


def test_queue_of_a_dead_peer_is_bounded_and_dropped_once_until_it_gets_a_bulk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sim = trio(settings=situation.Settings(table_limit=50))
    part(sim, (sim.fw1, third(sim)))
    monkeypatch.setattr(sim.fw1.up.peers[1].session, "credit", lambda: 0)
    bulks = sim.fw1.up.counters["bulks_sent"]
    for turn in range(80):
        flow = sim.fw1.kernel.open(tcp(1000 + turn))
        sim.run(0.1)
        sim.fw1.kernel.close(flow.key)
        sim.run(0.1)
        assert len(sim.fw1.up.peers[1].pending) <= 50
    assert sim.fw1.up.counters["pending_overflows"] == 1
    assert len(sim.fw1.up.peers[1].pending) <= 1
    assert sim.fw1.up.counters["bulks_sent"] == bulks  # none for a peer that does not hear it
    monkeypatch.undo()
    sim.converge(sim.fw1, sim.fw2, third(sim))
    assert sim.fw1.up.counters["bulks_sent"] == bulks + 1
    assert sim.fw2.up.counters["bulks_received"] == 1  # that one was not for fw2


def test_bulk_for_a_slow_peer_is_set_back_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "DUMP_ROOM", 10)
    sim = Simulation(nodes=3)
    keys = opened(sim.fw1, range(1000, 1100))
    sim.fw1.role = readiness.ACTIVE
    for node in sim.nodes.values():
        node.start(sim.now)
    sim.run_until(lambda: all(peer.established for peer in sim.fw1.up.peers))
    sim.run_until(lambda: sim.fw1.up.peers[1].bulking)
    monkeypatch.setattr(sim.fw1.up.peers[1].session, "credit", lambda: 0)  # its kernel is behind: it gives no credit
    sim.run_until(lambda: sim.fw2.up.complete, 5.0)
    assert sim.fw2.kernel.table.keys() == keys
    assert sim.fw1.up.counters["bulks_set_back"] >= 1
    assert not third(sim).up.complete
    sim.run(1.0)
    assert sim.fw1.up.verdict(sim.now).reasons == ("fw3 does not hold the complete table yet",)
    monkeypatch.undo()
    sim.converge(sim.fw1, sim.fw2, third(sim))


def test_healthy_backup_is_compared_though_another_one_died_in_its_bulk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "DUMP_ROOM", 10)
    sim = Simulation(nodes=3)
    keys = opened(sim.fw1, range(1000, 1100))
    sim.fw1.role = readiness.ACTIVE
    sim.fw1.start(sim.now)
    sim.fw2.start(sim.now)
    sim.run_until(lambda: sim.fw2.up.complete)
    sim.fw1.up.source.doubt()  # so it comes out of the kernel
    third(sim).start(sim.now)
    sim.run_until(lambda: third(sim).up.cache.bulk_running)
    monkeypatch.setattr(sim.fw1.up.peers[1].session, "credit", lambda: 0)
    third(sim).kill()
    sim.run(peers.GONE_S + 1.0)
    lost = tcp(1001).key
    sim.fw2.up.replicas.cache.take([lost])
    sim.fw2.up.copies.forget([lost])
    told = sim.fw2.up.counters["digests_equal"]
    sim.run(60.0)
    assert sim.fw2.up.counters["digests_equal"] > told
    assert sim.fw1.up.counters["audits"] > 0
    assert lost in sim.fw2.up.cache
    monkeypatch.undo()
    third(sim).start(sim.now)
    sim.converge(sim.fw1, sim.fw2, third(sim))
    assert third(sim).kernel.table.keys() == keys


def test_backup_does_not_wait_for_a_node_that_died_while_it_was_given_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """It follows another active node; the dead one gets nothing that it does not ask for again."""
    monkeypatch.setattr(peers, "DUMP_ROOM", 10)
    monkeypatch.setattr(peers, "SORTED_PER_TURN", 20)
    sim = trio()
    keys = opened(sim.fw1, range(1000, 1100))
    sim.converge(sim.fw1, sim.fw2, third(sim))
    sim.fw1.crash()
    sim.fw1.role = readiness.ACTIVE
    sim.fw1.start(sim.now)
    sim.run_until(lambda: sim.fw2.up.dumps.runs(GIVE))
    monkeypatch.setattr(sim.fw2.up.peers[0].session, "credit", lambda: 0)
    sim.run(0.1)
    assert not sim.fw2.up.dump_room
    sim.fw1.crash()
    sim.fw1.role = readiness.BACKUP
    sim.run(peers.GONE_S + 2.0)
    assert not sim.fw2.up.dumps.wanted
    sim.move(third(sim))
    sim.run(5.0)
    looks = sim.fw2.up.counters["kernel_looks"]
    sim.run(60.0)
    assert sim.fw2.up.counters["kernel_looks"] > looks
    monkeypatch.undo()
    given = sim.fw2.up.counters["bulks_given"]
    sim.fw1.start(sim.now)
    sim.converge(third(sim), sim.fw1, sim.fw2)
    assert sim.fw2.up.counters["bulks_given"] == given
    assert sim.fw1.kernel.table.keys() == keys


def test_bulk_of_a_new_session_is_for_that_peer_alone() -> None:
    sim = trio()
    keys = opened(sim.fw1, range(1000, 1040))
    sim.converge(sim.fw1, sim.fw2, third(sim))
    third(sim).crash()
    sim.run(3.0)
    keys |= opened(sim.fw1, range(2000, 2010))
    ended = {sim.fw1.kernel.open(tcp(3001)).key}
    sim.run(0.5)
    sim.fw1.up.source.doubt()  # so it comes out of the kernel
    third(sim).start(sim.now)
    sim.run_until(lambda: sim.fw1.up.peers[1].bulking)
    for key in ended:  # told to fw2, that has it, in the middle of the bulk for fw3
        sim.fw1.kernel.close(key)
    sim.converge(sim.fw1, sim.fw2, third(sim))
    assert sim.fw2.up.counters["bulks_received"] == 1
    assert sim.fw2.up.counters["stale_removed"] == 0
    assert sim.fw2.kernel.table.keys() == third(sim).kernel.table.keys() == keys


def test_bulk_out_of_memory_is_for_one_peer_alone_and_reads_no_table() -> None:
    sim = trio()
    keys = opened(sim.fw1, range(1000, 1040))
    sim.converge(sim.fw1, sim.fw2, third(sim))
    third(sim).crash()
    sim.run(3.0)
    keys |= opened(sim.fw1, range(2000, 2010))
    gone = tcp(1001).key
    sim.fw1.kernel.close(gone)
    sim.run(0.5)
    dumps = sim.fw1.up.counters["dumps"]
    third(sim).start(sim.now)
    sim.converge(sim.fw1, sim.fw2, third(sim))
    assert sim.fw1.up.counters["bulks_from_memory"] == 1
    assert sim.fw1.up.counters["dumps"] == dumps
    assert sim.fw2.up.counters["bulks_received"] == 1
    assert sim.fw2.kernel.table.keys() == third(sim).kernel.table.keys() == keys - {gone}


def test_peers_that_both_went_get_what_happened_meanwhile_out_of_memory() -> None:
    sim = trio()
    keys = opened(sim.fw1, range(1000, 1040))
    sim.converge(sim.fw1, sim.fw2, third(sim))
    sim.fw2.crash()
    third(sim).crash()
    sim.run(10.0)
    keys |= opened(sim.fw1, range(2000, 2010))
    sim.fw1.kernel.change(tcp(2001).key, mark=7)
    sim.run(1.0)
    dumps = sim.fw1.up.counters["dumps"]
    sim.fw2.start(sim.now)
    sim.run(0.3)
    third(sim).start(sim.now)
    sim.converge(sim.fw1, sim.fw2, third(sim))
    assert sim.fw1.up.counters["bulks_from_memory"] == 2
    assert sim.fw1.up.counters["dumps"] == dumps
    assert third(sim).kernel.table.keys() == keys


# --- who is active ---------------------------------------------------------------------------------------------------


def test_sessions_go_on_on_the_second_and_then_on_the_third_node() -> None:
    sim = trio()
    keys = opened(sim.fw1, range(1000, 1040))
    sim.converge(sim.fw1, sim.fw2, third(sim))
    sim.fw1.crash()
    sim.run(1.0)
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    keys |= opened(sim.fw2, range(2000, 2010))
    sim.run(3.0)
    assert third(sim).up.complete  # from fw2 now
    assert third(sim).up.verdict(sim.now) == (readiness.READY, (), 0, True)
    judged = sim.fw2.up.verdict(sim.now)
    assert judged.verdict == readiness.DEGRADED
    assert all("fw1" in reason for reason in judged.reasons) and judged.reasons
    assert third(sim).kernel.table.keys() == keys
    sim.fw2.crash()
    sim.run(1.0)
    third(sim).set_role(readiness.ACTIVE, sim.now)
    sim.run(3.0)
    assert third(sim).kernel.table.keys() == keys
    assert not third(sim).up.peers[0].learn and not third(sim).up.peers[1].learn  # it knew all
    sim.fw1.role = sim.fw2.role = readiness.BACKUP
    for node in (sim.fw1, sim.fw2):
        node.start(sim.now)
    sim.converge(third(sim), sim.fw1, sim.fw2)
    assert sim.fw1.kernel.table.keys() == keys


@pytest.mark.parametrize("loss", [0.0, 0.5])
def test_planned_hand_over_is_followed_by_the_third_node(loss: float) -> None:
    sim = trio()
    keys = opened(sim.fw1, range(1000, 1040))
    sim.converge(sim.fw1, sim.fw2, third(sim))
    sim.wire.loss = loss
    last = sim.fw1.kernel.open(tcp(2001)).key  # in the last moment
    sim.turn()
    sim.move(sim.fw2)
    keys |= opened(sim.fw2, range(3000, 3004)) | {last}
    sim.converge(sim.fw2, sim.fw1, third(sim))
    for node in sim.nodes.values():
        assert node.kernel.table.keys() == keys
    assert third(sim).up.leader is third(sim).up.peers[1]
    assert third(sim).up.counters["leaders_followed"] == 2


def test_backup_takes_nothing_of_another_backup() -> None:
    sim = trio()
    keys = opened(sim.fw1, range(1000, 1010))
    sim.converge(sim.fw1, sim.fw2, third(sim))
    key, value, extras = pack(tcp(5001))
    others = third(sim).up.peers[1]
    assert others.name == "fw2"
    record = wire.tlv(wire.RECORD_FLOW, wire.encode_flow_record(key, value, extras))
    gone = wire.tlv(wire.RECORD_GONE, wire.encode_gone(13, tcp(1001).key))
    third(sim).up._receive_records(others, wire.encode_bulk_begin(1) + record + gone + wire.encode_bulk_end(1, 0), 0.0)
    sim.run(1.0)
    assert third(sim).kernel.table.keys() == keys
    assert third(sim).up.counters["refused_not_leader"] == 1
    sim.converge(sim.fw1, sim.fw2, third(sim))


def test_rebooted_node_that_gets_the_virtual_ips_learns_from_both_others() -> None:
    """Each of them knows something: fw3 did not hear fw2's last flows, fw2 died for a moment."""
    sim = trio()
    keys = opened(sim.fw1, range(1000, 1020))
    sim.converge(sim.fw1, sim.fw2, third(sim))
    sim.fw1.crash()
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    sim.run(5.0)
    part(sim, (sim.fw2, third(sim)))
    keys |= opened(sim.fw2, range(2000, 2010))
    sim.run(1.0)
    sim.fw2.set_role(readiness.BACKUP, sim.now)
    sim.heal()
    sim.fw1.role = readiness.ACTIVE
    sim.fw1.start(sim.now)
    sim.converge(sim.fw1, sim.fw2, third(sim))
    assert sim.fw1.up.counters["tables_learned"] == 2
    assert sim.fw1.kernel.table.keys() == keys


def foreseen(sim: Simulation, node: Node) -> Expectation:
    """A helper's: a control connection, and what it announced."""
    master = node.kernel.open(control())
    one = expected_of(master)
    node.kernel.expect(one)
    sim.run(1.0)
    return one


def test_every_backup_gets_every_expectation_and_its_end() -> None:
    sim = trio()
    one = foreseen(sim, sim.fw1)
    backups = (sim.fw2, third(sim))
    assert [one.name in node.kernel.expectations for node in backups] == [True, True]
    part(sim, (sim.fw1, third(sim)))
    two = expected_of(control(), port=4001)
    sim.fw1.kernel.expect(two)
    sim.fw1.kernel.unexpect(one.name)
    sim.run(5.0)
    assert [two.name in node.kernel.expectations for node in backups] == [True, False]
    sim.heal()
    sim.run(5.0)
    assert [node.kernel.expectations.keys() == {two.name} for node in backups] == [True, True]
    third(sim).kill()
    third(sim).start(sim.now)
    sim.run(5.0)  # by bulk, out of memory for it alone
    assert [node.kernel.expectations.keys() == {two.name} for node in backups] == [True, True]
    sim.fw1.crash()
    third(sim).set_role(readiness.ACTIVE, sim.now)
    sim.run(2.0)
    assert third(sim).kernel.expectations[two.name].timeout < 300
    assert sim.fw2.kernel.expectations.keys() == {two.name}  # fw3's by now


@pytest.mark.parametrize("former", ["backup", "active"])
def test_a_node_that_lacks_flows_learns_their_expectations_too(former: str) -> None:
    """fw1 reboots with the virtual IPs; the others were its backups, or one of them was active for a while."""
    sim = trio()
    active = sim.fw1 if former == "backup" else sim.fw2
    if former == "active":
        sim.fw1.set_role(readiness.BACKUP, sim.now)
        sim.fw2.set_role(readiness.ACTIVE, sim.now)
        sim.run(2.0)
    one = foreseen(sim, active)
    sim.fw1.crash()
    sim.run(1.0)
    if former == "active":
        third(sim).kill()  # fw2 alone knows
        sim.fw2.set_role(readiness.BACKUP, sim.now)
    sim.fw1.role = readiness.ACTIVE
    sim.fw1.requests_per_turn = 1  # the kernel is slow: no expectation may overtake its master
    sim.fw1.start(sim.now)
    sim.run_until(lambda: sim.fw1.up.counters["tables_learned"] == (2 if former == "backup" else 1), 30.0)
    sim.run(2.0)
    assert sim.fw1.kernel.table[one.master_key].helper == "ftp"
    assert 280 < sim.fw1.kernel.expectations[one.name].timeout < 300
    sim.run(10.0)
    assert sim.fw2.kernel.expectations.keys() == {one.name}
    assert sim.fw1.up.helpers.describe()["internal"] == 1


def test_return_of_a_rebooted_node_with_two_others_alive() -> None:
    sim = trio()
    keys = opened(sim.fw1, range(1000, 1020))
    sim.converge(sim.fw1, sim.fw2, third(sim))
    sim.fw1.crash()
    sim.move(sim.fw2)
    sim.run(5.0)
    sim.fw1.start(sim.now)
    gates = []
    while not sim.fw1.up.complete:
        gates.append(sim.fw1.up.verdict(sim.now).gate)
        sim.turn()
        assert third(sim).up.verdict(sim.now).gate == 0
    assert set(gates) <= {1, 2} and gates[0] == 2
    sim.converge(sim.fw2, sim.fw1, third(sim))
    assert sim.fw1.kernel.table.keys() == keys


def test_of_backups_that_are_not_ready_the_better_informed_is_elected() -> None:
    """keepalived's election with the gates that the nodes write: somebody always wins, and it is the right one."""
    weight, base = 60, {"fw1": 150, "fw2": 140, "fw3": 130}

    def elected(sim: Simulation, *alive: Node) -> str:
        priority = {node.name: base[node.name] - weight * node.up.verdict(sim.now).gate for node in alive}
        assert all(value >= 1 for value in priority.values())
        return max(priority, key=lambda name: priority[name])

    sim = trio()
    opened(sim.fw1, range(1000, 1020))
    sim.converge(sim.fw1, sim.fw2, third(sim))
    assert elected(sim, sim.fw2, third(sim)) == "fw2"
    part(sim, (sim.fw1, sim.fw2))  # its line is broken: what it has gets old
    sim.run(60.0)
    assert elected(sim, sim.fw2, third(sim)) == "fw3"
    sim.heal()
    sim.converge(sim.fw1, sim.fw2, third(sim))
    sim.fw2.crash()
    sim.fw2.start(sim.now)  # knows nothing yet
    assert elected(sim, sim.fw2, third(sim)) == "fw3"
    sim.fw1.crash()
    third(sim).crash()
    third(sim).start(sim.now)
    sim.run(3.0)
    assert elected(sim, sim.fw2, third(sim)) == "fw2"
    assert {node.up.verdict(sim.now).verdict for node in (sim.fw2, third(sim))} == {readiness.NOT_READY}
    sim.fw1.start(sim.now)
    sim.run(3.0)
    assert elected(sim, sim.fw1, sim.fw2, third(sim)) == "fw1"  # three that are not ready: no deadlock


# --- split brain -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("winner", ["fw1", "fw2"])
def test_third_node_follows_one_of_two_histories_and_ends_with_the_winner(winner: str) -> None:
    sim = trio()
    shared = opened(sim.fw1, range(1000, 1020))
    sim.converge(sim.fw1, sim.fw2, third(sim))
    part(sim, (sim.fw1, sim.fw2), (sim.fw1, third(sim)))
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    own = {"fw1": opened(sim.fw1, range(2000, 2010)), "fw2": opened(sim.fw2, range(3000, 3010))}
    sim.run(30.0)
    assert third(sim).up.complete
    assert third(sim).kernel.table.keys() == shared | own["fw2"]
    sim.heal()
    sim.run(6.0)
    assert third(sim).kernel.table.keys() in (shared | own["fw1"], shared | own["fw2"])  # never both
    judged = third(sim).up.verdict(sim.now)
    assert "fw1 and fw2 are active at the same time: split brain" in judged.reasons
    assert sim.fw1.up.counters["split_brains"] == sim.fw2.up.counters["split_brains"] == 1
    loser = sim.nodes["fw2" if winner == "fw1" else "fw1"]
    loser.set_role(readiness.BACKUP, sim.now)
    sim.converge(sim.nodes[winner], loser, third(sim))
    for node in sim.nodes.values():
        assert node.kernel.table.keys() == shared | own[winner]


# --- everything at once ----------------------------------------------------------------------------------------------

NAMES = st.sampled_from(("fw1", "fw2", "fw3"))


class Trio(Events):
    """Traffic, a bad wire, partitions of any two nodes, restarts, overruns, moved virtual IPs, in any order."""

    @initialize(seed=st.integers(0, 2**32 - 1))
    def begin(self, seed: int) -> None:
        self.sim = Simulation(seed, nodes=3).start()
        self.active = self.sim.fw1

    @property
    def backups(self) -> list[Node]:
        return [node for node in self.sim.nodes.values() if node is not self.active]

    @rule(loss=st.sampled_from((0.0, 0.3, 0.7)), jitter=st.sampled_from((0.0, 0.1)))
    def wire_changes(self, loss: float, jitter: float) -> None:
        self.sim.wire.loss, self.sim.wire.duplication, self.sim.wire.jitter_s = loss, loss / 2, jitter
        self.sim.wire.corruption = loss / 10

    @rule(one=NAMES, two=NAMES)
    def two_part_or_meet_again(self, one: str, two: str) -> None:
        if one != two:
            self.sim.wire.parted ^= {frozenset((one, two))}

    @rule(seconds=st.sampled_from((0.003, 0.05, 0.5, 3.0, 12.0)))
    def time_passes(self, seconds: float) -> None:
        self.sim.run(seconds)

    @rule(number=st.integers(0, 1))
    def backup_reboots(self, number: int) -> None:
        node = self.backups[number]
        node.crash()
        self.sim.run(1.0)
        node.start(self.sim.now)

    @rule(number=st.integers(0, 1), what=st.sampled_from(("resync", "request", "overrun")))
    def backup_is_disturbed(self, number: int, what: str) -> None:
        node = self.backups[number]
        if what == "resync":
            node.up.resync()
        elif what == "request":
            node.up.request_bulk(self.sim.now)
        else:
            node.kernel.lose_events()

    @precondition(lambda self: any(node.up.complete for node in self.backups))
    @rule(overlap=st.booleans())
    def virtual_ips_move(self, overlap: bool) -> None:
        """To a backup that is complete, as keepalived would.  What it had not heard yet would be lost, and could not be
        made good: the entry of the former active node goes on to say it."""
        heir = next(node for node in self.backups if node.up.complete)
        if self.active.kernel.lost or self.active.up.dumps.wanted or self.sim.differences(self.active, heir):
            return
        if overlap:
            heir.set_role(readiness.ACTIVE, self.sim.now)
            self.sim.run(0.05)
            self.active.set_role(readiness.BACKUP, self.sim.now)
        else:
            self.sim.move(heir)
        self.active = heir

    @invariant()
    def bounds_hold(self) -> None:
        if not hasattr(self, "sim"):
            return
        for node in self.sim.nodes.values():
            assert len(node.up.cache) <= FLOWS
            assert all(peer.session.credit() >= 0 for peer in node.up.peers)
            assert not any(name.startswith("kernel_refused") for name in node.up.counters if "eexist" not in name)
        for node in self.backups:
            for flow, _since in node.up.external_flows():
                assert replicable(flow)

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.heal()
            before = {key for key, flow in self.active.kernel.table.items() if replicable(flow)}
            self.sim.converge(self.active, *self.backups)
            assert before <= self.active.kernel.table.keys()  # nobody took a session from the active node


Trio.TestCase.settings = thorough(25)
TestTrio = Trio.TestCase
