# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Timers and ends of flows across take-overs, on the real kernel."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import threading
import time
from typing import Callable, Iterator

import pytest
from integration.cluster import VIP, Cluster, Daemon, Session, entry
from integration.load import drop_virtual_ips
from integration.netns import Namespace, Pair, wait_for

pytestmark = pytest.mark.netns

SHORT_S = 5  # the kernel's UDP timers in some of these tests
SERVER = "192.168.1.3"


def short_udp(lab: Cluster, seconds: int = SHORT_S) -> None:
    for firewall in (lab.pair.fw1, lab.pair.fw2):
        firewall.sysctl(
            {f"net/netfilter/nf_conntrack_udp_{name}": str(seconds) for name in ("timeout", "timeout_stream")}
        )


def nothing_new(lab: Cluster) -> None:
    """The firewalls let no flow begin: one that was lost cannot come back by itself."""
    for firewall in (lab.pair.fw1, lab.pair.fw2):
        firewall.run("iptables", "-I", "FORWARD", "-m", "conntrack", "--ctstate", "NEW", "-j", "DROP")


def stream(lab: Cluster) -> Session:
    """A UDP stream with SNAT."""
    session = lab.all_kinds()["udp snat"]
    session.talk()
    return session


def seconds_left(line: str) -> int:
    return int(line.split()[2])


def took_over(daemon: Daemon) -> None:
    """The daemon is active and has given every flow its true timer."""
    wait_for(lambda: (s := daemon.status())["role"] == "active" and s["flows"]["external"] == 0, "the take-over")


@contextlib.contextmanager
def chatter(session: Session, pause: float) -> Iterator[list[str]]:
    """Speak in a session all the time, in a thread; the list gets what went wrong."""
    trouble: list[str] = []
    stop = threading.Event()

    def speak() -> None:
        while not stop.wait(pause):
            try:
                session.talk()
            except OSError as error:
                trouble.append(str(error))
                return

    thread = threading.Thread(target=speak)
    thread.start()
    try:
        yield trouble
    finally:
        stop.set()
        thread.join()


@pytest.mark.long
def test_udp_stream_that_is_busy_without_events_survives(cluster: Callable[..., Cluster]) -> None:
    """For several timeouts packets refresh the original's timer, and nothing tells the backup.

    Its record still says what was left when the last bulk named the flow: too little to live on after the take-over.
    """
    lab = cluster().up()
    short_udp(lab, 8)
    session = stream(lab)
    port = session.port

    def assured() -> bool:  # its event is the flow's last
        session.talk()
        return "[ASSURED]" in entry(lab.pair.fw1, "udp", port)

    wait_for(assured, "a stream")
    lab.replicated(lab.fw1, lab.fw2)
    wait_for(lambda: seconds_left(entry(lab.pair.fw1, "udp", port)) <= 2, "a timer that ran down")
    bulks = lab.fw2.status()["counters"]["bulks_received"]
    lab.fw1.ask("-B")
    with chatter(session, 0.5) as trouble:
        wait_for(lambda: lab.fw2.status()["counters"]["bulks_received"] > bulks, "the bulk")
        began = time.monotonic()
        wait_for(lambda: time.monotonic() > began + 2 * 8, "several timeouts")
    assert trouble == []
    assert f"sport={port} " in entry(lab.pair.fw2, "udp", port)
    nothing_new(lab)
    lab.power_cut(lab.fw1, lab.fw2)
    took_over(lab.fw2)
    assert seconds_left(entry(lab.pair.fw2, "udp", port)) >= 3
    session.talk()


def test_idle_flows_get_true_timers_at_the_take_over(cluster: Callable[..., Cluster]) -> None:
    """A TCP session keeps its days; a UDP replica that nobody uses expires by its own timer."""
    lab = cluster().up()
    short_udp(lab)
    tcp, udp = lab.session(), stream(lab)
    lab.replicated(lab.fw1, lab.fw2)
    assert seconds_left(entry(lab.pair.fw2, "udp", udp.port)) > 80_000  # parked
    lab.power_cut(lab.fw1, lab.fw2)
    took_over(lab.fw2)
    left = entry(lab.pair.fw2, "udp", udp.port)
    assert not left or seconds_left(left) <= SHORT_S
    assert seconds_left(entry(lab.pair.fw2, "tcp", tcp.port)) > 4 * 86_400
    wait_for(lambda: not entry(lab.pair.fw2, "udp", udp.port), "the idle stream's end")
    tcp.talk()


def test_node_that_wins_back_the_virtual_ips_did_not_see_what_passed(
    cluster: Callable[..., Cluster],
) -> None:
    """It was off the network, and did not notice: to its kernel the acknowledgements of today are INVALID for ever."""
    lab = cluster().up()
    session = lab.session()
    session.talk()
    lab.replicated(lab.fw1, lab.fw2)
    nothing_new(lab)
    ports = [f"fw1-{interface}" for interface in ("eth0", "eth1")]
    for port in ports:
        lab.pair.switch.ip("link", "set", port, "down")
    lab.pair.activate(lab.pair.fw2)
    for _dummy in range(3):
        session.talk()
    drop_virtual_ips(lab.pair.fw2)
    for port in ports:
        lab.pair.switch.ip("link", "set", port, "up")
    for host in (lab.pair.a, lab.pair.b):
        host.ip("neigh", "flush", "all")
    lab.ready(lab.fw1, lab.fw2)
    session.talk()


def test_sides_change_and_change_back_with_flows_idle_beyond_their_timers(cluster: Callable[..., Cluster]) -> None:
    """1→2→1→2.  What a backup holds does not expire there, and what the former active node holds is adopted.

    The TCP session sends more than a window while it is on the other node: the node that comes back has old numbers.
    """
    lab = cluster().up()
    for firewall in (lab.pair.fw1, lab.pair.fw2):
        firewall.sysctl({"net/netfilter/nf_conntrack_tcp_timeout_established": str(SHORT_S * 1000)})
    short_udp(lab)
    tcp, udp = lab.session(), stream(lab)
    lab.replicated(lab.fw1, lab.fw2)
    nothing_new(lab)
    active, backup = lab.fw1, lab.fw2
    with chatter(udp, 0.5) as trouble:
        for _turn in range(3):
            for interface, *both in Pair.VIPS:
                for one in both:
                    active.space.ip("address", "del", one, "dev", interface)
            lab.pair.activate(backup.space)
            active, backup = backup, active
            lab.ready(active, backup)
            lab.replicated(active, backup)
            began = time.monotonic()
            transfer(tcp, 8 << 20)
            wait_for(lambda began=began: time.monotonic() > began + 1.5 * SHORT_S, "more than the timers")
            assert seconds_left(entry(backup.space, "udp", udp.port)) > 80_000
            assert seconds_left(entry(backup.space, "tcp", tcp.port)) > 80_000
    assert trouble == []
    udp.talk()
    tcp.talk()


def transfer(session: Session, size: int) -> None:
    """``size`` bytes each way."""
    for sender, receiver in ((session.client, session.server), (session.server, session.client)):
        thread = threading.Thread(target=sender.sendall, args=(bytes(size),))
        thread.start()
        got = 0
        while got < size:
            part = receiver.recv(1 << 20)
            assert part, "the session was closed"
            got += len(part)
        thread.join()


def _vanish(sock: socket.socket, space: Namespace, port: int) -> None:
    """Close without a packet that gets through: as a process that dies while the network is away."""
    rule = ("OUTPUT", "-p", "tcp", "--sport", str(port), "-j", "DROP")
    space.run("iptables", "-A", *rule)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    space.run("iptables", "-D", *rule)


@pytest.mark.parametrize("server_knows", [True, False])
def test_flow_that_closed_during_the_switch_does_not_block_its_tuple(
    cluster: Callable[..., Cluster], server_knows: bool
) -> None:
    lab = cluster().up()
    session = lab.session()
    session.talk()
    port = session.port
    lab.replicated(lab.fw1, lab.fw2)
    lab.pair.unplug(lab.fw1.space)
    _vanish(session.client, lab.pair.a, port)
    if server_knows:
        _vanish(session.server, lab.pair.b, 5001)
    lab.power_cut(lab.fw1, lab.fw2)
    took_over(lab.fw2)
    assert "ESTABLISHED" in entry(lab.pair.fw2, "tcp", port)
    with lab.pair.a.inside():
        client = socket.socket()
    client.settimeout(30)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind(("192.168.0.3", port))
    client.connect((SERVER, 5001))
    lab._accepted(client, lab.listener).talk()


def test_nothing_half_open_is_injected(cluster: Callable[..., Cluster]) -> None:
    lab = cluster().up()
    lab.pair.b.run("iptables", "-A", "INPUT", "-p", "tcp", "--dport", "6001", "-j", "DROP")
    handshake = ("-p", "tcp", "--dport", "6002", "--tcp-flags", "SYN,ACK", "ACK", "-j", "DROP")
    lab.pair.a.run("iptables", "-A", "OUTPUT", *handshake)
    lab.stack.enter_context(lab.pair.b.listen(SERVER, 6002))
    states = {}
    for port in (6001, 6002):
        with lab.pair.a.inside():
            client = lab.stack.enter_context(socket.socket())
        client.setblocking(False)
        client.connect_ex((SERVER, port))
        states[port] = client
    select.select([], [states[6002]], [], 30)
    whole = lab.session()
    for port, state in ((6001, "SYN_SENT"), (6002, "SYN_RECV")):
        wait_for(lambda p=port, s=state: s in lab.pair.fw1.conntrack("-L", "-p", "tcp", "--dport", str(p)), state)
    lab.replicated(lab.fw1, lab.fw2)
    lab.fw1.ask("-B")
    wait_for(lambda: lab.fw2.status()["counters"]["bulks_received"] >= 2, "another bulk")
    lab.ready(lab.fw1, lab.fw2)
    table = lab.pair.fw2.conntrack("-L", "-p", "tcp")
    assert f"sport={whole.port} " in table
    assert "dport=600" not in table
    assert "SYN_" not in table
    assert "dport=600" not in lab.fw2.ask("-e")


def test_port_that_is_taken_on_the_backup_is_named_and_harms_no_other(cluster: Callable[..., Cluster]) -> None:
    lab = cluster().up()
    taken = 45_678
    lab.pair.fw2.conntrack(
        *("-I", "-s", "10.9.9.9", "-d", SERVER, "-p", "tcp", "--sport", str(taken), "--dport", "5001"),
        *("--state", "ESTABLISHED", "-u", "SEEN_REPLY,ASSURED", "-t", "1000", "--src-nat", f"{VIP}:{taken}"),
    )
    with lab.pair.a.inside():
        client = socket.socket()
    client.settimeout(30)
    client.bind(("192.168.0.3", taken))
    client.connect((SERVER, 5001))
    clashing = lab._accepted(client, lab.listener)
    assert clashing.server.getpeername() == (VIP, taken)
    others = [lab.session() for _ in range(5)]
    reason = "the kernel refuses 1 flows (1: their translated addresses and ports are taken)"
    wait_for(lambda: lab.fw2.status()["reasons"] == [reason], "the refusal")
    status = lab.fw2.status()
    assert status["verdict"] == "DEGRADED"
    assert status["counters"]["kernel_refused_create_eexist"] >= 1
    table = lab.pair.fw2.conntrack("-L", "-p", "tcp")
    for session in others:
        assert re.search(rf"src=192\.168\.0\.3 .*sport={session.port} .*dst=192\.168\.1\.100 ", table)
    lab.ready(lab.fw1, lab.fw2)  # by itself: the next attempt finds out that the other entry is stale
    lab.replicated(lab.fw1, lab.fw2)
    lab.power_cut(lab.fw1, lab.fw2)
    for session in (clashing, *others):
        session.talk()
