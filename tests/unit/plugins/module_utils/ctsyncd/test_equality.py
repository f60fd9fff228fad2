# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever was put out of order behind the daemons' backs: it is seen, named and mended; not with ``compare`` off."""

from __future__ import annotations

from typing import Callable

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import (
    checker,
    digest,
    dumps,
    prover,
    readiness,
    wire,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import pack
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.situation import Settings
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from unit.simulation import Node, Simulation, tcp, udp

ROUND_S = 2 * prover.AUDIT_S + 10.0  # of all that is looked at now and then, twice


def pair(compare: bool = True, flows: int = 40, seed: int = 0, mode: str = "hot-standby") -> Simulation:
    sim = Simulation(seed, Settings(compare=compare, mode=mode)).start()
    for port in range(1000, 1000 + flows):
        sim.fw1.kernel.open(tcp(port, port + 30_000) if port % 2 else udp(port))
    sim.converge(sim.fw1, sim.fw2)
    return sim


def verified(sim: Simulation, node: Node) -> dict[str, int]:
    """What ``ctsyncd verify`` says on a node: how many flows differ in which way."""
    asked = node.up.verify(sim.now)
    sim.run_until(lambda: asked.look(sim.now), 30.0)
    assert asked.found is not None, asked.reason
    return {kind: count for kind, count in asked.found.counts.items() if count}


# --- faults: each on a pair that is equal, and what verify says of it ---


def lose_a_record(sim: Simulation) -> dict[str, int]:
    """The active node tells of a flow, and what it tells vanishes (a bug of it)."""
    sim.fw1.kernel.open(tcp(3001))
    sim.fw1.up.kernel_changes(sim.fw1.kernel.take_events(), sim.now)
    sim.fw1.up.peers[0].pending.clear()
    return {digest.MISSING: 1, digest.KERNEL_LEFT_OVER: 0}


def lose_an_end(sim: Simulation) -> dict[str, int]:
    sim.fw1.kernel.close(tcp(1001).key)
    sim.fw1.up.kernel_changes(sim.fw1.kernel.take_events(), sim.now)
    sim.fw1.up.peers[0].pending.clear()
    return {digest.LEFT_OVER: 1}


def miss_an_event(sim: Simulation) -> dict[str, int]:
    """A flow of the active node's kernel that made no event."""
    sim.fw1.kernel.open(tcp(3001))
    sim.fw1.kernel.events.clear()
    return {digest.MISSING: 1}


def miss_an_end(sim: Simulation) -> dict[str, int]:
    sim.fw1.kernel.close(tcp(1001, 31_001).key)
    sim.fw1.kernel.events.clear()
    return {digest.LEFT_OVER: 1}


def miss_a_state(sim: Simulation) -> dict[str, int]:
    sim.fw1.kernel.change(tcp(1001).key, state=k.TCP_TIME_WAIT)
    sim.fw1.kernel.change(udp(1002).key, mark=77)
    sim.fw1.kernel.events.clear()
    return {digest.STATE: 2}


def miss_another_translation(sim: Simulation) -> dict[str, int]:
    """A flow ended and began anew with another translation, and no event told."""
    sim.fw1.kernel.close(tcp(1001).key)
    sim.fw1.kernel.open(tcp(1001, 41_001))
    sim.fw1.kernel.events.clear()
    return {digest.TRANSLATION: 1}


def corrupt_the_cache(sim: Simulation) -> dict[str, int]:
    cache = sim.fw2.up.cache
    key, value, _extras = pack(tcp(1001, 41_001))
    cache.put(key, value, b"", sim.now)
    cache.take([tcp(1003).key])
    key, value, _extras = pack(tcp(3001))
    cache.put(key, value, b"", sim.now)
    return {digest.TRANSLATION: 1, digest.MISSING: 1, digest.LEFT_OVER: 1}


def corrupt_a_state_in_the_cache(sim: Simulation) -> dict[str, int]:
    key, value, _extras = pack(tcp(1001, 31_001, state=k.TCP_CLOSE_WAIT))
    sim.fw2.up.cache.put(key, value, b"", sim.now)
    return {digest.STATE: 1}


FAULTS: list[Callable[[Simulation], dict[str, int]]] = [
    lose_a_record,
    lose_an_end,
    miss_an_event,
    miss_an_end,
    miss_a_state,
    miss_another_translation,
    corrupt_the_cache,
    corrupt_a_state_in_the_cache,
]


def table_differs(sim: Simulation) -> list[str]:
    """Of the caches; the kernel's copies of the test's corruptions are another matter."""
    return [text for text in sim.differences(sim.fw1, sim.fw2) if text.startswith("cache")]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_differs_is_named_and_mended(fault: Callable[[Simulation], dict[str, int]], seed: int) -> None:
    sim = pair(seed=seed)
    assert verified(sim, sim.fw1) == verified(sim, sim.fw2) == {}
    expected = fault(sim)
    found = verified(sim, sim.fw2)
    assert {kind: found.get(kind, 0) for kind in expected} == expected
    sim.run_until(lambda: not sim.differences(sim.fw1, sim.fw2), ROUND_S)
    sim.converge(sim.fw1, sim.fw2)
    sim.run(prover.DIGEST_IDLE_S + 1.0)
    assert sim.fw2.up.checker.state == checker.EQUAL
    assert sim.fw1.up.peers[0].equal
    assert verified(sim, sim.fw1) == verified(sim, sim.fw2) == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_with_compare_off_it_stays_as_it_is(fault: Callable[[Simulation], dict[str, int]]) -> None:
    sim = pair(compare=False)
    expected = fault(sim)
    sim.run(2 * ROUND_S)
    assert table_differs(sim)
    for node in (sim.fw1, sim.fw2):  # but an operator who asks is told
        found = verified(sim, node)
        assert {kind: found.get(kind, 0) for kind in expected} == expected
    assert sim.fw2.up.counters["repairs_asked"] == 0


# --- the backup's kernel ---


def plant_a_ghost(sim: Simulation) -> dict[str, int]:
    sim.fw2.kernel.table[tcp(3001).key] = tcp(3001)
    return {digest.KERNEL_LEFT_OVER: 1}


def dig_a_hole(sim: Simulation) -> dict[str, int]:
    del sim.fw2.kernel.table[tcp(1001).key]
    return {digest.KERNEL_MISSING: 1}


def bend_copies(sim: Simulation) -> dict[str, int]:
    table = sim.fw2.kernel.table
    table[udp(1000).key] = table[udp(1000).key]._replace(mark=99)
    table[tcp(1003).key] = table[tcp(1003).key]._replace(state=k.TCP_CLOSE)
    table[tcp(1005).key] = tcp(1005, 51_005)
    return {digest.KERNEL_DIFFERS: 3}


@pytest.mark.parametrize("fault", [plant_a_ghost, dig_a_hole, bend_copies])
def test_kernel_of_the_backup_is_kept_in_order(fault: Callable[[Simulation], dict[str, int]]) -> None:
    sim = pair()
    copies = dict(sim.fw2.kernel.table)
    expected = fault(sim)
    assert verified(sim, sim.fw1) == verified(sim, sim.fw2) == expected
    sim.run_until(lambda: sim.fw2.kernel.table == copies, ROUND_S)
    assert verified(sim, sim.fw2) == {}


@pytest.mark.parametrize("fault", [plant_a_ghost, dig_a_hole, bend_copies])
def test_kernel_of_the_backup_is_not_touched_with_compare_off(fault: Callable[[Simulation], dict[str, int]]) -> None:
    sim = pair(compare=False)
    expected = fault(sim)
    sim.run(2 * ROUND_S)
    assert verified(sim, sim.fw2) == expected


def test_entry_that_is_no_replica_is_removed_only_when_it_was_seen_twice() -> None:
    """A node that becomes active forwards flows before its daemon knows: they must not be taken for ghosts."""
    sim = pair()
    sim.fw2.kernel.table[tcp(3001).key] = tcp(3001)
    looks = sim.fw2.up.counters["kernel_looks"]
    sim.run_until(lambda: sim.fw2.up.counters["kernel_looks"] > looks, ROUND_S)
    assert sim.fw2.up.checker._ghosts == {tcp(3001).key}
    assert tcp(3001).key in sim.fw2.kernel.table
    sim.move(sim.fw2)
    sim.run(ROUND_S)
    assert tcp(3001).key in sim.fw2.kernel.table


def test_operator_who_asks_all_the_time_does_not_keep_it_from_being_mended() -> None:
    sim = pair()
    plant_a_ghost(sim)
    sim.fw1.kernel.open(tcp(4001))
    sim.fw1.kernel.events.clear()
    end = sim.now + 2 * ROUND_S
    while verified(sim, sim.fw1) or verified(sim, sim.fw2):
        assert sim.now < end
    assert tcp(4001).key in sim.fw2.kernel.table
    assert tcp(3001).key not in sim.fw2.kernel.table


def test_comparison_of_which_a_part_is_lost_removes_nothing() -> None:
    sim = pair()
    corrupt_the_cache(sim)
    told = wire.Compare(7, wire.COMPARE_REPAIR, digest.ALL)
    before = dict(sim.fw2.up.cache.table)
    checks = sim.fw2.up.checker
    checks.begin(told, sim.now)
    checks.end(7, 40, sim.now)
    assert sim.fw2.up.cache.table == before
    assert sim.fw2.up.counters["comparisons_incomplete"] == 1
    checks.begin(told, sim.now)
    checks.end(7, 0, sim.now)  # the same, and it is true that there are none
    assert not sim.fw2.up.cache.table


# --- a comparison that comes to no end ---


def repairing(sim: Simulation) -> Simulation:
    """Flows differ in a few buckets, and a repair has begun; neither an audit nor a look at the kernel is near."""
    corrupt_the_cache(sim)
    sim.run_until(lambda: sim.fw2.up.checker._running, prover.DIGEST_IDLE_S + 1.0)
    assert sim.fw1.up.provers[0]._running
    sim.fw1.up.provers[0]._audit_at = sim.fw2.up.checker._kernel_at = float("inf")
    return sim


def cut_for_a_moment(sim: Simulation) -> None:
    sim.wire.cut = True
    sim.run(2.5)
    sim.heal()


def read_for_something_urgent(sim: Simulation) -> None:
    sim.fw1.up.dumps.want(dumps.LOOSEN)


def give_it_up(sim: Simulation) -> None:
    """The kernel's table did not hold still."""
    running = sim.fw1.up.provers[0]._running
    assert running is not None
    running.restarts = prover.RESTARTS
    sim.fw1.up.dump_finished(False, sim.now)


@pytest.mark.parametrize("break_off", [cut_for_a_moment, read_for_something_urgent, give_it_up])
def test_comparison_that_is_broken_off_does_not_keep_the_next_from_mending(
    break_off: Callable[[Simulation], None],
) -> None:
    sim = repairing(pair(flows=600))
    break_off(sim)
    sim.run_until(lambda: sim.fw2.up.checker.state == checker.EQUAL, 10.0)
    assert sim.fw2.up.counters["comparisons_incomplete"] == sim.fw2.up.counters["repairs_done"] == 1
    assert sim.fw2.up.peers[0].session.counters["sessions"] == 1


def test_repair_that_is_broken_off_is_paid_for_before_the_next() -> None:
    sim = repairing(pair(flows=600))
    sim.fw1.up.dump_cost(0.2)
    cut_for_a_moment(sim)
    assert sim.fw1.up.provers[0]._repair_at > sim.now + 10.0


@pytest.mark.parametrize("name", ["fw1", "fw2"])
def test_verify_that_is_broken_off_says_so(name: str) -> None:
    sim = pair()
    asked = sim.nodes[name].up.verify(sim.now)
    sim.run_until(lambda: sim.fw2.up.checker._running)
    give_it_up(sim)
    sim.run_until(lambda: asked.look(sim.now), 3.0)
    assert asked.reason in (
        "the other node broke it off: ask again",
        "the kernel's table did not hold still: ask again",
    )


def read_anew(sim: Simulation) -> None:
    sim.fw1.up.resync()


def restart_the_backup(sim: Simulation) -> None:
    sim.fw2.kill()
    sim.fw2.start(sim.now)


@pytest.mark.parametrize("bulk", [read_anew, restart_the_backup])
def test_nothing_is_said_of_a_comparison_where_all_begins_anew(
    bulk: Callable[[Simulation], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sim = repairing(pair())
    ends: list[int] = []
    monkeypatch.setattr(checker.Checker, "end", lambda _self, _number, flows, _now: ends.append(flows))
    bulk(sim)
    sim.run(5.0)
    assert sim.fw2.up.counters["bulks_received"] >= 1
    assert not ends


@pytest.mark.parametrize("silent_s", [0.0, checker.BROKEN_OFF_S])
def test_older_active_node_that_does_not_say_so_is_not_waited_for(
    silent_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so by beginning an audit; and where it does not, there is patience."""
    monkeypatch.setattr(prover.Prover, "_break_off", lambda _self, _now: None)
    sim = repairing(pair())
    read_for_something_urgent(sim)
    sim.run(10.0)
    checks = sim.fw2.up.checker
    assert checks._running
    if silent_s:
        checks._running.heard_at -= silent_s
    else:
        sim.fw1.up.provers[0]._audit_at = sim.now
    sim.run_until(lambda: checks.state == checker.EQUAL, 20.0)
    assert sim.fw2.up.counters["comparisons_incomplete"] == 1


def test_comparison_is_waited_for_while_something_of_it_comes() -> None:
    sim = pair()
    checks = sim.fw2.up.checker
    checks.begin(wire.Compare(7, wire.COMPARE_REPAIR, digest.ALL), sim.now)
    for after in (1, 2):
        checks.named(1, sim.now + after * checker.BROKEN_OFF_S - 1.0)
        checks.digest(0, 0, sim.now + after * checker.BROKEN_OFF_S)
    assert checks._running


def test_peer_that_is_slow_does_not_keep_a_comparison_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = pair()
    sim.fw1.up.verify(sim.now)
    proves = sim.fw1.up.provers[0]
    sim.run_until(lambda: proves._running and proves._running.held)
    assert proves.next_deadline() <= sim.now + prover.HOLD_S
    monkeypatch.setattr(prover, "DUMP_ROOM", 0)
    assert proves.next_deadline() == float("inf")  # what was read waits for an acknowledgement
    monkeypatch.undo()
    sim.run_until(lambda: proves._running and proves._running.read_at)
    running = proves._running
    assert running is not None
    running.held.clear()
    monkeypatch.setattr(prover, "DUMP_ROOM", 0)
    assert proves.next_deadline() <= sim.now + prover.HOLD_S  # the end needs no room


def test_repair_that_pauses_is_one_and_lets_verify_pass() -> None:
    sim = pair()
    proves = sim.fw1.up.provers[0]
    proves._repair_at = sim.now + 50.0
    for bucket in range(prover.REQUESTS + 1):
        proves.compare(wire.Compare(0, wire.COMPARE_REPAIR, frozenset((bucket,))), sim.now)
    (waits,) = proves._wanted
    assert waits.buckets == frozenset(range(prover.REQUESTS + 1))
    assert verified(sim, sim.fw2) == verified(sim, sim.fw1) == {}
    assert list(proves._wanted) == [waits]
    proves.compare(wire.Compare(8, 0, digest.ALL), sim.now)
    proves._repair_at = sim.now
    assert proves._next(sim.now) is waits  # and no longer
    sim.run_until(lambda: sim.fw2.up.counters["repairs_done"] == 1, 20.0)
    assert sim.fw1.up.counters["comparisons_refused"] == 0


# --- what cannot be mended ---


def test_table_that_cannot_be_made_equal_is_an_alarm_and_no_loop() -> None:
    sim = pair()
    sim.fw2.up.cache.limit = 40
    for port in range(3000, 3020):
        sim.fw1.kernel.open(tcp(port))
    sim.run(600.0)
    counters = sim.fw2.up.counters
    assert 3 <= counters["repairs_asked"] <= 10
    verdict = sim.fw2.up.verdict(sim.now)
    assert verdict.verdict == readiness.DEGRADED
    assert "differs from that of fw1 in" in verdict.reasons[0]
    assert "in vain" in verdict.reasons[0]
    other = sim.fw1.up.verdict(sim.now)
    assert (other.verdict, other.gate) == (readiness.DEGRADED, readiness.OPEN)
    assert "the table of fw2 differs from this node's" in other.reasons[0]
    assert verified(sim, sim.fw1) == verified(sim, sim.fw2) == {digest.MISSING: 20}
    sim.fw2.up.cache.limit = 1000
    sim.run_until(lambda: sim.fw2.up.checker.state == checker.EQUAL, checker.REPAIR_MAX_S + ROUND_S)
    sim.converge(sim.fw1, sim.fw2)


@pytest.mark.parametrize("node", ["fw1", "fw2"])
def test_verify_says_why_it_cannot_tell(node: str) -> None:
    sim = pair()
    sim.wire.cut = True
    sim.run(5.0)
    asked = sim.nodes[node].up.verify(sim.now)
    assert asked.done
    assert "is silent" in asked.reason
    sim.heal()
    sim.run(5.0)
    asked = sim.nodes[node].up.verify(sim.now)
    again = sim.nodes[node].up.verify(sim.now)
    assert again.reason == "another verify runs: ask again"
    sim.wire.cut = True
    sim.run_until(lambda: asked.look(sim.now), 90.0)
    assert asked.reason
    sim.move(sim.fw2)
    sim.heal()


# --- anything ---


class Disorder(RuleBasedStateMachine):
    """Traffic, faults of the wire, restarts, and hands in both tables; then the tables become equal by themselves."""

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.sim = pair(flows=12, seed=seed)
        self.ports = iter(range(5000, 60_000))

    @rule(seconds=st.sampled_from((0.01, 0.3, 2.0, 40.0)))
    def time_passes(self, seconds: float) -> None:
        self.sim.run(seconds)

    @rule(count=st.integers(1, 20))
    def flows_begin(self, count: int) -> None:
        for dummy in range(count):
            port = next(self.ports)
            self.sim.fw1.kernel.open(tcp(port) if port % 3 else udp(port))

    def _some(self, table: dict, place: int) -> bytes | None:
        keys = sorted(table)
        return keys[place % len(keys)] if keys else None

    @rule(place=st.integers(0, 100), told=st.booleans())
    def flow_ends(self, place: int, told: bool) -> None:
        key = self._some(self.sim.fw1.kernel.table, place)
        if key is not None:
            self.sim.fw1.kernel.close(key)
            if not told:
                del self.sim.fw1.kernel.events[-1]

    @rule(place=st.integers(0, 100), told=st.booleans(), mark=st.integers(1, 9))
    def flow_changes(self, place: int, told: bool, mark: int) -> None:
        key = self._some(self.sim.fw1.kernel.table, place)
        if key is not None:
            self.sim.fw1.kernel.change(key, mark=mark)
            if not told:
                del self.sim.fw1.kernel.events[-1]

    @rule()
    def flow_begins_unseen(self) -> None:
        self.sim.fw1.kernel.open(tcp(next(self.ports)))
        del self.sim.fw1.kernel.events[-1]

    @rule(place=st.integers(0, 100))
    def replica_is_forgotten(self, place: int) -> None:
        key = self._some(self.sim.fw2.up.cache.table, place)
        if key is not None:
            self.sim.fw2.up.replicas.delete([key])

    @rule()
    def replica_is_made_up(self) -> None:
        key, value, extras = pack(tcp(next(self.ports)))
        self.sim.fw2.up.replicas.store_flow(key, value, extras, self.sim.now)

    @rule(place=st.integers(0, 100), what=st.sampled_from(("remove", "mark", "ghost")))
    def hand_in_the_kernel_of_the_backup(self, place: int, what: str) -> None:
        table = self.sim.fw2.kernel.table
        key = self._some(table, place)
        if what == "ghost":
            flow = tcp(next(self.ports))
            table[flow.key] = flow
        elif key is not None and what == "remove":
            del table[key]
        elif key is not None:
            table[key] = table[key]._replace(mark=99)

    @rule(loss=st.sampled_from((0.0, 0.3)), cut=st.booleans())
    def wire_is_bad(self, loss: float, cut: bool) -> None:
        self.sim.wire.loss, self.sim.wire.cut = loss, cut

    @rule(name=st.sampled_from(("fw1", "fw2")))
    def daemon_restarts(self, name: str) -> None:
        node = self.sim.nodes[name]
        node.kill()
        node.start(self.sim.now)

    def teardown(self) -> None:
        if not hasattr(self, "sim"):
            return
        self.sim.heal()
        self.sim.run(ROUND_S)
        self.sim.converge(self.sim.fw1, self.sim.fw2, seconds=400.0)
        self.sim.run_until(lambda: self.sim.fw2.up.checker.state == checker.EQUAL, 30.0)
        assert verified(self.sim, self.sim.fw1) == {}
        counters = self.sim.fw2.up.counters
        assert counters["records_malformed"] == 0


TestDisorder = Disorder.TestCase
TestDisorder.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
