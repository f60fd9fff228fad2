# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""After site.yml: two nodes that do what a pair has to do, one of them active."""

from __future__ import annotations

import json
import os
import time

import pytest
import testinfra

PREFIX = os.environ["CTSYNC_LAB_PREFIX"]
FIREWALLS = ("fw1", "fw2")
VIRTUAL_IPS = {"eth0": "192.168.1.100", "eth1": "192.168.0.100"}
DEADLINE = 60  # seconds; generous, it is a condition that is waited for


def node(name):
    return testinfra.get_host(f"docker://{PREFIX}{name}")


def held(host):
    """The virtual IPs that a node has, by interface."""
    lines = host.check_output("ip -o -4 address show").splitlines()
    pairs = [(line.split()[1], line.split()[3].split("/")[0]) for line in lines]
    return {interface: address for interface, address in pairs if address in VIRTUAL_IPS.values()}


def status(host):
    """What the daemon says of itself; its exit code follows the verdict, so it is not asserted here."""
    said = host.run("ctsyncd status --json")
    return json.loads(said.stdout) if said.stdout else {"verdict": "none", "reasons": [said.stderr]}


@pytest.mark.parametrize("name", FIREWALLS)
def test_packages_came_with_the_deployment(name):
    for package in ("keepalived", "python3-cryptography"):
        assert node(name).package(package).is_installed, package


@pytest.mark.parametrize("service", ["ctsyncd", "keepalived"])
@pytest.mark.parametrize("name", FIREWALLS)
def test_services_run_now_and_after_a_boot(name, service):
    host = node(name)
    journal = host.run(f"journalctl --no-pager -n 30 -u {service}").stdout
    assert host.service(service).is_running, journal
    assert host.service(service).is_enabled


@pytest.mark.parametrize("name", FIREWALLS)
def test_files_are_for_those_who_need_them(name):
    host = node(name)
    expected = {
        "/etc/ctsyncd/ctsyncd.conf": ("root", "ctsyncd", 0o640),
        "/etc/ctsyncd/keys/1.key": ("root", "root", 0o600),
        "/run/ctsync/not-ready": ("ctsyncd", "ctsyncd", 0o644),
        "/run/ctsync/notify.fifo": ("root", "ctsyncd", 0o640),
        "/run/ctsyncd/ctsyncd.sock": ("ctsyncd", "ctsyncd", 0o600),
    }
    found = {}
    for path in expected:
        file = host.file(path)
        found[path] = (file.user, file.group, file.mode)
    assert found == expected


@pytest.mark.parametrize("name", FIREWALLS)
def test_the_daemon_runs_with_one_capability(name):
    host = node(name)
    pid = host.check_output("systemctl show --property=MainPID --value ctsyncd")
    process = dict(line.split(":", 1) for line in host.file(f"/proc/{pid}/status").content_string.splitlines())
    assert int(process["CapEff"], 16) == 1 << 12  # CAP_NET_ADMIN, <linux/capability.h>
    assert process["Uid"].split()[0] != "0"


@pytest.mark.parametrize("name", FIREWALLS)
def test_the_six_rules_are_in_force(name):
    rules = node(name).check_output("iptables-save")
    assert ":FORWARD DROP" in rules
    for words in ("-i eth0", "RELATED", "-j LOG", "--to-source 192.168.1.100", "-i eth1 -p tcp"):
        assert words in rules, words
    assert node(name).sysctl("net.ipv4.ip_forward") == 1
    assert node(name).sysctl("net.netfilter.nf_conntrack_tcp_loose") == 0
    assert node(name).sysctl("net.netfilter.nf_conntrack_events") == 1


def test_exactly_one_node_is_active_with_all_virtual_ips():
    deadline = time.monotonic() + DEADLINE
    while True:
        found = {name: held(node(name)) for name in FIREWALLS}
        if sorted(map(len, found.values())) == [0, len(VIRTUAL_IPS)] or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert sorted(found.values(), key=len) == [{}, VIRTUAL_IPS], found


def test_both_nodes_are_ready():
    deadline = time.monotonic() + DEADLINE
    while True:
        found = {name: status(node(name)) for name in FIREWALLS}
        if all(said["verdict"] == "READY" for said in found.values()) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert {name: (said["verdict"], said["reasons"]) for name, said in found.items()} == dict.fromkeys(
        FIREWALLS, ("READY", [])
    )
    assert sorted(said["role"] for said in found.values()) == ["active", "backup"]


def test_a_session_passes_and_is_translated():
    said = node("a").run("ssh -o ConnectTimeout=10 b 'echo $SSH_CONNECTION'")
    assert said.rc == 0, said.stderr
    assert said.stdout.split()[0] == "192.168.1.100"
    assert said.stdout.split()[2:] == ["192.168.1.3", "22"]
