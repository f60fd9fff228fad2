# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Record what this kernel says over ctnetlink about flows of every kind, with what conntrack(8) says to the same.

As root, in the repository: ``PYTHONPATH=collections:tests python3 -m corpus.record``.  It makes network namespaces,
lets real traffic pass a firewall, and writes ``tests/corpus/ctnetlink.jsonl``: one line says which kernel it was; then
one object per message, ``part`` (what was going on), ``hex`` (the netlink message) and ``said`` (conntrack's line).
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
import select
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any, Iterator

from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import ctnetlink, netlink
from integration.netns import Namespace, Pair, pair, wait_for

CORPUS = Path(__file__).with_name("ctnetlink.jsonl")
INSIDE, OUTSIDE, VIP, ALIAS = "192.168.0.3", "192.168.1.3", "192.168.1.100", "192.168.1.200"
INSIDE6, OUTSIDE6, VIP6 = "fd00:c0de::3", "fd00:c0de:1::3", "fd00:c0de:1::100"

RULES = (
    ("iptables", "-I", "FORWARD", "-j", "ACCEPT"),
    ("ip6tables", "-I", "FORWARD", "-j", "ACCEPT"),
    ("iptables", "-t", "nat", "-I", "POSTROUTING", "-p", "udp", "--dport", "5362", "-j", "MASQUERADE"),
    (
        "iptables",
        "-t",
        "mangle",
        "-A",
        "PREROUTING",
        "-p",
        "tcp",
        "--dport",
        "5002",
        "-j",
        "CONNMARK",
        "--set-mark",
        "0x12345678",
    ),
    ("iptables", "-t", "raw", "-A", "PREROUTING", "-p", "udp", "--dport", "5360", "-j", "CT", "--zone", "5"),
    ("iptables", "-t", "raw", "-A", "PREROUTING", "-p", "udp", "--sport", "5360", "-j", "CT", "--zone", "5"),
    ("iptables", "-t", "raw", "-A", "PREROUTING", "-p", "udp", "--dport", "5361", "-j", "CT", "--zone-orig", "7"),
)
OPTIONAL_RULES = (  # where the kernel has them
    ("iptables", "-I", "FORWARD", "-p", "tcp", "--dport", "5003", "-m", "connlabel", "--label", "3", "--set"),
    ("iptables", "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "--dport", "21", "-j", "CT", "--helper", "ftp"),
)


class Recorder:
    """Raw events of a namespace next to conntrack(8)'s words for the same events."""

    def __init__(self, space: Namespace) -> None:
        self.space = space
        self.records: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Record the events that happen meanwhile, then the table."""
        with self.space.inside():
            raw = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_NETFILTER)
        raw.bind((0, 7))
        raw.setblocking(False)
        teller = self.space.popen(
            *("stdbuf", "-oL", "conntrack", "-E", "-o", "extended,id"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert teller.stdout is not None
        with raw, teller.stdout:
            wait_for(lambda: self._listening() >= 2, "conntrack -E to listen")
            messages, lines = list(_drain(raw)), b""
            messages.clear()  # of the time before conntrack listened
            yield
            self._dump(name)

            def told() -> bool:
                nonlocal lines
                messages.extend(_drain(raw))
                while select.select([teller.stdout], [], [], 0.3)[0]:
                    lines += teller.stdout.read1(65536)
                return lines.count(b"\n") >= len(messages)

            wait_for(told, "conntrack to tell of all events")
            teller.kill()
            teller.wait()
        said = [" ".join(line.split()) for line in lines.decode().splitlines()]
        assert len(said) == len(messages), f"{len(messages)} events, {len(said)} lines"
        for message, line in zip(messages, said):
            self.records.append({"part": name, "hex": message.hex(), "said": line})

    def _listening(self) -> int:
        """Sockets of the namespace that hear conntrack events."""
        with self.space.inside():
            rows = Path("/proc/thread-self/net/netlink").read_text(encoding="ascii").splitlines()[1:]
        return sum(row.split()[1] == str(netlink.NETLINK_NETFILTER) and row.split()[3] != "00000000" for row in rows)

    def _dump(self, name: str) -> None:
        lines = {
            found[1]: " ".join(line.split())
            for line in self.space.conntrack("-L", "-o", "extended,id").splitlines()
            + self.space.conntrack("-L", "-f", "ipv6", "-o", "extended,id").splitlines()
            if (found := re.search(r" id=(\d+)$", line.rstrip()))
        }
        with self.space.inside():
            asking = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_NETFILTER)
        with asking:
            asking.settimeout(10)
            asking.send(ctnetlink.dump(1))
            done = False
            while not done:
                data = asking.recv(65536)
                for message in _messages(data):
                    kind = struct.unpack_from("=H", message, 4)[0]
                    done = done or kind == ctnetlink.NLMSG_DONE
                    ident = re.search(rb"\x08\x00\x0c\x00(....)", message[20:], re.DOTALL)
                    if kind >> 8 == ctnetlink.NFNL_SUBSYS_CTNETLINK and ident is not None:
                        number = str(struct.unpack(">I", ident[1])[0])
                        if number in lines:
                            self.records.append({"part": name, "hex": message.hex(), "said": lines[number]})


def _drain(raw: socket.socket) -> Iterator[bytes]:
    while True:
        try:
            yield from _messages(raw.recv(65536))
        except BlockingIOError:
            return


def _messages(data: bytes) -> Iterator[bytes]:
    while len(data) >= 16:
        length = struct.unpack_from("=I", data)[0]
        yield data[:length]
        data = data[(length + 3) & ~3 :]


# --- traffic ---


def _tcp(client: Namespace, target: str, port: int, server: socket.socket) -> None:
    """A connection with a few bytes each way, closed by both."""
    with client.connect(target, port) as one, server.accept()[0] as two:
        one.sendall(b"question")
        two.recv(100)
        two.sendall(b"answer")
        one.recv(100)


def _udp(net: Pair, port: int, target: str = OUTSIDE, *, answered: bool = True) -> None:
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with net.b.inside():
        server = socket.socket(family, socket.SOCK_DGRAM)
        server.bind((OUTSIDE6 if ":" in target else OUTSIDE, port))
    with net.a.inside():
        client = socket.socket(family, socket.SOCK_DGRAM)
    with client, server:
        client.settimeout(10)
        server.settimeout(10)
        client.sendto(b"question", (target, port))
        _data, sender = server.recvfrom(100)
        if answered:
            server.sendto(b"answer", sender)
            client.recv(100)
            client.sendto(b"thanks", (target, port))
            server.recv(100)


def _raw(space: Namespace, proto: int, target: str, payload: bytes) -> None:
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with space.inside(), socket.socket(family, socket.SOCK_RAW, proto) as raw:
        raw.sendto(payload, (target, 0))


def _sctp(net: Pair, outside: str, vip: str) -> None:
    """INIT, INIT ACK, COOKIE ECHO, COOKIE ACK (RFC 9260) by hand; the checksums are not looked at."""

    def packet(sport: int, dport: int, tag: int, kind: int, value: bytes) -> bytes:
        return struct.pack("!HHIIBBH", sport, dport, tag, 0, kind, 0, 4 + len(value)) + value

    init = struct.pack("!IIHHI", 0xCAFE0001, 65536, 1, 1, 1)
    init_ack = struct.pack("!IIHHI", 0xCAFE0002, 65536, 1, 1, 1)
    _raw(net.a, 132, outside, packet(9899, 2905, 0, 1, init))
    _raw(net.b, 132, vip, packet(2905, 9899, 0xCAFE0001, 2, init_ack))
    _raw(net.a, 132, outside, packet(9899, 2905, 0xCAFE0002, 10, b"cookie!!"))
    _raw(net.b, 132, vip, packet(2905, 9899, 0xCAFE0001, 11, b""))


def _ftp(client: Namespace, server: Namespace, here: str, there: str, seen: str) -> None:
    """An active transfer: the helper expects the data connection, and rewrites the client's address to ``seen``."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(server.listen(there, 21))
        data = stack.enter_context(client.listen(here, 1234))
        one = stack.enter_context(client.connect(there, 21))
        two = stack.enter_context(listener.accept()[0])
        two.settimeout(10)
        for line in (b"USER x\r\n", b"PORT %s,4,210\r\n" % here.replace(".", ",").encode()):
            one.sendall(line)  # the helper follows from the second line on
            told = two.recv(100)
            two.sendall(b"200 yes\r\n")
            one.recv(100)
        numbers = [int(number) for number in re.findall(rb"\d+", told)]
        assert ".".join(map(str, numbers[:4])) == seen, f"the helper made {told!r}"
        with server.inside():
            back = socket.create_connection(
                (seen, numbers[4] * 256 + numbers[5]), timeout=10, source_address=(there, 20)
            )
        with back, data.accept()[0] as received:
            back.sendall(b"file")
            received.recv(100)
        one.sendall(b"QUIT\r\n")
        two.recv(100)


def record() -> list[dict[str, Any]]:
    with pair() as net, contextlib.ExitStack() as stack:
        net.activate(net.fw1)
        fw = net.fw1
        for rule in RULES:
            fw.run(*rule)
        for rule in OPTIONAL_RULES:
            fw.run(*rule, check=False)
        fw.sysctl({"net/netfilter/nf_conntrack_checksum": "0"})
        open_ = stack.enter_context
        servers = {port: open_(net.b.listen(OUTSIDE, port)) for port in (5001, 5002, 5003)}
        servers6 = open_(net.b.listen(OUTSIDE6, 5001))
        web, web6 = open_(net.a.listen(INSIDE, 80)), open_(net.a.listen(INSIDE6, 80))
        recorder = Recorder(fw)
        with recorder.part("tcp: snat, snat6, both, dnat, dnat6"):
            _tcp(net.a, OUTSIDE, 5001, servers[5001])
            _tcp(net.a, OUTSIDE6, 5001, servers6)
            _tcp(net.a, ALIAS, 5001, servers[5001])
            _tcp(net.b, VIP, 8080, web)
            _tcp(net.b, VIP6, 8080, web6)
        with recorder.part("tcp: mark, label"):
            _tcp(net.a, OUTSIDE, 5002, servers[5002])
            _tcp(net.a, OUTSIDE, 5003, servers[5003])
        with recorder.part("udp: snat, snat6, masquerade, zone, zone of one direction, unreplied"):
            _udp(net, 5353)
            _udp(net, 5353, OUTSIDE6)
            _udp(net, 5362)
            _udp(net, 5360)
            _udp(net, 5361)
            _udp(net, 5363, answered=False)
        with recorder.part("icmp, icmpv6; sctp, gre, esp over both families"):
            net.a.ping(OUTSIDE, 77)
            net.a.ping(OUTSIDE6, 78)
            for outside, vip in ((OUTSIDE, VIP), (OUTSIDE6, VIP6)):
                _sctp(net, outside, vip)
                _raw(net.a, 47, outside, b"\x20\0\x08\0\x12\x34\x56\x78" + bytes(20))
                _raw(net.a, 50, outside, bytes(40))
        with recorder.part("ftp with helper: snat, adjusted sequence, master; then from outside"):
            _ftp(net.a, net.b, INSIDE, OUTSIDE, VIP)
            _ftp(net.b, net.a, OUTSIDE, INSIDE, OUTSIDE)
        with recorder.part("plain"), fw.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as local:
            local.sendto(b"x", (OUTSIDE, 9))
        with recorder.part("made, changed and deleted over ctnetlink"):
            base = ("-s", "10.1.2.3", "-d", "10.4.5.6", "-p", "tcp", "--sport", "1000", "--dport", "22")
            fw.conntrack("-I", *base, "--state", "ESTABLISHED", "-t", "600", "-u", "SEEN_REPLY,ASSURED", "-m", "9")
            fw.conntrack("-U", *base, "-m", "10")
            fw.conntrack(
                "-I",
                *("-s", "10.1.2.3", "-d", "10.4.5.6", "-p", "udp", "--sport", "1", "--dport", "2"),
                "-t",
                "30",
                "-w",
                "9",
            )
            fw.conntrack("-D", *base)
        with recorder.part("deleted by hand"):
            fw.conntrack("-D", "-p", "tcp", check=False)
            fw.conntrack("-D", "-f", "ipv6", check=False)
            fw.conntrack("-D", "-p", "sctp", check=False)
        with recorder.part("ended by the timer"):
            fw.sysctl({"net/netfilter/nf_conntrack_udp_timeout": "1", "net/netfilter/nf_conntrack_icmp_timeout": "1"})
            _udp(net, 5364, answered=False)
            net.a.ping(OUTSIDE, 79)
            wait_for(lambda: "5364" not in fw.conntrack("-L"), "the timer to end a flow")
        fw.conntrack("-F")
        fw.sysctl({"net/netfilter/nf_conntrack_timestamp": "0", "net/netfilter/nf_conntrack_acct": "1"})
        with recorder.part("accounting, no timestamps"):
            _tcp(net.a, OUTSIDE, 5001, servers[5001])
            _udp(net, 5353)
            _udp(net, 5353, OUTSIDE6)
            fw.conntrack("-D", "-p", "udp", check=False)
        return recorder.records


def main() -> None:
    records = record()
    made = {
        "kernel": platform.release().split("-", maxsplit=1)[0],
        "machine": platform.machine(),
        "messages": len(records),
    }
    lines = [json.dumps(one, separators=(",", ":")) for one in (made, *records)]
    CORPUS.write_text("\n".join(lines) + "\n", encoding="ascii")
    print(f"{len(records)} messages, {CORPUS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
