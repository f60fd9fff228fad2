# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Network namespaces for tests on the real kernel: made with iproute2, named ``ctsync-t-XXXXXX-LABEL``,
removed always.

``with net() as n:`` gives an empty :class:`Net`; ``with pair() as p:`` the topology of the test case (a, fw1, fw2, b
and a switch namespace between them), see :class:`Pair`.  Root only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Iterator, TypeVar

CLONE_NEWNET = 0x40000000  # <linux/sched.h>

_libc = ctypes.CDLL(None, use_errno=True)
_Value = TypeVar("_Value")

CONNTRACK_SYSCTLS = {
    "net/netfilter/nf_conntrack_events": "1",
    "net/netfilter/nf_conntrack_timestamp": "1",
    "net/netfilter/nf_conntrack_tcp_loose": "0",
}


def run(*argv: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """A command's result; with ``check`` a failure raises with what the command said."""
    done = subprocess.run(
        argv, input=stdin, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(argv)} exited with {done.returncode}: {done.stdout}{done.stderr}")
    return done


class InVain(AssertionError):
    """What was waited for did not come."""


def wait_for(condition: Callable[[], _Value], what: str, timeout: float = 30.0, *, every_s: float = 0.02) -> _Value:
    """The first true value of ``condition``; :class:`InVain` naming ``what`` after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise InVain(f"waited {timeout:g} s in vain for {what}")
        time.sleep(every_s)


class Namespace:
    """One network namespace."""

    def __init__(self, name: str, label: str) -> None:
        self.name = name
        self.label = label
        self._processes: list[subprocess.Popen[Any]] = []

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Put the calling thread into the namespace: sockets opened within stay there for good (setns(2))."""
        back = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(there)
            try:
                yield
            finally:
                _setns(back)
        finally:
            os.close(there)
            os.close(back)

    def run(self, *argv: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """A command in the namespace."""
        return run("ip", "netns", "exec", self.name, *argv, check=check, stdin=stdin)

    def popen(self, *argv: str, **kwargs: Any) -> subprocess.Popen[Any]:
        """A process in the namespace; it is killed with the namespace."""
        process = subprocess.Popen(["ip", "netns", "exec", self.name, *argv], **kwargs)
        self._processes.append(process)
        return process

    def ip(self, *argv: str) -> str:
        """``ip`` in the namespace."""
        return run("ip", "-n", self.name, *argv).stdout

    def sysctl(self, values: dict[str, str]) -> None:
        """Set kernel parameters of the namespace, given as paths below /proc/sys."""
        with self.inside():
            for name, value in values.items():
                Path("/proc/sys", name).write_text(value, encoding="ascii")

    def conntrack(self, *argv: str, check: bool = True) -> str:
        """``conntrack`` in the namespace."""
        return self.run("conntrack", *argv, check=check).stdout

    def listen(self, host: str, port: int = 0) -> socket.socket:
        """A listening TCP socket in the namespace."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with self.inside():
            server = socket.create_server((host, port), family=family)
        server.settimeout(30)
        return server

    def connect(self, host: str, port: int, timeout: float = 30.0) -> socket.socket:
        """A TCP connection out of the namespace."""
        with self.inside():
            return socket.create_connection((host, port), timeout=timeout)

    def ping(self, host: str, ident: int, count: int = 1) -> None:
        """``count`` echo requests with one id, each answered (RFC 792, RFC 4443)."""
        v6 = ":" in host
        family, proto, request, reply = (
            (socket.AF_INET6, socket.IPPROTO_ICMPV6, 128, 129) if v6 else (socket.AF_INET, socket.IPPROTO_ICMP, 8, 0)
        )
        with self.inside():
            raw = socket.socket(family, socket.SOCK_RAW, proto)
        with raw:
            raw.settimeout(30)
            for number in range(count):
                body = struct.pack("!HH", ident, number)
                # the kernel fills in the checksum of ICMPv6 only
                raw.sendto(
                    struct.pack("!BBH", request, 0, 0 if v6 else _checksum(bytes((request, 0)) + body)) + body,
                    (host, 0),
                )
                while True:
                    answer = raw.recv(2048)
                    answer = answer if v6 else answer[(answer[0] & 15) * 4 :]
                    if answer[0] == reply and answer[4:8] == body:
                        break

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for pid in run("ip", "netns", "pids", self.name, check=False).stdout.split():  # what these started
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        run("ip", "netns", "del", self.name, check=False)


def _checksum(data: bytes) -> int:
    """Internet checksum of an even number of bytes (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Net:
    """The namespaces of one test."""

    def __init__(self) -> None:
        self.prefix = f"ctsync-t-{secrets.token_hex(3)}"
        self.namespaces: list[Namespace] = []

    def namespace(self, label: str) -> Namespace:
        """A fresh namespace with loopback up."""
        space = Namespace(f"{self.prefix}-{label}", label)
        run("ip", "netns", "add", space.name)
        self.namespaces.append(space)
        space.ip("link", "set", "lo", "up")
        return space

    def link(self, one: Namespace, one_name: str, two: Namespace, two_name: str) -> None:
        """A veth pair between two namespaces, both ends up."""
        run(
            *("ip", "link", "add", one_name, "netns", one.name, "type", "veth"),
            *("peer", "name", two_name, "netns", two.name),
        )
        one.ip("link", "set", one_name, "up")
        two.ip("link", "set", two_name, "up")

    def close(self) -> None:
        for space in reversed(self.namespaces):
            space.close()
        self.namespaces.clear()


@contextlib.contextmanager
def net() -> Iterator[Net]:
    """An empty set of namespaces, removed at the end whatever happened."""
    made = Net()
    try:
        yield made
    finally:
        made.close()


def last_octet(number: int) -> int:
    """Of the addresses of firewall ``number``; 3 is that of a and b."""
    return number if number < 3 else number + 1


class Pair:
    """The test case's topology: a -- (fw1 | fw2) -- b over the bridges of a switch namespace, and a sync link; with
    more than two firewalls a bridge for it.

    Addresses and interface names are those of the lab.  The firewalls have its six rules, the same for IPv6, and beyond
    them: UDP and echo requests from the inside; DNAT of port 8080 of the outside VIPs to port 80 of a; DNAT of
    192.168.1.200 and fd00:c0de:1::200 to b.  Strays to a VIP are dropped.  Nobody holds the VIPs before
    :meth:`activate`.
    """

    VIPS = (("eth1", "192.168.0.100/24", "fd00:c0de::100/64"), ("eth0", "192.168.1.100/24", "fd00:c0de:1::100/64"))

    def __init__(self, made: Net, firewalls: int = 2) -> None:
        self.net = made
        self.switch = made.namespace("sw")
        self.a = made.namespace("a")
        self.b = made.namespace("b")
        self.firewalls = [made.namespace(f"fw{number + 1}") for number in range(firewalls)]
        self.fw1, self.fw2 = self.firewalls[:2]
        for bridge in ("inside", "outside", "sync"):
            self.switch.ip("link", "add", bridge, "up", "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
        self._host(self.a, "inside", "192.168.0.3/24", "fd00:c0de::3/64")
        self._host(self.b, "outside", "192.168.1.3/24", "fd00:c0de:1::3/64")
        self._sync_link()
        for number, firewall in enumerate(self.firewalls, 1):
            self._port(firewall, "eth1", "inside")
            self._port(firewall, "eth0", "outside")
            for interface, v4, v6 in (
                ("eth1", "192.168.0", "fd00:c0de:"),
                ("eth0", "192.168.1", "fd00:c0de:1:"),
                ("eth2", "192.168.100", "fd00:c0de:64:"),
            ):
                last = last_octet(number)
                self._address(firewall, interface, f"{v4}.{last}/24", f"{v6}:{last}/64")
            firewall.sysctl({"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", **CONNTRACK_SYSCTLS})
            firewall.run(
                "iptables-restore", stdin=_rules("192.168.0.3", "192.168.1.100", "192.168.1.3", "192.168.1.200")
            )
            firewall.run(
                "ip6tables-restore",
                stdin=_rules("fd00:c0de::3", "fd00:c0de:1::100", "fd00:c0de:1::3", "fd00:c0de:1::200"),
            )

    def _sync_link(self) -> None:
        """The wire between eth2 of both firewalls; of more than two, a bridge."""
        if len(self.firewalls) == 2:
            self.net.link(self.fw1, "eth2", self.fw2, "eth2")
            return
        for firewall in self.firewalls:
            self._port(firewall, "eth2", "sync")

    def _port(self, node: Namespace, interface: str, bridge: str) -> None:
        port = f"{node.label}-{interface}"
        self.net.link(node, interface, self.switch, port)
        self.switch.ip("link", "set", port, "master", bridge)

    @staticmethod
    def _address(node: Namespace, interface: str, *addresses: str) -> None:
        for address in addresses:
            node.ip("address", "add", address, "dev", interface, *(("nodad",) if ":" in address else ()))

    def _host(self, node: Namespace, bridge: str, v4: str, v6: str) -> None:
        self._port(node, "eth0", bridge)
        self._address(node, "eth0", v4, v6)
        node.ip("route", "add", "default", "via", v4.rsplit(".", 1)[0] + ".100")
        node.ip("-6", "route", "add", "default", "via", v6.rsplit("::", 1)[0] + "::100")

    def unplug(self, firewall: Namespace) -> None:
        """Take a firewall's three ports off the network, as a power cut would."""
        for interface in ("eth0", "eth1"):
            self.switch.ip("link", "set", f"{firewall.label}-{interface}", "down")
        firewall.ip("link", "set", "eth2", "down")

    def activate(self, firewall: Namespace) -> None:
        """Give the VIPs to a firewall; the hosts forget who had them before."""
        for interface, v4, v6 in self.VIPS:
            self._address(firewall, interface, v4, v6)
        for host in (self.a, self.b):
            host.ip("neigh", "flush", "all")


def _rules(inside: str, vip: str, outside: str, alias: str) -> str:
    """iptables-restore input of a firewall of :class:`Pair`."""
    ping = "ipv6-icmp" if ":" in vip else "icmp"
    wrapped = f"[{inside}]" if ":" in vip else inside
    lines = [
        "*filter",
        ":INPUT ACCEPT [0:0]",
        ":FORWARD DROP [0:0]",
        ":OUTPUT ACCEPT [0:0]",
        f"-A INPUT -d {vip} -p tcp -j DROP",
        f"-A INPUT -d {vip} -p udp -j DROP",
        "-A FORWARD -i eth0 -m state --state ESTABLISHED,RELATED -j ACCEPT",
        "-A FORWARD -i eth1 -p tcp --syn -m state --state NEW -j ACCEPT",
        "-A FORWARD -i eth1 -p tcp -m state --state ESTABLISHED -j ACCEPT",
        "-A FORWARD -i eth1 -p udp -j ACCEPT",
        f"-A FORWARD -i eth1 -p {ping} -j ACCEPT",
        "-A FORWARD -i eth0 -p tcp --syn -m state --state NEW -m conntrack --ctstate DNAT -j ACCEPT",
        "-A FORWARD -m state --state INVALID",
        "COMMIT",
        "*nat",
        ":PREROUTING ACCEPT [0:0]",
        ":POSTROUTING ACCEPT [0:0]",
        f"-A PREROUTING -d {vip} -p tcp --dport 8080 -j DNAT --to-destination {wrapped}:80",
        f"-A PREROUTING -d {alias} -j DNAT --to-destination {outside}",
        f"-A POSTROUTING -s {inside} -o eth0 -j SNAT --to-source {vip}",
        "COMMIT",
    ]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def pair(firewalls: int = 2) -> Iterator[Pair]:
    """The test case's topology, removed at the end whatever happened."""
    with net() as made:
        yield Pair(made, firewalls)
