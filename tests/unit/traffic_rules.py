# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What can happen to any number of simulated nodes: rules for Hypothesis' state machines."""

from __future__ import annotations

import os
from typing import Any

from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow, SeqAdj
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from unit.simulation import Node, Simulation, tcp, udp

PORTS = st.integers(1000, 1011)
FLOWS = 12  # that these ports make


def thorough(examples: int) -> settings:
    """So many runs, always the same ones: ``CTSYNC_EXAMPLES`` asks for others, and as many as it says."""
    return settings(
        max_examples=int(os.environ.get("CTSYNC_EXAMPLES", examples)),
        stateful_step_count=30,
        deadline=None,
        derandomize="CTSYNC_EXAMPLES" not in os.environ,  # a hunt for failures sets it; the gate must not be a lottery
        suppress_health_check=[HealthCheck.too_slow],
    )


class Events(RuleBasedStateMachine):
    """Traffic through the active node, lost events, restarts of daemons, time."""

    sim: Simulation
    active: Node

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 20_000

    def flow(self, port: int) -> Flow:
        self.numbers += 1
        return tcp(port, self.numbers) if port % 2 else udp(port)

    @rule(port=PORTS, state=st.sampled_from((k.TCP_SYN_SENT, k.TCP_ESTABLISHED, k.TCP_ESTABLISHED)))
    def traffic_opens(self, port: int, state: int) -> None:
        flow = self.flow(port)
        if flow.key not in self.active.kernel.table:
            self.active.kernel.open(flow._replace(state=state) if port % 2 else flow)

    @rule(port=PORTS, mark=st.integers(0, 3), state=st.sampled_from((3, 3, 4, 7, 1)), adjusted=st.booleans())
    def traffic_changes(self, port: int, mark: int, state: int, adjusted: bool) -> None:
        key = self.flow(port).key
        if key in self.active.kernel.table:
            changes: dict[str, Any] = {"mark": mark}
            if port % 2:
                changes["state"] = state
            if adjusted:
                changes["seqadj"] = (SeqAdj(mark, 0, mark), SeqAdj(0, 0, 0))
            self.active.kernel.change(key, **changes)

    @rule(port=PORTS, again=st.booleans())
    def traffic_closes(self, port: int, again: bool) -> None:
        flow = self.flow(port)
        if flow.key in self.active.kernel.table:
            self.active.kernel.close(flow.key)
            if again:
                self.active.kernel.open(flow)

    @rule(number=st.integers(0, 2), seconds=st.sampled_from((0.0, 2.0)))
    def daemon_restarts(self, number: int, seconds: float) -> None:
        nodes = list(self.sim.nodes.values())
        node = nodes[number % len(nodes)]
        node.kill()
        self.sim.run(seconds)
        node.start(self.sim.now)

    @rule()
    def events_are_lost(self) -> None:
        self.active.kernel.lose_events()
