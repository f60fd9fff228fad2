# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The witness of the failover test, on the real kernel: it sees addresses move and resets pass, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from integration import netns

pytestmark = pytest.mark.netns


@pytest.fixture
def program(request):
    return str(request.config.rootpath / "roles/failover_test/files/ctsync_sessions.py")


def ask(program, directory, command):
    argv = [sys.executable, program, "ctl", "--run-dir", str(directory), "watch", command]
    return json.loads(subprocess.run(argv, capture_output=True, check=True, text=True).stdout)


def test_the_witness_sees_addresses_and_resets(net, program, tmp_path):
    one, two = net.namespace("one"), net.namespace("two")
    net.link(one, "eth0", two, "eth0")
    one.ip("address", "add", "192.168.1.1/24", "dev", "eth0")
    two.ip("address", "add", "192.168.1.3/24", "dev", "eth0")
    one.popen(sys.executable, program, "watch", "--run-dir", str(tmp_path), "--max-seconds", "120")
    netns.wait_for((tmp_path / "watch.sock").exists, "the witness")

    # A connection that works and ends well leaves no reset.
    server = two.listen("192.168.1.3", 9000)
    client = one.connect("192.168.1.3", 9000)
    accepted, _peer = server.accept()
    client.sendall(b"x")
    assert accepted.recv(1) == b"x"
    client.close()
    assert accepted.recv(1) == b""
    accepted.close()
    server.close()
    found = ask(program, tmp_path, "snapshot")
    assert found["resets"] == {"problem": None, "seen": []}
    assert found["addresses"] == []

    # A refused one leaves one, coming in; a VIP that comes and goes is seen with its time.
    with pytest.raises(ConnectionRefusedError):
        one.connect("192.168.1.3", 9001)
    before = time.time()
    one.ip("address", "add", "192.168.1.100/24", "dev", "eth0")
    with pytest.raises(ConnectionRefusedError):
        two.connect("192.168.1.100", 9002)
    one.ip("address", "del", "192.168.1.100/24", "dev", "eth0")

    def complete():
        seen = ask(program, tmp_path, "snapshot")
        return seen if len(seen["addresses"]) == 2 and len(seen["resets"]["seen"]) == 2 else None

    found = netns.wait_for(complete, "two addresses and two resets")
    assert [(event["event"], event["address"]) for event in found["addresses"]] == [
        ("added", "192.168.1.100"),
        ("removed", "192.168.1.100"),
    ]
    assert all(event["interface"] == "eth0" and event["at"] >= before - 1 for event in found["addresses"])
    seen = [(reset["direction"], reset["src"], reset["sport"]) for reset in found["resets"]["seen"]]
    assert seen == [("in", "192.168.1.3", 9001), ("out", "192.168.1.100", 9002)]
