# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pair of daemons under load: sessions of mixed kinds by two programs (``traffic.py``), short connections beside
them, and if wanted a sync link that loses datagrams."""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from integration import traffic
from integration.cluster import VIP, VIP6, Cluster, Daemon
from integration.netns import Namespace, Pair, run, wait_for

CHURN = 20.0  # short connections per second beside the sessions


class Side:
    """One of the two traffic programs."""

    def __init__(self, space: Namespace, name: str, plan: traffic.Plan, patience_s: float) -> None:
        self.name = name
        self.patience_s = patience_s
        self.process = space.popen(
            *(sys.executable, str(Path(traffic.__file__)), name, json.dumps(plan._asdict())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=_many_files,
        )

    def tell(self, do: str, **values: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **values}).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, timeout: float | None = None) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout or self.patience_s)[0]:
            raise AssertionError(f"the {self.name} says nothing")
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the {self.name} ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        self.tell(do, **values)
        return self.hear()


def _many_files() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Load(Cluster):
    """The pair under load of so many ``sessions``; ``loss`` is the share of sync datagrams that both nodes drop."""

    def __init__(self, pair: Pair, home: Path, sessions: int = 200, loss: float = 0.0, **options: Any) -> None:
        super().__init__(pair, home, **options)
        self.sessions = sessions
        self.patience_s = 60 + sessions / 50  # for what takes seconds on an idle machine
        self._prepare(loss)
        plan = traffic.Plan(sessions, ["192.168.0.3", "192.168.0.4"], "fd00:c0de::4", "192.168.1.3", "fd00:c0de:1::3")
        self.server = Side(pair.b, "server", plan, self.patience_s)
        self.server.hear()
        self.client = Side(pair.a, "client", plan, self.patience_s)
        self.active, self.backup = self.fw1, self.fw2

    def _prepare(self, share: float) -> None:
        a, b = self.pair.a, self.pair.b
        a.ip("address", "add", "192.168.0.4/24", "dev", "eth0")
        a.ip("address", "add", "fd00:c0de::4/64", "dev", "eth0", "nodad")
        a.sysctl({"net/ipv4/ip_local_port_range": "40000 65000"})
        for space, direction in ((a, "--sport"), (b, "--dport")):
            for tool in ("iptables", "ip6tables"):
                match = ("-p", "tcp", direction, str(traffic.TCP_PORT), "--tcp-flags", "RST", "RST")
                space.run(tool, "-A", "INPUT", *match)
        for firewall in (self.pair.fw1, self.pair.fw2):
            snat = ("-t", "nat", "-A", "POSTROUTING", "-s", "192.168.0.4", "-o", "eth0")
            firewall.run("iptables", *snat, "-j", "SNAT", "--to-source", VIP)
            snat = ("-t", "nat", "-A", "POSTROUTING", "-s", "fd00:c0de::4", "-o", "eth0")
            firewall.run("ip6tables", *snat, "-j", "SNAT", "--to-source", VIP6)
            if not share:
                continue
            loss = ("-m", "statistic", "--mode", "random", "--probability", str(share))
            firewall.run("iptables", "-I", "INPUT", "-p", "udp", "--dport", "3781", *loss, "-j", "DROP")

    def open(self) -> None:
        """All sessions stand and are spoken in, each as its kind does."""
        self.client.tell("open")
        result = self.client.hear(self.patience_s + 120)
        assert result == {"proved": self.sessions, "lost": {}}
        self.client.ask("talk", on=True, churn=CHURN)

    def seal(self) -> None:
        """From now on the firewalls let no session begin but the short ones: what is lost stays lost."""
        new = ("-m", "conntrack", "--ctstate", "NEW")
        for firewall in (self.pair.fw1, self.pair.fw2):
            for tool in ("iptables", "ip6tables"):
                firewall.run(tool, "-I", "FORWARD", *new, "-j", "DROP")
            short = ("-p", "tcp", "--dport", str(traffic.CHURN_PORT))
            firewall.run("iptables", "-I", "FORWARD", *short, *new, "-j", "ACCEPT")

    def replicated_all(self) -> dict[str, Any]:
        """Wait until every change that came up until now is acknowledged and both nodes are READY."""
        began = time.monotonic()

        def done() -> Any:
            asked = time.monotonic()
            active, backup = self.active.status(), self.backup.status()
            if active["verdict"] != "READY" or backup["verdict"] != "READY":
                return None
            if (active["role"], backup["role"]) != ("active", "backup"):
                return None
            age = active["peers"][0]["lag"]["age_s"]
            return active if backup["flows"]["external"] >= self.sessions and asked - age > began else None

        try:
            return wait_for(done, "the table on the backup", self.patience_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.active.status()}\n{self.backup.status()}") from None

    def unplug(self, space: Namespace) -> None:
        """The node is off the network, at once."""
        self.unplug_traffic(space)
        space.ip("link", "set", "eth2", "down")

    def unplug_traffic(self, space: Namespace) -> None:
        """Only the sync link stays; the node does not see a carrier go."""
        _batch(self.pair.switch, (f"link set {space.label}-eth{n} nomaster" for n in (0, 1)))

    def plug_sync(self, space: Namespace) -> None:
        space.ip("link", "set", "eth2", "up")
        space.ip("address", "replace", f"fd00:c0de:64::{space.label[-1]}/64", "dev", "eth2", "nodad")

    def plug_traffic(self, space: Namespace) -> None:
        _batch(
            self.pair.switch,
            (f"link set {space.label}-eth{n} master {bridge}" for n, bridge in ((0, "outside"), (1, "inside"))),
        )

    def cut(self) -> None:
        """The active node is off the network at once; the other gets the virtual IPs."""
        self.unplug(self.active.space)
        self.pair.activate(self.backup.space)
        self.active, self.backup = self.backup, self.active

    def come_back(self, daemon: str, table: str) -> None:
        """The node that was cut is back.  ``daemon``: it was restarted, or ran on; ``table``: kept, or empty."""
        node = self.backup
        if daemon == "restarted":
            node.kill()
            drop_virtual_ips(node.space)
        if table == "empty":
            node.space.conntrack("-F")
        self.plug_sync(node.space)
        if daemon == "restarted":
            node.start()
        else:  # both hold the virtual IPs until keepalived hears the other
            wait_for(lambda: node.status()["peers"][0]["role"] == "active", "two active nodes", self.patience_s)
            drop_virtual_ips(node.space)
        self.plug_traffic(node.space)

    def prove(self, deadline: float) -> dict[str, Any]:
        """Round trips in every session: begun by the server in half of those that it can, by the client in all."""
        began = time.monotonic()
        self.server.tell("prove", deadline=deadline)
        self.client.tell("prove", deadline=deadline, part="rest")
        pushed, asked = self.server.hear(deadline + self.patience_s), self.client.hear(deadline + self.patience_s)
        first = time.monotonic() - began
        self.client.tell("prove", deadline=deadline, part="all")
        everything = self.client.hear(deadline + self.patience_s)
        lost = {**pushed["lost"], **asked["lost"], **everything["lost"]}
        lost.update({f"{n} icmp": f"echo ids {i}" for n, i in self.server.ask("echo_ids")["changed"].items()})
        return {"proved": everything["proved"], "lost": lost, "first_s": round(first, 2), "resets": self.resets()}

    def resets(self) -> int:
        """RSTs that reached either end of the sessions."""
        lines = [
            line
            for space in (self.pair.a, self.pair.b)
            for tool in ("iptables", "ip6tables")
            for line in space.run(tool, "-nvxL", "INPUT").stdout.splitlines()
        ]
        return sum(int(line.split()[0]) for line in lines if str(traffic.TCP_PORT) in line)


class Throttle:
    """Lets so few sync datagrams a second through to a node; 0: none."""

    def __init__(self, space: Namespace, per_second: int) -> None:
        self._space = space
        match = ("-p", "udp", "--dport", "3781")
        limit = ("-m", "limit", "--limit", f"{per_second}/s", "--limit-burst", "5", "-j", "ACCEPT")
        self._rules = [(*match, "-j", "DROP"), *([(*match, *limit)] if per_second else [])]
        for rule in self._rules:
            space.run("iptables", "-I", "INPUT", *rule)

    def end(self) -> None:
        for rule in self._rules:
            self._space.run("iptables", "-D", "INPUT", *rule)


def _batch(space: Namespace, lines: Any) -> None:
    run("ip", "-n", space.name, "-batch", "-", stdin="\n".join(lines) + "\n")


def drop_virtual_ips(space: Namespace) -> None:
    """As keepalived does when it becomes backup: all of them at once."""
    _batch(
        space,
        (f"address del {address} dev {interface}" for interface, *both in Pair.VIPS for address in both),
    )


def cpu_seconds(daemon: Daemon) -> float:
    """CPU time of the daemon's present life (user and system)."""
    assert daemon.process is not None
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return round((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), 2)


def memory_kib(daemon: Daemon, what: str = "VmRSS") -> int:
    """Resident memory of the daemon, in KiB; ``VmHWM`` is the most there ever was."""
    assert daemon.process is not None
    lines = Path(f"/proc/{daemon.process.pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))
