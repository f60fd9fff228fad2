# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two real daemons on the pair of firewalls, with sessions between a and b; what VRRP would do is done by hand."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Sequence

from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _zipapp, ctsyncd
from integration.netns import Namespace, Pair, last_octet, wait_for

PACKAGE = Path(__file__).resolve().parents[2] / "plugins" / "module_utils"
VIPS = (("eth1", "192.168.0.100"), ("eth0", "192.168.1.100"), ("eth1", "fd00:c0de::100"), ("eth0", "fd00:c0de:1::100"))
VIP, VIP6 = "192.168.1.100", "fd00:c0de:1::100"


class Daemon:
    """ctsyncd on one firewall, with its files in a directory of its own."""

    def __init__(
        self,
        space: Namespace,
        home: Path,
        key: Path,
        sync: Sequence[tuple[str, str]] = (("eth2", "192.168.100."),),
        *,
        count: int = 2,
        **options: Any,
    ) -> None:
        """``sync``: interface and beginning of the addresses of each sync link.  ``count``: firewalls there are."""
        number = int(space.label[-1])
        peers = [other for other in range(1, count + 1) if other != number]
        self.space = space
        self.home = home
        self.process: subprocess.Popen[Any] | None = None
        self.package = PACKAGE  # where the daemon's program is run
        self.program: tuple[str, ...] = (sys.executable, "-m", "ctsyncd")
        self.environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "LC_ALL": "C"}
        home.mkdir()
        os.mkfifo(home / "fifo")
        (home / "not-ready").write_text("1\n", encoding="ascii")
        links = [{"interface": interface, "address": f"{net}{last_octet(number)}"} for interface, net in sync]
        theirs = {peer: [f"{net}{last_octet(peer)}" for _interface, net in sync] for peer in peers}
        one = len(links) == 1
        config = {
            "node": f"fw{number}",
            "peers": [
                {"node": f"fw{peer}", **({"address": ends[0]} if one else {"addresses": ends})}
                for peer, ends in theirs.items()
            ],
            **({"link": links[0]} if one else {"links": links}),
            "virtual_ips": [{"interface": interface, "address": address} for interface, address in VIPS],
            "keys": {"1": str(key)},
            "control_socket": str(home / "socket"),
            "notify_fifo": str(home / "fifo"),
            "track_file": str(home / "not-ready"),
            "ignore_addresses": ["192.168.100.0/24", "fd00:c0de:64::/64"],
            **options,
        }
        (home / "conf").write_text(json.dumps(config), encoding="utf-8")

    def configure(self, **options: Any) -> None:
        """Change the file; a running daemon learns of it by :meth:`reload`."""
        path = self.home / "conf"
        path.write_text(json.dumps({**json.loads(path.read_text()), **options}), encoding="utf-8")

    def reload(self) -> None:
        self.send(signal.SIGHUP)

    def _command(self, *argv: str) -> tuple[str, ...]:
        return (*self.program, "-C", str(self.home / "conf"), *argv)

    def start(self) -> None:
        with open(self.home / "log", "ab") as log:
            self.process = self.space.popen(
                *self._command(), cwd=self.package, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def send(self, number: int) -> None:
        """A signal to the daemon itself (``ip netns exec`` becomes it)."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """As a crash would: nothing is tidied up."""
        self.send(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def stop(self) -> None:
        """As systemd does."""
        self.send(signal.SIGTERM)
        assert self.process is not None
        assert self.process.wait(30) == 0, self.log()

    def run(self, *argv: str) -> tuple[int, str]:
        """The command's exit status and its output."""
        done = subprocess.run(
            self._command(*argv), cwd=self.package, env=self.environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout

    def ask(self, *argv: str) -> str:
        return self.run(*argv)[1]

    def equal(self) -> bool:
        """Does ``ctsyncd verify`` say so?"""
        return self.run("verify")[0] == 0

    def status(self) -> dict[str, Any]:
        """The daemon's; where nobody answers the fields that tests ask for are empty."""
        empty: dict[str, Any] = {"role": "", "peers": [], "flows": {"external": 0}, "counters": {}}
        return {**empty, **json.loads(self.ask("status", "--json"))}

    def log(self) -> str:
        return (self.home / "log").read_text(encoding="utf-8", errors="replace")

    @property
    def gate(self) -> str:
        return (self.home / "not-ready").read_text(encoding="ascii").strip()


def fill(space: Namespace, count: int) -> None:
    """Have the namespace's kernel track ``count`` TCP sessions with SNAT that nobody speaks in."""
    lines = (
        f"-A -p tcp -s 10.{n >> 16}.{n >> 8 & 255}.{n & 255} -d 198.51.{100 + n // 50_000}.9"
        f" --sport {10_000 + n % 50_000} --dport 443 --src-nat {VIP}:{10_000 + n % 50_000}"
        " --state ESTABLISHED -u SEEN_REPLY,ASSURED -t 86400\n"
        for n in range(count)
    )
    before = int(space.conntrack("-C"))
    space.run("conntrack", "-R", "-", stdin="".join(lines))
    assert int(space.conntrack("-C")) >= before + count


def entry(space: Namespace, proto: str, sport: int) -> str:
    """conntrack(8)'s line of a flow of a; empty where there is none."""
    return space.conntrack("-L", "-p", proto, "--src", "192.168.0.3", "--sport", str(sport)).strip()


def missing(space: Namespace, sessions: list[Session]) -> list[Session]:
    """Those of a's TCP sessions with port 5001 that the kernel does not know."""
    table = space.conntrack("-L", "-p", "tcp", "--src", "192.168.0.3")
    return [session for session in sessions if f" sport={session.port} dport=5001 " not in table]


def install(place: Path, version: str) -> None:
    """Write a zipapp of this version and have the link show it, as the module does."""
    sources = _zipapp.package_sources(ctsyncd)
    name = "ctsyncd/__init__.py"
    changed = sources[name].replace(b'"' + ctsyncd.__version__.encode() + b'"', f'"{version}"'.encode())
    assert changed != sources[name]
    app = _zipapp.build({**sources, name: changed}, sys.executable, version)
    (place / app.file_name).write_bytes(app.data)
    (place / "new").symlink_to(app.file_name)
    (place / "new").rename(place / "ctsyncd")


class Session:
    """An open connection between a and b."""

    def __init__(self, client: socket.socket, server: socket.socket, seen: Any) -> None:
        self.client = client
        self.server = server
        self.port = int(client.getsockname()[1])
        self.seen = seen  # the client's address as the server sees it
        self._number = 0

    def talk(self) -> None:
        """A message each way; raises OSError where the session is dead."""
        for sender, receiver in ((self.client, self.server), (self.server, self.client)):
            self._number += 1
            message = b"message %6d" % self._number
            if sender.type == socket.SOCK_DGRAM and sender is self.server:
                sender.sendto(message, self.seen)
            else:
                sender.sendall(message)
            got = b""
            while len(got) < len(message):
                part = receiver.recv(len(message) - len(got))
                if not part:
                    raise ConnectionError("closed")
                got += part
            if got != message:
                raise ConnectionError(f"{message!r} arrived as {got!r}")

    def close(self) -> None:
        self.client.close()
        self.server.close()


class Cluster:
    """The pair, its daemons, and what VRRP would do."""

    def __init__(self, pair: Pair, home: Path, **options: Any) -> None:
        key = home / "key"
        key.write_bytes(base64.b64encode(secrets.token_bytes(32)))
        key.chmod(0o600)
        self.pair = pair
        count = len(pair.firewalls)
        self.daemons = [Daemon(space, home / space.label, key, count=count, **options) for space in pair.firewalls]
        self.fw1, self.fw2 = self.daemons[:2]
        self.stack = contextlib.ExitStack()
        self.listener = self.stack.enter_context(pair.b.listen("192.168.1.3", 5001))
        self.listener6 = self.stack.enter_context(pair.b.listen("fd00:c0de:1::3", 5001))
        self.web = self.stack.enter_context(pair.a.listen("192.168.0.3", 80))
        with pair.b.inside():
            self.udp = self.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.udp.bind(("192.168.1.3", 5002))
        self.udp.settimeout(30)

    def up(self) -> Cluster:
        """fw1 active, fw2 complete."""
        self.pair.activate(self.pair.fw1)
        self.fw1.start()
        self.fw2.start()
        self.ready(self.fw1, self.fw2)
        return self

    def ready(self, active: Daemon, backup: Daemon) -> None:
        def both() -> bool:
            roles = ((active, "active"), (backup, "backup"))
            return all((s := d.status())["verdict"] == "READY" and s["role"] == role for d, role in roles)

        try:
            wait_for(both, "both nodes to be READY")
        except AssertionError as error:
            raise AssertionError(
                f"{error}\n{active.status()}\n{backup.status()}\n{active.log()}\n{backup.log()}"
            ) from None

    def verified(self, *daemons: Daemon) -> None:
        """Wait until ``ctsyncd verify`` says of each (by default all that there are) that its pair is equal."""
        for daemon in daemons or self.daemons:
            said: list[tuple[int, str]] = []

            def equal(daemon: Daemon = daemon, said: list[tuple[int, str]] = said) -> bool:
                said[:] = [daemon.run("verify")]
                return said[0][0] == 0

            try:
                wait_for(equal, f"verify on {daemon.space.label} to say equal")
            except AssertionError as error:
                raise AssertionError(f"{error}: {said}") from None

    def back_and_equal(self, victim: Daemon, heir: Daemon) -> None:
        """After :meth:`power_cut`: the victim comes back as backup, and both say that the tables are equal."""
        self.power_on(victim)
        self.ready(heir, victim)
        self.verified()

    def session(self) -> Session:
        client = self.pair.a.connect("192.168.1.3", 5001)
        return self._accepted(client, self.listener)

    def _accepted(self, client: socket.socket, listener: socket.socket) -> Session:
        server, seen = listener.accept()
        for sock in (client, server):
            sock.settimeout(30)
            self.stack.callback(sock.close)
        return Session(client, server, seen)

    def all_kinds(self) -> dict[str, Session]:
        """TCP with SNAT over both families, TCP with DNAT, UDP with SNAT."""
        with self.pair.a.inside():
            datagrams = self.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        datagrams.connect(("192.168.1.3", 5002))
        datagrams.settimeout(30)
        datagrams.send(b"hello")
        _data, seen = self.udp.recvfrom(100)
        return {
            "tcp snat": self.session(),
            "tcp6 snat": self._accepted(self.pair.a.connect("fd00:c0de:1::3", 5001), self.listener6),
            "tcp dnat": self._accepted(self.pair.b.connect(VIP, 8080), self.web),
            "udp snat": Session(datagrams, self.udp, seen),
        }

    def replicated(self, active: Daemon, backup: Daemon) -> None:
        """Wait until the backup's kernel holds what the active one's holds, translations included."""

        def table(daemon: Daemon, letter: str) -> list[str]:
            lines = (json.loads(line) for line in daemon.ask(letter, "--json").splitlines())
            return sorted(json.dumps([f["protocol"], f["orig"], f["reply"], f["assured"], f["state"]]) for f in lines)

        def entries(daemon: Daemon) -> set[str]:
            return {
                " ".join(word for word in line.split()[1:] if word[:4] in ("src=", "dst=") or "port=" in word)
                for family in ("ipv4", "ipv6")
                for line in daemon.space.conntrack("-L", "-f", family).splitlines()
                if "5001" in line or "5002" in line or "8080" in line
            }

        def equal() -> bool:
            return table(active, "-i") == table(backup, "-e") and entries(active) == entries(backup)

        try:
            wait_for(equal, "equal tables")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{active.ask('-i')}\n{backup.ask('-e')}\n{backup.status()}") from None

    def power_cut(self, victim: Daemon, heir: Daemon) -> None:
        """The victim is off the network at once, and dead; the heir gets the virtual IPs."""
        self.pair.unplug(victim.space)
        self.pair.activate(heir.space)
        victim.kill()

    def power_on(self, victim: Daemon) -> None:
        """Comes back as after a reboot: no virtual IPs, no conntrack entries, no daemon."""
        for interface, v4, v6 in Pair.VIPS:
            for address in (v4, v6):
                victim.space.ip("address", "del", address, "dev", interface)
        victim.space.conntrack("-F")
        victim.space.ip("link", "set", "eth2", "up")
        victim.space.ip("address", "replace", f"fd00:c0de:64::{victim.space.label[-1]}/64", "dev", "eth2", "nodad")
        for interface in ("eth0", "eth1"):
            self.pair.switch.ip("link", "set", f"{victim.space.label}-{interface}", "up")
        victim.start()

    def close(self) -> None:
        for daemon in self.daemons:
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.kill()
        self.stack.close()
