# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Record what this kernel says of the expectations of real helpers, with what conntrack(8) says to the same.

As root, in the repository: ``PYTHONPATH=collections:tests python3 -m corpus.record_expectations``.  It makes network
namespaces, speaks FTP, TFTP and SIP through a firewall, and writes ``tests/corpus/expectations.jsonl``: one line says
which kernel it was; then one object per message, ``part`` (what was going on), ``hex`` (the netlink message) and, of
entries of a dump, ``said`` (conntrack's line).
"""

from __future__ import annotations

import contextlib
import json
import platform
import socket
import tempfile
from pathlib import Path
from typing import Any

from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import ctnetlink, expectation
from integration.netns import Namespace, pair
from integration.related import Call, Ftp, Registration, Tftp, Vsftpd

CORPUS = Path(__file__).with_name("expectations.jsonl")
HELPERS = (("tcp", 21, "ftp"), ("udp", 69, "tftp"), ("udp", 5060, "sip"))
GROUPS = 8 | 32  # NF_NETLINK_CONNTRACK_EXP_NEW, NF_NETLINK_CONNTRACK_EXP_DESTROY


def netlink(space: Namespace, groups: int) -> socket.socket:
    with space.inside():
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)  # NETLINK_NETFILTER
    made.bind((0, groups))
    made.settimeout(0.2)
    return made


def messages(data: bytes) -> list[bytes]:
    """The messages about expectations in a datagram."""
    found = []
    while data:
        length = int.from_bytes(data[:4], "little")
        if data[5] == expectation.NFNL_SUBSYS_CTNETLINK_EXP:
            found.append(data[:length])
        data = data[(length + 3) & ~3 :]
    return found


def dumped(space: Namespace) -> list[tuple[bytes, str]]:
    """The whole table, as the kernel and as conntrack(8) say it."""
    with netlink(space, 0) as sock:
        sock.send(expectation.dump(1))
        found: list[bytes] = []
        while True:
            data = sock.recv(1 << 16)
            found += messages(data)
            if any(kind == ctnetlink.NLMSG_DONE for kind, *_rest in ctnetlink.split(data)):
                break
    said = []
    for number, family in ((socket.AF_INET, "ipv4"), (socket.AF_INET6, "ipv6")):
        there = [message for message in found if message[16] == number]
        lines = space.conntrack("-L", "expect", "-f", family).splitlines()
        assert len(there) == len(lines), (there, lines)
        said += list(zip(there, lines))
    return said


def main() -> None:
    out: list[dict[str, Any]] = [{"kernel": platform.release(), "machine": platform.machine()}]
    with pair() as lab, tempfile.TemporaryDirectory() as home:
        firewall = lab.fw1
        lab.activate(firewall)
        for tool in ("iptables", "ip6tables"):
            for proto, port, name in HELPERS:
                match = ("-p", proto, "--dport", str(port), "-j", "CT", "--helper", name)
                firewall.run(tool, "-t", "raw", "-A", "PREROUTING", *match)
            firewall.run(tool, "-I", "FORWARD", "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT")
        Vsftpd(lab.b, Path(home) / "ftp")
        with netlink(firewall, GROUPS) as events, contextlib.ExitStack() as stack:

            def note(part: str) -> None:
                out.extend({"part": part, "hex": data.hex(), "said": line} for data, line in dumped(firewall))
                with contextlib.suppress(TimeoutError):
                    while True:
                        out.extend({"part": f"{part}: events", "hex": m.hex()} for m in messages(events.recv(1 << 16)))

            for server in ("192.168.1.3", "fd00:c0de:1::3"):
                for passive in (False, True):
                    client = Ftp(lab.a, server, passive)
                    stack.callback(client.close)
                    client.prepare()
                    note(f"{'passive' if passive else 'active'} FTP to {server}")
                    client.start("small")
                    note(f"{'passive' if passive else 'active'} FTP to {server}, transfer")
            tftp = Tftp(lab.b, lab.a, Path(home))
            stack.callback(tftp.close)
            # the request gets lost behind the helper, so that no answer uses its expectation up
            lab.b.run("iptables", "-I", "INPUT", "-p", "udp", "--dport", "69", "-j", "DROP")
            tftp.ask()
            note("TFTP")
            call = Call(lab.a, lab.b, "192.168.0.3", "192.168.1.3")
            stack.callback(call.close)
            call.invite()
            note("SIP")
            call.close()
            registration = Registration(lab.a, lab.b, "192.168.0.3", "192.168.1.3")
            stack.callback(registration.close)
            registration.register()
            note("SIP registration")
    CORPUS.write_text("".join(json.dumps(one) + "\n" for one in out), encoding="ascii")


if __name__ == "__main__":
    main()
