# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two real daemons on the real kernel: sessions live through lost nodes, killed daemons and a bad sync link."""

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
from typing import Any, Callable, Iterator

import pytest
from integration.netns import Namespace, Pair, wait_for

pytestmark = pytest.mark.netns

PACKAGE = Path(__file__).resolve().parents[2] / "plugins" / "module_utils"
VIPS = (("eth1", "192.168.0.100"), ("eth0", "192.168.1.100"), ("eth1", "fd00:c0de::100"), ("eth0", "fd00:c0de:1::100"))
VIP = "192.168.1.100"


class Daemon:
    """ctsyncd on one firewall, with its files in a directory of its own."""

    def __init__(self, space: Namespace, home: Path, key: Path, **options: Any) -> None:
        number = int(space.label[-1])
        peer = 3 - number
        self.space = space
        self.home = home
        self.process: subprocess.Popen[Any] | None = None
        home.mkdir()
        os.mkfifo(home / "fifo")
        (home / "not-ready").write_text("1\n", encoding="ascii")
        config = {
            "node": f"fw{number}",
            "peers": [{"node": f"fw{peer}", "address": f"192.168.100.{peer}"}],
            "link": {"interface": "eth2", "address": f"192.168.100.{number}"},
            "virtual_ips": [{"interface": interface, "address": address} for interface, address in VIPS],
            "keys": {"1": str(key)},
            "control_socket": str(home / "socket"),
            "notify_fifo": str(home / "fifo"),
            "track_file": str(home / "not-ready"),
            "ignore_addresses": ["192.168.100.0/24", "fd00:c0de:64::/64"],
            **options,
        }
        (home / "conf").write_text(json.dumps(config), encoding="utf-8")

    def _command(self, *argv: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "ctsyncd", "-C", str(self.home / "conf"), *argv)

    def start(self) -> None:
        with open(self.home / "log", "ab") as log:
            self.process = self.space.popen(
                *self._command(), cwd=PACKAGE, env=_environment(), stdout=log, stderr=subprocess.STDOUT
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

    def ask(self, *argv: str) -> str:
        done = subprocess.run(
            self._command(*argv), cwd=PACKAGE, env=_environment(), capture_output=True, text=True, check=False
        )
        return done.stdout

    def status(self) -> dict[str, Any]:
        text = self.ask("status", "--json")
        return json.loads(text) if text else {"verdict": "NOT READY", "reasons": ["nobody answers"], "role": ""}

    def log(self) -> str:
        return (self.home / "log").read_text(encoding="utf-8", errors="replace")

    @property
    def gate(self) -> str:
        return (self.home / "not-ready").read_text(encoding="ascii").strip()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PACKAGE), "LC_ALL": "C"}


class Session:
    """An open connection between a and b."""

    def __init__(self, client: socket.socket, server: socket.socket, seen: Any) -> None:
        self.client = client
        self.server = server
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
        self.fw1 = Daemon(pair.fw1, home / "fw1", key, **options)
        self.fw2 = Daemon(pair.fw2, home / "fw2", key, **options)
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
        for daemon in (self.fw1, self.fw2):
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.kill()
        self.stack.close()


@pytest.fixture
def cluster(pair: Pair, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """A factory: options are those of the daemons' configuration."""
    made: list[Cluster] = []

    def make(**options: Any) -> Cluster:
        made.append(Cluster(pair, tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_sessions_of_all_kinds_survive_a_power_cut_and_the_next(cluster: Callable[..., Cluster]) -> None:
    lab = cluster().up()
    sessions = lab.all_kinds()
    for session in sessions.values():
        session.talk()
    lab.replicated(lab.fw1, lab.fw2)
    port, outside = sessions["tcp snat"].client.getsockname()[1], sessions["tcp snat"].seen[1]
    line = (
        f"tcp      6 ESTABLISHED src=192.168.0.3 dst=192.168.1.3 sport={port} dport=5001 "
        f"src=192.168.1.3 dst={VIP} sport=5001 dport={outside} [ASSURED] mark=0"
    )
    for daemon, letter in ((lab.fw1, "-i"), (lab.fw2, "-e")):
        assert line in daemon.ask(letter)
    assert sessions["tcp snat"].seen[0] == sessions["udp snat"].seen[0] == VIP

    lab.power_cut(lab.fw1, lab.fw2)
    for name, session in sessions.items():
        try:
            session.talk()
        except OSError as error:
            raise AssertionError(f"{name} died with fw1: {error}") from error

    lab.power_on(lab.fw1)
    lab.ready(lab.fw2, lab.fw1)
    late = lab.session()
    late.talk()
    lab.replicated(lab.fw2, lab.fw1)
    assert lab.fw1.gate == "0"
    lab.power_cut(lab.fw2, lab.fw1)
    for name, session in {**sessions, "opened on fw2": late}.items():
        try:
            session.talk()
        except OSError as error:
            raise AssertionError(f"{name} died with fw2: {error}") from error
    counters = lab.fw1.status()["counters"]
    assert not [name for name in counters if name.startswith("kernel_refused")], counters


def test_without_replication_the_same_sessions_die(cluster: Callable[..., Cluster]) -> None:
    """The negative control: what the test above sees is the replication's work."""
    lab = cluster(replicate=False)
    lab.pair.activate(lab.pair.fw1)
    lab.fw1.start()
    lab.fw2.start()
    wait_for(lambda: lab.fw2.status()["reasons"] == ["replication is off"], "fw2 to run")
    session = lab.session()
    session.talk()
    assert lab.fw2.gate == "2"
    lab.power_cut(lab.fw1, lab.fw2)
    for sock in (session.client, session.server):
        sock.settimeout(2)
    with pytest.raises(OSError):
        session.talk()
    lab.session().talk()  # new ones work


def test_killed_daemons_come_back_and_catch_up(cluster: Callable[..., Cluster]) -> None:
    lab = cluster().up()
    idle = lab.session()
    ended = {name: lab.session() for name in ("fw1", "fw2")}
    lab.replicated(lab.fw1, lab.fw2)
    born = [idle]
    for daemon in (lab.fw1, lab.fw2):
        daemon.kill()
        name = daemon.space.label
        born.append(lab.session())
        gone = ended[name]
        lab.pair.fw1.conntrack("-D", "-p", "tcp", "--sport", str(gone.client.getsockname()[1]))  # its end
        daemon.start()
        lab.ready(lab.fw1, lab.fw2)
        lab.replicated(lab.fw1, lab.fw2)
        external = lab.fw2.ask("-e")
        assert f"sport={gone.client.getsockname()[1]} " not in external
        assert f"sport={born[-1].client.getsockname()[1]} " in external
    closed_by_itself = born.pop()
    port = closed_by_itself.client.getsockname()[1]
    closed_by_itself.close()
    wait_for(
        lambda: f"TIME_WAIT src=192.168.0.3 dst=192.168.1.3 sport={port} " in lab.fw2.ask("-e"), "the end on the backup"
    )
    lab.power_cut(lab.fw1, lab.fw2)
    for session in born:
        session.talk()
    wait_for(
        lambda: "TIME_WAIT" in lab.pair.fw2.conntrack("-L", "-p", "tcp", "--sport", str(port)),
        "the true state after the take-over",
    )


def test_tables_are_equal_in_spite_of_a_sync_link_that_loses_a_third(cluster: Callable[..., Cluster]) -> None:
    lab = cluster().up()
    for firewall in (lab.pair.fw1, lab.pair.fw2):
        loss = ("-m", "statistic", "--mode", "random", "--probability", "0.3")
        firewall.run("iptables", "-I", "INPUT", "-i", "eth2", "-p", "udp", *loss, "-j", "DROP")
    sessions = [lab.session() for _ in range(40)]
    for session in sessions[::2]:
        lab.pair.fw1.conntrack("-D", "-p", "tcp", "--sport", str(session.client.getsockname()[1]))
    lab.replicated(lab.fw1, lab.fw2)
    external = lab.fw2.ask("-e")
    for number, session in enumerate(sessions):
        assert (f"sport={session.client.getsockname()[1]} " in external) == bool(number % 2)
    wait_for(lambda: lab.fw1.status()["counters"].get("blocks_retransmitted"), "a retransmission")
    lab.ready(lab.fw1, lab.fw2)


def resets(firewall: Namespace) -> int:
    """RSTs that the firewall itself sent to b."""
    rules = firewall.run("iptables", "-nvxL", "OUTPUT").stdout.splitlines()
    return sum(int(line.split()[0]) for line in rules if "0x04" in line or "RST" in line)


@pytest.mark.parametrize(
    ("mode", "strays"), [("external-cache", "answered"), ("hot-standby", "answered"), ("hot-standby", "dropped")]
)
def test_table_comes_before_the_virtual_ip(cluster: Callable[..., Cluster], mode: str, strays: str) -> None:
    """The daemon cannot act while the virtual IPs move: it is stopped.

    The classic mode commits too late then, and where strays are not dropped the firewall itself resets the session.
    In hot standby the flows are there already.
    """
    lab = cluster(mode=mode).up()
    fw2 = lab.pair.fw2
    fw2.run("iptables", "-A", "OUTPUT", "-p", "tcp", "--tcp-flags", "RST", "RST", "-d", "192.168.1.3")
    if strays == "answered":
        fw2.run("iptables", "-D", "INPUT", "-d", VIP, "-p", "tcp", "-j", "DROP")
    session = lab.session()
    session.talk()
    wait_for(lambda: f"sport={session.client.getsockname()[1]} " in lab.fw2.ask("-e"), "the flow on the backup")
    if mode == "hot-standby":
        lab.replicated(lab.fw1, lab.fw2)
    lab.fw2.send(signal.SIGSTOP)
    lab.power_cut(lab.fw1, lab.fw2)
    session.server.sendall(b"anybody there?")
    if mode == "external-cache":
        wait_for(lambda: resets(fw2), "a reset")
        with pytest.raises(ConnectionResetError):
            session.server.recv(10)
    else:
        assert session.client.recv(100) == b"anybody there?"
        session.talk()
        assert resets(fw2) == 0
    lab.fw2.send(signal.SIGCONT)
    wait_for(lambda: lab.fw2.status()["role"] == "active", "fw2 to be active")


def test_commit_by_hand_says_how_many(cluster: Callable[..., Cluster]) -> None:
    lab = cluster(mode="external-cache").up()
    session = lab.session()
    wait_for(lambda: f"sport={session.client.getsockname()[1]} " in lab.fw2.ask("-e"), "the flow on the backup")
    assert "sport=5001" not in lab.pair.fw2.conntrack("-L")
    assert lab.fw2.ask("-c") == "1 flows committed\n"
    assert f"sport={session.client.getsockname()[1]} " in lab.pair.fw2.conntrack("-L")
