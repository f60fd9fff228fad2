# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Datagrams that come in fragments: connection tracking puts them together before it looks the flow up, so a replica
has to serve them as the original does, and the translation holds for each fragment."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Callable

import pytest
from integration.cluster import Cluster
from integration.netns import Namespace, wait_for
from integration.test_every_flow import nothing_new

pytestmark = pytest.mark.netns

BYTES = 5000  # of UDP payload: four fragments on an Ethernet
SERVERS = {4: "192.168.1.3", 6: "fd00:c0de:1::3"}
VIRTUAL = {4: "192.168.1.100", 6: "fd00:c0de:1::100"}
PORT = 5003
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER = 10, 23  # <linux/in.h>, <linux/in6.h>
PMTUDISC_DONT = 0


def talkers(lab: Cluster, version: int) -> tuple[socket.socket, socket.socket]:
    """UDP sockets of a and b, which let the kernel fragment; a's is connected to b's address."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    made = []
    for space in (lab.pair.a, lab.pair.b):
        with space.inside():
            made.append(lab.stack.enter_context(socket.socket(family, socket.SOCK_DGRAM)))
    client, server = made
    server.bind((SERVERS[version], PORT))
    client.connect((SERVERS[version], PORT))
    for sock in made:
        sock.settimeout(30)
        if version == 4:
            sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DONT)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DONT)
    return client, server


def exchange(client: socket.socket, server: socket.socket, mark: bytes) -> tuple[str, int]:
    """A large datagram each way; the client's address as the server sees it.  Raises OSError where one is lost."""
    data = mark * (BYTES // len(mark))
    client.send(data)
    got, seen = server.recvfrom(BYTES + 1)
    assert got == data
    server.sendto(data[::-1], seen)
    assert client.recv(BYTES + 1) == data[::-1]
    return seen[:2]


def reassembled(space: Namespace, version: int) -> int:
    """Datagrams that the namespace's kernel has put together (RFC 4293, ipSystemStatsReasmOKs)."""
    with space.inside():
        text = Path(f"/proc/thread-self/net/snmp{'6' if version == 6 else ''}").read_text(encoding="ascii")
    if version == 6:
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Ip6ReasmOKs"))
    names, values = (line.split() for line in text.splitlines() if line.startswith("Ip:"))
    return int(values[names.index("ReasmOKs")])


def run(lab: Cluster, replicate: bool = True) -> None:
    lab.pair.activate(lab.pair.fw1)
    lab.fw1.start()
    lab.fw2.start()
    if replicate:
        lab.ready(lab.fw1, lab.fw2)
    else:
        wait_for(lambda: lab.fw2.status()["reasons"] == ["replication is off"], "fw2 to run")


@pytest.mark.parametrize("version", [4, 6])
def test_fragments_pass_before_and_after_a_take_over(cluster: Callable[..., Cluster], version: int) -> None:
    lab = cluster()
    run(lab)
    client, server = talkers(lab, version)
    port = client.getsockname()[1]
    seen = exchange(client, server, b"before")
    assert seen == (VIRTUAL[version], port)
    assert reassembled(lab.pair.b, version) == reassembled(lab.pair.a, version) == 1, "nothing was fragmented"
    if version == 4:  # IPv6's of connection tracking are not counted
        assert reassembled(lab.pair.fw1, version) == 2
    nothing_new(lab)

    def known() -> bool:
        family = f"ipv{version}"
        return f" sport={port} dport={PORT} " in lab.pair.fw2.conntrack("-L", "-f", family, "-p", "udp")

    wait_for(known, "the flow in the kernel of fw2")
    lab.power_cut(lab.fw1, lab.fw2)
    assert exchange(client, server, b"after") == seen
    assert reassembled(lab.pair.b, version) == reassembled(lab.pair.a, version) == 2
    if version == 4:
        assert reassembled(lab.pair.fw2, version) == 2
    lab.back_and_equal(lab.fw1, lab.fw2)


@pytest.mark.parametrize("version", [4, 6])
def test_without_replication_no_fragment_passes_after_it(cluster: Callable[..., Cluster], version: int) -> None:
    """The negative control."""
    lab = cluster(replicate=False)
    run(lab, replicate=False)
    client, server = talkers(lab, version)
    exchange(client, server, b"before")
    nothing_new(lab)
    exchange(client, server, b"still ")
    lab.power_cut(lab.fw1, lab.fw2)
    for sock in (client, server):
        sock.settimeout(2)
    with pytest.raises(TimeoutError):
        exchange(client, server, b"after")
    assert reassembled(lab.pair.b, version) == 2
