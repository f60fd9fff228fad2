# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Mistakes in the inventory: site.yml names each in one sentence and stops before the first change on any host."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import pytest
import testinfra

ROOT = pathlib.Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
VIP = {"interface": "eth1", "address": "192.168.0.100/24", "router_id": 51}

MISTAKES = [
    pytest.param(
        {"ha_firewall_virtual_ips": [], "ha_firewall_key_id": 2},
        [
            "ha_firewall_virtual_ips: is missing or empty",
            "ha_firewall_key_id: 2 is not among the keys that this node runs with (1)",
        ],
        id="no virtual IP, another key",
    ),
    pytest.param(
        {
            "ha_firewall_priority": 100,
            "ha_firewall_sync_address": "192.168.100.1",
            "ha_firewall_virtual_ips": [{**VIP, "interface": "eth7"}],
            "ha_firewall_key": "c2hvcnQ=",
            "ruleset_rules": ["-A FORWARD -i eth0 --syyn -j ACCEPT"],
        },
        [
            "ha_firewall_priority: 100 is also the priority of fw1",
            "ha_firewall_sync_address: 192.168.100.1 is also the sync address of fw1",
            "ha_firewall_virtual_ips: interface eth7 of 192.168.0.100 does not exist",
            "ha_firewall_key: is too short: 5 bytes, and 32 are needed",
            "ruleset_rules: rule 1 '-A FORWARD -i eth0 --syyn -j ACCEPT': unknown option '--syyn'",
        ],
        id="five at once",
    ),
    pytest.param(
        {
            "ha_firewall_service": [],
            "ha_firewall_services": [{"protocol": "tpc", "port": 22}],
            "ctsyncd_mode": "hotstandby",
            "ctsyncd_window_ms": 99,
            "keepalived_nopreempt": "maybe",
            "ruleset_rollback_timeout": "30s",
            "ruleset_rules": ["-A FORWARD -p tcp --sny -j ACCEPT"],
            "ruleset_filter_rules": [{"action": "acept"}],
            "kernel_extra_sysctls": [{"name": "net.core.rmem_mux", "value": 1}],
        },
        [
            "ha_firewall_service: is not an option: did you mean ha_firewall_services?",
            "ha_firewall_services: entry 1: protocol 'tpc' is not one of tcp, udp, sctp; did you mean tcp?",
            "ctsyncd_mode: 'hotstandby' is not one of hot-standby, external-cache; did you mean hot-standby?",
            "keepalived_nopreempt: 'maybe' is neither true nor false",
            "ruleset_rollback_timeout: '30s' is not a whole number",
            "unknown option '--sny'; did you mean '--syn'?",
            "ruleset_filter_rules: rule 1, key 'action': 'acept' is not known; did you mean 'accept'?",
            "kernel_extra_sysctls: The kernel has no key net.core.rmem_mux.",
        ],
        id="what only a role would have found",
    ),
]


def deploy(variables):
    """Run site.yml on the molecule lab as a user would, with these variables over the inventory's."""
    return subprocess.run(
        [
            "ansible-playbook",
            "--inventory",
            str(ROOT / "inventories/lab/hosts.yml"),
            "--extra-vars",
            json.dumps(variables),
            "ctsync.ha_firewall.site",
        ],
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": f"{ROOT / os.environ['CTSYNC_COLLECTIONS']}:{ROOT / '.vendor'}",
            "ANSIBLE_NOCOLOR": "1",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_refused(done, sentences):
    """It failed, it said every one of the sentences, and nothing was changed on any host."""
    assert done.returncode != 0
    told = done.stdout.partition("Nothing was changed, because")[2]
    for sentence in sentences:
        assert sentence in told, done.stdout[-4000:]
    recap = done.stdout.partition("PLAY RECAP")[2]
    assert "changed=0" in recap
    assert not any(f"changed={number}" in recap for number in range(1, 10)), recap


@pytest.mark.parametrize(("variables", "sentences"), MISTAKES)
def test_every_mistake_is_named_and_nothing_is_changed(variables, sentences):
    done = deploy(variables)
    assert_refused(done, sentences)
    if "ha_firewall_key" in variables:
        assert variables["ha_firewall_key"] not in done.stdout + done.stderr, "the key was printed"


def test_a_running_conntrackd_is_refused():
    host = testinfra.get_host(f"docker://{os.environ['CTSYNC_LAB_PREFIX']}fw2")
    # What counts is a process of that name; the real package is not among those that the lab offers.
    host.check_output("cp /bin/sleep /usr/local/sbin/conntrackd")
    host.check_output("systemd-run --collect --unit=test-conntrackd /usr/local/sbin/conntrackd 300")
    try:
        assert_refused(deploy({}), ["fw2: conntrackd", "systemctl disable --now conntrackd"])
    finally:
        host.check_output("systemctl stop test-conntrackd; rm /usr/local/sbin/conntrackd")
