# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filters of the role preflight, as templates call them."""

from __future__ import annotations

import base64

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.filter import group_problems, key_summary, vrrp_instances

KEY = base64.b64encode(b"a secret of exactly 32 bytes ...").decode()
VARIABLES = {
    "ha_firewall_virtual_ips": [{"interface": "eth1", "address": "192.168.0.100/24", "router_id": 51}],
    "ha_firewall_sync_interface": "eth2",
    "ha_firewall_key": KEY,
    "ruleset_rules": ["-P FORWARD DROP"],
}


def hostvars():
    return {
        "fw1": {**VARIABLES, "ha_firewall_priority": 150, "ha_firewall_sync_address": "192.168.100.1"},
        "fw2": {**VARIABLES, "ha_firewall_priority": 100, "ha_firewall_sync_address": "192.168.100.2"},
    }


def test_hosts_that_take_no_part_are_judged_by_the_inventory():
    assert group_problems.group_problems(["fw1", "fw2"], hostvars()) == []
    variables = hostvars()
    variables["fw2"]["ha_firewall_priority"] = 150
    assert group_problems.group_problems(["fw1", "fw2"], variables) == [
        "fw2: ha_firewall_priority: 150 is also the priority of fw1: give each node a different one"
    ]


def test_what_the_role_prepared_wins():
    variables = hostvars()
    variables["fw1"]["preflight__node"] = {**group_problems.node_options(variables["fw1"]), "priority": 20}
    assert [line[:30] for line in group_problems.group_problems(["fw1", "fw2"], variables)] == [
        "fw1: ha_firewall_priority: 20 "
    ]


def test_the_weight_moves_the_limits():
    variables = hostvars()
    variables["fw1"]["ha_firewall_priority"] = 200
    assert group_problems.group_problems(["fw1", "fw2"], variables, -120) != []  # 100 is now too low
    variables["fw2"]["ha_firewall_priority"] = 130
    assert group_problems.group_problems(["fw1", "fw2"], variables, -120) == []


def test_wrong_input_is_refused():
    with pytest.raises(AnsibleFilterError, match="not a list of host names"):
        group_problems.group_problems("fw1", hostvars())
    with pytest.raises(AnsibleFilterError, match="has no address"):
        vrrp_instances.vrrp_instances([{"interface": "eth1", "router_id": 51}], {}, "fw1")
    with pytest.raises(AnsibleFilterError, match="fw1: no own address"):
        vrrp_instances.vrrp_instances(VARIABLES["ha_firewall_virtual_ips"], {}, "fw1")


def test_a_summary_does_not_show_the_key():
    summary = key_summary.FilterModule().filters()["key_summary"](KEY)
    assert (summary["given"], summary["valid"], summary["bytes"]) == (True, True, 32)
    assert KEY not in str(summary)
