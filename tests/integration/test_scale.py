# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Many sessions of mixed kinds, a sync link that loses 30 %, the active node cut, there and back: none is lost.

``CTSYNC_SCALE`` is the number of sessions (200), ``CTSYNC_REPEAT`` how often the survival is repeated (1);
``CTSYNC_SCALE_LOG`` names a file that gets a JSON line for each cut.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
from integration import traffic
from integration.cluster import Cluster, Daemon
from integration.netns import Namespace, Pair, run, wait_for

pytestmark = pytest.mark.netns

SESSIONS = int(os.environ.get("CTSYNC_SCALE", "200"))
REPEAT = int(os.environ.get("CTSYNC_REPEAT", "1"))
LOSS = "0.3"
CHURN = 20.0  # short connections per second beside the sessions
PATIENCE_S = 60 + SESSIONS / 50  # for what takes seconds on an idle machine

PLAN = traffic.Plan(SESSIONS, ["192.168.0.3", "192.168.0.4"], "fd00:c0de::4", "192.168.1.3", "fd00:c0de:1::3")


class Side:
    """One of the two traffic programs."""

    def __init__(self, space: Namespace, name: str) -> None:
        self.name = name
        self.process = space.popen(
            *(sys.executable, str(Path(traffic.__file__)), name, json.dumps(PLAN._asdict())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=_many_files,
        )

    def tell(self, do: str, **values: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **values}).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, timeout: float = PATIENCE_S) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
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


class Lab(Cluster):
    """The pair under load.  ``held_since``: when the youngest session was there (monotonic seconds)."""

    def __init__(self, pair: Pair, home: Path, **options: Any) -> None:
        super().__init__(pair, home, **options)
        self._prepare()
        self.server = Side(pair.b, "server")
        self.server.hear()
        self.client = Side(pair.a, "client")
        self.active, self.backup = self.fw1, self.fw2
        self.opened_at = 0.0

    def _prepare(self) -> None:
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
            firewall.run("iptables", *snat, "-j", "SNAT", "--to-source", "192.168.1.100")
            loss = ("-m", "statistic", "--mode", "random", "--probability", LOSS)
            firewall.run("iptables", "-I", "INPUT", "-p", "udp", "--dport", "3781", *loss, "-j", "DROP")

    def open(self) -> None:
        """All sessions stand, and from now on the firewalls let no new one begin: what is lost stays lost."""
        self.client.tell("open")
        result = self.client.hear(PATIENCE_S + 120)
        assert result == {"proved": SESSIONS, "lost": {}}
        self.opened_at = time.monotonic()
        self.client.ask("talk", on=True, churn=CHURN)
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
            return active if backup["flows"]["external"] >= SESSIONS and asked - age > began else None

        try:
            return wait_for(done, "the table on the backup", PATIENCE_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.active.status()}\n{self.backup.status()}") from None

    def cut(self) -> None:
        """The active node is off the network at once; the other gets the virtual IPs."""
        victim, heir = self.active, self.backup
        _batch(self.pair.switch, (f"link set {victim.space.label}-eth{n} nomaster" for n in (0, 1)))
        victim.space.ip("link", "set", "eth2", "down")
        self.pair.activate(heir.space)
        self.active, self.backup = heir, victim

    def come_back(self, daemon: str, table: str) -> None:
        """The node that was cut is back.  ``daemon``: it was restarted, or ran on; ``table``: kept, or empty."""
        node = self.backup
        label = node.space.label
        if daemon == "restarted":
            node.kill()
            self._drop_virtual_ips(node.space)
        if table == "empty":
            node.space.conntrack("-F")
        node.space.ip("link", "set", "eth2", "up")
        node.space.ip("address", "replace", f"fd00:c0de:64::{label[-1]}/64", "dev", "eth2", "nodad")
        if daemon == "restarted":
            node.start()
        else:  # both hold the virtual IPs until keepalived hears the other
            wait_for(lambda: node.status()["peers"][0]["role"] == "active", "two active nodes", PATIENCE_S)
            self._drop_virtual_ips(node.space)
        _batch(
            self.pair.switch,
            (f"link set {label}-eth{n} master {bridge}" for n, bridge in ((0, "outside"), (1, "inside"))),
        )

    @staticmethod
    def _drop_virtual_ips(space: Namespace) -> None:
        _batch(
            space,
            (f"address del {address} dev {interface}" for interface, *both in Pair.VIPS for address in both),
        )

    def prove(self, deadline: float) -> dict[str, Any]:
        """Round trips in every session: begun by the server in half of those that it can, by the client in all."""
        began = time.monotonic()
        self.server.tell("prove", deadline=deadline)
        self.client.tell("prove", deadline=deadline, part="rest")
        pushed, asked = self.server.hear(deadline + PATIENCE_S), self.client.hear(deadline + PATIENCE_S)
        first = time.monotonic() - began
        self.client.tell("prove", deadline=deadline, part="all")
        everything = self.client.hear(deadline + PATIENCE_S)
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


def _batch(space: Namespace, lines: Any) -> None:
    run("ip", "-n", space.name, "-batch", "-", stdin="\n".join(lines) + "\n")


@contextlib.contextmanager
def _lab(pair: Pair, home: Path, **options: Any) -> Iterator[Lab]:
    lab = Lab(pair, home, **options)
    try:
        yield lab
    finally:
        lab.close()


def _record(**values: Any) -> None:
    name = os.environ.get("CTSYNC_SCALE_LOG")
    if name:
        with open(name, "a", encoding="utf-8") as log:
            log.write(json.dumps(values) + "\n")


def _cpu_seconds(daemon: Daemon) -> float:
    """CPU time of the daemon's present life (user and system)."""
    assert daemon.process is not None
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return round((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), 2)


def _resident(daemon: Daemon) -> int:
    """Resident memory of the daemon, in KiB."""
    assert daemon.process is not None
    lines = Path(f"/proc/{daemon.process.pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


# what becomes of the node that was cut, before the other one is cut: its daemon and its table
JOURNEY = (("restarted", "kept"), ("ran on", "kept"), ("restarted", "empty"))


@pytest.mark.parametrize("attempt", range(REPEAT))
def test_no_session_is_lost_there_and_back_and_there(pair: Pair, tmp_path: Path, attempt: int) -> None:
    """1→2→1→2→1, with a kept table (adoption) and an empty one."""
    with _lab(pair, tmp_path) as lab:
        lab.up()
        lab.open()
        assert lab.server.ask("translated")["translated"] > SESSIONS // 8  # SNAT really chose ports
        for number, back in enumerate((*JOURNEY, None)):
            before = lab.replicated_all()
            lab.cut()
            result = lab.prove(PATIENCE_S)
            _record(
                attempt=attempt,
                cut=number + 1,
                sessions=SESSIONS,
                **{**result, "lost": dict(list(result["lost"].items())[:20]), "lost_count": len(result["lost"])},
                retransmitted=before["counters"].get("blocks_retransmitted", 0),
                lag=before["peers"][0]["lag"],
                cpu_s={daemon.space.label: _cpu_seconds(daemon) for daemon in (lab.fw1, lab.fw2)},
                rss_kib={daemon.space.label: _resident(daemon) for daemon in (lab.fw1, lab.fw2)},
            )
            assert result["lost"] == {}, f"cut {number + 1}: {len(result['lost'])} lost"
            assert (result["proved"], result["resets"]) == (SESSIONS, 0)
            if back is not None:
                lab.come_back(*back)
        assert lab.client.ask("talk", on=False)["short_connections"] > 0


def test_without_replication_every_session_dies(pair: Pair, tmp_path: Path) -> None:
    """The negative control: what the other test sees is ctsyncd's work."""
    with _lab(pair, tmp_path, replicate=False) as lab:
        pair.activate(pair.fw1)
        lab.fw1.start()
        lab.fw2.start()
        wait_for(lambda: lab.fw2.status()["reasons"] == ["replication is off"], "fw2 to run")
        lab.open()
        lab.cut()
        result = lab.prove(3.0)
        _record(attempt="negative control", sessions=SESSIONS, proved=result["proved"])
        assert result["proved"] == 0
