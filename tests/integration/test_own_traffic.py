# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What belongs to the firewall itself is not replicated, although its kernel tracks it like everything else."""

from __future__ import annotations

import signal
import socket
from typing import Callable

import pytest
from integration.cluster import Cluster, fill
from integration.netns import wait_for

pytestmark = pytest.mark.netns

REPLICAS = 20_000
SMALLEST_BUFFER = 65_536
REPLIED = ("-u", "SEEN_REPLY,ASSURED", "-t", "600")


def test_own_traffic_is_never_replicated(cluster: Callable[..., Cluster]) -> None:
    """Nothing is configured to be ignored.  All of it has seen replies, so that is not why it stays."""
    lab = cluster(ignore_addresses=[]).up()
    fw1 = lab.pair.fw1
    for address in ("127.0.0.1", "::1", "192.168.0.1"):  # loopback; a service of the firewall, used from the inside
        client = fw1 if address != "192.168.0.1" else lab.pair.a
        listener = lab.stack.enter_context(fw1.listen(address, 2222))
        lab.stack.enter_context(client.connect(address, 2222))
        lab.stack.enter_context(listener.accept()[0])
    with fw1.inside(), socket.socket(socket.AF_INET, socket.SOCK_RAW, 112) as vrrp:
        vrrp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("192.168.0.1"))
        vrrp.sendto(bytes(20), ("224.0.0.18", 0))
    for src, dst in (("192.168.0.1", "192.168.0.2"), ("10.1.1.1", "10.1.1.2"), ("fd00:9::1", "fd00:9::2")):
        fw1.conntrack("-I", "-p", "112", "-s", src, "-d", dst, *REPLIED)
    fw1.conntrack("-I", "-p", "253", "-s", "10.1.1.1", "-d", "10.1.1.2", *REPLIED)  # the like, of another protocol
    sessions = lab.all_kinds()
    for session in sessions.values():
        session.talk()
    lab.replicated(lab.fw1, lab.fw2)
    wait_for(lambda: "253 src=10.1.1.1" in " ".join(lab.fw2.ask("-e").split()), "the flow of another protocol")

    table = [line for family in ("ipv4", "ipv6") for line in fw1.conntrack("-L", "-f", family).splitlines()]
    own = {
        "sync": (" sport=3781 dport=3781 ",),
        "loopback": (" src=127.0.0.1 dst=127.0.0.1 ", "dport=2222"),
        "loopback over IPv6": ("src=::1 ", "dport=2222"),
        "service": (" dst=192.168.0.1 ", "dport=2222"),
        "VRRP, multicast": ("dst=224.0.0.18 ",),
        "VRRP, unicast": (" 112 ", "src=192.168.0.1 dst=192.168.0.2"),
        "VRRP of others": (" 112 ", "src=10.1.1.1 "),
        "VRRP of others over IPv6": (" 112 ", "src=fd00:9::1"),
    }
    for name, words in own.items():
        found = [line for line in table if all(word in line for word in words)]
        assert found, f"the kernel does not track {name}: {table}"
        assert name == "VRRP, multicast" or all("[UNREPLIED]" not in line for line in found), found
    for daemon, letter in ((lab.fw1, "-i"), (lab.fw1, "-e"), (lab.fw2, "-i"), (lab.fw2, "-e")):
        shown = [line for line in daemon.ask(letter).splitlines() if line.strip()]
        for name, words in own.items():
            assert not [line for line in shown if all(word in line for word in words)], name
        replicas = len(sessions) + 1 if (daemon, letter) in ((lab.fw1, "-i"), (lab.fw2, "-e")) else 0
        assert len(shown) == replicas, shown


def test_a_backups_own_replicas_never_overrun_its_event_buffer(cluster: Callable[..., Cluster]) -> None:
    """It makes and removes them with the smallest buffer that there may be.  As many ends by somebody else overrun it.

    A backup hears of ends only, so its filter has to drop its own ones among these.
    """
    lab = cluster()
    lab.fw2.configure(netlink_buffer_bytes=SMALLEST_BUFFER)
    lab.up()
    fill(lab.pair.fw1, REPLICAS)
    wait_for(lambda: lab.fw2.status()["flows"]["external"] >= REPLICAS, "the replicas", 60.0)
    wait_for(lambda: int(lab.pair.fw2.conntrack("-C")) >= REPLICAS, "their entries", 60.0)
    lab.ready(lab.fw1, lab.fw2)
    lab.pair.fw1.conntrack("-D", "-p", "tcp", "--dport", "443")
    wait_for(lambda: int(lab.pair.fw2.conntrack("-C")) < REPLICAS // 100, "the end of the entries", 60.0)
    lab.ready(lab.fw1, lab.fw2)
    assert lab.fw2.status()["counters"].get("overruns", 0) == 0
    lab.fw2.send(signal.SIGSTOP)  # it cannot read on while these come in
    fill(lab.pair.fw2, REPLICAS)
    lab.pair.fw2.conntrack("-D", "-p", "tcp", "--dport", "443")
    lab.fw2.send(signal.SIGCONT)
    wait_for(lambda: lab.fw2.status()["counters"].get("overruns", 0) > 0, "the overrun")


def test_backup_may_start_first(cluster: Callable[..., Cluster]) -> None:
    """Alone it may not take over; it catches up with what began before the active node's daemon ran."""
    lab = cluster()
    lab.pair.activate(lab.pair.fw1)
    lab.fw2.start()
    wait_for(lambda: lab.fw2.status()["role"] == "backup", "the backup")
    early = lab.all_kinds()
    for session in early.values():
        session.talk()
    assert lab.fw2.status()["verdict"] != "READY"
    assert lab.fw2.gate != "0"
    assert lab.fw2.status()["flows"]["external"] == 0
    lab.fw1.start()
    lab.ready(lab.fw1, lab.fw2)
    assert lab.fw2.gate == "0"
    late = lab.session()
    late.talk()
    lab.replicated(lab.fw1, lab.fw2)
    lab.power_cut(lab.fw1, lab.fw2)
    for name, session in {**early, "late": late}.items():
        try:
            session.talk()
        except OSError as error:
            raise AssertionError(f"{name} died with fw1: {error}") from error
