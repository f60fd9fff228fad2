# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What new rules would cut, said before and then seen: real connections through a firewall with NAT."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import subprocess
import sys

import pytest
from integration.sealed import Machine

pytestmark = pytest.mark.netns

FORWARD = ["-P FORWARD DROP", "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"]
OPEN = [*FORWARD, "-A FORWARD -i inside -j ACCEPT"]
SNAT = "-A POSTROUTING -t nat -o outside -s 10.1.0.2 -p tcp --dport 7001 -j SNAT --to 10.2.0.1:40000-40999"
MASQUERADE = "-A POSTROUTING -t nat -o outside -p udp -j MASQUERADE"
SIX = ["-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT", "-A FORWARD -i inside -j ACCEPT"]

# One echo server for several ports and both protocols; one client that says after each line of its input who answers.
SERVER = """
import selectors, socket, sys
wait = selectors.DefaultSelector()
for kind, port in [(k, p) for k in (socket.SOCK_STREAM, socket.SOCK_DGRAM) for p in (7001, 7002)]:
    sock = socket.socket(socket.AF_INET6, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("::", port))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    wait.register(sock, selectors.EVENT_READ)
print("ready", flush=True)
while True:
    for key, _events in wait.select():
        sock = key.fileobj
        if sock.type == socket.SOCK_DGRAM:
            data, peer = sock.recvfrom(99)
            sock.sendto(data, peer)
        elif sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            wait.register(sock.accept()[0], selectors.EVENT_READ)
        else:
            data = sock.recv(99)
            if data:
                sock.send(data)
            else:
                wait.unregister(sock)
"""
CLIENT = """
import socket, sys
flows = {}
for name, kind, address, port in [
    ("tcp1", socket.SOCK_STREAM, "10.2.0.2", 7001), ("tcp2", socket.SOCK_STREAM, "10.2.0.2", 7002),
    ("udp1", socket.SOCK_DGRAM, "10.2.0.2", 7001), ("six1", socket.SOCK_STREAM, "fd00:2::2", 7001),
    ("own1", socket.SOCK_STREAM, "10.1.0.1", 7001),
]:
    flows[name] = sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    sock.settimeout(2)
    sock.connect((address, port))
for line in sys.stdin:
    alive = []
    for name, sock in flows.items():
        try:
            sock.send(b"x")
            sock.recv(99)
            alive.append(name)
        except OSError:
            pass
    print(" ".join(alive), flush=True)
"""


class Path:
    """inside -- firewall -- outside, with connections that are open."""

    def __init__(self, firewall: Machine) -> None:
        self.firewall = firewall
        self.ends = {name: f"ctsync-t-{secrets.token_hex(4)}" for name in ("inside", "outside")}
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> Path:
        for number, (name, space) in enumerate(self.ends.items(), 1):
            subprocess.run(["ip", "netns", "add", space], check=True)
            wire = space[-8:]
            for command in (
                f"ip link add e{wire} netns {space} type veth peer name {name} netns {self.firewall.name}",
                f"ip -n {space} link set lo up",
                f"ip -n {space} addr add 10.{number}.0.2/24 dev e{wire}",
                f"ip -n {space} addr add fd00:{number}::2/64 dev e{wire} nodad",
                f"ip -n {space} link set e{wire} up",
                f"ip -n {self.firewall.name} addr add 10.{number}.0.1/24 dev {name}",
                f"ip -n {self.firewall.name} addr add fd00:{number}::1/64 dev {name} nodad",
                f"ip -n {self.firewall.name} link set {name} up",
                f"ip -n {space} route add default via 10.{number}.0.1",
                f"ip -n {space} route add default via fd00:{number}::1",
            ):
                subprocess.run(command.split(), check=True)
        switches = "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"
        self.firewall.run("sh", "-ec", f"ip link set lo up; {switches}")
        return self

    def __exit__(self, *_exc: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for space in self.ends.values():
            subprocess.run(["ip", "netns", "del", space], check=False)

    def open(self) -> None:
        """Start servers outside and on the firewall, then the client's connections through and to the firewall."""
        for command in (["ip", "netns", "exec", self.ends["outside"]], ["ip", "netns", "exec", self.firewall.name]):
            server = subprocess.Popen([*command, sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
            self.processes.append(server)
            assert server.stdout.readline() == "ready\n"
        command = ["ip", "netns", "exec", self.ends["inside"], sys.executable, "-c", CLIENT]
        self.client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.processes.append(self.client)
        assert self.alive() == ["tcp1", "tcp2", "udp1", "six1", "own1"]

    def alive(self) -> list[str]:
        """The connections that carry a byte there and back."""
        self.client.stdin.write("\n")
        self.client.stdin.flush()
        return self.client.stdout.readline().split()


@pytest.fixture(params=["nft", "legacy"])
def path(request):
    if not shutil.which(f"iptables-{request.param}"):
        pytest.skip(f"iptables-{request.param} is not installed")
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(Path(stack.enter_context(Machine())))
        made.backend = request.param
        made.settings = {"backend": request.param, "persist": False, "diff": False}
        first = made.firewall.module("ruleset", rules=[*OPEN, SNAT, MASQUERADE], rules6=SIX, **made.settings)
        assert first["would_cut"]["checked"] == 0
        made.open()
        yield made


def cut(result):
    """The ends of the flows that would be cut, without the client's port."""
    return sorted(
        " -> ".join((line.split()[0], line.split(" -> ")[1].split()[0])) for line in result["would_cut"]["flows"]
    )


def test_what_would_be_cut_is_said_before_and_is_what_is_cut(path):
    rules = [
        "-A INPUT -p tcp --dport 7001 -j REJECT",
        "-A FORWARD -p tcp --dport 7002 -j REJECT --reject-with icmp-port-unreachable",
        *OPEN,
    ]
    six = ["-A FORWARD -o inside -j DROP"]
    new = {"rules": [*rules, SNAT, MASQUERADE], "rules6": six, **path.settings}
    predicted = path.firewall.module("ruleset", check=True, **new)
    assert predicted["would_cut"]["reason"] == ""
    assert predicted["would_cut"]["unknown"] == 0, predicted["would_cut"]
    assert predicted["would_cut"]["checked"] == 5
    assert cut(predicted) == ["tcp -> 10.1.0.1:7001", "tcp -> 10.2.0.2:7002", "tcp -> [fd00:2::2]:7001"]
    assert "The new rules cut 3 of 5 established flows" in json.dumps(predicted["warnings"])
    assert path.alive() == ["tcp1", "tcp2", "udp1", "six1", "own1"]  # the trial touched nobody
    done = path.firewall.module("ruleset", **new)
    assert cut(done) == cut(predicted)
    assert path.alive() == ["tcp1", "udp1"]


def test_rules_that_cut_nothing_are_not_warned_of(path):
    """Without rules for new connections, what is established goes on, with its NAT."""
    done = path.firewall.module("ruleset", rules=[*FORWARD, SNAT], rules6=SIX[:1], **path.settings)
    assert done["would_cut"] == {"checked": 5, "count": 0, "flows": [], "not_checked": 0, "reason": "", "unknown": 0}
    assert "warnings" not in done
    assert path.alive() == ["tcp1", "tcp2", "udp1", "six1", "own1"]
    assert "would_cut" not in path.firewall.module("ruleset", rules=[*FORWARD, SNAT], rules6=SIX[:1], **path.settings)


def test_nothing_is_claimed_where_the_trial_does_not_resemble_the_machine(path):
    """Policy routing is not part of a trial: the flow that needs it is unknown, not cut."""
    path.firewall.run("ip", "rule", "add", "from", "10.1.0.2", "lookup", "99")
    path.firewall.run("ip", "route", "add", "10.2.0.0/24", "dev", "outside", "table", "99")
    path.firewall.run("ip", "route", "del", "10.2.0.0/24", "dev", "outside")
    path.firewall.run("ip", "address", "del", "10.2.0.1/24", "dev", "outside")
    result = path.firewall.module("ruleset", check=True, rules=["-A FORWARD -j DROP"], rules6=SIX, **path.settings)
    assert result["would_cut"]["unknown"] == 3, result["would_cut"]
    assert result["would_cut"]["count"] == 0
