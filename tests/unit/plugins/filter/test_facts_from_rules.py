# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A dead node's addresses, out of the rules of the one that lives: the roles make the same of them as of its facts."""

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.filter.facts_from_rules import facts_from_rules
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _preflight, _ruleset

VIPS = [
    {"interface": "eth1", "address": "192.168.0.100/24", "router_id": 51},
    {"interface": "eth-0", "address": "192.168.1.100/24", "router_id": 52},
    {"interface": "eth1", "address": "fd00:c0de::100/64", "router_id": 51},
]


def facts(number):
    return {
        "interfaces": ["eth1", "eth-0", "eth2"],
        "eth1": {
            "ipv4": {"address": f"192.168.0.{number}", "prefix": "24"},
            "ipv6": [
                {"address": f"fd00:c0de::{number}", "prefix": "64"},
                {"address": f"fe80::{number}", "prefix": "64"},
            ],
        },
        "eth_0": {"ipv4": {"address": f"192.168.1.{number}", "prefix": "24"}},
        "eth2": {"ipv4": {"address": f"10.0.0.{number}", "prefix": "24"}},
    }


def rules(peers):
    """What ha_facts reads where these peers were deployed."""
    pair = _ruleset.Pair(vrrp_peers=tuple((p["interface"], tuple(p["addresses"])) for p in peers))
    parts = []
    for family, length in (("ipv4", 32), ("ipv6", 128)):
        listed = []
        for line in _ruleset.build_plan(family, [], pair)["filter"].chains["CTSYNC-INPUT"]:
            text = _ruleset.quote
            words = " ".join(text(word) for word in line.args).replace("-p 112", "-p vrrp")
            if words.startswith("-i ") and " -s " in words:  # as iptables-save prints it: the source first
                first, interface, flag, source, *rest = words.split(" ")
                words = " ".join([flag, f"{source}/{length}", first, interface, *rest])
            listed.append({"rule": f"-A CTSYNC-INPUT {words}", "packets": 0, "bytes": 0})
        parts.append({"chains": {"filter": {"CTSYNC-INPUT": {"rules": listed}}}})
    return {**parts[0], "ipv6": parts[1]}


def test_the_roles_make_the_same_of_it_as_of_the_facts():
    wanted = _preflight.vrrp_peers(VIPS, {"fw2": facts(2)})
    found = facts_from_rules(rules(wanted), VIPS, {"fw2": {}})
    assert found["fw2"]["interfaces"] == ["eth1", "eth-0"]
    assert found["fw2"]["eth1"]["ipv4"] == {"address": "192.168.0.2", "prefix": "24"}
    assert [sorted(p["addresses"]) for p in _preflight.vrrp_peers(VIPS, found)] == [
        sorted(p["addresses"]) for p in wanted
    ]
    own = {"fw1": facts(1)}
    assert _preflight.vrrp_instances(VIPS, {**own, **found}, "fw1") == _preflight.vrrp_instances(
        VIPS, {**own, "fw2": facts(2)}, "fw1"
    )


def test_of_three_nodes_one_or_two_may_be_dead():
    wanted = _preflight.vrrp_peers(VIPS, {"fw2": facts(2), "fw3": facts(3)})
    everybody = {"fw1": facts(1), "fw2": facts(2), "fw3": facts(3)}
    for others in ({"fw2": {}, "fw3": facts(3)}, {"fw2": facts(2), "fw3": {}}, {"fw2": {}, "fw3": {}}):
        found = facts_from_rules(rules(wanted), VIPS, others)
        assert set(found) == {host for host, known in others.items() if not known}
        known = {"fw1": facts(1), **others, **found}
        assert _preflight.vrrp_instances(VIPS, known, "fw1") == _preflight.vrrp_instances(VIPS, everybody, "fw1")


def test_where_nothing_can_be_told_nothing_is_made_up():
    assert facts_from_rules({}, VIPS, {"fw2": {}}) == {}
    wanted = rules(_preflight.vrrp_peers(VIPS, {"fw2": facts(2)}))
    assert facts_from_rules(wanted, VIPS, {"fw2": facts(2)}) == {}
    assert facts_from_rules(wanted, VIPS, {"fw2": {}, "fw3": {}}) == {}  # whose addresses are they?


def test_a_wrong_list_is_named():
    with pytest.raises(AnsibleFilterError, match="facts_from_rules: an entry of the virtual IPs has no address"):
        facts_from_rules({}, [{"interface": "eth1"}], {"fw2": {}})
