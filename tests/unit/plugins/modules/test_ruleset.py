# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import pytest
import yaml
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _ruleset, _typed_rules
from ansible_collections.ctsync.ha_firewall.plugins.modules import ruleset

DEFAULTS = {name: spec.get("default") for name, spec in ruleset.ARGUMENT_SPEC.items()}


def params(**given):
    return {**DEFAULTS, **given}


def test_documentation_and_argument_spec_agree():
    documented = yaml.safe_load(ruleset.DOCUMENTATION)["options"]

    def compare(options, spec):
        assert options.keys() == spec.keys()
        for name, option in options.items():
            for key in ("type", "default", "choices", "required", "elements"):
                assert option.get(key) == spec[name].get(key), (name, key)
            if "options" in spec[name]:
                compare(option["suboptions"], spec[name]["options"])

    compare(documented, ruleset.ARGUMENT_SPEC)


def test_the_example_of_the_documentation_makes_a_plan():
    example = yaml.safe_load(ruleset.EXAMPLES)[0]["ctsync.ha_firewall.ruleset"]
    example["services"] = [{"interface": None, "sources": [], **service} for service in example["services"]]
    example["sync"][0]["port"] = 3781
    plans = ruleset.plans_from(params(**example))
    assert list(plans) == ["ipv4"]
    assert set(plans["ipv4"]) == {"filter", "nat", "raw"}


def test_documentation_and_checker_know_the_same_keys():
    documented = yaml.safe_load(ruleset.DOCUMENTATION)["options"]
    kinds = {"str": ("text", "word"), "list": ("list",), "bool": ("bool",)}
    for option, keys in _typed_rules.KEYS.items():
        assert documented[option]["suboptions"].keys() == keys.keys()
        for key, described in documented[option]["suboptions"].items():
            assert keys[key] in kinds[described["type"]], key


def test_the_typed_example_of_the_documentation_makes_a_plan():
    plans = ruleset.plans_from(params(**yaml.safe_load(ruleset.EXAMPLES)[1]["ctsync.ha_firewall.ruleset"]))
    assert [plans[family]["filter"].policies for family in ("ipv4", "ipv6")] == [{"FORWARD": "DROP"}] * 2
    assert "nat" not in plans["ipv6"]


def test_ipv6_comes_into_play_with_its_first_address():
    assert list(ruleset.plans_from(params(virtual_ips=["fd00::100/64"]))) == ["ipv4", "ipv6"]
    assert list(ruleset.plans_from(params(rules6=["-A FORWARD -j DROP"]))) == ["ipv4", "ipv6"]


def test_every_wrong_option_is_named_at_once():
    service = {"protocol": "tcp", "port": "22-23", "interface": None, "sources": ["everywhere"]}
    wrong = params(
        rules=["-F"],
        rules6=["-A FORWARD -s 10.0.0.1 -j DROP"],
        virtual_ips=["192.168.0.1000/24"],
        services=[service],
        vrrp_peers=[{"interface": "eth0", "addresses": ["eth0"]}],
        sync=[{"interface": "eth2", "address": "192.168.100.1", "peers": ["fd00::2"], "port": 70000}],
        nflog_group=70000,
    )
    with pytest.raises(_ruleset.RulesetError) as caught:
        ruleset.plans_from(wrong)
    for words in (
        "rules: rule 1 '-F'",
        "rules6: rule 1",
        "virtual_ips: '192.168.0.1000/24'",
        "services[1].port: '22-23'",
        "services[1].sources: 'everywhere'",
        "vrrp_peers[1].addresses: 'eth0'",
        "sync[1].port: 70000",
        "sync[1]: address and peers",
        "nflog_group: 70000",
    ):
        assert sum(words in problem for problem in caught.value.problems) == 1, words


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rollback_timeout": 3}, "rollback_timeout: 3 is out of range; write 5-3600, or 0 for none."),
        ({"rollback_timeout": 0, "canary": "true"}, "canary: needs a rollback_timeout"),
        ({"canary": "ping 'x"}, "canary: 'ping 'x' cannot be split into words (no closing quotation)."),
        ({"canary": " "}, "canary: is empty"),
        ({"rollback_id": "../../etc"}, "rollback_id: is given by the action plugin"),
    ],
)
def test_options_of_the_rollback_are_checked(given, words):
    with pytest.raises(_ruleset.RulesetError) as caught:
        ruleset.plans_from(params(**given))
    (problem,) = caught.value.problems
    assert problem.startswith(words)


@pytest.mark.parametrize(
    ("connection", "services", "danger"),
    [
        ("10.0.0.9 4242 192.168.0.100 22", [], True),
        ("10.0.0.9 4242 192.168.0.100 22", [_ruleset.Service("tcp", "20:30")], False),
        ("10.0.0.9 4242 192.168.0.100 22", [_ruleset.Service("udp", "22")], True),
        ("10.0.0.9 4242 192.168.0.1 22", [], False),
        ("", [], False),
    ],
)
def test_whoever_is_connected_to_a_virtual_address_must_be_able_to_come_back(connection, services, danger):
    pair = _ruleset.Pair(virtual_ips=("192.168.0.100",), services=tuple(services))
    assert bool(ruleset.locked_out(pair, connection)) is danger
