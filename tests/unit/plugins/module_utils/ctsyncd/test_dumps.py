# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dumps that nobody waits for: not in a flood, but in the end; seldom where nothing changes."""

from __future__ import annotations

from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import checker, dumps, prover
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.dumps import AUDIT, Dumps
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.situation import Settings
from unit.simulation import Simulation, tcp


def test_calm_comes_some_time_after_a_crowd_of_changes() -> None:
    wanted = Dumps()
    assert wanted.calm(1000.0, 1000.0)
    wanted.changed(dumps.CROWD - 1, 1000.0)
    assert wanted.calm(1000.1, 1000.0)
    wanted.changed(1, 1000.9)
    assert not wanted.calm(1000.9 + dumps.CALM_S - 0.01, 1000.0)
    assert wanted.calm(1000.9 + dumps.CALM_S, 1000.0)
    for second in range(1001, 1010):  # as many, but slowly
        wanted.changed(dumps.CROWD // 2, second + 0.5)
    assert wanted.calm(1010.0, 1000.0)


def test_calm_is_not_waited_for_for_ever() -> None:
    wanted = Dumps()
    wanted.changed(dumps.CROWD, 1000.0)
    assert not wanted.calm(1000.0, 1000.1 - dumps.PATIENCE_S)
    assert wanted.calm(1000.0, 1000.0 - dumps.PATIENCE_S)


def test_rest_after_a_dump() -> None:
    """A hundredth of a core, or a thousandth where nothing changes, but not so seldom that it is never."""
    wanted = Dumps()
    for spent, busy, quiet in ((0.001, 30.0, 30.0), (0.1, 30.0, 100.0), (2.0, 200.0, 600.0), (30.0, 3000.0, 3000.0)):
        wanted.want(AUDIT)
        wanted.begin()
        wanted.spend(spent)
        wanted.finished(0.0)
        assert abs(wanted.pause(30.0) - busy) < 0.001
        assert abs(wanted.pause(30.0, True) - quiet) < 0.001


def _pair() -> Simulation:
    sim = Simulation(0, Settings()).start()
    sim.fw1.kernel.open(tcp(1001))
    sim.converge(sim.fw1, sim.fw2)
    return sim


def test_flood_puts_audits_and_looks_off_until_it_is_over() -> None:
    sim = _pair()
    one, two = sim.fw1.up.counters, sim.fw2.up.counters
    for dummy in range(100):  # seconds
        for up in (sim.fw1.up, sim.fw2.up):
            up.dumps.changed(dumps.CROWD, sim.now)
        sim.run(1.0)
    assert one["audits"] == two["states_compared"] == two["kernel_looks"] == 0
    sim.run(max(prover.AUDIT_S, checker.KERNEL_S) + dumps.CALM_S)
    assert one["audits"] >= 1
    assert two["states_compared"] >= 1
    assert two["kernel_looks"] >= 1


def test_flood_that_does_not_end_is_audited_all_the_same() -> None:
    sim = _pair()
    for dummy in range(int(dumps.PATIENCE_S + prover.AUDIT_S) // 4 + 10):
        for up in (sim.fw1.up, sim.fw2.up):
            up.dumps.changed(dumps.CROWD, sim.now)
        sim.run(4.0)
    assert sim.fw1.up.counters["audits"] >= 1
    assert sim.fw2.up.counters["states_compared"] >= 1
    assert sim.fw2.up.counters["kernel_looks"] >= 1


def test_audit_that_a_flood_meets_gives_way() -> None:
    sim = _pair()
    sim.run_until(lambda: sim.fw1.up.provers[0]._settle_at, 2 * prover.AUDIT_S)
    sim.fw1.up.provers[0]._settle_at = None  # as if the dump were not at its end
    assert not sim.fw1.up.counters["audits"]
    sim.fw1.up.dumps.changed(dumps.CROWD, sim.now)
    sim.run(1.0)
    assert sim.fw1.up.source.states is None
    assert not sim.fw1.up.provers[0].wants
    assert sim.fw1.up.counters["audits_put_off"] == 1
    assert not sim.fw1.up.counters["audits"]
    sim.run(prover.AUDIT_S + dumps.CALM_S)
    assert sim.fw1.up.counters["audits"] == 1
    assert sim.fw2.up.counters["states_differed"] == 0


def test_changes_are_counted_on_both_nodes() -> None:
    sim = _pair()
    counted = [up.dumps.changes for up in (sim.fw1.up, sim.fw2.up)]
    sim.fw1.kernel.open(tcp(1002))
    sim.fw1.kernel.close(tcp(1001).key)
    sim.converge(sim.fw1, sim.fw2)
    assert all(up.dumps.changes >= before + 2 for up, before in zip((sim.fw1.up, sim.fw2.up), counted))
