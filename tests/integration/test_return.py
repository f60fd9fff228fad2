# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A node reboots and returns with an empty table, under traffic, with real keepalived that would rather have it active.

The node has the higher priority and preemption is on: nothing but ctsyncd's "not ready" keeps the virtual IPs away
from it until it has the table.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Callable, Iterator

import pytest
from integration.cluster import Daemon, fill
from integration.load import Load, Throttle
from integration.netns import wait_for
from integration.vrrp_node import V4, V6, Node, adverts_seen

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(shutil.which("keepalived") is None, reason="needs keepalived"),
]

SESSIONS = 100
MORE = 10_000  # flows that make the table large enough to watch it come
INTERVAL_S = 0.3  # of keepalived's advertisements: longer than on a firewall, for a busy machine


class Site:
    """The pair under load, daemon and keepalived on each firewall; fw1 is active, fw2 has its table."""

    def __init__(self, lab: Load, home: Path, track_file: Path | None = None) -> None:
        self.lab = lab
        self.nodes = {
            lab.fw1: Node(lab.pair.fw1, home / "vrrp1", 1, 150, lab.fw1.home),
            lab.fw2: Node(lab.pair.fw2, home / "vrrp2", 2, 100, lab.fw2.home),
        }
        if track_file is not None:
            self.nodes[lab.fw1].track_file = track_file
        for daemon, node in self.nodes.items():
            node.configure(ipv6=True, nopreempt=False, advert_interval=INTERVAL_S)
            daemon.start()
        self.nodes[lab.fw1].start()
        self.has_virtual_ips(lab.fw1)
        self.nodes[lab.fw2].start()
        lab.ready(lab.fw1, lab.fw2)
        fill(lab.pair.fw1, MORE)
        lab.open()
        lab.seal()

    def has_virtual_ips(self, daemon: Daemon) -> None:
        wait_for(lambda: self.nodes[daemon].holds(V4 | V6), f"the virtual IPs on {daemon.space.label}")

    def cut(self, victim: Daemon) -> None:
        """No power: what it had in memory is gone."""
        self.lab.unplug(victim.space)
        victim.kill()
        self.nodes[victim].power_off()
        victim.space.conntrack("-F")

    def boot(self, daemon: Daemon) -> None:
        """As systemd starts both: first the unit says "not ready"."""
        self.lab.plug_sync(daemon.space)
        self.lab.plug_traffic(daemon.space)
        daemon.ask("gate", "--not-ready")
        daemon.start()
        self.nodes[daemon].start()

    def stays_backup(self, daemon: Daemon) -> None:
        """For longer than keepalived needs to take over from a worse node."""
        adverts_seen(self.nodes[daemon], 6)
        assert self.nodes[daemon].holds_none()

    def nothing_is_lost(self, active: Daemon) -> None:
        result = self.lab.prove(self.lab.patience_s)
        assert (result["lost"], result["proved"], result["resets"]) == ({}, SESSIONS, 0)
        self.lab.active, self.lab.backup = active, self.lab.fw2 if active is self.lab.fw1 else self.lab.fw1


@pytest.fixture
def site(load: Callable[..., Load], tmp_path: Path) -> Iterator[Callable[..., Site]]:
    with contextlib.ExitStack() as stack:

        def make(track_file: Path | None = None) -> Site:
            made = Site(load(SESSIONS, datagram_bytes=512), tmp_path, track_file)
            for node in made.nodes.values():
                stack.callback(node.close)
            return made

        yield make


def test_node_that_returns_takes_over_when_it_has_the_table_or_is_alone(site: Callable[..., Site]) -> None:
    """1→2→1→2→1."""
    here = site()
    lab = here.lab
    fw1, fw2 = lab.fw1, lab.fw2
    lab.replicated_all()
    here.cut(fw1)
    here.has_virtual_ips(fw2)
    here.nothing_is_lost(fw2)

    throttle = Throttle(fw1.space, 6)
    here.boot(fw1)
    wait_for(lambda: fw1.status()["flows"]["external"], "the first of the table")
    here.stays_backup(fw1)
    shares: list[int] = []
    while len(set(shares)) < 3:
        status = fw1.status()
        assert (status["verdict"], status["role"], fw1.gate) == ("NOT READY", "backup", "1"), "too fast to see it"
        (reason,) = status["reasons"]
        assert reason.startswith("the table of fw2 is not complete here yet: receiving, ")
        shares.append(status["flows"]["external"])
    assert here.nodes[fw1].priorities() == {90}
    assert shares == sorted(shares)
    throttle.end()
    wait_for(lambda: fw1.gate == "0", "the table")
    here.has_virtual_ips(fw1)
    here.nothing_is_lost(fw1)

    lab.ready(fw1, fw2)
    lab.replicated_all()
    wait_for(fw2.equal, "equal tables", 120.0)
    here.cut(fw1)
    here.has_virtual_ips(fw2)
    here.nothing_is_lost(fw2)

    Throttle(fw1.space, 0)
    here.boot(fw1)
    wait_for(lambda: fw1.status()["reasons"] == ["no session with fw2"], "fw1 to say why it waits")
    here.stays_backup(fw1)
    assert fw1.gate == "2"
    here.cut(fw2)
    here.has_virtual_ips(fw1)  # keepalived's bound: four intervals
    reason = "no session with fw2: a failure loses every session"
    wait_for(lambda: fw1.status()["reasons"] == [reason], "fw1 to say that it is alone")
    assert fw1.status()["verdict"] == "DEGRADED"
    before = lab.client.ask("talk", on=True, churn=20.0)["short_connections"]
    wait_for(lambda: lab.client.ask("talk", on=True, churn=20.0)["short_connections"] > before, "it to serve")


def test_without_the_gate_the_node_takes_over_too_early(site: Callable[..., Site], tmp_path: Path) -> None:
    """The negative control: keepalived watches a file that always says "ready"."""
    always = tmp_path / "always-ready"
    always.write_text("0\n", encoding="ascii")
    here = site(always)
    lab = here.lab
    lab.replicated_all()
    here.cut(lab.fw1)
    here.has_virtual_ips(lab.fw2)
    here.nothing_is_lost(lab.fw2)
    Throttle(lab.fw1.space, 0)
    here.boot(lab.fw1)
    here.has_virtual_ips(lab.fw1)
    assert lab.prove(2.0)["proved"] == 0
