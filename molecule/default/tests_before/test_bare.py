# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Before site.yml: four bare machines that know nothing of us."""

from __future__ import annotations

import os

import pytest
import testinfra

PREFIX = os.environ["CTSYNC_LAB_PREFIX"]
FIREWALLS = ("fw1", "fw2")


def node(name):
    return testinfra.get_host(f"docker://{PREFIX}{name}")


@pytest.mark.parametrize("name", FIREWALLS)
def test_nothing_of_ours_is_in_the_image(name):
    host = node(name)
    for package in ("keepalived", "python3-cryptography", "python3-pyroute2", "conntrackd"):
        assert not host.package(package).is_installed, package
    for path in ("/usr/sbin/ctsyncd", "/usr/lib/ctsyncd", "/etc/ctsyncd", "/etc/keepalived", "/run/ctsync"):
        assert not host.file(path).exists, path
    assert not host.service("ctsyncd").exists
    assert not host.service("keepalived").exists
    assert "CTSYNC" not in host.check_output("iptables-save")


@pytest.mark.parametrize("name", FIREWALLS)
def test_forwarding_is_off_until_the_role_switches_it_on(name):
    assert node(name).sysctl("net.ipv4.ip_forward") == 0


@pytest.mark.parametrize("name", [*FIREWALLS, "a", "b"])
def test_the_node_has_booted_and_has_only_the_labs_cards(name):
    host = node(name)
    assert host.check_output("systemctl is-system-running") == "running"
    cards = {"eth0", "eth1", "eth2"} if name in FIREWALLS else {"eth0"}
    assert set(host.check_output("ls /sys/class/net").split()) - cards == {"lo"}


def test_wires_join_what_they_should_and_nothing_else():
    assert node("fw1").run("ping -c 1 -W 2 192.168.100.2").rc == 0
    assert node("fw1").run("ping -c 1 -W 2 192.168.0.3").rc == 0
    assert node("fw2").run("ping -c 1 -W 2 192.168.1.3").rc == 0
    assert node("a").run("ping -c 1 -W 1 192.168.1.3").rc != 0
