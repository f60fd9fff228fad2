# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The kernel's sockets and the codec on the real kernel: real connections, conntrack(8) as the judge."""

from __future__ import annotations

import contextlib
import errno
import re
import select
import socket
import struct
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import columns, ctnetlink, netlink
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.ctnetlink import Event, Kind
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.filters import EventFilter
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import (
    ZONE_ORIGINAL,
    ZONE_REPLY,
    Flow,
    SeqAdj,
    Tuple,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import Changes, pack, unpack
from integration.netns import CONNTRACK_SYSCTLS, Namespace, Net, Pair, wait_for

pytestmark = pytest.mark.netns

NOTHING = Changes({}, [], [])
OWN_INJECTIONS = 20_000

SNATTED = 0x19E  # SEEN_REPLY ASSURED CONFIRMED SRC_NAT SRC_NAT_DONE DST_NAT_DONE


def table(space: Namespace) -> list[Flow]:
    """All conntrack entries of a namespace, as the codec reads them."""
    with space.inside():
        return [flow for part in netlink.dump_flows() for flow in part]


def tcp_to(space: Namespace, port: int) -> list[Flow]:
    return [
        flow for flow in table(space) if flow.proto == k.IPPROTO_TCP and flow.orig.l4[2:] == struct.pack("!H", port)
    ]


def inject(space: Namespace, messages: list[bytes]) -> list[tuple[int, int]]:
    with space.inside(), netlink.RequestSocket() as requests:
        return requests.inject(messages)


def firewall(net: Net) -> Namespace:
    """A namespace that tracks and translates (NAT works only where a NAT chain exists)."""
    space = net.namespace("fw")
    space.sysctl(CONNTRACK_SYSCTLS)
    for tool in ("iptables", "ip6tables"):
        space.run(tool, "-A", "FORWARD", "-m", "state", "--state", "ESTABLISHED")
        space.run(tool, "-t", "nat", "-A", "POSTROUTING", "-o", "nowhere", "-j", "MASQUERADE")
    return space


def flow_number(number: int, **changes: Any) -> Flow:
    """One of many different plain TCP flows."""
    orig = Tuple(struct.pack("!I", 0x0A000000 + number), b"\xc0\xa8\1\3", b"\x30\x39\0\x16")
    reply = Tuple(orig.dst, orig.src, b"\0\x16\x30\x39")
    return Flow(k.AF_INET, k.IPPROTO_TCP, 0, orig, reply, 0x0E, 600, k.TCP_ESTABLISHED)._replace(**changes)


class Traffic:
    """Connections of every kind through the active firewall of a pair; its sockets stay open."""

    def __init__(self, pair: Pair) -> None:
        self.stack = contextlib.ExitStack()
        keep = self.stack.enter_context
        v4 = keep(pair.b.listen("192.168.1.3", 5001))
        v6 = keep(pair.b.listen("fd00:c0de:1::3", 5001))
        web4 = keep(pair.a.listen("192.168.0.3", 80))
        web6 = keep(pair.a.listen("fd00:c0de::3", 80))
        for client, host, port, server in (
            (pair.a, "192.168.1.3", 5001, v4),  # SNAT
            (pair.a, "fd00:c0de:1::3", 5001, v6),
            (pair.a, "192.168.1.200", 5001, v4),  # DNAT and SNAT
            (pair.a, "fd00:c0de:1::200", 5001, v6),
            (pair.b, "192.168.1.100", 8080, web4),  # DNAT
            (pair.b, "fd00:c0de:1::100", 8080, web6),
        ):
            keep(client.connect(host, port))
            keep(server.accept()[0])
        for host, family in (("192.168.1.3", socket.AF_INET), ("fd00:c0de:1::3", socket.AF_INET6)):
            with pair.b.inside():
                server = keep(socket.socket(family, socket.SOCK_DGRAM))
                server.bind((host, 5353))
            with pair.a.inside():
                client = keep(socket.socket(family, socket.SOCK_DGRAM))
            server.settimeout(30)
            client.settimeout(30)
            client.sendto(b"question", (host, 5353))
            server.sendto(b"answer", server.recvfrom(100)[1])
            client.recv(100)
        pair.a.ping("192.168.1.3", 77)
        pair.a.ping("fd00:c0de:1::3", 78)
        with pair.fw1.inside():  # GRE has keys, ESP has nothing
            for proto in (k.IPPROTO_GRE, 50):
                with socket.socket(socket.AF_INET, socket.SOCK_RAW, proto) as raw:
                    raw.sendto(b"\x20\0\x08\0\x12\x34\x56\x78" + bytes(20), ("192.168.1.3", 0))


@pytest.fixture
def traffic(pair: Pair) -> Iterator[Pair]:
    """A pair whose fw1 is active and forwards connections of every kind."""
    pair.activate(pair.fw1)
    made = Traffic(pair)
    with made.stack:
        yield pair


def of_conntrack(text: str) -> dict[int, dict[str, Any]]:
    """``conntrack -L -o extended,id`` by id, timeout left out."""
    entries = {}
    for line in text.splitlines():
        words = line.split()
        pairs = [word.split("=") for word in words if "=" in word]
        first: dict[str, str] = {}
        second: dict[str, str] = {}
        rest: dict[str, str] = {}
        for name, value in pairs:
            if name in {"src", "dst", "sport", "dport", "id", "type", "code", "srckey", "dstkey"}:
                side = first if name not in first else second if name not in second else rest
                side[name] = value
            else:
                rest[name] = value
        if "type" not in first:  # only ICMP has an id of its own in each direction
            rest["id"] = first.pop("id")
        entries[int(rest["id"])] = {
            "family": int(words[1]),
            "proto": int(words[3]),
            "state": next((word for word in words[5:6] if word.isupper()), None),
            "assured": "[ASSURED]" in words,
            "replied": "[UNREPLIED]" not in words,
            "mark": int(rest["mark"]),
            "orig": first,
            "reply": second,
        }
    return entries


def as_conntrack(flow: Flow) -> dict[str, Any]:
    """A flow as :func:`of_conntrack` has it."""
    family = socket.AF_INET if flow.family == k.AF_INET else socket.AF_INET6

    def side(direction: Tuple) -> dict[str, str]:
        out = {"src": socket.inet_ntop(family, direction.src), "dst": socket.inet_ntop(family, direction.dst)}
        if flow.proto in k.ICMP_PROTOCOLS:
            ident, kind, code = struct.unpack("!HBB", direction.l4)
            out.update(type=str(kind), code=str(code), id=str(ident))
        elif flow.proto == k.IPPROTO_GRE:
            keys = struct.unpack("!HH", direction.l4)
            out.update(srckey=hex(keys[0]), dstkey=hex(keys[1]))
        elif direction.l4:
            sport, dport = struct.unpack("!HH", direction.l4)
            out.update(sport=str(sport), dport=str(dport))
        return out

    return {
        "family": flow.family,
        "proto": flow.proto,
        "state": k.TCP_STATE_NAMES[flow.state or 0] if flow.proto == k.IPPROTO_TCP else None,
        "assured": flow.assured,
        "replied": flow.replied,
        "mark": flow.mark,
        "orig": side(flow.orig),
        "reply": side(flow.reply),
    }


def test_real_flows_read_as_conntrack_reads_them(traffic: Pair) -> None:
    got = {flow.ident: as_conntrack(flow) for flow in table(traffic.fw1)}
    want = of_conntrack(traffic.fw1.conntrack("-L", "-o", "extended,id"))
    assert got == want
    assert {(entry["family"], entry["proto"]) for entry in got.values()} >= {
        (k.AF_INET, 1), (k.AF_INET, 6), (k.AF_INET, 17), (k.AF_INET, 47), (k.AF_INET, 50),
        (k.AF_INET6, 6), (k.AF_INET6, 17), (k.AF_INET6, 58),
    }  # fmt: skip
    assert len([entry for entry in got.values() if entry["proto"] == k.IPPROTO_TCP]) == 6
    for flow in table(traffic.fw1):
        assert flow.start is not None and flow.timeout


def lasting(flow: Flow) -> Flow:
    """What of a flow must be the same on another machine."""
    done = ~0x180 if not flow.status & 0x30 else ~0  # NAT_DONE without NAT is set by the first packet only
    if flow.proto == k.IPPROTO_GRE:  # the timer of a replica is fixed
        done &= ~k.IPS_FIXED_TIMEOUT
    flags = flow.tcp_flags and tuple(one & 0x03 for one in flow.tcp_flags)
    return flow._replace(status=flow.status & done, timeout=None, ident=None, start=None, tcp_flags=flags)


def test_a_copied_table_is_the_same_table(traffic: Pair) -> None:
    """Dump on fw1, create on fw2: tuples, NAT bits, states, window scale; then update and delete all of it."""
    flows = table(traffic.fw1)
    natted = [flow for flow in flows if flow.snat or flow.dnat]
    assert {(flow.family, flow.snat, flow.dnat) for flow in natted} == {
        (family, snat, dnat) for family in (k.AF_INET, k.AF_INET6) for snat, dnat in ((1, 0), (0, 1), (1, 1))
    }
    ours = {flow.key for flow in flows}
    assert inject(traffic.fw2, [ctnetlink.create(flow, timeout=5000) for flow in flows]) == []
    copies = {flow.key: flow for flow in table(traffic.fw2) if flow.key in ours}
    assert {key: lasting(flow) for key, flow in copies.items()} == {flow.key: lasting(flow) for flow in flows}
    for flow in copies.values():
        assert flow.timeout is not None and 4900 < flow.timeout <= 5000
        if flow.proto == k.IPPROTO_TCP and flow.snat and not flow.dnat:
            assert flow.status == SNATTED
            assert flow.tcp_flags is not None
            assert [one & k.TCP_FLAG_BE_LIBERAL for one in flow.tcp_flags] == [k.TCP_FLAG_BE_LIBERAL] * 2

    changed = [flow._replace(mark=7, status=flow.status | 0x0E) for flow in flows]
    assert inject(traffic.fw2, [ctnetlink.update(flow, timeout=90) for flow in changed]) == []
    for flow in table(traffic.fw2):
        if flow.key in ours:
            assert (flow.mark, flow.status & 0x0E) == (7, 0x0E)
            assert flow.timeout is not None and (flow.timeout <= 90 or flow.proto == k.IPPROTO_GRE)
            assert flow.status & 0x30 == copies[flow.key].status & 0x30

    stale = [ctnetlink.delete(flow, ident=(flow.ident or 0) ^ 1) for flow in copies.values()]
    assert inject(traffic.fw2, stale) == [(index, errno.ENOENT) for index in range(len(stale))]
    by_key = [ctnetlink.delete(ctnetlink.flow_of_key(key), ident=flow.ident) for key, flow in copies.items()]
    assert inject(traffic.fw2, by_key) == []
    assert not ours & {flow.key for flow in table(traffic.fw2)}


def test_everything_else_that_an_entry_can_have(net: Net) -> None:
    space = firewall(net)
    control = flow_number(1, helper="ftp")
    data = flow_number(
        2,
        status=0x0F | k.IPS_SEQ_ADJUST,
        master=control.orig,
        master_proto=k.IPPROTO_TCP,
        seqadj=(SeqAdj(0xF0000001, -4, 6), SeqAdj(9, 0, -1)),
        mark=0xDEADBEEF,
    )
    scaled = flow_number(3, tcp_wscale=(7, 14), tcp_flags=(0x23, 0x13))
    half = flow_number(4, tcp_wscale=(7, 0), tcp_flags=(0x03, 0x02))
    zoned = flow_number(3, zone=9)
    orig = Tuple(b"\x0a\0\0\1", b"\x0a\0\0\2", b"\x26\xab\x0b\x59")
    sctp = Flow(2, 132, 0, orig, ctnetlink.mirror(132, orig), 0x0E, 99, k.SCTP_ESTABLISHED, sctp_vtags=(0xFEEDF00D, 7))
    made = [control, data, scaled, half, zoned, sctp]
    assert inject(space, [ctnetlink.create(flow, liberal=False) for flow in made]) == []
    with space.inside(), netlink.RequestSocket() as requests:
        found = [requests.lookup(flow) for flow in made]
        assert requests.lookup(flow_number(99)) is None
    for want, got in zip(made, found):
        assert got is not None
        assert got.key == want.key and got.state == want.state
    got_control, got_data, got_scaled, got_half, got_zoned, got_sctp = found
    assert got_control and got_control.helper == "ftp"
    assert got_data and (got_data.master, got_data.master_proto) == (control.orig, k.IPPROTO_TCP)
    assert (got_data.seqadj, got_data.mark) == (data.seqadj, 0xDEADBEEF)
    assert got_data.status & (k.IPS_EXPECTED | k.IPS_SEQ_ADJUST) == k.IPS_EXPECTED | k.IPS_SEQ_ADJUST
    assert got_scaled and (got_scaled.tcp_wscale, got_scaled.tcp_flags) == ((7, 14), (3, 3))
    assert got_half and (got_half.tcp_wscale, got_half.tcp_flags) == ((0, 0), (3, 2))
    assert got_zoned and got_zoned.ident != got_scaled.ident
    assert got_sctp and got_sctp.sctp_vtags == (0xFEEDF00D, 7)
    # the retries that the engine has, and the refusals that they answer
    orphan = flow_number(5, master=flow_number(6).orig, master_proto=6, status=0x0F)
    unknown = flow_number(7, helper="no-such-helper")
    assert inject(space, [ctnetlink.create(orphan), ctnetlink.create(unknown)]) == [
        (0, errno.ENOENT),
        (1, errno.EOPNOTSUPP),
    ]
    retries = [ctnetlink.create(orphan, master=False), ctnetlink.create(unknown, helper=False)]
    assert inject(space, retries) == []
    assert inject(space, [ctnetlink.update(data), ctnetlink.update(orphan)]) == [(1, errno.EBUSY)]
    assert inject(space, [ctnetlink.update(orphan, expected=False)]) == []
    assert inject(space, [ctnetlink.update(data._replace(status=0x0B))]) == [(0, errno.EBUSY)]  # cannot clear ASSURED
    assert inject(space, [ctnetlink.update(data._replace(status=0x0B), status=False)]) == []


def drops(space: Namespace, tool: str) -> int:
    """Packets that a firewall of a pair judged INVALID in FORWARD or dropped because they came to a VIP itself."""
    text = space.run(tool, "-vnxL").stdout
    return sum(int(line.split()[0]) for line in text.splitlines() if re.search(r"state INVALID|\bDROP  ", line))


@pytest.mark.parametrize("host", ["192.168.1.3", "fd00:c0de:1::3"])
@pytest.mark.parametrize("copied", [True, False], ids=["copied", "not-copied"])
def test_a_stream_goes_on_through_the_other_firewall(pair: Pair, host: str, copied: bool) -> None:
    """The same connection, the same SNAT address and port at the server; without the copied entry nothing passes."""
    pair.activate(pair.fw1)
    with pair.b.listen(host, 5001) as listener, pair.a.connect(host, 5001) as client:
        server, peer = listener.accept()
        with server:
            server.settimeout(30)
            client.sendall(b"before")
            assert server.recv(100) == b"before"
            assert peer[0] in {"192.168.1.100", "fd00:c0de:1::100"}
            flows = tcp_to(pair.fw1, 5001)
            assert [flow.status for flow in flows] == [SNATTED]
            if copied:
                assert inject(pair.fw2, [ctnetlink.create(flow) for flow in flows]) == []
            pair.unplug(pair.fw1)
            pair.activate(pair.fw2)
            client.sendall(b"after")
            if not copied:
                tool = "ip6tables" if ":" in host else "iptables"
                wait_for(lambda: drops(pair.fw2, tool) >= 3, "three dropped packets")
                assert not select.select([server], [], [], 0)[0]
                assert tcp_to(pair.fw2, 5001) == []
                return
            assert server.recv(100) == b"after"
            server.sendall(b"and back")
            assert client.recv(100) == b"and back"
            assert server.getpeername() == peer
            assert [lasting(flow) for flow in tcp_to(pair.fw2, 5001)] == [lasting(flow) for flow in flows]


@pytest.mark.parametrize("liberal", [True, False], ids=["liberal", "strict"])
def test_a_stream_goes_on_although_acknowledgements_were_lost(pair: Pair, liberal: bool) -> None:
    """The first packet through the other firewall repeats old data, and the answer acknowledges newer data.

    Window tracking begins with that first packet, so without BE_LIBERAL the answer is INVALID, every time.
    """
    pair.activate(pair.fw1)
    with pair.b.listen("192.168.1.3", 5001) as listener, pair.a.connect("192.168.1.3", 5001) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server, _peer = listener.accept()
        with server:
            server.settimeout(30)
            flows = tcp_to(pair.fw1, 5001)
            pair.fw1.run("iptables", "-t", "raw", "-A", "PREROUTING", "-i", "eth0", "-j", "DROP")
            received = 0
            for _ in range(5):
                client.sendall(bytes(1000))
                received += len(server.recv(1000))
            while received < 5000:
                received += len(server.recv(5000))
            wait_for(lambda: retransmissions(client) >= 2, "the client to repeat from the start")
            assert inject(pair.fw2, [ctnetlink.create(flow, liberal=liberal) for flow in flows]) == []
            if not liberal:
                pair.fw2.run(
                    *INVALID, "-A", "PREROUTING", "-i", "eth0", "-p", "tcp", "-m", "state", "--state", "INVALID"
                )
            pair.unplug(pair.fw1)
            pair.activate(pair.fw2)
            client.sendall(b"after")
            if not liberal:  # the client repeats, the server acknowledges again, and nothing of it helps
                wait_for(lambda: invalid(pair.fw2) >= 2, "acknowledgements that are INVALID")
                server.settimeout(1)
                with pytest.raises(TimeoutError):
                    server.recv(100)
                assert retransmissions(client) >= 3
                return
            assert server.recv(100) == b"after"
            server.sendall(b"and back")
            assert client.recv(100) == b"and back"


INVALID = ("iptables", "-t", "mangle")


def invalid(space: Namespace) -> int:
    """Packets that the rule for INVALID ones saw; they are not translated back, so they do not come to be forwarded."""
    return int(space.run(*INVALID, "-nvxL", "PREROUTING").stdout.splitlines()[2].split()[0])


def retransmissions(connection: socket.socket) -> int:
    """tcpi_retransmits of struct tcp_info (<linux/tcp.h>): timeouts in a row without an acknowledgement."""
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[2]


def single(events: netlink.EventSocket) -> list[Event]:
    """The events that are there, each for itself, as the codec reads them."""
    got: list[Event] = []
    while data := events._receive(socket.MSG_DONTWAIT):
        got += ctnetlink.parse_messages(data)
    return got


def collect(events: netlink.EventSocket, enough: Callable[[list[Event]], bool], what: str) -> list[Event]:
    """Events until they are ``enough``."""
    got: list[Event] = []

    def more() -> bool:
        got.extend(single(events))
        return enough(got)

    wait_for(more, what)
    return got


def test_own_requests_are_not_reported_and_foreign_ones_are(net: Net) -> None:
    space = firewall(net)
    with contextlib.ExitStack() as stack:
        with space.inside():
            ours = stack.enter_context(netlink.RequestSocket())
            other = stack.enter_context(netlink.RequestSocket())
            events = stack.enter_context(netlink.EventSocket(ignore_portids=[ours.portid]))
            witness = stack.enter_context(netlink.EventSocket())
        flows = [flow_number(number) for number in range(3)]
        assert ours.inject([ctnetlink.create(flow) for flow in flows]) == []
        assert ours.inject([ctnetlink.update(flows[0]), ctnetlink.delete(flows[0])]) == []
        seen = single(witness)
        assert [event.kind for event in seen] == [Kind.NEW] * 3 + [Kind.UPDATE, Kind.DESTROY]
        assert {event.portid for event in seen} == {ours.portid}
        assert events.read() == NOTHING
        assert other.inject([ctnetlink.update(flows[1]._replace(mark=5))]) == []
        space.conntrack("-D", "-s", "10.0.0.2")
        changes = events.read()
        ((key, value),) = changes.rows[len(flows[1].key)].items()
        assert (key, unpack(key, value).mark, changes.gone) == (flows[1].key, 5, [flows[2].key])
        assert (changes.events, changes.flows, changes.lost, changes.more) == (2, [], False, False)
        updated, destroyed = single(witness)[-2:]
        assert (updated.kind, updated.portid) == (Kind.UPDATE, other.portid)
        assert destroyed.kind == Kind.DESTROY and destroyed.portid not in {0, ours.portid, other.portid}
        # the filter can be exchanged while the socket is in use
        events.set_filter(ignore_portids=[other.portid])
        assert other.inject([ctnetlink.delete(flows[1])]) == []
        assert ours.inject([ctnetlink.create(flows[2])]) == []
        changes = events.read()
        assert (changes.events, changes.gone, list(changes.rows[len(flows[2].key)])) == (1, [], [flows[2].key])


def test_new_entries_are_told_only_to_who_follows_and_ends_always(net: Net) -> None:
    """Also the end of an entry that was made while nobody followed: the kernel keeps what it needs to tell it."""
    space = firewall(net)
    with contextlib.ExitStack() as stack:
        with space.inside():
            other = stack.enter_context(netlink.RequestSocket())
            events = stack.enter_context(netlink.EventSocket())
        flows = [flow_number(number) for number in range(3)]
        assert other.inject([ctnetlink.create(flows[0])]) == []
        assert [event.kind for event in single(events)] == [Kind.NEW]
        events.follow(False)
        assert other.inject([ctnetlink.create(flows[1]), ctnetlink.update(flows[0]._replace(mark=5))]) == []
        assert events.read() == NOTHING
        assert other.inject([ctnetlink.delete(flow) for flow in flows[:2]]) == []
        assert events.read().gone == [flow.key for flow in flows[:2]]
        events.follow(True)
        assert other.inject([ctnetlink.create(flows[2])]) == []
        assert [event.kind for event in single(events)] == [Kind.NEW]


def test_unwanted_tcp_states_are_not_reported(pair: Pair) -> None:
    """A whole real connection; UDP and the end of every flow pass the filter."""
    pair.activate(pair.fw1)
    unwanted = (k.TCP_SYN_SENT, k.TCP_SYN_RECV, k.TCP_FIN_WAIT, k.TCP_CLOSE_WAIT, k.TCP_LAST_ACK)
    with contextlib.ExitStack() as stack:
        with pair.fw1.inside():
            events = stack.enter_context(netlink.EventSocket(unwanted=EventFilter(tcp_states=unwanted)))
            witness = stack.enter_context(netlink.EventSocket())
        listener = stack.enter_context(pair.b.listen("192.168.1.3", 5001))
        with pair.a.connect("192.168.1.3", 5001), listener.accept()[0]:
            pass
        with pair.a.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"question", ("192.168.1.3", 5353))

        def tcp(events: list[Event]) -> list[tuple[Kind, int | None]]:
            return [(e.kind, e.flow.state) for e in events if e.flow and e.flow.proto == k.IPPROTO_TCP]

        everything = collect(witness, lambda got: (Kind.UPDATE, k.TCP_TIME_WAIT) in tcp(got), "TIME_WAIT")
        pair.fw1.conntrack("-D", "-p", "tcp")
        everything += collect(witness, lambda got: any(one[0] == Kind.DESTROY for one in tcp(got)), "the end")
        filtered = single(events)
        assert {state for _kind, state in tcp(everything)} >= {
            k.TCP_SYN_SENT,
            k.TCP_SYN_RECV,
            k.TCP_LAST_ACK,
            k.TCP_ESTABLISHED,
            k.TCP_TIME_WAIT,
        }
        assert tcp(filtered) == [one for one in tcp(everything) if one[0] == Kind.DESTROY or one[1] not in unwanted]
        assert all(event.portid == 0 for event in filtered if event.kind != Kind.DESTROY)
        assert [e.kind for e in filtered if e.flow and e.flow.proto == k.IPPROTO_UDP] == [Kind.NEW]


def test_system_calls_of_a_thousand_events(net: Net) -> None:
    """512 events per system call, and none to find that there are no more."""
    space = firewall(net)
    with contextlib.ExitStack() as stack:
        with space.inside():
            events = stack.enter_context(netlink.EventSocket())
        inject(space, [ctnetlink.create(flow_number(number), timeout=600) for number in range(1000)])
        calls = []
        receive = events._receiver.receive
        events._receiver.receive = lambda limit: calls.append(limit) or receive(limit)  # type: ignore[method-assign, func-returns-value]
        changes = events.read()
        assert changes.events == 1000
        assert sum(map(len, changes.settled().rows.values())) == 1000
        assert (changes.lost, changes.more) == (False, False)
        assert len(calls) == 2


def test_a_flood_comes_in_columns_and_says_the_same(net: Net) -> None:
    """The kernel's own events, the second time, when their layout is known."""
    space = firewall(net)
    flows = [flow_number(number, timeout=600 + number % 7) for number in range(1200)]
    with contextlib.ExitStack() as stack:
        with space.inside():
            events, generally = (stack.enter_context(netlink.EventSocket()) for _again in range(2))
        generally.reader = columns.Reader(columns=False)
        for part in (flows[:600], flows[600:]):
            inject(space, [ctnetlink.create(flow, timeout=flow.timeout or 0) for flow in part])
            changes, others = events.read(), generally.read()
            assert changes.settled() == others
        (sheet,) = changes.sheets
        assert (len(sheet), sheet.keys, changes.rows) == (600, [flow.key for flow in flows[600:]], {})
        assert not others.sheets


def test_an_overrun_is_reported_once_and_events_go_on(net: Net) -> None:
    space = firewall(net)
    with contextlib.ExitStack() as stack:
        with space.inside():
            other = stack.enter_context(netlink.RequestSocket())
            events = stack.enter_context(netlink.EventSocket(receive_buffer=32 << 10))
        assert other.inject([ctnetlink.create(flow_number(number)) for number in range(500)]) == []
        got = events.read()
        assert got.lost and events.overruns == 1
        assert 0 < got.events < 500
        assert sum(map(len, got.rows.values())) == got.events
        assert other.inject([ctnetlink.delete(flow_number(3))]) == []
        assert events.read() == NOTHING._replace(gone=[flow_number(3).key], events=1)
        assert events.overruns == 1
        # read() keeps to its limit
        assert other.inject([ctnetlink.delete(flow_number(number)) for number in range(10, 20)]) == []
        parts = [events.read(limit=4) for _ in range(4)]
        assert [(len(part.gone), part.more) for part in parts] == [(4, True), (4, True), (2, False), (0, False)]


def test_a_buffer_that_has_grown_holds_what_overran_the_small_one(net: Net) -> None:
    space = firewall(net)
    with contextlib.ExitStack() as stack:
        with space.inside():
            other = stack.enter_context(netlink.RequestSocket())
            events = stack.enter_context(netlink.EventSocket(receive_buffer=32 << 10))
        for size, lost in ((32 << 10, True), (4 << 20, False)):
            events.grow(size)
            flows = [flow_number(number) for number in range(500)]
            assert other.inject([ctnetlink.create(flow) for flow in flows]) == []
            got = events.read()
            assert (got.lost, got.events == 500) == (lost, not lost)
            assert other.inject([ctnetlink.delete(flow) for flow in flows]) == []
            events.read()


def test_own_injections_overrun_nothing_and_those_of_others_do(net: Net) -> None:
    """The kernel's filter drops an own event before it costs room in the buffer, however small that is."""
    space = firewall(net)
    create = [ctnetlink.create(flow_number(number)) for number in range(OWN_INJECTIONS)]
    delete = [ctnetlink.delete(flow_number(number)) for number in range(OWN_INJECTIONS)]
    with contextlib.ExitStack() as stack:
        with space.inside():
            ours = stack.enter_context(netlink.RequestSocket())
            other = stack.enter_context(netlink.RequestSocket())
            events = stack.enter_context(netlink.EventSocket(4096, ignore_portids=[ours.portid]))
        assert ours.inject(create) == []
        assert ours.inject(delete) == []
        assert (events.read(), events.overruns) == (NOTHING, 0)
        assert other.inject(create) == []
        assert events.read().lost
        assert events.overruns == 1


def test_errors_of_a_big_batch_find_their_requests(net: Net) -> None:
    """Several system calls' worth of requests; every seventh is refused, each kind with its own errno."""
    space = firewall(net)
    messages = []
    want = []
    for number in range(1000):
        if number % 7 == 3:
            messages.append(ctnetlink.create(flow_number(number - 1)))
            want.append((number, errno.EEXIST))
        elif number % 7 == 5:
            messages.append(ctnetlink.delete(flow_number(100000 + number)))
            want.append((number, errno.ENOENT))
        else:
            messages.append(ctnetlink.create(flow_number(number)))
    with space.inside(), netlink.RequestSocket() as requests:
        for _ in range(2):  # and the sequence numbers may wrap
            assert requests.inject(messages) == want
            assert requests.inject([ctnetlink.delete(flow) for flow in table(space)]) == []
            requests._seq = 0xFFFFFFFF - 500
        assert requests.inject([]) == []


def test_without_the_capability_it_is_said(net: Net) -> None:
    """CAP_NET_ADMIN is checked when the socket sends; drop it in a child process."""
    space = firewall(net)
    source = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import ctnetlink, errors, netlink\n"
        "requests = netlink.RequestSocket()\n"
        "key = bytes.fromhex('06c0a80003c0a8010330390016')\n"
        "try: requests.inject([ctnetlink.delete(ctnetlink.flow_of_key(key))] * 2)\n"
        "except errors.NetlinkError as error: print(error.errno)\n"
    )
    done = space.run(
        "setpriv",
        "--bounding-set",
        "-net_admin",
        "--inh-caps",
        "-net_admin",
        sys.executable,
        "-c",
        source,
        *sys.path,
        check=False,
    )
    assert done.stdout == f"{errno.EPERM}\n", done.stderr


def test_a_dump_comes_in_slices_and_ends(net: Net) -> None:
    space = firewall(net)
    want = {flow_number(number).key for number in range(1500)}
    assert inject(space, [ctnetlink.create(flow_number(number)) for number in range(1500)]) == []
    with space.inside():
        walk = netlink.TableDump()
    with walk:
        poll = select.poll()
        poll.register(walk, select.POLLIN)
        parts = []
        while not walk.done:
            assert poll.poll(30000)
            parts.append(walk.read())
        assert not walk.interrupted and not walk.malformed
        assert walk.read() == NOTHING
        assert (walk.reader.fast, walk.reader.general) == (1500, 0)
    assert {key for part in parts for table in part.rows.values() for key in table} == want
    assert len(parts) > 5 and max(part.events for part in parts) < 300
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]
    with space.inside():
        walk = netlink.TableDump(family=k.AF_INET6)
    with walk:
        assert walk.read(10) == NOTHING and walk.done


def test_a_dump_during_which_the_hash_table_was_resized_is_no_good(
    net: Net, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernel goes on at the number of the bucket where it was, and does not tell that it skips or doubles.

    The table is one for the whole machine: a file stands for its size.
    """
    real = Path(netlink._BUCKETS_PATH)
    buckets = tmp_path / "buckets"
    buckets.write_bytes(real.read_bytes())
    monkeypatch.setattr(netlink, "_BUCKETS_PATH", str(buckets))
    space = firewall(net)
    assert inject(space, [ctnetlink.create(flow_number(number)) for number in range(500)]) == []
    for size, good in ((buckets.read_bytes(), True), (b"%d\n" % (2 * int(real.read_text())), False)):
        with space.inside():
            walk = netlink.TableDump()
        with walk:
            buckets.write_bytes(size)
            while not walk.done:
                assert not walk.interrupted
                assert select.select([walk], [], [], 30)[0]
                walk.read()
            assert walk.interrupted != good
    buckets.unlink()  # not told: not compared
    with space.inside(), netlink.TableDump() as walk:
        while not walk.done:
            walk.read_flows()
        assert not walk.interrupted


def test_addresses_and_their_changes(net: Net) -> None:
    space = net.namespace("host")
    with space.inside(), netlink.AddressMonitor() as monitor:
        space.ip("link", "add", "eth9", "up", "type", "bridge")
        monitor.drain()
        assert not monitor.drain()
        before = netlink.local_addresses()
        space.ip("address", "add", "192.168.0.100/24", "dev", "eth9")
        space.ip("address", "add", "10.0.0.1", "peer", "10.0.0.2/32", "dev", "eth9")
        space.ip("address", "add", "fd00:c0de::100/64", "dev", "eth9", "nodad")
        assert select.select([monitor], [], [], 30)[0]
        assert monitor.drain()
        got = {
            (entry.ifname, entry.family, socket.inet_ntop(entry.family, entry.address), entry.prefix_len)
            for entry in netlink.interface_addresses()
        }
        assert got >= {
            ("lo", k.AF_INET, "127.0.0.1", 8),
            ("lo", k.AF_INET6, "::1", 128),
            ("eth9", k.AF_INET, "192.168.0.100", 24),
            ("eth9", k.AF_INET, "10.0.0.1", 32),
            ("eth9", k.AF_INET6, "fd00:c0de::100", 64),
        }
        assert netlink.local_addresses() - before >= {b"\xc0\xa8\0\x64", b"\x0a\0\0\1"}
        monitor.drain()
        space.ip("address", "del", "192.168.0.100/24", "dev", "eth9")
        assert select.select([monitor], [], [], 30)[0]
        assert monitor.drain()
        assert b"\xc0\xa8\0\x64" not in netlink.local_addresses()


@pytest.mark.parametrize("recvmmsg", [True, False], ids=["recvmmsg", "single"])
def test_what_is_read_by_columns_is_what_single_messages_say(
    traffic: Pair, monkeypatch: pytest.MonkeyPatch, recvmmsg: bool
) -> None:
    """The end of real flows of every kind, made anew over ctnetlink; nearly all of it by columns."""
    assert netlink._recvmmsg is not None
    if not recvmmsg:
        monkeypatch.setattr(netlink, "_recvmmsg", None)
    flows = table(traffic.fw1)
    with contextlib.ExitStack() as stack:
        with traffic.fw1.inside():
            events = stack.enter_context(netlink.EventSocket())
            witness = stack.enter_context(netlink.EventSocket())
            walk = stack.enter_context(netlink.TableDump())
        traffic.fw1.conntrack("-F")
        assert inject(traffic.fw1, [ctnetlink.create(flow) for flow in flows]) == []
        assert inject(traffic.fw1, [ctnetlink.update(flow._replace(mark=3)) for flow in flows]) == []
        told = events.read()
        assert not told.more
        ended = {event.flow.key for event in single(witness) if event.kind == Kind.DESTROY and event.flow}
        assert set(told.gone) == ended >= {flow.key for flow in flows}
        known = {key: unpack(key, value) for rows in told.rows.values() for key, value in rows.items()}
        assert told.flows == []
        for flow in flows:
            got = known[flow.key]
            assert (got.reply, got.state, got.mark, got.status & 0x3E) == (
                flow.reply,
                flow.state,
                3,
                flow.status & 0x3E,
            )
        assert events.reader.general == 0 and events.reader.fast == told.events >= 3 * len(flows)
        dumped = walk.read(100)
        while not walk.done:
            select.select([walk], [], [], 30)
            walk.read(100)
        assert (dumped.flows, walk.reader.general) == ([], 0)
        assert {key for rows in dumped.rows.values() for key in rows} >= {flow.key for flow in flows}


@pytest.mark.parametrize("recvmmsg", [True, False], ids=["recvmmsg", "single"])
def test_other_programs_cannot_send_to_the_sockets_that_ask_nobody_who_he_is(
    net: Net, monkeypatch: pytest.MonkeyPatch, recvmmsg: bool
) -> None:
    """Root in the same namespace, with what the kernel said before; the socket of the control is not connected."""
    if not recvmmsg:
        monkeypatch.setattr(netlink, "_recvmmsg", None)
    space, flow = firewall(net), flow_number(1)
    with contextlib.ExitStack() as stack:
        with space.inside():
            events = stack.enter_context(netlink.EventSocket())
            witness = stack.enter_context(netlink.EventSocket())
            requests = stack.enter_context(netlink.RequestSocket())
            other = stack.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_NETFILTER))
            with monkeypatch.context() as patch:
                patch.setattr(netlink._Socket, "_hear_the_kernel_only", lambda one: one._sock.bind((0, 0)))
                control = stack.enter_context(netlink.EventSocket())
        assert requests.inject([ctnetlink.create(flow), ctnetlink.delete(flow)]) == []
        news, end = witness._receive(), witness._receive()
        assert news and end
        for one in (events, control):
            assert one.read().gone == [flow.key]
        for one in (events, requests):
            with pytest.raises(ConnectionRefusedError):
                other.sendto(end, (one.portid, 0))
        other.sendto(end, (control.portid, 0))
        assert (events.read(), control.read().gone) == (NOTHING, [flow.key])
        # to the group: needs what changing the table needs, and is judged as what the kernel says
        for said in (end[:20], end):
            other.sendto(said, (0, 1 << netlink.NFNLGRP_CONNTRACK_DESTROY - 1))
        assert (events.read().gone, events.malformed) == ([flow.key], 1)


def rows_of(flows: list[Flow]) -> dict[int, list[tuple[bytes, bytes]]]:
    found: dict[int, list[tuple[bytes, bytes]]] = {}
    for flow in flows:
        key, value, extras = pack(flow)
        assert not extras
        found.setdefault(len(key), []).append((key, value))
    return found


def test_a_table_copied_by_rows_is_the_same_table(traffic: Pair) -> None:
    """As above with rows: create, again (they exist), update, timers alone, delete, again (they are gone)."""
    flows = table(traffic.fw1)
    lengths = rows_of(flows)
    assert sorted(lengths) == [9, 13, 37]
    ours = {flow.key for flow in flows}

    def copies() -> dict[bytes, Flow]:
        return {flow.key: flow for flow in table(traffic.fw2) if flow.key in ours}

    with traffic.fw2.inside():
        requests = netlink.RequestSocket()
    with requests:
        for key_len, rows in lengths.items():
            keys, values = zip(*rows)
            assert requests.create_rows(key_len, keys, values, [5000] * len(keys)) == []
            exist = requests.create_rows(key_len, keys, values, [5000] * len(keys))
            assert exist == [(index, errno.EEXIST) for index in range(len(keys))]
        made = copies()
        assert {key: lasting(flow) for key, flow in made.items()} == {flow.key: lasting(flow) for flow in flows}
        assert all(flow.timeout and 4900 < flow.timeout <= 5000 for flow in made.values())
        for key_len, rows in lengths.items():
            keys, values = zip(*rows)
            marked = [value[:-1] + b"\7" for value in values]
            assert requests.update_rows(key_len, keys, marked, [900] * len(keys)) == []
        updated = copies()
        assert {key: lasting(flow) for key, flow in updated.items()} == {
            flow.key: lasting(flow._replace(mark=7)) for flow in flows
        }
        assert all(flow.timeout and flow.timeout <= 900 for flow in updated.values() if flow.proto != k.IPPROTO_GRE)
        assert {flow.timeout > 900 for flow in updated.values() if flow.timeout and flow.proto == k.IPPROTO_GRE} == {
            True
        }
        for key_len, rows in lengths.items():
            keys = [key for key, _value in rows]
            assert requests.set_timers(key_len, keys, range(2000, 2000 + len(keys))) == []
        timed = copies()
        for rows in lengths.values():
            for index, (key, _value) in enumerate(rows):
                assert key[0] == k.IPPROTO_GRE or 1900 + index < (timed[key].timeout or 0) <= 2000 + index
                assert timed[key]._replace(timeout=None) == updated[key]._replace(timeout=None)
        for key_len, rows in lengths.items():
            keys = [key for key, _value in rows]
            assert requests.delete_keys(key_len, keys) == []
            assert requests.delete_keys(key_len, keys) == [(index, errno.ENOENT) for index in range(len(keys))]
        assert copies() == {}


def test_failures_of_many_rows_find_their_rows(net: Net) -> None:
    """Rows of three kinds in turn, several batches of them, every seventh refused; the numbers wrap."""
    space = firewall(net)
    flows = [
        flow_number(
            number, **(({}, {"tcp_flags": (3, 3), "tcp_wscale": (7, 7)}, {"proto": 17, "state": None})[number % 3])
        )
        for number in range(2500)
    ]
    ((key_len, rows),) = rows_of(flows).items()
    keys, values = [key for key, _value in rows], [value for _key, value in rows]
    taken = range(0, 2500, 7)
    with space.inside(), netlink.RequestSocket() as requests:
        requests._seq = 0xFFFFFFFF - 1500
        assert requests.create_rows(key_len, keys[::7], values[::7], [60] * len(taken)) == []
        want = [(index, errno.EEXIST) for index in taken]
        assert requests.create_rows(key_len, keys, values, [60] * 2500) == want
        assert len(table(space)) == 2500
        assert requests.delete_keys(key_len, keys[::7]) == []
        want = [(index, errno.ENOENT) for index in taken]
        assert requests.update_rows(key_len, keys, values, [90] * 2500) == want
        assert requests.set_timers(key_len, keys, [90] * 2500) == want
        assert requests.delete_keys(key_len, keys) == want
        assert requests.create_rows(key_len, [], [], []) == []


def test_zones_of_one_direction(net: Net) -> None:
    """Made over ctnetlink as flows and as rows, read in events and dumps, found, changed and deleted."""
    space = firewall(net)
    made = [
        flow_number(1, zone=7, zone_dir=ZONE_ORIGINAL),
        flow_number(1, zone=7),
        flow_number(1, status=0x1E, reply=Tuple(b"\xc0\xa8\1\3", b"\xc0\xa8\1\x64", b"\0\x16\x30\x39")),
        flow_number(2, zone=8, zone_dir=ZONE_REPLY),
    ]
    with contextlib.ExitStack() as stack:
        with space.inside():
            events = stack.enter_context(netlink.EventSocket())
            requests = stack.enter_context(netlink.RequestSocket())
        assert requests.inject([ctnetlink.create(flow) for flow in (made[0], made[3])]) == []
        assert {flow.key for flow in table(space)} == {made[0].key, made[3].key}
        # The kernel compares tuple and zone for each direction: the same in one is taken, ...
        assert requests.inject([ctnetlink.create(made[1])]) == [(0, errno.EEXIST)]
        # ... and another reply tuple in zone 0 is free.
        assert requests.inject([ctnetlink.create(made[2])]) == []
        for flow in (made[0], made[2], made[3]):
            found = requests.lookup(flow)
            assert found is not None and (found.key, found.zone_dir) == (flow.key, flow.zone_dir)
        lengths = rows_of([made[0], made[2], made[3]])
        assert sorted(lengths) == [13, 16]
        changes = events.read()
        assert {key for rows in changes.rows.values() for key in rows} == {flow.key for flow in table(space)}
        for key_len, rows in lengths.items():
            keys, values = zip(*rows)
            assert requests.update_rows(key_len, keys, values, [50] * len(keys)) == []
            assert requests.set_timers(key_len, keys, [40] * len(keys)) == []
            assert requests.delete_keys(key_len, keys) == []
            assert requests.create_rows(key_len, keys, values, [50] * len(keys)) == []
        assert {flow.key for flow in table(space)} == {key for rows in lengths.values() for key, _value in rows}
        changes = events.read()
        assert set(changes.gone) == {flow.key for flow in table(space)}
        with space.inside(), netlink.TableDump() as walk:
            found_ = walk.read(100)
        assert {key for rows in found_.rows.values() for key in rows} == set(changes.gone)
        assert (walk.reader.general, events.reader.general) == (0, 0)
