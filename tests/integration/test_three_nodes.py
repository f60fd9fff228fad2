# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Three firewalls with real daemons and real keepalived: sessions outlive the active node, and the next one, too."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Callable, Iterator

import pytest
from integration import netns
from integration.cluster import Cluster, Daemon, Session, fill
from integration.netns import wait_for
from integration.vrrp_node import V4, V6, Node

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(shutil.which("keepalived") is None, reason="needs keepalived"),
]

INTERVAL_S = 0.3  # of keepalived's advertisements: longer than on a firewall, for a busy machine
FLOWS = 2000


class Trio(Cluster):
    """fw1, fw2, fw3 with falling priorities; fw1 is active, the others have its table."""

    def __init__(self, pair: netns.Pair, home: Path, **options: object) -> None:
        super().__init__(pair, home, **options)
        self.fw3 = self.daemons[2]
        self.nodes: dict[Daemon, Node] = {}
        for number, daemon in enumerate(self.daemons, 1):
            others = tuple(other for other in (1, 2, 3) if other != number)
            node = Node(daemon.space, home / f"vrrp{number}", number, 160 - 10 * number, daemon.home, others=others)
            self.nodes[daemon] = node
            self.stack.callback(node.close)
            node.configure(ipv6=True, advert_interval=INTERVAL_S)
            daemon.start()
        self.nodes[self.fw1].start()
        self.has_virtual_ips(self.fw1)
        for daemon in self.daemons[1:]:
            self.nodes[daemon].start()

    def has_virtual_ips(self, daemon: Daemon) -> None:
        wait_for(lambda: self.nodes[daemon].holds(V4 | V6), f"the virtual IPs on {daemon.space.label}", 60.0)
        for host in (self.pair.a, self.pair.b):
            host.ip("neigh", "flush", "all")

    def verdicts(self, **wanted: str) -> None:
        """Wait until the nodes say so."""

        def said() -> dict[str, str]:
            named = {daemon.space.label: daemon for daemon in self.daemons}
            return {label: named[label].status().get("verdict", "") for label in wanted}

        try:
            wait_for(lambda: said() == wanted, f"{wanted}", 60.0)
        except AssertionError as error:
            states = "\n".join(f"{daemon.status()}\n{daemon.log()}" for daemon in self.daemons)
            raise AssertionError(f"{error}: {said()}\n{states}") from None

    def cut(self, victim: Daemon) -> None:
        """No power: off the network at once, and what it had in memory is gone."""
        for interface in ("eth0", "eth1", "eth2"):
            self.pair.switch.ip("link", "set", f"{victim.space.label}-{interface}", "down")
        victim.kill()
        self.nodes[victim].power_off()
        victim.space.conntrack("-F")

    def boot(self, daemon: Daemon) -> None:
        """As systemd starts both: first the unit says "not ready"."""
        for interface in ("eth0", "eth1", "eth2"):
            self.pair.switch.ip("link", "set", f"{daemon.space.label}-{interface}", "up")
        daemon.ask("gate", "--not-ready")
        daemon.start()
        self.nodes[daemon].start()


@pytest.fixture
def trio(tmp_path: Path) -> Iterator[Callable[..., Trio]]:
    with netns.pair(3) as pair, contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(contextlib.closing(Trio(pair, tmp_path, **options)))


def talk(sessions: dict[str, Session]) -> None:
    for session in sessions.values():
        session.talk()


def test_sessions_go_on_on_the_second_node_and_then_on_the_third(trio: Callable[..., Trio]) -> None:
    lab = trio()
    lab.verdicts(fw1="READY", fw2="READY", fw3="READY")
    fill(lab.pair.fw1, FLOWS)
    sessions = lab.all_kinds()
    talk(sessions)
    for backup in (lab.fw2, lab.fw3):
        lab.replicated(lab.fw1, backup)

    lab.cut(lab.fw1)
    lab.has_virtual_ips(lab.fw2)  # keepalived elects the better one of two that are ready
    assert lab.nodes[lab.fw3].holds_none()
    talk(sessions)
    sessions.update({f"{name}, of fw2": session for name, session in {"tcp": lab.session()}.items()})
    talk(sessions)
    lab.verdicts(fw2="DEGRADED", fw3="READY")
    reasons = lab.fw2.status()["reasons"]
    assert reasons and all("fw1" in reason for reason in reasons)
    assert {peer["node"]: peer["bulk"] for peer in lab.fw2.status()["peers"]}["fw3"] == "complete"
    assert {peer["node"]: peer["role"] for peer in lab.fw3.status()["peers"]}["fw2"] == "active"
    lab.replicated(lab.fw2, lab.fw3)

    lab.cut(lab.fw2)
    lab.has_virtual_ips(lab.fw3)
    talk(sessions)
    lab.verdicts(fw3="DEGRADED")

    for daemon in (lab.fw1, lab.fw2):  # with two others alive, or one
        lab.boot(daemon)
    lab.verdicts(fw1="READY", fw2="READY", fw3="READY")
    assert lab.nodes[lab.fw3].holds(V4 | V6)
    for backup in (lab.fw1, lab.fw2):
        lab.replicated(lab.fw3, backup)
    lab.verified()
    lab.cut(lab.fw3)
    lab.has_virtual_ips(lab.fw1)
    talk(sessions)
    lab.boot(lab.fw3)
    lab.verdicts(fw1="READY", fw2="READY", fw3="READY")
    lab.verified()


def test_without_replication_the_same_sessions_die(trio: Callable[..., Trio]) -> None:
    """The negative control: what the test above sees is the replication's work."""
    lab = trio(replicate=False)
    sessions = lab.all_kinds()
    talk(sessions)
    del sessions["udp snat"]  # the first datagram of the client makes it anew
    lab.cut(lab.fw1)
    wait_for(lambda: any(lab.nodes[daemon].holds(V4 | V6) for daemon in (lab.fw2, lab.fw3)), "an heir", 60.0)
    for host in (lab.pair.a, lab.pair.b):
        host.ip("neigh", "flush", "all")
    for name, session in sessions.items():
        session.client.settimeout(2)
        session.server.settimeout(2)
        with pytest.raises(OSError):
            session.talk()
            raise AssertionError(f"{name} survived")


@pytest.mark.long
def test_dead_backup_is_named_and_delays_nobody(trio: Callable[..., Trio]) -> None:
    lab = trio()
    lab.verdicts(fw1="READY", fw2="READY", fw3="READY")
    lab.cut(lab.fw3)
    lab.verdicts(fw1="DEGRADED", fw2="READY")
    assert [reason for reason in lab.fw1.status()["reasons"] if not reason.startswith("fw3 is silent for ")] == []
    fill(lab.pair.fw1, FLOWS)
    sessions = lab.all_kinds()
    talk(sessions)
    lab.replicated(lab.fw1, lab.fw2)
    lags = {peer["node"]: peer["lag"]["events"] for peer in lab.fw1.status()["peers"]}
    assert lags["fw2"] == 0 and lags["fw3"] > 0
    lab.boot(lab.fw3)
    lab.verdicts(fw1="READY", fw2="READY", fw3="READY")
    lab.replicated(lab.fw1, lab.fw3)
    assert lab.fw2.status()["counters"]["bulks_received"] == 1


def test_verify_speaks_of_every_backup(trio: Callable[..., Trio]) -> None:
    lab = trio(compare=False)
    lab.verdicts(fw1="READY", fw2="READY", fw3="READY")
    fill(lab.pair.fw1, 50)
    lab.replicated(lab.fw1, lab.fw2)
    lab.replicated(lab.fw1, lab.fw3)

    def said(daemon: Daemon) -> tuple[int, dict[str, bool | None], list[tuple[str, str]]]:
        status, text = daemon.run("verify", "--json")
        result = json.loads(text)
        equal = {one["backup"]: one["equal"] for one in result["backups"]}
        return status, equal, [(each["backup"], each["kind"]) for each in result["differences"]]

    assert said(lab.fw1) == (0, {"fw2": True, "fw3": True}, [])
    lab.fw3.space.run(
        *("conntrack", "-I", "-p", "tcp", "-s", "10.0.0.9", "-d", "198.51.100.9", "--sport", "19001"),
        *("--dport", "443", "--state", "ESTABLISHED", "-u", "SEEN_REPLY,ASSURED", "-t", "86400"),
    )
    assert said(lab.fw1) == (1, {"fw2": True, "fw3": False}, [("fw3", "kernel_left_over")])
    assert said(lab.fw2) == (0, {"fw2": True}, [])
    assert said(lab.fw3) == (1, {"fw3": False}, [("fw3", "kernel_left_over")])
    lines = lab.fw1.ask("verify").splitlines()
    assert lines[0].startswith("equal: ") and lines[0].endswith(" flows on fw1 and fw2")
    assert lines[2] == "1 left over in the kernel of fw3: its external cache has them not"
    assert "sport=19001" in lines[3]
    lab.cut(lab.fw2)
    wait_for(lambda: lab.fw1.status()["peers"][0]["state"] == "silent", "fw2 to be missed")
    assert said(lab.fw1) == (1, {"fw2": None, "fw3": False}, [("fw3", "kernel_left_over")])
    lab.fw3.space.conntrack("-D", "-p", "tcp", "-s", "10.0.0.9")
    assert said(lab.fw1) == (2, {"fw2": None, "fw3": True}, [])
    assert "cannot tell of fw2: fw2 is silent" in lab.fw1.ask("verify")


def test_split_brain_heals_and_one_history_stays(trio: Callable[..., Trio]) -> None:
    """fw1 alone on one side of a partition, fw2 and fw3 on the other, VRRP and the sync link alike."""
    lab = trio()
    lab.verdicts(fw1="READY", fw2="READY", fw3="READY")
    fill(lab.pair.fw1, 50)
    lab.replicated(lab.fw1, lab.fw3)

    vrrp = ("192.168.0.", "192.168.1.", "fd00:c0de::", "fd00:c0de:1::")
    sync = ("192.168.100.",)

    def hear(yes: bool, *networks: str) -> None:
        ends = [(lab.fw1, other) for other in (lab.fw2, lab.fw3)]
        for hearer, speaker in (*ends, *(end[::-1] for end in ends)):
            for network in networks:
                tool = "ip6tables" if ":" in network else "iptables"
                source = f"{network}{netns.last_octet(int(speaker.space.label[-1]))}"
                hearer.space.run(tool, "-D" if yes else "-I", "INPUT", "-s", source, "-j", "DROP")

    def alarm(daemon: Daemon) -> bool:
        """On the node, of what nodes say by themselves, and what they keep for later."""
        said = daemon.status()
        notes = [json.loads(line) for line in daemon.ask("recorder").splitlines()]
        return (
            (said["role"], said["verdict"]) == ("active", "DEGRADED")
            and any("split brain" in reason for reason in said["reasons"])
            and said["counters"].get("split_brains", 0) == 1
            and "split brain" in daemon.log()
            and any("split brain" in str(note.get("reasons")) for note in notes if note.get("note") == "verdict")
        )

    def known(daemon: Daemon) -> set[str]:
        lines = daemon.space.conntrack("-L", "-p", "tcp").splitlines()
        return {word for line in lines if "dst=198.51." in line for word in line.split() if word.startswith("sport=1")}

    def entry(daemon: Daemon, port: int) -> None:
        daemon.space.run(
            *("conntrack", "-I", "-p", "tcp", "-s", "10.0.0.9", "-d", "198.51.100.9", "--sport", str(port)),
            *("--dport", "443", "--state", "ESTABLISHED", "-u", "SEEN_REPLY,ASSURED", "-t", "86400"),
        )

    hear(False, *vrrp, *sync)
    lab.has_virtual_ips(lab.fw2)
    assert lab.nodes[lab.fw1].holds(V4 | V6)
    shared = known(lab.fw1)
    entry(lab.fw1, 19_001)
    entry(lab.fw2, 19_002)
    wait_for(lambda: "sport=19002" in known(lab.fw3), "fw3 to follow fw2", 60.0)
    assert [daemon.status()["counters"].get("split_brains", 0) for daemon in lab.daemons] == [0, 0, 0]
    hear(True, *sync)  # from now on they can know of each other
    for daemon in (lab.fw1, lab.fw2):
        try:
            wait_for(lambda at=daemon: alarm(at), f"the alarm of {daemon.space.label}", 60.0)
        except AssertionError as error:
            raise AssertionError(f"{error}: {daemon.status()}\n{daemon.log()}") from None
    assert lab.fw3.status()["counters"].get("split_brains", 0) == 0  # it takes no part
    hear(True, *vrrp)
    wait_for(lab.nodes[lab.fw2].holds_none, "fw2 to yield: fw1 has the higher priority", 60.0)
    lab.verdicts(fw1="READY", fw2="READY", fw3="READY")
    wanted = shared | {"sport=19001"}
    for daemon in lab.daemons:
        wait_for(lambda at=daemon: known(at) == wanted, f"one history on {daemon.space.label}", 60.0)
    assert known(lab.fw1) == wanted
    lab.verified()
