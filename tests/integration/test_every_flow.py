# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every kind of flow lives through the loss of the active node: real streams, the kernel's own table as the judge."""

from __future__ import annotations

import concurrent.futures
import json
import re
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from integration.cluster import Cluster, Daemon
from integration.netns import Namespace, Pair, wait_for
from integration.streams import (
    EXPERIMENTAL,
    Connection,
    Datagrams,
    Died,
    End,
    Frame,
    Gre,
    Stream,
    Transfer,
    open_stream,
    window_scales,
)
from pyroute2.netlink.nfnetlink.nfctsocket import nfct_msg

pytestmark = pytest.mark.netns

ASSURED = ("tcp", "udp", "sctp", "gre")  # protocols whose entries become ASSURED
PLAIN_PORT, DNAT_PORT, REDIRECTED_PORT = 5100, 8090, 5099
NAT_BITS = k.IPS_SRC_NAT | k.IPS_DST_NAT


class Addresses(NamedTuple):
    inside: str  # of a
    outside: str  # of b
    vip: str  # outside
    alias: str  # DNAT to b
    wan: str  # of b, where the firewalls have no address but a virtual one
    wan_vip: str


ADDRESSES = {
    4: Addresses("192.168.0.3", "192.168.1.3", "192.168.1.100", "192.168.1.200", "203.0.113.3", "203.0.113.100"),
    6: Addresses(
        *("fd00:c0de::3", "fd00:c0de:1::3", "fd00:c0de:1::100", "fd00:c0de:1::200", "fd00:c0de:2::3"),
        "fd00:c0de:2::100",
    ),
}

# How a stream is translated: NAT bits of its entry, and as which of the addresses its server sees the client
WAYS = {
    "plain": (0, "inside"),
    "snat": (k.IPS_SRC_NAT, "vip"),
    "masquerade": (k.IPS_SRC_NAT, "wan_vip"),
    "dnat": (k.IPS_DST_NAT, "outside"),
    "both": (k.IPS_SRC_NAT | k.IPS_DST_NAT, "vip"),
}

STREAMS = [
    *((proto, version, way) for proto in ("tcp", "udp") for version in (4, 6) for way in WAYS),
    *((proto, version, way) for proto in ("icmp", "sctp") for version in (4, 6) for way in ("snat", "both")),
    # without ports or ids two of them would look the same from outside
    *(("gre", 4, "both"), ("gre", 6, "snat"), ("other", 4, "snat"), ("other", 6, "both")),
]


def tool(version: int) -> str:
    return "iptables" if version == 4 else "ip6tables"


def both(lab: Cluster, version: int, *rule: str) -> None:
    """A rule on both firewalls."""
    for firewall in (lab.pair.fw1, lab.pair.fw2):
        firewall.run(tool(version), *rule)


def nothing_new(lab: Cluster) -> None:
    """The firewalls let no flow begin: one that was lost cannot come back by itself."""
    for version in (4, 6):
        both(lab, version, "-I", "FORWARD", "-m", "conntrack", "--ctstate", "NEW", "-j", "DROP")


class Wan:
    """A network behind the firewalls, of b: there they have no address but a virtual one, so they can masquerade."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        pair.switch.ip("link", "add", "wan", "up", "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
        for node, interface in ((pair.b, "eth1"), (pair.fw1, "eth3"), (pair.fw2, "eth3")):
            pair._port(node, interface, "wan")
        pair._address(pair.b, "eth1", f"{ADDRESSES[4].wan}/24", f"{ADDRESSES[6].wan}/64")

    def activate(self, firewall: Namespace) -> None:
        self.pair._address(firewall, "eth3", f"{ADDRESSES[4].wan_vip}/24", f"{ADDRESSES[6].wan_vip}/64")

    def plug(self, firewall: Namespace, state: str) -> None:
        self.pair.switch.ip("link", "set", f"{firewall.label}-eth3", state)
        if state == "up":
            for address in (f"{ADDRESSES[4].wan_vip}/24", f"{ADDRESSES[6].wan_vip}/64"):
                firewall.run("ip", "address", "del", address, "dev", "eth3", check=False)


def allow_every_kind(lab: Cluster) -> None:
    for version, addresses in ADDRESSES.items():
        wrapped = f"[{addresses.inside}]" if version == 6 else addresses.inside
        for vip in (addresses.vip, addresses.wan_vip):  # strays; not the neighbours' answers
            both(lab, version, "-I", "INPUT", "-d", vip, "!", "-p", "ipv6-icmp", "-j", "DROP")
        both(
            lab, version, "-A", "FORWARD", "-i", "eth3", "-m", "state", "--state", "ESTABLISHED,RELATED", "-j", "ACCEPT"
        )
        for proto in (socket.IPPROTO_SCTP, socket.IPPROTO_GRE, EXPERIMENTAL):
            both(lab, version, "-A", "FORWARD", "-i", "eth1", "-p", str(proto), "-j", "ACCEPT")
        both(lab, version, "-A", "FORWARD", "-i", "eth0", "-m", "conntrack", "--ctstate", "DNAT", "-j", "ACCEPT")
        both(lab, version, "-t", "nat", "-A", "POSTROUTING", "-o", "eth3", "-j", "MASQUERADE")
        for proto in ("tcp", "udp"):
            both(
                lab, version, "-t", "nat", "-I", "POSTROUTING", "-p", proto, "--dport", str(PLAIN_PORT), "-j", "ACCEPT"
            )
            dnat = ("-d", addresses.vip, "-p", proto, "--dport", str(DNAT_PORT), "-j", "DNAT")
            both(lab, version, "-t", "nat", "-I", "PREROUTING", *dnat, "--to-destination", f"{wrapped}:90")


def open_way(pair: Pair, number: int, proto: str, version: int, way: str) -> Stream:
    here = ADDRESSES[version]
    a, b = End(pair.a, here.inside), End(pair.b, here.outside, 5200 + number)
    if way == "dnat":
        return open_stream(proto, number, b._replace(port=0), (here.vip, DNAT_PORT), a._replace(port=90))
    if way == "plain":
        b = b._replace(port=PLAIN_PORT)
    elif way == "masquerade":
        b = b._replace(address=here.wan)
    return open_stream(proto, number, a, (here.alias if way == "both" else b.address, b.port), b)


def died(streams: Mapping[str, Stream], patience: float = 20.0) -> dict[str, str]:
    """Speak in all streams at once; those that do not go on, and why."""

    def speak(stream: Stream) -> str:
        try:
            stream.talk(patience)
        except Died as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(len(streams)) as pool:
        return {name: trouble for name, trouble in zip(streams, pool.map(speak, streams.values())) if trouble}


# --- the kernel's table, as pyroute2 reads it ---

_VOLATILE = (
    *("CTA_TIMEOUT", "CTA_USE", "CTA_ID", "CTA_TIMESTAMP", "CTA_COUNTERS_ORIG", "CTA_COUNTERS_REPLY", "CTA_SYNPROXY"),
)


def plain(nla: Any) -> dict[str, Any]:
    return {
        name: plain(value) if hasattr(value, "get_attr") and value.get("attrs") else value
        for name, value in nla["attrs"]
    }


def kernel(space: Namespace) -> list[dict[str, Any]]:
    """The conntrack entries of a namespace."""
    entries: list[dict[str, Any]] = []
    with space.inside():
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)  # NETLINK_NETFILTER
    with sock:
        sock.send(struct.pack("=IHHIIBBH", 20, 0x101, 0x301, 1, 0, 0, 0, 0))  # IPCTNL_MSG_CT_GET, a dump
        while True:
            data = sock.recv(1 << 17)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind == 3:  # NLMSG_DONE
                    return entries
                message = nfct_msg(data[:length])
                message.decode()
                entries.append(plain(message))
                data = data[length:]


def flows(space: Namespace) -> dict[str, dict[str, Any]]:
    """The entries of flows through a firewall, by their original tuple and zone, without what changes by itself.

    Of TCP's flags only those that the ends agreed upon, of the status no NAT_DONE bits, which a plain replica lacks.
    """
    found = {}
    for entry in kernel(space):
        ends = set(entry["CTA_TUPLE_ORIG"]["CTA_TUPLE_IP"].values())
        if not any(ends & set(addresses) for addresses in ADDRESSES.values()):
            continue
        for name in _VOLATILE:
            entry.pop(name, None)
        entry["CTA_STATUS"] &= NAT_BITS | k.IPS_SEEN_REPLY | k.IPS_ASSURED | k.IPS_CONFIRMED
        tcp = entry.get("CTA_PROTOINFO", {}).get("CTA_PROTOINFO_TCP", {})
        for name in set(tcp) & {"CTA_PROTOINFO_TCP_FLAGS_ORIGINAL", "CTA_PROTOINFO_TCP_FLAGS_REPLY"}:
            tcp[name] = tcp[name][0] & (k.TCP_FLAG_WINDOW_SCALE | k.TCP_FLAG_SACK_PERM)
        found[f"{entry['CTA_TUPLE_ORIG']} {entry.get('CTA_ZONE', 0)}"] = entry
    return found


def flow_of(stream: Stream, entries: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A stream's entry; empty where there is none."""
    found = [entry for entry in entries.values() if _is_of(stream, entry["CTA_TUPLE_ORIG"])]
    assert len(found) <= 1, found
    return found[0] if found else {}


def _is_of(stream: Stream, orig: Mapping[str, Any]) -> bool:
    ports = [orig["CTA_TUPLE_PROTO"].get(f"CTA_PROTO_{name}", 0) for name in ("SRC_PORT", "ICMP_ID", "ICMPV6_ID")]
    return (
        orig["CTA_TUPLE_PROTO"]["CTA_PROTO_NUM"] == stream.client.proto
        and stream.client.getsockname()[0] in orig["CTA_TUPLE_IP"].values()
        and stream.port == sum(ports)
    )


def same(active: Namespace, backup: Namespace, but: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Wait until the backup's kernel holds what the active one's does (``but``: words of what it need not).

    Returns the entries.
    """
    seen: list[dict[str, dict[str, Any]]] = []

    def equal() -> bool:
        here = {key: entry for key, entry in flows(active).items() if not any(word in key for word in but)}
        seen[:] = [here, flows(backup)]
        return here == seen[1]

    try:
        wait_for(equal, "equal tables", 20.0)
    except AssertionError as error:
        wrong = [(one, seen[1].get(key)) for key, one in seen[0].items() if seen[1].get(key) != one]
        more = [key for key in seen[1] if key not in seen[0]]
        raise AssertionError(f"{error}; missing or different: {wrong}; too many: {more}") from None
    return seen[1]


def cut(lab: Cluster, victim: Daemon, heir: Daemon, wan: Wan) -> None:
    wan.plug(victim.space, "down")
    lab.power_cut(victim, heir)
    wan.activate(heir.space)


@pytest.mark.parametrize("replicate", [True, False], ids=["replicated", "without replication"])
def test_streams_of_every_kind_go_on_after_a_cut_and_the_next(cluster: Callable[..., Cluster], replicate: bool) -> None:
    """Without replication each of them dies.  What REDIRECT turned to the firewall itself stays there."""
    lab = cluster(replicate=replicate)
    wan = Wan(lab.pair)
    allow_every_kind(lab)
    lab.pair.activate(lab.pair.fw1)
    wan.activate(lab.pair.fw1)
    lab.fw1.start()
    lab.fw2.start()
    if replicate:
        lab.ready(lab.fw1, lab.fw2)
    else:
        wait_for(lambda: lab.fw2.status()["reasons"] == ["replication is off"], "fw2 to run")
    streams, nat, seen_as = {}, {}, {}
    for number, (proto, version, way) in enumerate(STREAMS):
        name = f"{proto}{version} {way}"
        streams[name] = open_way(lab.pair, number, proto, version, way)
        lab.stack.callback(streams[name].close)
        nat[name] = WAYS[way][0]
        seen_as[name] = (getattr(ADDRESSES[version], WAYS[way][1]), streams[name].port)
    assured = [name for name in streams if name.startswith(ASSURED)]
    both(lab, 4, *("-t", "nat", "-I", "PREROUTING", "-p", "tcp", "--dport", str(REDIRECTED_PORT), "-j", "REDIRECT"))
    to_firewall = End(lab.pair.fw1, "192.168.0.1", REDIRECTED_PORT)
    redirected = open_stream(
        "tcp", 0, End(lab.pair.a, ADDRESSES[4].inside), (ADDRESSES[4].outside, REDIRECTED_PORT), to_firewall
    )
    lab.stack.callback(redirected.close)

    def settled() -> bool:  # a UDP stream is ASSURED if it goes on for two seconds
        assert died(streams) == {}
        entries = flows(lab.pair.fw1)
        return all(flow_of(streams[name], entries).get("CTA_STATUS", 0) & k.IPS_ASSURED for name in assured)

    wait_for(settled, "ASSURED streams")
    wait_for(lambda: flow_of(redirected, flows(lab.pair.fw1)), "the redirected connection's entry")
    assert {name: stream.seen for name, stream in streams.items()} == seen_as
    nothing_new(lab)
    if not replicate:
        cut(lab, lab.fw1, lab.fw2, wan)
        assert died(streams, 2.0).keys() == streams.keys()
        return
    for active, backup in ((lab.fw1, lab.fw2), (lab.fw2, lab.fw1)):
        entries = same(active.space, backup.space, but=[str(REDIRECTED_PORT)])
        for name, stream in streams.items():
            bits = k.IPS_SEEN_REPLY | k.IPS_CONFIRMED | nat[name] | (k.IPS_ASSURED if name in assured else 0)
            assert flow_of(stream, entries)["CTA_STATUS"] == bits, name
        cut(lab, active, backup, wan)
        assert died(streams) == {}
        counters = backup.status()["counters"]
        assert not [name for name in counters if name.startswith("kernel_refused")], counters
        if active is lab.fw1:
            wan.plug(active.space, "up")
            lab.power_on(active)
            lab.ready(backup, active)


def invalid(firewall: Namespace, version: int) -> int:
    """Packets that came to the rule for INVALID ones."""
    rules = firewall.run(tool(version), "-nvxL", "FORWARD").stdout.splitlines()
    return sum(int(line.split()[0]) for line in rules if "state INVALID" in line)


def test_bulk_transfers_go_on_with_their_window_scales(cluster: Callable[..., Cluster]) -> None:
    lab = cluster().up()
    allow_every_kind(lab)
    streams = [open_way(lab.pair, number, "tcp", 4 + 2 * number, "both") for number in (0, 1)]
    transfers = []
    for stream in streams:
        assert isinstance(stream, Connection)
        lab.stack.callback(stream.close)
        transfers.append(Transfer(stream))

    def moved(more: int) -> Callable[[], bool]:
        goals = [[count + more for count in one.received] for one in transfers]
        return lambda: all(
            count >= goal for one, wanted in zip(transfers, goals) for count, goal in zip(one.received, wanted)
        )

    try:
        wait_for(moved(2 << 20), "the transfers to run")
        nothing_new(lab)
        entries = same(lab.pair.fw1, lab.pair.fw2)
        for stream in streams:
            announced, of_peer = window_scales(stream.client)
            assert min(announced, of_peer) > 0
            assert flow_of(stream, entries)["CTA_PROTOINFO"]["CTA_PROTOINFO_TCP"] == {
                "CTA_PROTOINFO_TCP_STATE": k.TCP_ESTABLISHED,
                "CTA_PROTOINFO_TCP_WSCALE_ORIGINAL": announced,
                "CTA_PROTOINFO_TCP_WSCALE_REPLY": of_peer,
                "CTA_PROTOINFO_TCP_FLAGS_ORIGINAL": k.TCP_FLAG_WINDOW_SCALE | k.TCP_FLAG_SACK_PERM,
                "CTA_PROTOINFO_TCP_FLAGS_REPLY": k.TCP_FLAG_WINDOW_SCALE | k.TCP_FLAG_SACK_PERM,
            }
        lab.power_cut(lab.fw1, lab.fw2)
        wait_for(moved(8 << 20), "the transfers to go on")
    finally:
        for transfer in transfers:
            transfer.finish()
    assert invalid(lab.pair.fw2, 4) == invalid(lab.pair.fw2, 6) == 0


@pytest.mark.parametrize("tagged", ["later", "by their first packet"])
def test_marks_and_labels_go_with_their_flow(cluster: Callable[..., Cluster], tagged: str) -> None:
    """Only the first active node sets them; the other lets pass what has them.  Later changes are replicated, too."""
    lab = cluster().up()
    fw1, fw2 = lab.pair.fw1, lab.pair.fw2
    kinds = [(proto, version, kind) for proto in ("tcp", "udp") for version in (4, 6) for kind in ("tagged", "bare")]
    ports = ",".join(str(5200 + number) for number, one in enumerate(kinds) if one[2] == "tagged")

    def tag(mark: int, label: int) -> None:
        for version in (4, 6):
            for proto in ("tcp", "udp"):
                rule = (
                    tool(version),
                    "-t",
                    "mangle",
                    "-A",
                    "FORWARD",
                    "-p",
                    proto,
                    "-m",
                    "multiport",
                    "--dports",
                    ports,
                )
                fw1.run(*rule, "-j", "CONNMARK", "--set-mark", hex(mark))
                fw1.run(*rule, "-m", "connlabel", "--label", str(label), "--set")

    for version in (4, 6):
        fw2.run(tool(version), "-I", "FORWARD", "-m", "connmark", "!", "--mark", "0x22/0xff", "-j", "DROP")
        fw1.run(tool(version), "-A", "FORWARD", "-m", "connlabel", "--label", "3")  # entries get room for labels
        fw2.run(tool(version), "-I", "FORWARD", "-m", "connlabel", "!", "--label", "3", "-j", "DROP")
        fw2.run(tool(version), "-I", "FORWARD", "-m", "connlabel", "!", "--label", "70", "-j", "DROP")
    if tagged != "later":
        tag(0x11, 3)
    streams = {
        f"{proto}{version} {kind}": open_way(lab.pair, number, proto, version, "snat")
        for number, (proto, version, kind) in enumerate(kinds)
    }
    for stream in streams.values():
        lab.stack.callback(stream.close)
    bare = {name: stream for name, stream in streams.items() if name.endswith("bare")}
    chosen = {name: stream for name, stream in streams.items() if name not in bare}

    def replicas() -> dict[str, tuple[int, set[int]]]:
        """Mark and labels on the backup."""
        assert died(streams) == {}
        entries = same(fw1, fw2)
        found = {name: flow_of(stream, entries) for name, stream in streams.items()}
        return {
            name: (one["CTA_MARK"], {bit for bit in range(128) if one.get("CTA_LABELS", 0) >> bit & 1})
            for name, one in found.items()
        }

    replicas()
    if tagged == "later":
        tag(0x11, 3)
    assert replicas() == {name: (0, set()) if name in bare else (0x11, {3}) for name in streams}
    tag(0x22, 70)
    assert replicas() == {name: (0, set()) if name in bare else (0x22, {3, 70}) for name in streams}
    nothing_new(lab)
    lab.power_cut(lab.fw1, lab.fw2)
    assert died(chosen) == {}
    assert died(bare, 2.0).keys() == bare.keys()


def test_ftp_keeps_its_helper_and_its_data_connections_their_master(cluster: Callable[..., Cluster]) -> None:
    """The kernel tells the master with the first packet only, of a connection that is not replicated yet."""
    lab = cluster().up()
    helped = ("-p", "tcp", "--dport", "21", "-j", "CT", "--helper", "ftp")
    both(lab, 4, "-t", "raw", "-A", "PREROUTING", "-i", "eth1", *helped)
    both(lab, 4, "-A", "FORWARD", "-i", "eth1", "-m", "conntrack", "--ctstate", "RELATED", "-j", "ACCEPT")
    here = ADDRESSES[4]
    a = End(lab.pair.a, here.inside)
    control = Connection.open(a, (here.outside, 21), End(lab.pair.b, here.outside, 21))
    lab.stack.callback(control.close)
    for line in (b"220 ready\r\n", b"227 Entering Passive Mode (192,168,1,3,20,81).\r\n"):
        control.server.sendall(line)
        assert control.client.recv(100).startswith(line[:4])
    data = Connection.open(a, (here.outside, 20 << 8 | 81), End(lab.pair.b, here.outside, 20 << 8 | 81))
    lab.stack.callback(data.close)
    entries = same(lab.pair.fw1, lab.pair.fw2)
    assert "helper=ftp" in lab.pair.fw2.conntrack("-L", "-p", "tcp", "--orig-port-dst", "21")
    assert flow_of(data, entries)["CTA_TUPLE_MASTER"] == flow_of(control, entries)["CTA_TUPLE_ORIG"]
    nothing_new(lab)
    lab.power_cut(lab.fw1, lab.fw2)
    data.talk()
    control.talk()


def test_gre_with_keys(cluster: Callable[..., Cluster]) -> None:
    """The kernel looks at no key of RFC 2890; of version 1 (PPTP) it does, and then knows no reply without a helper."""
    lab = cluster().up()
    allow_every_kind(lab)
    streams = {}
    for version, way in ((4, "both"), (6, "snat")):
        here = ADDRESSES[version]
        target = here.alias if way == "both" else here.outside
        ends = End(lab.pair.a, here.inside), (target, 0), End(lab.pair.b, here.outside, 0)
        streams[f"keyed {version}"] = Datagrams.open(socket.IPPROTO_GRE, Gre(0x1234, 0x89ABCDEF), *ends)
    for stream in streams.values():
        lab.stack.callback(stream.close)
    assert died(streams) == {}
    for space, source, target, call in (
        (lab.pair.a, ADDRESSES[4].inside, ADDRESSES[4].outside, 0x777),
        (lab.pair.b, ADDRESSES[4].outside, ADDRESSES[4].vip, 0x888),
    ):
        with space.inside(), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_GRE) as raw:
            raw.bind((source, 0))
            raw.sendto(struct.pack("!HHHHI", 0x3001, 0x880B, 4, call, 1) + b"data", (target, 0))
    wait_for(lambda: "dstkey=0x777" in lab.pair.fw1.conntrack("-L", "-p", "gre"), "the caller's entry")
    nothing_new(lab)
    entries = same(lab.pair.fw1, lab.pair.fw2, but=[str(0x777)])
    for stream in streams.values():
        proto = flow_of(stream, entries)["CTA_TUPLE_ORIG"]["CTA_TUPLE_PROTO"]
        assert (proto["CTA_PROTO_SRC_PORT"], proto["CTA_PROTO_DST_PORT"]) == (0, 0)  # where the keys of a flow are
    called = [line for line in lab.pair.fw1.conntrack("-L", "-p", "gre").splitlines() if "0x777" in line]
    assert len(called) == 1
    assert "[UNREPLIED]" in called[0] and "srckey=0x0 dstkey=0x777" in called[0], called
    assert "dstkey=0x777" not in lab.fw1.ask("-i")
    lab.power_cut(lab.fw1, lab.fw2)
    assert died(streams) == {}


class InZone(Datagrams):
    """A stream that shares its sockets, hence addresses and ports, with others; it differs in the type of service."""

    def __init__(self, client: socket.socket, server: socket.socket, dscp: int) -> None:
        super().__init__(client, server, Frame())
        self._dscp = dscp

    def talk(self, patience: float = 20.0) -> None:
        for sock in (self.client, self.server):
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, self._dscp << 2)
        super().talk(patience)


@pytest.mark.parametrize(
    ("inside", "outside", "zones"),
    [
        pytest.param("--zone", "--zone", (1, 2), id="both directions"),
        pytest.param("--zone-orig", "", (1, 2), id="original direction"),
        pytest.param("--zone-reply", "--zone-reply", (1,), id="reply direction"),
    ],
)
def test_flows_with_one_tuple_in_two_zones(
    cluster: Callable[..., Cluster], inside: str, outside: str, zones: tuple[int, ...]
) -> None:
    """``inside`` and ``outside``: CT's option for what comes in there.  Replies in one zone need different ports."""
    lab = cluster().up()
    here = ADDRESSES[4]
    sockets = []
    for space, address in ((lab.pair.a, here.inside), (lab.pair.b, here.outside)):
        with space.inside():
            sockets.append(lab.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
        sockets[-1].bind((address, 5300))
    sockets[0].connect((here.outside, 5300))
    streams = {}
    for zone in zones:
        for interface, option in (("eth1", inside), ("eth0", outside)):
            if option:
                dscp = ("-t", "raw", "-A", "PREROUTING", "-i", interface, "-m", "dscp", "--dscp", str(zone))
                both(lab, 4, *dscp, "-j", "CT", option, str(zone))
        streams[zone] = InZone(sockets[0], sockets[1], zone)
    for stream in streams.values():
        stream.talk()
    seen = {zone: stream.seen for zone, stream in streams.items()}
    nothing_new(lab)

    def lines(firewall: Namespace) -> list[str]:
        words = (line.split() for line in firewall.conntrack("-L", "-p", "udp", "--orig-port-dst", "5300").splitlines())
        return sorted(" ".join(word for word in line[3:] if not word.startswith("delta")) for line in words)

    assert len(lines(lab.pair.fw1)) == len(zones)
    wait_for(lambda: lines(lab.pair.fw1) == lines(lab.pair.fw2), "equal tables", 20.0)
    lab.power_cut(lab.fw1, lab.fw2)
    for stream in streams.values():
        stream.talk()
    assert {zone: stream.seen for zone, stream in streams.items()} == seen


def timers(firewall: Namespace) -> dict[int, tuple[str, int]]:
    """State and seconds left of every TCP entry, by the client's port."""
    words = (line.split() for line in firewall.conntrack("-L", "-p", "tcp").splitlines())
    return {int(line[6].partition("=")[2]): (line[3], int(line[2])) for line in words}


CLOSING_S = {"fin_wait": 300, "time_wait": 400, "close": 200}


def test_closing_connections_get_their_short_timers(cluster: Callable[..., Cluster]) -> None:
    """What is half closed still ends in order."""
    lab = cluster().up()
    for firewall in (lab.pair.fw1, lab.pair.fw2):
        firewall.sysctl({f"net/netfilter/nf_conntrack_tcp_timeout_{name}": str(s) for name, s in CLOSING_S.items()})
    streams = {}
    for number, (name, version) in enumerate((("established", 6), ("half closed", 6), ("closed", 4), ("reset", 4))):
        streams[name] = open_way(lab.pair, number, "tcp", version, "snat")
        lab.stack.callback(streams[name].close)
    assert died(streams) == {}
    ports = {name: stream.port for name, stream in streams.items()}
    same(lab.pair.fw1, lab.pair.fw2)
    half = streams["half closed"]
    half.client.shutdown(socket.SHUT_WR)
    assert half.server.recv(1) == b""
    streams["closed"].close()
    reset = streams["reset"]
    reset.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reset.close()
    nothing_new(lab)
    wanted = {"established": "ESTABLISHED", "half closed": "FIN_WAIT", "closed": "TIME_WAIT", "reset": "CLOSE"}

    def told() -> bool:
        replicas = (json.loads(line) for line in lab.fw2.ask("-e", "--json").splitlines())
        return {one["orig"]["sport"]: one["state"] for one in replicas} == {
            ports[name]: state for name, state in wanted.items()
        }

    wait_for(told, "the states on the backup")
    assert min(left for _state, left in timers(lab.pair.fw2).values()) > 80_000  # parked
    lab.power_cut(lab.fw1, lab.fw2)
    wait_for(lambda: (s := lab.fw2.status())["role"] == "active" and s["flows"]["external"] == 0, "the take-over")
    table = timers(lab.pair.fw2)
    for name in ("half closed", "closed", "reset"):
        state, left = table[ports[name]]
        assert state == wanted[name]
        assert 0 < left <= CLOSING_S[state.lower()]
    state, left = table[ports["established"]]
    assert (state, left > 4 * 86_400) == ("ESTABLISHED", True)
    streams["established"].talk()  # who retransmits while neighbours are looked for is answered with a reset at its end
    half.server.sendall(b"the rest")
    half.server.close()
    assert half.client.recv(100) == b"the rest"
    assert half.client.recv(100) == b""
    wait_for(lambda: timers(lab.pair.fw2)[ports["half closed"]][0] == "TIME_WAIT", "the end in order")


KINDS = {  # as conntrack(8) wants them
    "tcp": "--sport 1001 --dport 22 --state ESTABLISHED --mark 5",
    "udp": "--sport 1002 --dport 53",
    "udplite": "--sport 1003 --dport 53",
    "sctp": "--sport 1004 --dport 9 --state ESTABLISHED --orig-vtag 7 --reply-vtag 8",
    "icmp": "--icmp-type 8 --icmp-code 0 --icmp-id 1006",
    "icmpv6": "--icmpv6-type 128 --icmpv6-code 0 --icmpv6-id 1006",
    "gre": "--srckey 0x3ef --dstkey 0xfffe",
    "253": "",
}


def inject(firewall: Namespace, proto: str, version: int, *more: str, src: str = "") -> None:
    """An entry of a flow from a to b's other address."""
    here = ADDRESSES[version]
    ends = ("-s", src or here.inside, "-d", here.wan, "-u", "SEEN_REPLY,ASSURED", "-t", "500")
    firewall.conntrack("-I", "-p", proto, *ends, *KINDS[proto].split(), *more)


def kinds_of(version: int) -> list[str]:
    return [proto for proto in KINDS if proto != {4: "icmpv6", 6: "icmp"}[version]]


def test_operator_sees_changes_and_removes_every_kind(cluster: Callable[..., Cluster]) -> None:
    """What somebody does to the active node's table is replicated; conntrack(8) is the judge of what is shown."""
    lab = cluster().up()
    fw1, fw2 = lab.pair.fw1, lab.pair.fw2
    for version in (4, 6):
        for proto in kinds_of(version):
            inject(fw1, proto, version, *(("--src-nat", ADDRESSES[4].vip) if version == 4 else ()))
    assert len(same(fw1, fw2)) == 14

    truth = [line.split() for line in fw1.conntrack("-L").splitlines() if "sport=3781" not in line]
    lines = sorted(
        " ".join(word for word in (*words[:2], *words[3:]) if not word.startswith(("delta-time=", "use=")))
        for words in truth
    )
    flows_in_xml = sorted(_XML_ENDS.findall(fw1.conntrack("-L", "-o", "xml")))
    for daemon, letter in ((lab.fw1, "-i"), (lab.fw2, "-e")):
        shown = daemon.ask(letter).splitlines()
        assert sorted(" ".join(line.partition("[active")[0].split()) for line in shown) == lines
        assert set(_XML_ENDS.findall(daemon.ask(letter, "-x"))) <= set(flows_in_xml)
    keys = [json.loads(line)["orig"] for line in lab.fw2.ask("-e", "--json").splitlines() if '"gre"' in line]
    assert [(one["srckey"], one["dstkey"]) for one in keys] == [(0x3EF, 0xFFFE)] * 2

    fw1.conntrack("-U", "-s", ADDRESSES[6].inside, "--mark", "9")  # conntrack(8) cannot update what is translated
    marks = {("V6" in key, one["CTA_MARK"]) for key, one in same(fw1, fw2).items()}
    assert marks == {(True, 9), (False, 0), (False, 5)}
    for version, left in ((4, 7), (6, 0)):
        fw1.conntrack("-D", "-s", ADDRESSES[version].inside)
        assert len(same(fw1, fw2)) == left


_XML_ENDS = re.compile(r'<flow>(<meta direction="original">.*?</meta><meta direction="reply">.*?</meta>)')


def test_translations_that_are_taken_on_the_backup_are_named(cluster: Callable[..., Cluster]) -> None:
    """Entries of others have what the peer's flows want: each of these is counted, the others are made."""
    lab = cluster(ignore_addresses=["192.168.100.0/24", "10.9.9.0/24", "fd00:9::/64"]).up()
    fw1, fw2 = lab.pair.fw1, lab.pair.fw2
    for version, src in ((4, "10.9.9.9"), (6, "fd00:9::9")):
        for proto in kinds_of(version):
            nat = ("--src-nat", ADDRESSES[version].vip)
            inject(fw2, proto, version, *nat, src=src)
            inject(fw1, proto, version, *nat)
    reason = "the kernel refuses 14 flows (14: their translated addresses and ports are taken)"
    wait_for(lambda: lab.fw2.status()["reasons"] == [reason], "the refusals")
    status = lab.fw2.status()
    assert status["verdict"] == "DEGRADED"
    assert status["counters"]["kernel_refused_create_eexist"] >= 14
    streams = {version: open_way(lab.pair, version, "tcp", version, "snat") for version in (4, 6)}
    for stream in streams.values():
        lab.stack.callback(stream.close)
        wait_for(lambda stream=stream: flow_of(stream, flows(fw2)), "a new flow on the backup")
    nothing_new(lab)
    lab.power_cut(lab.fw1, lab.fw2)
    for stream in streams.values():
        stream.talk()
