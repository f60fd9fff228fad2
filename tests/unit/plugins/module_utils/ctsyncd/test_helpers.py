# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Expectations and what helpers change without an event: two engines, two model kernels."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import config, readiness
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.expectation import (
    INACTIVE,
    PERMANENT,
    Expectation,
    Nat,
    pack,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.expectation_source import LINGER_S
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow, SeqAdj, Tuple
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.situation import Settings
from unit.simulation import VIP, Simulation, address, tcp

PARKED_S = 86_400
ADJUSTED = (SeqAdj(77, 0, 2), SeqAdj(0, 0, 0))


def control(port: int = 1021, **changes: Any) -> Flow:
    """An FTP control connection behind SNAT."""
    return tcp(port, helper="ftp", **changes)


def foreseen(master: Flow, port: int = 4000, **changes: Any) -> Expectation:
    """A data connection from the server to the virtual IP."""
    one = Expectation(
        *(k.AF_INET, k.IPPROTO_TCP),
        Tuple(address("192.168.1.3"), address(VIP), struct.pack("!HH", 0, port)),
        Tuple(b"\xff" * 4, b"\xff" * 4, struct.pack("!HH", 0, 0xFFFF)),
        *(k.IPPROTO_TCP, master.orig),
        timeout=300,
        helper="ftp",
        nat=Nat(1, bytes(4), struct.pack("!H", port)),
        function="nat-follow-master",
    )
    return one._replace(**changes).of(master.key)


def held(sim: Simulation, one: Expectation) -> Expectation | None:
    """As the backup's kernel has it."""
    return sim.fw2.kernel.expectations.get(one.name)


def replicated(**settings: Any) -> tuple[Simulation, Flow, Expectation]:
    sim = Simulation(settings=Settings(park_timeout_s=PARKED_S, **settings) if settings else None).start()
    master = sim.fw1.kernel.open(control())
    one = foreseen(master)
    sim.fw1.kernel.expect(one)
    sim.run(1.0)
    return sim, master, one


def switch(sim: Simulation) -> None:
    """fw1 dies; fw2 takes over."""
    sim.fw1.crash()
    sim.fw2.set_role(readiness.ACTIVE, sim.now)


def test_an_expectation_waits_parked_and_gets_its_true_timer_at_take_over() -> None:
    sim, _master, one = replicated()
    assert held(sim, one) == one._replace(timeout=PARKED_S)
    sim.run(2.0)
    switch(sim)
    sim.run(1.0)
    copy = held(sim, one)
    assert copy is not None and 290 < copy.timeout < 299
    assert len(sim.fw2.up.helpers.replicas) == 0
    assert sim.fw2.up.helpers.describe() == {"internal": 1, "external": 0, "helper_flows": 1}


def test_the_classic_mode_makes_it_at_take_over() -> None:
    sim, _master, one = replicated(mode="external-cache")
    assert held(sim, one) is None
    assert [told for told, _since in sim.fw2.up.helpers.replicas.items()] == [one._replace(ident=None)]
    switch(sim)
    sim.run(1.0)
    copy = held(sim, one)
    assert copy is not None and 290 < copy.timeout <= 300


def test_one_that_ends_by_its_timer_goes_at_once() -> None:
    sim, _master, one = replicated()
    sim.fw1.kernel.unexpect(one.name)
    sim.run(0.5)
    assert held(sim, one) is None
    assert len(sim.fw2.up.helpers.replicas) == 0


def test_one_that_was_used_up_stays_a_moment_for_retransmissions_and_is_not_made_anew() -> None:
    sim, _master, one = replicated()
    sim.fw1.kernel.unexpect(one.name, timeout=290)
    sim.run(LINGER_S / 2)
    assert held(sim, one) == one._replace(timeout=PARKED_S)
    switch(sim)
    sim.run(1.0)
    copy = held(sim, one)
    assert copy is not None and copy.timeout <= LINGER_S
    sim, _master, one = replicated()
    sim.fw1.kernel.unexpect(one.name, timeout=290)
    sim.run(LINGER_S / 2)
    del sim.fw2.kernel.expectations[one.name]  # the helper's policy let one other come in its place
    switch(sim)
    sim.run(1.0)
    assert held(sim, one) is None
    sim, _master, one = replicated()
    sim.fw1.kernel.unexpect(one.name, timeout=290)
    sim.run(LINGER_S + 1.0)
    assert held(sim, one) is None


def test_one_goes_with_its_master() -> None:
    sim, master, one = replicated()
    sim.fw1.kernel.close(master.key)
    sim.run(0.5)
    assert held(sim, one) is None
    assert (len(sim.fw2.up.helpers.replicas), len(sim.fw1.up.helpers.source)) == (0, 0)
    assert sim.fw1.up.helpers.source.masters == 0


def test_what_the_backups_kernel_lost_is_made_again_and_what_it_has_too_much_goes() -> None:
    sim, master, one = replicated()
    other = foreseen(master, 4001)
    del sim.fw2.kernel.expectations[one.name]
    sim.fw2.kernel.expectations[other.name] = other
    sim.run(12.0)
    assert held(sim, one) is not None
    assert held(sim, other) is None
    assert sim.fw2.up.counters["expectations_stale"] == 1


def test_what_was_lost_just_before_a_take_over_is_made_then() -> None:
    sim, _master, one = replicated()
    del sim.fw2.kernel.expectations[one.name]
    switch(sim)
    sim.run(1.0)
    copy = held(sim, one)
    assert copy is not None and copy.timeout <= 300


def test_expectations_before_the_session_are_in_the_bulk_and_stale_ones_are_not() -> None:
    sim, master, one = replicated()
    sim.fw1.kill()
    sim.run(0.5)
    sim.fw1.kernel.expectations.clear()
    other = foreseen(master, 4001)
    sim.fw1.kernel.expect(other)
    sim.fw1.start(sim.now)
    sim.run(5.0)
    assert held(sim, one) is None
    assert held(sim, other) is not None


def test_a_master_that_is_not_replicated_yet_lets_its_expectation_wait() -> None:
    """A SIP offer makes expectations with the first packet of a flow that nobody answered yet."""
    sim = Simulation().start()
    master = control(state=k.TCP_SYN_SENT)
    sim.fw1.kernel.open(master)
    one = foreseen(master)
    sim.fw1.kernel.expect(one)
    sim.run(1.0)
    assert held(sim, one) is None
    sim.fw1.kernel.change(master.key, state=k.TCP_ESTABLISHED)
    sim.run(1.0)
    assert held(sim, one) == one._replace(timeout=PARKED_S)


def test_there_are_not_more_than_the_limit() -> None:
    sim = Simulation(settings=Settings(park_timeout_s=PARKED_S, max_expectations=5)).start()
    master = sim.fw1.kernel.open(control())
    for port in range(8):
        sim.fw1.kernel.expect(foreseen(master, 4000 + port))
    sim.run(2.0)
    assert len(sim.fw2.kernel.expectations) == 5
    assert sim.fw1.up.counters["expectations_over_limit"] >= 3
    for port in range(5):
        sim.fw1.kernel.unexpect(foreseen(master, 4000 + port).name)
    sim.run(7.0)  # the walk finds the others
    assert {one.expected.l4[2:] for one in sim.fw2.kernel.expectations.values()} == {
        struct.pack("!H", port) for port in (4005, 4006, 4007)
    }


def test_equal_masters_in_two_zones_have_their_own_expectations() -> None:
    sim = Simulation().start()
    masters = [control()._replace(zone=zone) for zone in (1, 2)]
    for number, master in enumerate(masters):
        sim.fw1.kernel.open(master._replace(reply=master.reply._replace(l4=struct.pack("!HH", 22, 2000 + number))))
    sim.run(0.5)
    ones = [foreseen(masters[0]), foreseen(masters[1]), foreseen(masters[1], 4001)]
    for one in ones:
        sim.fw1.kernel.expect(one)
    sim.run(1.0)
    assert set(sim.fw2.kernel.expectations) == {one.name for one in ones}
    sim.fw1.kernel.unexpect(ones[0].name)
    sim.run(LINGER_S + 1.0)
    assert set(sim.fw2.kernel.expectations) == {one.name for one in ones[1:]}


def test_lost_events_are_made_up_for_by_a_walk() -> None:
    sim, master, one = replicated()
    other = foreseen(master, 4001)
    sim.fw1.kernel.expectations[other.name] = other
    del sim.fw1.kernel.expectations[one.name]
    sim.fw1.up.helpers.events([], True, sim.now)
    sim.run(0.5)
    assert held(sim, other) is not None
    assert held(sim, one) is None


def test_a_helper_that_changes_an_expectation_makes_no_event() -> None:
    """SIP: a registration is confirmed."""
    sim, _master, one = replicated()
    sim.fw1.kernel.expectations[one.name] = one._replace(flags=PERMANENT | INACTIVE)
    sim.run(7.0)
    copy = held(sim, one)
    assert copy is not None and copy.flags == PERMANENT | INACTIVE
    sim.fw1.kernel.expectations[one.name] = one._replace(flags=PERMANENT, timeout=3600)
    sim.run(7.0)
    copy = held(sim, one)
    assert copy is not None and copy.flags == PERMANENT
    switch(sim)
    sim.run(1.0)
    copy = held(sim, one)
    assert copy is not None and 3500 < copy.timeout <= 3600


@pytest.mark.parametrize("event", [True, False])
def test_a_sequence_adjustment_without_an_event_is_found(event: bool) -> None:
    sim, master, one = replicated()
    if event:
        sim.fw1.kernel.expect(foreseen(master, 4001))
        sim.run(0.005)  # the event is read before the helper changes the packet
    sim.fw1.kernel.table[master.key] = sim.fw1.kernel.table[master.key]._replace(seqadj=ADJUSTED)
    assert not sim.fw1.kernel.events
    sim.run(0.2 if event else 2.5)
    assert sim.fw2.kernel.table[master.key].seqadj == ADJUSTED
    assert sim.fw1.up.counters["sequence_adjustments_found"] == 1
    assert held(sim, one) is not None


def test_what_this_kernel_does_not_know_is_named_and_tried_again() -> None:
    sim = Simulation().start()
    sim.fw2.kernel.functions.clear()
    master = sim.fw1.kernel.open(control())
    one = foreseen(master)
    sim.fw1.kernel.expect(one)
    sim.run(2.0)
    assert held(sim, one) is None
    assert sim.fw2.up.counters["expectations_refused_unknown_function"] == 1
    verdict = sim.fw2.up.verdict(sim.now)
    assert verdict.verdict == readiness.DEGRADED
    assert verdict.reasons == (
        "this node's kernel does not know what 1 of the peer's expectations need: load the same helper modules on both"
        " nodes",
    )
    sim.fw2.kernel.functions.add("nat-follow-master")
    sim.run(25.0)
    assert held(sim, one) is not None
    assert sim.fw2.up.verdict(sim.now).verdict == readiness.READY


def test_a_related_flow_that_comes_before_its_master_in_a_bulk_waits_for_it() -> None:
    sim = Simulation()
    master = control()
    data = tcp(4000, master=master.orig, master_proto=k.IPPROTO_TCP)
    for flow in (data, *(tcp(5000 + number) for number in range(200)), master):
        sim.fw1.kernel.open(flow)
    sim.start()
    sim.run(2.0)
    assert sim.fw2.kernel.table[data.key].master == master.orig
    assert "degraded_without_master" not in sim.fw2.up.counters
    sim.fw2.crash()
    sim.fw2.start(sim.now)
    sim.run_until(lambda: sim.fw2.up.complete)
    assert sim.fw2.kernel.table[data.key].master == master.orig


def test_without_helpers_nothing_is_done() -> None:
    sim = Simulation().start()
    for number in range(50):
        sim.fw1.kernel.open(tcp(1000 + number))
    sim.run(1.0)
    for node in (sim.fw1, sim.fw2):
        helpers = node.up.helpers
        assert helpers.next_deadline() == float("inf")
        before = dict(vars(helpers))
        sim.run(20.0)
        assert helpers.walk is None and not helpers.source.looks and not helpers.take_asks()
        assert helpers._walks == before["_walks"] <= 1  # after the node became active
        assert helpers.work(100) == []


def test_none_are_replicated_where_that_is_switched_off() -> None:
    sim, _master, one = replicated(max_expectations=0)
    assert held(sim, one) is None
    assert sim.fw1.up.helpers.walk is None


def test_a_master_that_ended_while_nobody_listened_is_forgotten() -> None:
    sim, master, _one = replicated()
    sim.fw2.kill()
    sim.run(3.0)
    sim.fw1.kernel.close(master.key)
    sim.run(1.0)
    assert sim.fw1.up.helpers.describe() == {"internal": 0, "external": 0, "helper_flows": 0}


def test_an_expectation_without_its_master_is_refused_and_counted() -> None:
    sim, _master, _one = replicated()
    other = foreseen(tcp(9, helper="ftp"), 4009)
    sim.fw2.up.helpers.receive(pack(other), sim.now)
    assert held(sim, other) is None
    assert sim.fw2.up.counters["expectations_refused_without_master"] == 1
    sim.fw2.up.helpers.receive_gone(other.name)
    assert len(sim.fw2.up.helpers.replicas) == 1


def test_another_filter_takes_the_expectations_with_their_masters() -> None:
    sim, _master, one = replicated()
    other = Settings(park_timeout_s=PARKED_S, filter=config.Filter(protocols=(k.IPPROTO_UDP,)))
    for node in (sim.fw1, sim.fw2):
        node.up.reconfigure(other, sim.now)
    sim.run(3.0)
    assert held(sim, one) is None
    assert len(sim.fw1.up.helpers.source) == len(sim.fw2.up.helpers.replicas) == 0
