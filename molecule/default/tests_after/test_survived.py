# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""After the power cut: the other node serves, and the session that was open is the same one."""

from __future__ import annotations

import json
import os
import pathlib
import time

import pytest
import testinfra

PREFIX = os.environ["CTSYNC_LAB_PREFIX"]
DEADLINE = 60  # seconds; generous, it is a condition that is waited for


def node(name):
    return testinfra.get_host(f"docker://{PREFIX}{name}")


@pytest.fixture(scope="module")
def failover():
    """What the failover has left in writing; without it there was none, and every test here fails."""
    path = pathlib.Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "failover.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_other_node_holds_both_virtual_ips(failover):
    assert {failover["was_active"], failover["is_active"]} == {"fw1", "fw2"}
    addresses = node(failover["is_active"]).check_output("ip -o -4 address show")
    assert " 192.168.0.100/" in addresses
    assert " 192.168.1.100/" in addresses


def test_the_node_without_power_is_off(failover):
    running = testinfra.get_host("local://").check_output("docker ps --format '{{.Names}}'").split()
    assert PREFIX + failover["was_active"] not in running
    assert PREFIX + failover["is_active"] in running


def test_the_same_session_counts_on_without_a_gap(failover):
    client = node("a")
    deadline = time.monotonic() + DEADLINE
    while True:
        first, *numbers = client.file("/root/molecule-session.log").content_string.splitlines()
        if len(numbers) > failover["lines_at_cut"] + 20 or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert client.check_output("systemctl show --property=ActiveState --value molecule-session") == "active"
    process = client.check_output("systemctl show --property=MainPID --value molecule-session")
    assert int(process) == failover["session_process"]
    assert len(numbers) > failover["lines_at_cut"] + 20, "it did not go on after the power cut"
    assert numbers == [str(number) for number in range(len(numbers))], "lines were lost, doubled or out of order"
    assert first.split()[0] == "192.168.1.100"


def test_the_server_sees_the_same_translated_connection(failover):
    first = node("a").file("/root/molecule-session.log").content_string.splitlines()[0]
    port = first.split()[1]
    established = node("b").check_output("ss -H -t -n state established sport = :22")
    assert f"192.168.1.100:{port}" in established
    table = node(failover["is_active"]).check_output("conntrack -L -p tcp --dport 22 2>/dev/null")
    assert any("ESTABLISHED" in line and f"dport={port}" in line for line in table.splitlines()), table


def test_a_new_session_passes_too(failover):
    said = node("a").run("ssh -o ConnectTimeout=10 b true")
    assert said.rc == 0, said.stderr
