# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is replicated and what is not, with real traffic; and the filter, with other options, exchanged by SIGHUP."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import struct
import sys
from typing import Any, Callable

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import ctnetlink, netlink
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.ctnetlink import Kind
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.filters import EventFilter, Filter
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow, Tuple
from integration.cluster import Cluster, Daemon, Session
from integration.netns import CONNTRACK_SYSCTLS, Namespace, Net, wait_for
from integration.test_netlink import single

pytestmark = pytest.mark.netns

TCP_REPAIR = 19  # <linux/tcp.h>: a socket closed in this mode sends nothing
PLAIN = ("-p", "tcp", "-s", "10.9.0.1", "-d", "10.9.0.2", "--dport", "22", "--timeout", "600", "--state", "ESTABLISHED")


def replica(daemon: Daemon, session: Session) -> dict[str, Any] | None:
    """The backup's external cache on this session."""
    for line in daemon.ask("-e", "--json").splitlines():
        flow = json.loads(line)
        if flow["orig"].get("sport") == session.port:
            return dict(flow)
    return None


def in_kernel(space: Namespace, session: Session) -> bool:
    return f"sport={session.port} " in space.conntrack("-L")


def insert(space: Namespace, number: int, *more: str) -> None:
    space.conntrack("-I", *PLAIN, "--sport", str(number), *more)


def change(daemon: Daemon, **options: Any) -> None:
    daemon.configure(**options)
    daemon.reload()


def test_marks_decide_and_may_come_and_go_while_a_session_lives(cluster: Callable[..., Cluster]) -> None:
    lab = cluster(filter={"marks": [{"value": 1, "mask": 1}]}).up()
    sessions = lab.all_kinds()
    chosen, other = sessions["tcp snat"], sessions["tcp dnat"]
    for session in sessions.values():
        session.talk()
    rule = ("FORWARD", "-t", "mangle", "-p", "tcp", "-m", "multiport", "--ports", "5001", "-j", "CONNMARK")
    for firewall in (lab.pair.fw1, lab.pair.fw2):
        firewall.run("iptables", "-A", *rule, "--set-mark", "3")
    chosen.talk()  # its state was told long ago: the event of the mark does not repeat it
    wait_for(lambda: (replica(lab.fw2, chosen) or {}).get("mark") == 3, "the marked session on the backup")
    assert (replica(lab.fw2, chosen) or {})["state"] == "ESTABLISHED"
    assert lab.fw2.ask("-e").count("\n") == lab.fw1.ask("-i").count("\n") == 1
    wait_for(lambda: in_kernel(lab.pair.fw2, chosen), "the session in the backup's kernel")

    # entries of others in the backup's kernel stay; one that the peer should have told of goes
    insert(lab.pair.fw2, 1001)
    insert(lab.pair.fw2, 1002, "--mark", "1")
    lab.fw2.ask("-R")
    wait_for(lambda: "sport=1002 " not in lab.pair.fw2.conntrack("-L"), "the stale entry to go")
    lab.fw2.ask("-F")
    wait_for(lambda: not in_kernel(lab.pair.fw2, chosen), "the flush")
    assert "sport=1001 " in lab.pair.fw2.conntrack("-L")
    lab.fw2.ask("-R")
    wait_for(lambda: in_kernel(lab.pair.fw2, chosen), "the session again")

    for firewall in (lab.pair.fw1, lab.pair.fw2):
        firewall.run("iptables", "-R", rule[0], "1", *rule[1:], "--set-mark", "2")
    chosen.talk()
    wait_for(lambda: replica(lab.fw2, chosen) is None, "the session without the mark to leave the backup")
    wait_for(lambda: not in_kernel(lab.pair.fw2, chosen), "it to leave the kernel")
    for firewall in (lab.pair.fw1, lab.pair.fw2):
        firewall.run("iptables", "-R", rule[0], "1", *rule[1:], "--set-mark", "1")
    chosen.talk()
    wait_for(lambda: in_kernel(lab.pair.fw2, chosen), "the session on the backup")
    lab.power_cut(lab.fw1, lab.fw2)
    chosen.talk()
    for sock in (other.client, other.server):
        sock.settimeout(2)
    with pytest.raises(OSError):
        other.talk()


def test_addresses_and_zones_decide(cluster: Callable[..., Cluster]) -> None:
    lab = cluster(filter={"addresses": ["192.168.1.3/32"], "zones": [0]}, ignore_addresses=["10.0.0.0/8"]).up()
    sessions = lab.all_kinds()
    sessions["udp snat"].talk()
    wait_for(lambda: lab.fw2.ask("-e").count("\n") >= 3, "the sessions with 192.168.1.3")
    for name, session in sessions.items():
        assert (replica(lab.fw2, session) is not None) == (name != "tcp6 snat"), name
    assert "fd00" not in lab.fw1.ask("-i")


def test_sighup_exchanges_the_filter_on_both_nodes(cluster: Callable[..., Cluster]) -> None:
    lab = cluster(filter={"protocols": ["udp"]}).up()
    sessions = lab.all_kinds()
    tcp, udp = sessions["tcp snat"], sessions["udp snat"]
    udp.talk()
    wait_for(lambda: in_kernel(lab.pair.fw2, udp), "UDP on the backup")
    assert not [name for name in ("tcp snat", "tcp6 snat", "tcp dnat") if replica(lab.fw2, sessions[name])]
    change(lab.fw2, filter={"protocols": ["tcp"]}, log_level="debug", window_ms=1)
    wait_for(lambda: not in_kernel(lab.pair.fw2, udp), "UDP to leave the backup with its filter")
    change(lab.fw1, filter={"protocols": ["6"]})
    wait_for(lambda: in_kernel(lab.pair.fw2, tcp), "TCP on the backup")
    assert replica(lab.fw2, udp) is None
    lab.ready(lab.fw1, lab.fw2)
    late = lab.session()
    wait_for(lambda: in_kernel(lab.pair.fw2, late), "a new session on the backup")
    lab.power_cut(lab.fw1, lab.fw2)
    for session in (tcp, late, sessions["tcp6 snat"], sessions["tcp dnat"]):
        session.talk()


def test_different_filters_are_said(cluster: Callable[..., Cluster]) -> None:
    lab = cluster().up()
    session = lab.session()
    lab.replicated(lab.fw1, lab.fw2)
    change(lab.fw2, filter={"protocols": ["udp"]})
    text = "fw1 replicates flows that this node's filter excludes: give both the same filter"
    wait_for(lambda: lab.fw2.status()["reasons"] == [text], "the reason")
    assert replica(lab.fw2, session) is None
    change(lab.fw2, filter={})
    lab.ready(lab.fw1, lab.fw2)
    lab.replicated(lab.fw1, lab.fw2)


def test_reload_that_cannot_be_done_leaves_everything_and_says_why(
    cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = cluster().up()
    path, good = lab.fw2.home / "conf", (lab.fw2.home / "conf").read_text(encoding="utf-8")
    before = lab.fw2.status()["configuration"]
    # a client needs a file that names the control socket
    (lab.fw2.home / "good").write_text(good, encoding="utf-8")
    command = (sys.executable, "-m", "ctsyncd", "-C", str(lab.fw2.home / "good"))
    monkeypatch.setattr(lab.fw2, "_command", lambda *argv: (*command, *argv))
    for text, reasons in (
        ("{", ("not valid JSON",)),
        (good.replace('"node"', '"filter": {"zones": [70000]}, "nod": 1, "node"', 1), ("(and 1 more)", "zones[0]: 70")),
        (good.replace("eth2", "eth3").replace('"node"', '"window_ms": 9, "node"', 1), ("changes of links need a",)),
    ):
        path.write_text(text, encoding="utf-8")
        lab.fw2.send(signal.SIGHUP)

        def said(reason: str = reasons[0]) -> bool:
            return any(reason in line for line in lab.fw2.status()["reasons"])

        wait_for(said, reasons[0])
        assert reasons[-1] in lab.fw2.log()
        status = lab.fw2.status()
        assert status["verdict"] == "DEGRADED"
        assert status["configuration"]["digest"] == before["digest"]
        assert lab.fw2.gate == "0"
        session = lab.session()
        wait_for(lambda session=session: replica(lab.fw2, session) is not None, "a new session")
    path.write_text(good, encoding="utf-8")
    lab.fw2.send(signal.SIGHUP)
    lab.ready(lab.fw1, lab.fw2)
    assert lab.fw2.status()["configuration"] == before


def reopen(lab: Cluster, number: int) -> Session:
    """A connection of a from a given port."""
    with lab.pair.a.inside():
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind(("192.168.0.3", number))
    client.settimeout(30)
    client.connect(("192.168.1.3", 5001))
    server, seen = lab.listener.accept()
    for sock in (client, server):
        sock.settimeout(30)
        lab.stack.callback(sock.close)
    return Session(client, server, seen)


@pytest.mark.parametrize("end", ["reset", "silence"])
def test_connection_that_takes_the_tuple_of_a_former_one_is_replicated(
    cluster: Callable[..., Cluster], end: str
) -> None:
    """Half-open states do not leave the kernel: the peer must still get the new connection, not keep the old one.

    After a reset the kernel makes a new entry.  When both ends vanished in silence the established entry goes through
    SYN_RECV again.
    """
    lab = cluster().up()
    with contextlib.ExitStack() as stack:
        with lab.pair.fw1.inside():
            witness = stack.enter_context(netlink.EventSocket())
            filtered = stack.enter_context(netlink.EventSocket(unwanted=Filter().events))
        first = reopen(lab, 4001)
        first.talk()
        lab.replicated(lab.fw1, lab.fw2)
        if end == "reset":
            first.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            for sock in (first.client, first.server):
                sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        first.close()
        second = reopen(lab, 4001)
        second.talk()
        lab.replicated(lab.fw1, lab.fw2)
        states = [event.flow.state for event in single(witness) if event.flow and event.flow.state is not None]
        assert states.count(k.TCP_SYN_RECV) == states.count(k.TCP_ESTABLISHED) == 2
        assert states.count(k.TCP_SYN_SENT) == (2 if end == "reset" else 1)
        passed = [event.flow.state for event in single(filtered) if event.flow and event.flow.state is not None]
        assert passed == [state for state in states if state >= k.TCP_ESTABLISHED]
    lab.power_cut(lab.fw1, lab.fw2)
    second.talk()


def test_kernel_runs_the_program_as_meant(net: Net) -> None:
    """Zones, protocols and replies: what an unfiltered socket hears, less what is not wanted."""
    space = net.namespace("fw")
    space.sysctl(CONNTRACK_SYSCTLS)
    unwanted = EventFilter(protocols=(k.IPPROTO_UDP, k.IPPROTO_GRE), zones=(0, 7), replied_only=True)
    flows = [
        Flow(
            *(k.AF_INET, proto, zone),
            Tuple(b"\x0a\0\0" + bytes((number,)), b"\x0a\0\1\1", b"\x10\0\x20\0"),
            Tuple(b"\x0a\0\1\1", b"\x0a\0\0" + bytes((number,)), b"\x20\0\x10\0"),
            k.IPS_CONFIRMED | status,
            600,
            k.TCP_ESTABLISHED if proto == k.IPPROTO_TCP else None,
        )
        for number, (proto, zone, status) in enumerate(
            (proto, zone, status)
            for proto in (k.IPPROTO_TCP, k.IPPROTO_UDP, k.IPPROTO_UDPLITE)
            for zone in (0, 7, 8)
            for status in (0, k.IPS_SEEN_REPLY)
        )
    ]
    with contextlib.ExitStack() as stack:
        with space.inside():
            requests = stack.enter_context(netlink.RequestSocket())
            witness = stack.enter_context(netlink.EventSocket())
            filtered = stack.enter_context(netlink.EventSocket(unwanted=unwanted))
        assert requests.inject([ctnetlink.create(flow) for flow in flows]) == []
        assert requests.inject([ctnetlink.delete(flow) for flow in flows]) == []
        heard = [(event.kind, event.flow.key) for event in single(witness) if event.flow]
        assert len(heard) == 2 * len(flows)
        wanted = {f.key for f in flows if f.proto == k.IPPROTO_UDP and f.zone in (0, 7) and f.replied}
        assert len(wanted) == 2
        passed = [(event.kind, event.flow.key) for event in single(filtered) if event.flow]
        assert passed == [one for one in heard if one[0] == Kind.DESTROY or one[1] in wanted]
