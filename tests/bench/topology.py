# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The namespaces that the benchmark runs in, and the limits of the conntrack table, which all namespaces share.

    client ── fw1 ── server        fw2 is the backup; eth2 of both is the sync link
       └───── fw2 ─────┘

Names begin with ``ctsync-b-`` and a random part.  Root only.
"""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Iterator

from integration.netns import CONNTRACK_SYSCTLS, Namespace, Net

VIPS = (("eth1", "192.168.0.100"), ("eth0", "192.168.1.100"))
SYNC_PORTS = (3780, 3781)

# Clients and servers of the real connections, all of them addresses of the two outer namespaces.
PLAIN_CLIENTS = "20.0.0.0/8"
SNAT_CLIENTS = "10.0.0.0/16"
SERVERS = "198.18.0.0/15"
PORTS = ("80", "443", "8443")

TIME_WAIT_S = 2  # instead of 120: connections end within a run, so that their DESTROY is part of what is measured

_HOST_SYSCTLS = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/core/somaxconn": "65535",
    "net/ipv4/tcp_max_syn_backlog": "65535",
    "net/ipv4/tcp_max_tw_buckets": "1000000",
}
_FIREWALL_SYSCTLS = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/ip_forward": "1",
}
_TRACKING_SYSCTLS = {
    **CONNTRACK_SYSCTLS,
    "net/netfilter/nf_conntrack_tcp_timeout_time_wait": str(TIME_WAIT_S),
}


def _rules() -> str:
    """iptables-restore input of both firewalls: the lab's rules for TCP, and the sync link untracked."""
    untracked = [
        f"-A {chain} -p udp -m multiport --ports {','.join(map(str, SYNC_PORTS))} -j CT --notrack"
        for chain in ("PREROUTING", "OUTPUT")
    ]
    lines = [
        "*raw",
        *untracked,
        "COMMIT",
        "*filter",
        ":FORWARD DROP [0:0]",
        "-A FORWARD -i eth0 -m state --state ESTABLISHED,RELATED -j ACCEPT",
        "-A FORWARD -i eth1 -p tcp --syn -m state --state NEW -j ACCEPT",
        "-A FORWARD -i eth1 -p tcp -m state --state ESTABLISHED -j ACCEPT",
        "COMMIT",
        "*nat",
        f"-A POSTROUTING -s {SNAT_CLIENTS} -o eth0 -j SNAT --to-source {VIPS[1][1]}",
        "COMMIT",
    ]
    return "\n".join(lines) + "\n"


class Stand(Net):
    """The four namespaces."""

    def __init__(self) -> None:
        super().__init__()
        self.prefix = f"ctsync-b-{secrets.token_hex(3)}"

    def build(self) -> None:
        """Make everything; :meth:`close` removes it, also what a failure left half made."""
        self.client = self.namespace("client")
        self.server = self.namespace("server")
        self.fw1 = self.namespace("fw1")
        self.fw2 = self.namespace("fw2")
        for host in (self.client, self.server):
            host.sysctl(_HOST_SYSCTLS)
        for number, firewall in enumerate((self.fw1, self.fw2), 1):
            firewall.sysctl(_FIREWALL_SYSCTLS)
            self.link(firewall, "eth1", self.client, f"in{number}")
            self.link(firewall, "eth0", self.server, f"out{number}")
        self.link(self.fw1, "eth2", self.fw2, "eth2")
        for number, firewall in enumerate((self.fw1, self.fw2), 1):
            for interface, net in (("eth1", "192.168.0"), ("eth0", "192.168.1"), ("eth2", "192.168.100")):
                firewall.ip("address", "add", f"{net}.{number}/24", "dev", interface)
            for clients in (PLAIN_CLIENTS, SNAT_CLIENTS):
                firewall.ip("route", "add", clients, "via", "192.168.0.3")
            firewall.ip("route", "add", SERVERS, "via", "192.168.1.3")
            firewall.run("iptables-restore", stdin=_rules())
            firewall.sysctl(_TRACKING_SYSCTLS)  # they are there once a rule has loaded the module
        self.client.ip("address", "add", "192.168.0.3/24", "dev", "in1")
        self.server.ip("address", "add", "192.168.1.3/24", "dev", "out1")
        for clients in (PLAIN_CLIENTS, SNAT_CLIENTS):
            self.client.ip("route", "add", "local", clients, "dev", "lo")
        self.server.ip("route", "add", "local", SERVERS, "dev", "lo")
        self.route_through(1)

    def route_through(self, number: int) -> None:
        """Send the hosts' packets through fw1 or fw2."""
        self.client.ip("route", "replace", "default", "via", f"192.168.0.{number}", "dev", f"in{number}", "onlink")
        self.server.ip("route", "replace", "default", "via", f"192.168.1.{number}", "dev", f"out{number}", "onlink")
        self.server.ip("route", "replace", VIPS[1][1], "dev", f"out{number}")

    @staticmethod
    def hold(firewall: Namespace, held: bool) -> None:
        """Give the virtual IPs to a firewall, or take them away."""
        for interface, address in VIPS:
            if held:
                firewall.ip("address", "replace", f"{address}/24", "dev", interface)
            elif address in firewall.ip("address", "show", "dev", interface):
                firewall.ip("address", "del", f"{address}/24", "dev", interface)

    def reset(self) -> None:
        """Empty tables, no virtual IPs, the hosts' packets through fw1."""
        for firewall in (self.fw1, self.fw2):
            self.hold(firewall, False)
            firewall.conntrack("-F", check=False)
        self.route_through(1)


def entries(firewall: Namespace) -> int:
    """Number of entries in a firewall's table."""
    with firewall.inside():
        return int(Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text(encoding="ascii"))


@contextlib.contextmanager
def stand() -> Iterator[Stand]:
    """The namespaces, removed at the end whatever happened."""
    made = Stand()
    try:
        made.build()
        yield made
    finally:
        made.close()


MAX_FILE = Path("/proc/sys/net/netfilter/nf_conntrack_max")
BUCKETS_FILE = Path("/sys/module/nf_conntrack/parameters/hashsize")


@contextlib.contextmanager
def table_room(flows: int) -> Iterator[None]:
    """Room for so many flows on both firewalls; the machine's own limits come back at the end.

    No more buckets than that: every listing of any table walks through all of them.
    """
    before = [(path, path.read_text(encoding="ascii").strip()) for path in (MAX_FILE, BUCKETS_FILE)]
    wanted = {MAX_FILE: flows + flows // 4 + 100_000, BUCKETS_FILE: 1 << (flows - 1).bit_length()}
    try:
        for path, value in before:
            if int(value) < wanted[path]:
                path.write_text(str(wanted[path]), encoding="ascii")
        yield
    finally:
        for path, value in reversed(before):
            if path.read_text(encoding="ascii").strip() != value:
                path.write_text(value, encoding="ascii")
