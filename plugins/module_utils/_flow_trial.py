# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which established flows would new rules cut? Ask the kernel: send a packet of each through both rulesets.

This module is private to the collection. A trial is a child process in a network namespace that ends with it. There it
makes interfaces with the machine's names, addresses and routes (veth pairs; nothing is connected to anything), loads a
ruleset, gives the kernel the machine's conntrack entries with their NAT, and sends one packet of each flow in each
direction. A packet that leaves by an interface or is delivered to the machine has passed. Nothing here judges a rule.

Two trials are compared, one with the rules of now and one with those to come. A flow counts as cut only if its packets
pass the first and not the second; where they do not pass the first, the trial does not resemble the machine well enough
(policy routing, state of matches such as `recent`), and nothing is said of this flow.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import re
import select
import socket
import struct
import subprocess
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from . import _ruleset
from .ctsyncd import ctnetlink, netlink
from .ctsyncd.errors import NetlinkError
from .ctsyncd.flow import Flow

MAX_FLOWS = 2000  # tried at most; the rest is counted
MAX_SHOWN = 20
SLICE = 64  # packets between two looks at what came out
QUIET = 0.05  # seconds without a packet after which no more are expected
TRIAL_SECONDS = 60

CLONE_NEWNET = 0x40000000  # <linux/sched.h>
IPS_SEEN_REPLY = 2  # <linux/netfilter/nf_conntrack_common.h>
TCP_ESTABLISHED = 3  # TCP_CONNTRACK_ESTABLISHED, <linux/netfilter/nf_conntrack_tcp.h>
ETH_P_ALL, ETH_P_IP, ETH_P_IPV6 = 0x0003, 0x0800, 0x86DD  # <linux/if_ether.h>
PACKET_OUTGOING = 4  # <linux/if_packet.h>
SO_RCVBUFFORCE = 33  # <asm-generic/socket.h>
SOL_IPV6, IPV6_HDRINCL = 41, 36  # <linux/in6.h>
MARKER = b"ctsync trial "
_COPIED = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/netfilter/nf_conntrack_tcp_loose")
_FIXED = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/router_solicitations": "0",
}


class TrialError(Exception):
    """No trial can be made here."""


class Host(NamedTuple):
    """What a trial has to resemble: interfaces with addresses, routes, sysctls, the headers and members of ipsets."""

    interfaces: Dict[str, List[str]]
    routes: List[str]
    sysctls: Dict[str, str]
    sets: str = ""


class Program(NamedTuple):
    """How to load one ruleset: the iptables-restore program and its input."""

    program: str
    text: str


def render_tables(tables: _ruleset.Tables) -> str:
    """iptables-restore input for whole tables, without counters."""
    out: List[str] = []
    for name, table in tables.items():
        out.append(f"*{name}")
        for chain in table.chains:
            policy = table.policies.get(chain, ("-",))[0]
            if chain in _ruleset.BUILTIN_CHAINS.get(name, ()) and policy == "-":
                policy = "ACCEPT"
            out.append(f":{chain} {policy} [0:0]")
        for rules in table.chains.values():
            out += [saved.rule for saved in rules]
        out.append("COMMIT")
    return "\n".join(out) + "\n" if out else ""


def _run(command: Sequence[str], text: str = "", check: bool = True) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        list(command), input=text, capture_output=True, text=True, env=environment, timeout=30, check=False
    )
    if check and done.returncode:
        raise TrialError(f"{os.path.basename(command[0])}: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout


def _ip() -> str:
    path = _ruleset.find_program("ip")
    if not path:
        raise TrialError("the program ip (package iproute2) is missing")
    return path


def _read(key: str) -> str:
    with contextlib.suppress(OSError), open(f"/proc/sys/{key}") as stream:
        return stream.read().strip()
    return ""


def look() -> Host:
    """Describe this machine's network, as far as a trial needs it."""
    interfaces: Dict[str, List[str]] = {}
    for link in json.loads(_run([_ip(), "-j", "address", "show", "up"]) or "[]"):
        if link.get("ifname") and "LOOPBACK" not in link.get("flags", ()):
            local = [a for a in link.get("addr_info", ()) if a.get("local")]
            interfaces[link["ifname"]] = [f"{a['local']}/{a['prefixlen']}" for a in local]
    routes = []
    for family in ("-4", "-6"):
        for line in _run([_ip(), "-o", family, "route", "show", "table", "main"], check=False).splitlines():
            words = line.split("\\")[0]
            if "proto kernel" not in words and words.split()[0] not in ("unreachable", "blackhole", "prohibit"):
                routes.append(
                    f"{family} route replace {re.sub(r' (linkdown|dead|onlink|pervasive)', '', words)} onlink"
                )
    ipset = _ruleset.find_program("ipset")
    sets = _run([ipset, "save"], check=False) if ipset else ""
    return Host(interfaces, routes, {key: _read(key) for key in _COPIED}, sets)


def established(limit: int = MAX_FLOWS) -> Tuple[List[Flow], int, int]:
    """The established TCP and UDP flows of this machine, at most `limit`; how many more, and how many others."""
    found: List[Flow] = []
    others = 0
    for flows in netlink.dump_flows():
        for flow in flows:
            open_tcp = flow.proto == socket.IPPROTO_TCP and flow.state == TCP_ESTABLISHED
            if open_tcp or (flow.proto == socket.IPPROTO_UDP and flow.status & IPS_SEEN_REPLY):
                found.append(flow)
            else:
                others += 1
    found.sort(key=lambda flow: flow.proto)  # TCP first
    return found[:limit], max(0, len(found) - limit), others


# ---------------------------------------------------------------------------------------------------------------------
# Packets


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packet(flow: Flow, reply: bool, payload: bytes) -> bytes:
    """An IP packet as it arrives in one direction of the flow, before any translation on this machine."""
    sent = flow.reply if reply else flow.orig
    ports = sent.l4[:4]
    if flow.proto == socket.IPPROTO_TCP:
        header = ports + struct.pack("!IIBBHHH", 1, 1, 5 << 4, 0x18, 1024, 0, 0)  # PSH, ACK
        at = 16
    else:
        header = ports + struct.pack("!HH", 8 + len(payload), 0)
        at = 6
    size = len(header) + len(payload)
    pseudo = sent.src + sent.dst + struct.pack("!IHBB", size, 0, 0, flow.proto)
    total = _checksum(pseudo + header + payload) or 0xFFFF
    transport = header[:at] + struct.pack("!H", total) + header[at + 2 :] + payload
    if len(sent.src) == 16:
        return struct.pack("!IHBB", 6 << 28, size, flow.proto, 64) + sent.src + sent.dst + transport
    start = struct.pack("!BBHHHBBH", 0x45, 0, 20 + size, 1, 0x4000, 64, flow.proto, 0) + sent.src + sent.dst
    return start[:10] + struct.pack("!H", _checksum(start)) + start[12:] + transport


# ---------------------------------------------------------------------------------------------------------------------
# The trial, in a child process


class _Trial:
    def __init__(self, host: Host, programs: Sequence[Program], flows: Sequence[Flow]) -> None:
        self.host, self.programs, self.flows = host, programs, flows
        self.inlets: Dict[str, Tuple[str, bytes]] = {}
        self.outlets: Set[str] = set()
        self.sockets: List[socket.socket] = []

    def run(self) -> Tuple[Set[Tuple[int, bool]], Set[int]]:
        """(flow number, reply direction) of all packets that passed; numbers of the flows the kernel did not take."""
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            raise TrialError(f"no network namespace can be made: {os.strerror(ctypes.get_errno())}")
        self.build()
        self.load()
        self.listen()
        origins = self.origins()
        passed: Set[Tuple[int, bool]] = set()
        refused: Set[int] = set()
        with contextlib.closing(netlink.RequestSocket()) as table:
            for reply in (False, True):
                # anew for each direction: a machine without the socket may answer with a reset, which ends the flow
                table.inject([ctnetlink.delete(flow) for flow in self.flows])
                entries = [ctnetlink.create(f, timeout=600, helper=False, master=False) for f in self.flows]
                refused |= {index for index, _errno in table.inject(entries)}
                passed |= self.send(reply, origins)
        return passed, refused

    def build(self) -> None:
        """Interfaces, addresses, routes and sysctls like the machine's."""
        for key, value in {**_FIXED, **self.host.sysctls}.items():
            path = f"/proc/sys/{key}"
            if value and os.path.exists(path) and _read(key) != value:
                try:
                    with open(path, "w") as stream:
                        stream.write(value)
                except OSError as exc:
                    raise TrialError(f"{path} cannot be set in a namespace: {exc.strerror}") from exc
        lines = ["link set lo up"]
        for number, (name, addresses) in enumerate(self.host.interfaces.items()):
            lines += [f"link add {name} type veth peer name ctsync-o{number}"]
            lines += [f"link set {end} arp off up" for end in (f"ctsync-o{number}", name)]
            for address in addresses:
                lines.append(f"address add {address} dev {name}" + (" nodad" if ":" in address else ""))
        _run([_ip(), "-batch", "-"], "\n".join(lines) + "\n")
        # a route that cannot be made shows in the first trial: its flows do not pass
        text = "".join(f"{route[3:]}\n" for route in self.host.routes if route.startswith("-4"))
        _run([_ip(), "-4", "-force", "-batch", "-"], text, check=False)
        text = "".join(f"{route[3:]}\n" for route in self.host.routes if route.startswith("-6"))
        _run([_ip(), "-6", "-force", "-batch", "-"], text, check=False)
        for number, name in enumerate(self.host.interfaces):
            self.inlets[name] = (f"ctsync-o{number}", self.hardware(name))
            self.outlets.add(f"ctsync-o{number}")

    @staticmethod
    def hardware(name: str) -> bytes:
        """The hardware address of an interface in this namespace (sysfs may show another one's)."""
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
            sock.bind((name, 0))
            return sock.getsockname()[4]

    def load(self) -> None:
        """The ipsets with their members, then the ruleset."""
        if self.host.sets:
            _run([_ruleset.find_program("ipset"), "restore"], self.host.sets)
        for program in self.programs:
            if program.text:
                _run([program.program, "-w", "10"], program.text)

    def listen(self) -> None:
        """Sockets for packets that leave, and for those that are delivered here."""
        out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.sockets = [out]
        for family in (socket.AF_INET, socket.AF_INET6):
            for proto in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
                with contextlib.suppress(OSError):
                    self.sockets.append(socket.socket(family, socket.SOCK_RAW, proto))
        for sock in self.sockets:
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)
        self.own4 = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self.own6 = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)

    def origins(self) -> Dict[bytes, str]:
        """By source address the interface it lies behind; 'lo' for the machine's own, missing if there is no route."""
        addresses = sorted({end.src for flow in self.flows for end in (flow.orig, flow.reply)})
        found: Dict[bytes, str] = {}
        text = "".join(f"route get {ipaddress.ip_address(address)}\n" for address in addresses)
        for line in _run([_ip(), "-o", "-force", "-batch", "-"], text, check=False).splitlines():
            match = re.match(r"(?:(local|broadcast|multicast|anycast) )?(\S+) .*?dev (\S+)", line)
            if match:
                key = ipaddress.ip_address(match[2]).packed
                found[key] = "lo" if match[1] == "local" else match[3]
        return found

    def send(self, reply: bool, origins: Dict[bytes, str]) -> Set[Tuple[int, bool]]:
        """Send one packet of every flow in one direction; those that came out."""
        passed: Set[int] = set()
        sender = self.sockets[0]
        for number, flow in enumerate(self.flows):
            sent = flow.reply if reply else flow.orig
            where = origins.get(sent.src)
            data = packet(flow, reply, MARKER + struct.pack("!I", number))
            kind = ETH_P_IPV6 if len(sent.src) == 16 else ETH_P_IP
            with contextlib.suppress(OSError):
                if where == "lo":
                    own = self.own6 if kind == ETH_P_IPV6 else self.own4
                    own.sendto(data, (str(ipaddress.ip_address(sent.dst)), 0))
                elif where in self.inlets:
                    inlet, hardware = self.inlets[where]
                    frame = hardware + b"\2ctsyn" + struct.pack("!H", kind) + data
                    sender.sendto(frame, (inlet, 0))
            if number % SLICE == SLICE - 1:
                passed |= self.collect(0)
        passed |= self.collect(QUIET)
        return {(number, reply) for number in passed}

    def left(self, frame: bytes, source: Any) -> bool:
        """Whether a frame is a TCP or UDP packet that left; an ICMP error may quote one that did not."""
        if source[2] == PACKET_OUTGOING or source[0] not in self.outlets or len(frame) < 54:
            return False
        proto = frame[14 + 9] if source[1] == ETH_P_IP else frame[14 + 6] if source[1] == ETH_P_IPV6 else 0
        return proto in (socket.IPPROTO_TCP, socket.IPPROTO_UDP)

    def collect(self, patience: float) -> Set[int]:
        """The numbers in the packets that came out since the last look."""
        found: Set[int] = set()
        while True:
            ready, _write, _error = select.select(self.sockets, [], [], patience)
            if not ready:
                return found
            for sock in ready:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        data, source = sock.recvfrom(65535)
                        if sock is self.sockets[0] and not self.left(data, source):
                            continue
                        at = data.rfind(MARKER)
                        if at >= 0 and len(data) >= at + len(MARKER) + 4:
                            found.add(struct.unpack_from("!I", data, at + len(MARKER))[0])


def try_flows(host: Host, programs: Sequence[Program], flows: Sequence[Flow]) -> Tuple[Set[Tuple[int, bool]], Set[int]]:
    """Run one trial in a child process: what passed, and which flows the kernel did not take. Raises TrialError."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        answer: Any = "the trial ended without a word"
        try:
            os.close(reader)
            passed, refused = _Trial(host, programs, flows).run()
            answer = [sorted(passed), sorted(refused)]
        except (TrialError, NetlinkError, OSError, ValueError, subprocess.SubprocessError) as exc:
            answer = str(exc)
        finally:
            with contextlib.suppress(BaseException), os.fdopen(writer, "w") as stream:
                json.dump(answer, stream)
            os._exit(0)
    os.close(writer)
    data = b""
    with os.fdopen(reader, "rb") as stream:
        ready, _write, _error = select.select([stream], [], [], TRIAL_SECONDS)
        if ready:
            data = stream.read()
    if not data:
        with contextlib.suppress(OSError):
            os.kill(child, 9)
    os.waitpid(child, 0)
    answer = json.loads(data) if data else "the trial took too long"
    if isinstance(answer, str):
        raise TrialError(answer)
    return {(int(number), bool(reply)) for number, reply in answer[0]}, set(answer[1])


def describe(flow: Flow) -> str:
    """One flow in a line, as the client sees it, and the server's end where it is another."""

    def end(address: bytes, port: bytes) -> str:
        ip = ipaddress.ip_address(address)
        number = int.from_bytes(port, "big")
        return f"[{ip}]:{number}" if ip.version == 6 else f"{ip}:{number}"

    proto = "tcp" if flow.proto == socket.IPPROTO_TCP else "udp"
    words = f"{proto} {end(flow.orig.src, flow.orig.l4[:2])} -> {end(flow.orig.dst, flow.orig.l4[2:4])}"
    server = end(flow.reply.src, flow.reply.l4[:2])
    return words if words.endswith(f" {server}") else f"{words} ({server})"


def would_cut(before: Sequence[Program], after: Sequence[Program]) -> Dict[str, Any]:
    """Compare two rulesets over the established flows of this machine.

    The result: `checked` flows, `count` of those that the new rules cut, the first of them as text in `flows`,
    `unknown` (they do not pass a trial of the present rules either, so nothing can be said), `not_checked` (too many,
    or neither TCP nor UDP), and `reason` if no trial could be made at all (then nothing was checked).
    """
    result: Dict[str, Any] = {"checked": 0, "count": 0, "flows": [], "unknown": 0, "not_checked": 0, "reason": ""}
    try:
        flows, more, others = established()
        result["not_checked"] = more + others
        if not flows:
            return result
        host = look()
        now, refused = try_flows(host, before, flows)
        then, refused_then = try_flows(host, after, flows)
    except (TrialError, NetlinkError, OSError, ValueError, subprocess.SubprocessError) as exc:
        result["reason"] = str(exc)
        return result
    cut = []
    for number, flow in enumerate(flows):
        directions = {(number, False), (number, True)}
        if number in refused | refused_then or not directions <= now:
            result["unknown"] += 1
            continue
        result["checked"] += 1
        if not directions <= then:
            cut.append(flow)
    result["count"] = len(cut)
    result["flows"] = [describe(flow) for flow in cut[:MAX_SHOWN]]
    return result


def sentence(result: Optional[Dict[str, Any]]) -> str:
    """A warning for the operator; empty if there is nothing to warn of."""
    if not result or not result["count"]:
        return ""
    shown = "; ".join(result["flows"][:3])
    return f"The new rules cut {result['count']} of {result['checked']} established flows: {shown}" + (
        ", ..." if result["count"] > 3 else "."
    )
