# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the documentation of ha_facts promises is what the module returns, no key more and none less."""

from __future__ import annotations

import yaml
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _facts, _ruleset
from ansible_collections.ctsync.ha_firewall.plugins.modules import ha_facts

FACTS = yaml.safe_load(ha_facts.RETURN)["ansible_facts"]["contains"]["ha_firewall"]["contains"]


def nothing(command):
    """A host where every program fails."""
    return 1, "", f"{command[0]} fails"


def test_documentation_and_argument_spec_agree():
    documented = yaml.safe_load(ha_facts.DOCUMENTATION)["options"]
    fields = ("type", "default", "choices", "elements", "required")
    assert {
        name: {field: option[field] for field in fields if field in option} for name, option in documented.items()
    } == ha_facts.argument_spec()


def test_every_subset_is_documented_and_nothing_else():
    assert set(FACTS) == {*ha_facts.SUBSETS, "virtual_ips"}


def test_flows(tmp_path, monkeypatch):
    monkeypatch.setattr(_facts.netlink, "dump_flows", lambda: iter(()))
    found = _facts.flow_facts(nothing, str(tmp_path / "none"), "/c", 1)
    assert set(found) == set(FACTS["flows"]["contains"])


def test_ruleset():
    found = _ruleset.read_live(nothing)
    assert set(found) == set(FACTS["ruleset"]["contains"])
    assert set(found["ipv6"]) == set(FACTS["ruleset"]["contains"]["ipv6"]["sample"])


def test_host(tmp_path):
    found = _facts.host_facts(
        nothing, None, None, config=str(tmp_path / "c/ctsyncd.conf"), keepalived_config=str(tmp_path / "k")
    )
    sample = FACTS["host"]["sample"]
    assert set(found) == set(sample)
    for name in ("conntrackd", "ctsyncd", "keepalived"):
        assert set(found[name]) == set(sample[name]), name


def test_virtual_ips():
    (found,) = _facts.virtual_ips_held([{"interface": "eth1", "address": "192.168.0.100/24"}], set())
    assert set(found) == set(FACTS["virtual_ips"]["sample"][0])
