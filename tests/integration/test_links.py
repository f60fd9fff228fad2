# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two real daemons with two sync links between them, the first over IPv4, the second over IPv6; each of them fails."""

from __future__ import annotations

import socket
from typing import Any, Callable

import pytest
from integration.cluster import Cluster, Daemon, fill
from integration.netns import Namespace, Pair, wait_for

SYNC = (("eth2", "192.168.100."), ("eth3", "fd00:c0de:65::"))
DROP = ("INPUT", "-p", "udp", "--dport", "3781", "-j", "DROP")


pytestmark = pytest.mark.netns


@pytest.fixture
def lab(pair: Pair, cluster: Callable[..., Cluster]) -> Callable[..., Cluster]:
    """The pair, with a second sync link; options are those of the daemons."""
    pair.net.link(pair.fw1, "eth3", pair.fw2, "eth3")
    for number, firewall in enumerate((pair.fw1, pair.fw2), 1):
        firewall.ip("address", "add", f"fd00:c0de:65::{number}/64", "dev", "eth3", "nodad")
    return lambda **options: cluster(**{"sync": SYNC, **options}).up()


def links(daemon: Daemon) -> list[dict[str, Any]]:
    """Each link, as the status shows it."""
    peers = daemon.status()["peers"]
    return list(peers[0]["links"]) if peers else []


def in_use(cluster: Cluster) -> list[str]:
    """The interface that carries the session, of each node."""
    return [link["interface"] for daemon in (cluster.fw1, cluster.fw2) for link in links(daemon) if link["carries"]]


def uses(cluster: Cluster, interface: str) -> None:
    wait_for(lambda: in_use(cluster) == [interface] * 2, f"both nodes to use {interface}")


def counted(daemon: Daemon, name: str) -> int:
    return int(daemon.status()["counters"].get(name, 0))


def says(daemon: Daemon, reason: str) -> None:
    """Wait until this alone is what its verdict says."""
    wait_for(lambda: daemon.status().get("reasons") == [reason], reason)


def same_session(cluster: Cluster) -> None:
    """Neither a new session nor another bulk, on either node."""
    assert [counted(daemon, "sessions") for daemon in (cluster.fw1, cluster.fw2)] == [1, 1]
    assert counted(cluster.fw2, "bulks_received") == 1
    assert counted(cluster.fw1, "bulks_sent") == 1


def drop(firewall: Namespace, interface: str, how: str = "-I") -> None:
    """What comes in over an interface is lost, and nobody is told; ``how`` -D: no longer."""
    for command in ("iptables", "ip6tables"):
        firewall.run(command, how, DROP[0], "-i", interface, *DROP[1:])


def test_the_first_link_carries_and_both_are_shown(lab: Callable[..., Cluster]) -> None:
    cluster = lab()
    uses(cluster, "eth2")
    for daemon in (cluster.fw1, cluster.fw2):
        wait_for(lambda daemon=daemon: [link["state"] for link in links(daemon)] == ["up", "up"], "both links up")  # type: ignore[misc]
        text = daemon.ask("status")
        assert "in use" in text
        assert "eth3 to fw" in text
        assert [link["mtu"] for link in links(daemon)] == [1428, 1448]  # of 1400 bytes of UDP payload
        assert "eth3" in daemon.ask("-s", "link")


@pytest.mark.parametrize("fault", ["down", "deaf fw1", pytest.param("deaf fw2", marks=pytest.mark.long)])
def test_a_failing_link_is_left_and_taken_again(lab: Callable[..., Cluster], fault: str) -> None:
    cluster = lab()
    pair = cluster.pair
    uses(cluster, "eth2")
    wait_for(lambda: all(link["state"] == "up" for d in (cluster.fw1, cluster.fw2) for link in links(d)), "all links")
    before = cluster.session()
    cluster.replicated(cluster.fw1, cluster.fw2)
    if fault == "down":
        pair.fw1.ip("link", "set", "eth2", "down")
    else:
        drop(pair.fw1 if fault == "deaf fw1" else pair.fw2, "eth2")
    uses(cluster, "eth3")
    during = cluster.session()
    cluster.replicated(cluster.fw1, cluster.fw2)
    for daemon, peer in ((cluster.fw1, "fw2"), (cluster.fw2, "fw1")):
        says(daemon, f"link eth2 to {peer} is down (using eth3)")  # after: using eth2, which is left a moment later
        assert daemon.status()["verdict"] == "DEGRADED"
        assert "the session with" in daemon.log()
    if fault == "down":
        pair.fw1.ip("link", "set", "eth2", "up")
    else:
        drop(pair.fw1 if fault == "deaf fw1" else pair.fw2, "eth2", "-D")
    uses(cluster, "eth2")
    cluster.ready(cluster.fw1, cluster.fw2)
    after = cluster.session()
    cluster.replicated(cluster.fw1, cluster.fw2)
    same_session(cluster)
    assert counted(cluster.fw1, "failovers") >= 1
    for session in (before, during, after):
        session.talk()
    cluster.verified()


def test_sessions_survive_a_take_over_while_only_the_second_link_works(lab: Callable[..., Cluster]) -> None:
    cluster = lab()
    uses(cluster, "eth2")
    drop(cluster.pair.fw2, "eth2")
    drop(cluster.pair.fw1, "eth2")
    uses(cluster, "eth3")
    kinds = cluster.all_kinds()
    for session in kinds.values():
        session.talk()
    cluster.replicated(cluster.fw1, cluster.fw2)
    cluster.pair.fw1.ip("link", "set", "eth3", "down")
    cluster.power_cut(cluster.fw1, cluster.fw2)
    wait_for(lambda: cluster.fw2.status()["role"] == "active", "fw2 to be active")
    for session in kinds.values():
        session.talk()
    for firewall in (cluster.pair.fw1, cluster.pair.fw2):
        drop(firewall, "eth2", "-D")
    cluster.pair.fw1.ip("link", "set", "eth3", "up")
    cluster.pair.fw1.ip("address", "replace", "fd00:c0de:65::1/64", "dev", "eth3", "nodad")
    cluster.back_and_equal(cluster.fw1, cluster.fw2)


def test_with_one_link_the_peer_is_silent(lab: Callable[..., Cluster]) -> None:
    """The negative control: the same fault, and no second link."""
    cluster = lab(sync=SYNC[:1])
    drop(cluster.pair.fw2, "eth2")
    session = cluster.session()
    wait_for(lambda: "fw1 is silent" in " ".join(cluster.fw2.status().get("reasons", ())), "fw1 to be silent")
    session.talk()
    assert f" sport={session.port} " not in cluster.pair.fw2.conntrack("-L")
    assert cluster.fw1.status()["peers"][0]["lag"]["events"] > 0


@pytest.mark.long
def test_both_links_fail_and_come_back(lab: Callable[..., Cluster]) -> None:
    cluster = lab()
    uses(cluster, "eth2")
    for interface in ("eth2", "eth3"):
        drop(cluster.pair.fw2, interface)
        drop(cluster.pair.fw1, interface)
    for daemon, peer in ((cluster.fw1, "fw2"), (cluster.fw2, "fw1")):
        wait_for(
            lambda daemon=daemon, peer=peer: f"{peer} is silent" in " ".join(daemon.status().get("reasons", ())),  # type: ignore[misc]
            "silence",
        )
    session = cluster.session()
    drop(cluster.pair.fw2, "eth3", "-D")
    drop(cluster.pair.fw1, "eth3", "-D")
    cluster.replicated(cluster.fw1, cluster.fw2)
    uses(cluster, "eth3")
    drop(cluster.pair.fw2, "eth2", "-D")
    drop(cluster.pair.fw1, "eth2", "-D")
    uses(cluster, "eth2")
    cluster.ready(cluster.fw1, cluster.fw2)
    same_session(cluster)
    session.talk()
    cluster.verified()


def mtu(daemon: Daemon, interface: str) -> int:
    return next((int(link["mtu"]) for link in links(daemon) if link["interface"] == interface), 0)


@pytest.mark.long
def test_a_link_shrinks_and_grows_under_load(pair: Pair, lab: Callable[..., Cluster]) -> None:
    """Where it shrinks on the far side nobody says so; where the own interface shrinks the kernel does (EMSGSIZE)."""
    for firewall in (pair.fw1, pair.fw2):
        for interface, size in (("eth2", "9000"), ("eth3", "1280")):
            firewall.ip("link", "set", interface, "mtu", size)
    cluster = lab(datagram_bytes=8900)
    fw1, fw2 = cluster.fw1, cluster.fw2
    wait_for(lambda: [link["mtu"] for link in links(fw1)] == [8928, 1280], "the lengths that fit")
    pair.fw2.ip("link", "set", "eth2", "mtu", "1500")  # what is longer vanishes there
    fill(pair.fw1, 20_000)
    wait_for(lambda: mtu(fw1, "eth2") == 1500, "fw1 to notice that the link shrank")
    wait_for(lambda: fw2.status()["flows"]["external"] >= 20_000, "all flows", 60)
    assert counted(fw1, "parts_sent") > 0
    assert counted(fw2, "parts_received") > 0
    pair.fw1.ip("link", "set", "eth2", "mtu", "1300")
    pair.fw1.conntrack("-F")
    wait_for(lambda: fw2.status()["flows"]["external"] == 0, "the end of all flows", 60)
    wait_for(lambda: mtu(fw1, "eth2") == 1300, "fw1 to know its interface")
    assert [counted(daemon, "sessions") for daemon in (fw1, fw2)] == [1, 1]
    for firewall in (pair.fw1, pair.fw2):
        firewall.ip("link", "set", "eth2", "mtu", "9000")
    wait_for(lambda: mtu(fw1, "eth2") == 8928, "longer datagrams again", 60)
    session = cluster.session()
    cluster.replicated(fw1, fw2)
    session.talk()
    cluster.verified()


def test_strangers_are_not_heard_on_any_link(lab: Callable[..., Cluster]) -> None:
    cluster = lab()
    fw1, fw2 = cluster.pair.fw1, cluster.fw2
    before = counted(fw2, "dropped_foreign_address")
    for interface, beginning in SYNC:
        six = ":" in beginning
        fw1.ip("address", "add", f"{beginning}9/{64 if six else 24}", "dev", interface, *(("nodad",) if six else ()))
        with fw1.inside():
            stranger = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM)
        with stranger:
            stranger.bind((f"{beginning}9", 3781))
            stranger.sendto(b"let me in", (f"{beginning}2", 3781))
    wait_for(lambda: counted(fw2, "dropped_foreign_address") == before + 2, "two strangers to be counted")
    cluster.ready(cluster.fw1, fw2)
