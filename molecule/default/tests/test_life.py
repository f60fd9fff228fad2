# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Daemon and keepalived go on hearing each other, whichever of them was restarted, stopped or killed."""

from __future__ import annotations

import json
import os
import time

import pytest
import testinfra

PREFIX = os.environ["CTSYNC_LAB_PREFIX"]
FIREWALLS = ("fw1", "fw2")
DEADLINE = 60  # seconds; generous, it is a condition that is waited for
NO_RESTART = "/run/systemd/system/ctsyncd.service.d/test.conf"


class Node:
    def __init__(self, name):
        self.name = name
        self.host = testinfra.get_host(f"docker://{PREFIX}{name}")

    def run(self, command):
        return self.host.check_output(command)

    def status(self):
        said = self.host.run("ctsyncd status --json").stdout
        return json.loads(said) if said else {}

    def not_ready(self):
        return self.run("cat /run/ctsync/not-ready").strip() in ("1", "2")

    def journal_since(self, mark, unit):
        return self.run(f"journalctl --no-pager -q -o cat -u {unit} --since=@{mark}")

    def mark(self):
        return self.run("date +%s.%6N").strip()


def wait_for(what, condition):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE} s for: {what}"
        time.sleep(0.2)


def ready(node):
    return node.status().get("verdict") == "READY" and not node.not_ready()


@pytest.fixture
def pair():
    """The active node and the backup, both ready."""
    nodes = [Node(name) for name in FIREWALLS]
    wait_for("both nodes READY", lambda: all(ready(node) for node in nodes))
    wait_for("one active node", lambda: sorted(node.status().get("role") for node in nodes) == ["active", "backup"])
    return sorted(nodes, key=lambda node: node.status()["role"])


def test_a_killed_daemon_leaves_no_stale_ready(pair):
    _active, backup = pair
    backup.run(f"mkdir -p $(dirname {NO_RESTART}) && printf '[Service]\\nRestart=no\\n' > {NO_RESTART}")
    try:
        backup.run("systemctl daemon-reload")
        assert not backup.not_ready()
        mark = backup.mark()
        backup.run("systemctl kill --signal=KILL ctsyncd")
        wait_for("the killed daemon's node to say not ready", backup.not_ready)
        wait_for(
            "keepalived to lower its priority",
            lambda: "Changing effective priority" in backup.journal_since(mark, "keepalived"),
        )
    finally:
        backup.run(f"rm -f {NO_RESTART}; systemctl daemon-reload; systemctl start ctsyncd")
    wait_for("the backup to be READY again", lambda: ready(backup))


def test_a_killed_daemon_on_the_active_node_moves_no_virtual_ip(pair):
    active, backup = pair
    mark = backup.mark()
    active.run("systemctl kill --signal=KILL ctsyncd")
    wait_for("the daemon to be back", lambda: ready(active))
    assert active.status()["role"] == "active"
    assert not active.not_ready()
    assert "MASTER" not in backup.journal_since(mark, "keepalived")


def test_readiness_reaches_a_restarted_keepalived(pair):
    _active, backup = pair
    backup.run("systemctl restart keepalived")
    mark = backup.mark()
    backup.run("systemctl stop ctsyncd")
    wait_for("not ready", backup.not_ready)
    lowered = "Changing effective priority from"
    wait_for("a lower priority", lambda: lowered in backup.journal_since(mark, "keepalived"))
    backup.run("systemctl start ctsyncd")
    wait_for("the backup to be READY again", lambda: ready(backup))
    wait_for("the old priority", lambda: backup.journal_since(mark, "keepalived").count(lowered) >= 4)


@pytest.mark.parametrize("restarted", ["ctsyncd", "keepalived"])
def test_a_role_change_reaches_the_daemon_after_a_restart(pair, restarted):
    active, backup = pair
    backup.run(f"systemctl restart {restarted}")
    wait_for("the backup to be READY after the restart", lambda: ready(backup))
    mark = backup.mark()
    active.run("systemctl stop keepalived")
    try:
        wait_for("the other node to be active", lambda: backup.status().get("role") == "active")
        wait_for(
            "keepalived's word in the FIFO",
            lambda: "keepalived: GROUP ha_firewall is MASTER" in backup.journal_since(mark, "ctsyncd"),
        )
    finally:
        active.run("systemctl start keepalived")
    wait_for("the former active node to be a ready backup", lambda: ready(active))
    assert active.status()["role"] == "backup"
    assert backup.status()["role"] == "active"


@pytest.mark.parametrize("name", FIREWALLS)
def test_the_unit_is_sealed(name):
    host = Node(name)
    table = host.run("systemd-analyze security --no-pager ctsyncd.service")
    level = float(table.rpartition("Overall exposure level for ctsyncd.service:")[2].split()[0])
    assert level <= 2.0, table
    pid = host.run("systemctl show --property=MainPID --value ctsyncd").strip()
    process = dict(line.split(":\t", 1) for line in host.run(f"cat /proc/{pid}/status").splitlines() if ":\t" in line)
    assert process["CapEff"] == process["CapBnd"] == f"{1 << 12:016x}", "CAP_NET_ADMIN and nothing else"
    assert process["NoNewPrivs"] == "1"
    assert process["Uid"].split()[0] != "0"
