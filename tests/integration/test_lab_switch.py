# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's switch on the real kernel: two machines on one wire, a power cut, and the way back."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from typing import Iterator

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _lab
from integration import netns as helper

pytestmark = pytest.mark.netns


def describe(name: str, number: int) -> _lab.Node:
    data = {
        "name": name,
        "interfaces": [
            {"name": "eth0", "segment": "one", "addresses": [f"10.9.0.{number}/24", f"fd00:9::{number}/64"]},
            {"name": "eth1", "segment": "two", "addresses": [f"10.9.1.{number}/24"]},
        ],
        "routes": [
            {"destination": "default", "gateway": "10.9.0.9"},
            {"destination": "default", "gateway": "fd00:9::9"},
        ],
    }
    return _lab.parse_node(data, lambda path: path)


@pytest.fixture
def switch() -> Iterator[_lab.Switch]:
    made = _lab.Switch(f"ctsync-t-{secrets.token_hex(3)}")
    yield made
    if made.exists():
        made.remove()


@pytest.fixture
def machines() -> Iterator[dict[str, int]]:
    """Two processes in network namespaces of their own: what a container is to the switch."""
    children = {name: subprocess.Popen(["unshare", "--net", "sleep", "300"]) for name in ("x", "y")}
    yield {name: child.pid for name, child in children.items()}
    for child in children.values():
        child.kill()
        child.wait()


def reaches(pid: int, address: str) -> bool:
    """Whether a machine answers: its refusal of a connection is an answer."""
    connect = "socket.create_connection((sys.argv[1], 9), 2)"
    probe = f"import socket, sys\ntry: {connect}\nexcept ConnectionRefusedError: print(1)"
    said = helper.run("nsenter", "-t", str(pid), "-n", sys.executable, "-c", probe, address, check=False)
    return said.stdout.strip() == "1"


def test_wire_cut_and_mend(switch: _lab.Switch, machines: dict[str, int]) -> None:
    nodes = {"x": describe("x", 1), "y": describe("y", 2)}
    own = os.readlink("/proc/self/ns/net")
    for pid in machines.values():  # unshare has to have come so far
        helper.wait_for(lambda pid=pid: os.readlink(f"/proc/{pid}/ns/net") != own, "a namespace")

    switch.create()
    switch.add_bridges(switch.missing_bridges(["one", "two"]))
    assert switch.missing_bridges(["one", "two"]) == []
    for name, node in nodes.items():
        pid = machines[name]
        switch.apply(node, pid, _lab.wiring_plan(node, switch.observe(node, pid)))
        assert _lab.wiring_plan(node, switch.observe(node, pid)) == []
    for address in ("10.9.0.2", "10.9.1.2", "fd00:9::2"):
        assert reaches(machines["x"], address)

    ports, _moment = switch.cut(["y"])
    assert ports == ["y-eth0", "y-eth1"]
    assert not reaches(machines["x"], "10.9.0.2")
    assert not reaches(machines["x"], "10.9.1.2")
    carrier = helper.run("nsenter", "-t", str(machines["y"]), "-n", "ip", "-br", "link", "show", "eth0").stdout
    assert "LOWER_UP" in carrier, "the node must not notice that it was cut off"

    steps = _lab.wiring_plan(nodes["y"], switch.observe(nodes["y"], machines["y"]))
    assert [step.action for step in steps] == ["attach", "attach"]
    switch.apply(nodes["y"], machines["y"], steps)
    assert reaches(machines["x"], "10.9.0.2")

    switch.unplug(["y-eth0"])
    steps = _lab.wiring_plan(nodes["y"], switch.observe(nodes["y"], machines["y"]))
    assert {step.action for step in steps} >= {"plug", "address", "up", "route"}
    switch.apply(nodes["y"], machines["y"], steps)
    assert reaches(machines["x"], "fd00:9::2")

    switch.remove()
    assert not switch.exists()
