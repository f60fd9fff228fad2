# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Readings of a large table that nobody waits for keep to their share of a core.

The daemon's own code reads a real kernel's table; time is an argument, and what it costs is processor time as the
kernel counts it for the thread (schedstat), so that the speed and the load of the machine do not matter.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import daemon, dumps
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import Changes
from integration.cluster import fill
from integration.netns import Net

pytestmark = pytest.mark.netns

FLOWS = 50_000
READINGS = 3
UNSEEN = 0.15  # of the processor time at most is outside of what the daemon counts: the loop of this test


class Engine:
    """What the daemon wants of the engine while it feeds a dump, with the engine's own account of dumps."""

    dump_room = True

    def __init__(self) -> None:
        self.dumps = dumps.Dumps()
        self.flows = 0
        self.consistent: list[bool] = []

    @property
    def dump(self) -> dumps.Dump | None:
        return self.dumps.current

    @property
    def dump_paced(self) -> bool:
        return self.dumps.runs(*dumps.PACED)

    def dump_cost(self, seconds: float) -> None:
        self.dumps.spend(seconds)

    def dump_slice(self, changes: Changes, _now: float) -> None:
        self.flows += changes.events

    def dump_finished(self, consistent: bool, now: float) -> None:
        self.consistent.append(consistent)
        self.dumps.finished(now)


def processor_s() -> float:
    """Seconds that this thread has run."""
    return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[0]) / 1e9


def test_a_reading_and_the_pause_after_it_keep_to_a_hundredth_of_a_core(net: Net) -> None:
    space = net.namespace("fw")
    space.sysctl({"net/netfilter/nf_conntrack_events": "0"})
    fill(space, FLOWS)
    engine = Engine()
    one = daemon.Daemon.__new__(daemon.Daemon)
    one._engine = engine  # type: ignore[assignment]
    one._dump, one._dump_number, one._dump_at = None, 0, 0.0
    now, began, rested = 0.0, processor_s(), 0.0
    with space.inside():
        for number in range(1, READINGS + 1):
            engine.dumps.want(dumps.AUDIT)
            engine.dumps.begin()
            turns, first = 0, now
            while engine.dump is not None:
                before = engine.flows
                one._feed_dump(now)
                assert engine.flows - before < FLOWS / 100, "more than a slice in a turn"
                turns += 1
                if engine.dump is not None:
                    assert one._dump_at > now, "no rest between two slices"
                    now = one._dump_at
            assert (engine.flows, engine.consistent) == (number * FLOWS, [True] * number)
            assert turns > 100
            pause = engine.dumps.pause(0.0)
            # within the dump the rests are four times as long as the slices
            assert now - first <= daemon.PACED_REST * pause * dumps.SHARE + 1e-6
            rested += pause
            now += pause
    spent = processor_s() - began
    assert dumps.SHARE == 0.01
    assert spent * (1 - UNSEEN) <= dumps.SHARE * rested <= spent + 0.01
